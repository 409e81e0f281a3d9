"""Parsing the files of a run directory, which anybody may have damaged: every fault is a one-line RunDirectoryError."""

from __future__ import annotations

import csv
import json
import math
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from neq_cli.errors import RunDirectoryError
from neq_cli.runs.formatting import printable
from neq_cli.runs.serialisation import NEURON_FIELDS, SCHEMA

Number = float | int
_MEBIBYTE = 2**20
_LARGEST_YAML = _MEBIBYTE // 4  # its parser is slow
_LARGEST_JSON = _MEBIBYTE
_LARGEST_TABLE = 1024 * _MEBIBYTE
_LARGEST_NEURONS = 4096 * _MEBIBYTE
_LONGEST_LINE = 2**16
_MOST_VALUES = 100_000  # of a YAML or JSON document, aliases expanded
_DEEPEST = 50
_LONGEST_INTEGER = 1024  # bits; Python refuses to print much longer ones
_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")
_DTYPES = {"phi": "F32", "delta_phi": "F32", "velocity": "F32", "trained": "BOOL", "trainable": "BOOL"}


def damaged(path: Path, what: str, line: int | None = None) -> RunDirectoryError:
    """Return the error for a file that does not hold what ``neq train`` writes there."""
    place = printable(path) if line is None else f"{printable(path)}:{line}"
    return RunDirectoryError(f"{place}: {what}; the file is damaged, restore it or train again")


class _Loader(yaml.SafeLoader):
    """YAML's safe loader without merge keys, of which a few lines could fill the memory; ``neq train`` writes none."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Leave ``<<`` as it is, for which there is then no constructor: an error."""


def read_yaml(path: Path) -> dict[str, Any]:
    """Return a YAML mapping of plain values, keys as text."""
    text = _read_text(path, _LARGEST_YAML)
    try:
        return _plain_mapping(path, yaml.load(text, _Loader))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = None if mark is None else mark.line + 1
        raise damaged(path, "not YAML: " + _quote(getattr(error, "problem", None) or "unreadable"), line) from error
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
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
    _checked_size(path, _LARGEST_TABLE)
    lines = _Lines(path)
    rows = csv.reader(lines)
    try:
        for cells in rows:
            yield lines.number, cells
    except csv.Error as error:
        raise damaged(path, f"not CSV: {_quote(error)}", lines.number) from error
    except OSError as error:
        raise _unreadable(path, error) from error


class _Lines:
    """The complete lines of a UTF-8 file, with the number of the one read last."""

    def __init__(self, path: Path) -> None:
        self.number = 0
        self._path = path
        self._lines = self._read()

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        return next(self._lines)

    def _read(self) -> Iterator[str]:
        with self._path.open("rb") as file:
            while (line := file.readline(_LONGEST_LINE)).endswith(b"\n"):
                self.number += 1
                try:
                    yield line.decode()
                except UnicodeDecodeError as error:
                    raise damaged(self._path, "not UTF-8 text", self.number) from error
            if len(line) == _LONGEST_LINE:
                raise damaged(self._path, f"a line of more than {_LONGEST_LINE} bytes", self.number + 1)


def parse_number(path: Path, line: int, column: str, text: str) -> Number:
    """Return the int or float of a cell; an empty cell, not measured, is NaN."""
    if not text:
        return math.nan
    if _WHOLE.fullmatch(text):
        return int(text)
    try:
        return float(text)
    except ValueError as error:
        raise damaged(path, f"{printable(column)}: {_quote(text)} is not a number", line) from error


def parse_count(path: Path, line: int, column: str, text: str) -> int:
    """Return the whole number, zero or more, of a cell."""
    number = parse_number(path, line, column, text)
    if not isinstance(number, int) or number < 0:
        raise damaged(path, f"{printable(column)}: {_quote(text)} is not a whole number", line)
    return number


def read_neurons(path: Path, fields: tuple[str, ...] = NEURON_FIELDS) -> dict[str, dict[str, NDArray[Any]]]:
    """Return ``{layer: {field: [neurons]}}``; the order of layers is not kept."""
    _checked_size(path, _LARGEST_NEURONS)
    try:
        with safe_open(path, framework="numpy") as file:
            schema = (file.metadata() or {}).get("schema")
            if schema != SCHEMA:
                raise damaged(path, f"schema {_quote(schema)} where this neq reads {SCHEMA}")
            layers: dict[str, dict[str, NDArray[Any]]] = {}
            for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                layer, _, field = key.rpartition("/")
                if field in fields:
                    _check_tensor(path, key, field, file.get_slice(key))
                    layers.setdefault(layer, {})[field] = file.get_tensor(key)
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise damaged(path, f"not a safetensors file: {_quote(error)}") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    for layer, arrays in layers.items():
        if len(arrays) != len(fields) or len({len(array) for array in arrays.values()}) != 1:
            raise damaged(path, f"{printable(layer, 80)}: its {', '.join(fields)} do not belong together")
    return layers


def _check_tensor(path: Path, key: str, field: str, tensor: Any) -> None:
    dtype, shape = tensor.get_dtype(), tensor.get_shape()
    if dtype != _DTYPES[field] or len(shape) != 1:
        raise damaged(path, f"{printable(key, 80)}: {dtype}{shape} where {_DTYPES[field]}[neurons] belongs")


def _read_text(path: Path, limit: int) -> str:
    _checked_size(path, limit)
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise damaged(path, "not UTF-8 text") from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _checked_size(path: Path, limit: int) -> None:
    try:
        state = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(state.st_mode):  # a pipe or a device would be read for ever
        raise RunDirectoryError(f"{printable(path)}: not a regular file; is this a run directory?")
    if state.st_size > limit:
        raise RunDirectoryError(f"{printable(path)}: {state.st_size} bytes, more than the {limit} that neq reads")


def _unreadable(path: Path, error: OSError) -> RunDirectoryError:
    if isinstance(error, FileNotFoundError):
        return RunDirectoryError(f"{printable(path)}: missing; the run directory is incomplete, copy it again")
    return RunDirectoryError(f"{printable(path)}: cannot be read: {printable(error.strerror or error)}")


def _quote(text: object) -> str:
    return repr(printable(text, 60))


def _plain_mapping(path: Path, document: object) -> dict[str, Any]:
    if not isinstance(document, dict):
        raise damaged(path, "not a mapping of keys to values")
    values = 0

    def plain(value: object, depth: int) -> Any:
        # A few aliases can stand for billions of values: count them as they are expanded.
        nonlocal values
        values += 1
        if values > _MOST_VALUES or depth > _DEEPEST:
            raise damaged(path, f"more than {_MOST_VALUES} values, or nested deeper than {_DEEPEST}")
        if isinstance(value, int) and value.bit_length() > _LONGEST_INTEGER:
            raise damaged(path, f"a whole number of {value.bit_length()} bits")
        if isinstance(value, dict):
            return {str(key): plain(item, depth + 1) for key, item in value.items()}
        if isinstance(value, (list, tuple, set)):
            return [plain(item, depth + 1) for item in value]
        return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)

    result: dict[str, Any] = plain(document, 0)
    return result
