"""Parsing the files of a run directory, which anybody may have damaged: every fault is a one-line RunDirectoryError."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from neq_cli.errors import RunDirectoryError
from neq_cli.text import printable

Number = float | int
_MEBIBYTE = 2**20
_LARGEST_YAML = _MEBIBYTE // 16  # its parser takes a second for as much
_LARGEST_JSON = _MEBIBYTE
_LARGEST_TABLE = 512 * _MEBIBYTE
_LONGEST_LINE = 2**16
_MOST_VALUES = 100_000  # of a YAML or JSON document, aliases expanded
_MOST_TEXT = 4 * _MEBIBYTE  # characters of it, every value with the dotted key it stands at
_DEEPEST = 50
_LONGEST_INTEGER = 1000  # bits; Python refuses to print much longer ones, and floats end soon after
_LARGEST_NUMBER = 1e100  # of a table; sums and squares of it are floats too
_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,40}(?:\.[0-9]{0,40})?(?:[eE][+-]?[0-9]{1,3})?|inf|nan)")
_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")


def damaged(path: Path, what: str, line: int | None = None) -> RunDirectoryError:
    """Return the error for a file that does not hold what ``neq train`` writes there."""
    place = printable(path) if line is None else f"{printable(path)}:{line}"
    return RunDirectoryError(f"{place}: {what}; the file is damaged, restore it or train again")


class _Loader(yaml.SafeLoader):
    """YAML's safe loader without what could keep it busy for long, none of which ``neq train`` writes.

    Merge keys, of which a few lines could fill the memory; whole numbers of hundreds of digits, or to base 60.
    """

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Leave ``<<`` as it is, for which there is then no constructor: an error."""

    def construct_whole(self, node: yaml.ScalarNode) -> int:
        """Return a whole number of at most 64 bits, which few other numbers share their hash with."""
        if len(node.value) <= 100 and (value := self.construct_yaml_int(node)).bit_length() <= 64:
            return int(value)
        raise yaml.constructor.ConstructorError(None, None, "a whole number of more than 64 bits", node.start_mark)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return a YAML mapping of plain values, keys as text."""
    text = _read_text(path, _LARGEST_YAML)
    try:
        return _plain_mapping(path, yaml.load(text, _Loader))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = None if mark is None else mark.line + 1
        raise damaged(path, "not YAML: " + _quote(getattr(error, "problem", None) or "unreadable"), line) from error
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise damaged(path, "not YAML: " + _quote(error)) from error


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object of plain values."""
    text = _read_text(path, _LARGEST_JSON)
    try:
        return _plain_mapping(path, json.loads(text))
    except json.JSONDecodeError as error:
        raise damaged(path, f"not JSON: {_quote(error.msg)}", error.lineno) from error
    except (ValueError, RecursionError) as error:
        raise damaged(path, "not JSON: " + _quote(error)) from error


def read_table(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (line, cells) of a CSV file, header included. A last line without its line end was torn and is left out."""
    try:
        with open_regular(path, _LARGEST_TABLE) as file:
            lines = _Lines(path, file)
            try:
                for cells in csv.reader(lines, strict=True):
                    yield lines.number, cells
            except csv.Error as error:
                if not lines.ended:  # else the last row was torn within quotes
                    raise damaged(path, f"not CSV: {_quote(error)}", lines.number) from error
    except OSError as error:
        raise unreadable(path, error) from error


class _Lines:
    """The complete lines of a UTF-8 file, with the number of the one read last."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.number = 0
        self.ended = False
        self._path = path
        self._lines = self._read(file)

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        return next(self._lines)

    def _read(self, file: BinaryIO) -> Iterator[str]:
        while (line := file.readline(_LONGEST_LINE)).endswith(b"\n"):
            self.number += 1
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                raise damaged(self._path, "not UTF-8 text", self.number) from error
        if len(line) == _LONGEST_LINE:
            raise damaged(self._path, f"a line of more than {_LONGEST_LINE} bytes", self.number + 1)
        self.ended = True


def parse_number(path: Path, line: int, column: str, text: str) -> Number:
    """Return the int or float of a cell; an empty cell, not measured, is NaN."""
    if not text:
        return math.nan
    if _WHOLE.fullmatch(text):
        return int(text)
    number = float(text) if _NUMBER.fullmatch(text) else None  # float takes underscores and digits of any script
    if number is None or (abs(number) > _LARGEST_NUMBER and text.strip("+-") != "inf"):
        raise damaged(path, f"{printable(column, 80)}: {_quote(text)} is not a number", line)
    return number


def parse_count(path: Path, line: int, column: str, text: str) -> int:
    """Return the whole number, zero or more, of a cell."""
    number = parse_number(path, line, column, text)
    if not isinstance(number, int) or number < 0:
        raise damaged(path, f"{printable(column, 80)}: {_quote(text)} is not a whole number", line)
    return number


def open_regular(path: Path, limit: int) -> BinaryIO:
    """Open a regular file of at most ``limit`` bytes to be read; a pipe or a device would be read for ever."""
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except IsADirectoryError as error:
        raise _not_regular(path) from error
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        state = os.fstat(file.fileno())
        if not stat.S_ISREG(state.st_mode):
            raise _not_regular(path)
        if state.st_size > limit:
            raise RunDirectoryError(f"{printable(path)}: {state.st_size} bytes, more than the {limit} that neq reads")
    except BaseException:
        file.close()
        raise
    return file


def unreadable(path: Path, error: OSError) -> RunDirectoryError:
    """Return the error for a file of a run that cannot be opened or read."""
    if isinstance(error, FileNotFoundError):
        return RunDirectoryError(f"{printable(path)}: missing; the run directory is incomplete, copy it again")
    return RunDirectoryError(f"{printable(path)}: cannot be read: {printable(error.strerror or error)}")


def _not_regular(path: Path) -> RunDirectoryError:
    return RunDirectoryError(f"{printable(path)}: not a regular file; is this a run directory?")


def _read_text(path: Path, limit: int) -> str:
    try:
        with open_regular(path, limit) as file:
            return file.read(limit).decode()
    except UnicodeDecodeError as error:
        raise damaged(path, "not UTF-8 text") from error
    except OSError as error:
        raise unreadable(path, error) from error


def _quote(text: object) -> str:
    return repr(printable(text, 60))


def _plain_mapping(path: Path, document: object) -> dict[str, Any]:
    if not isinstance(document, dict):
        raise damaged(path, "not a mapping of keys to values")
    values = characters = 0

    def plain(value: object, depth: int, key: int) -> Any:
        # A few aliases can stand for billions of values, or of characters: count them as they are expanded.
        nonlocal values, characters
        values += 1
        characters += key + (len(value) if isinstance(value, (str, bytes)) else 0)
        if values > _MOST_VALUES or characters > _MOST_TEXT or depth > _DEEPEST:
            most = f"{_MOST_VALUES} values or {_MOST_TEXT} characters"
            raise damaged(path, f"more than {most}, or nested deeper than {_DEEPEST}")
        if isinstance(value, int) and value.bit_length() > _LONGEST_INTEGER:
            raise damaged(path, f"a whole number of {value.bit_length()} bits")
        if isinstance(value, dict):
            return {str(name): plain(item, depth + 1, key + len(str(name))) for name, item in value.items()}
        if isinstance(value, (list, tuple, set)):
            return [plain(item, depth + 1, key) for item in value]
        return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)

    result: dict[str, Any] = plain(document, 0, 0)
    return result
