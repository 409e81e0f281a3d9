"""Expands KEY=V1,V2,... to the points of a grid, each with a name that is safe as a folder's; checks no values."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from neq_cli.errors import RecipeError
from neq_cli.recipe.describe import shown
from neq_cli.recipe.document import Given
from neq_cli.recipe.keys import CHANGES
from neq_cli.recipe.values import SURROUNDINGS
from neq_cli.recipe.yaml import YamlSyntaxError, read_yaml
from neq_cli.text import escaped

LARGEST = 1000  # points; a run of seconds each would take them most of an hour
_SAFE = re.compile(r"[A-Za-z0-9_.+-]+=[A-Za-z0-9_.+-]+")
_LONGEST_PART, _LONGEST_NAME = 48, 160  # characters; file systems take 255 bytes
_OPENING, _CLOSING, _QUOTES = "[{", "]}", "'\""


@dataclass(frozen=True)
class Axis:
    """A key and the values it takes, at least one, as YAML ``texts``. ``option`` is what stood for the key, if any."""

    key: str
    texts: tuple[str, ...]
    option: str | None = None

    @property
    def values(self) -> tuple[Any, ...]:
        return tuple(_value(text) for text in self.texts)

    def override(self, text: str) -> str:
        """Return what sets the key to the value ``text``."""
        override = f"{self.key}={text}"
        return override if self.option is None else Given(override, f"{self.option} {text}")

    @property
    def names_runs(self) -> bool:
        """Whether runs are named by it: by what differs between them, and by the seed, of which there may be more."""
        return len(self.texts) > 1 or self.key == "seed"


@dataclass(frozen=True)
class Point:
    """One run of a sweep: its folder's name, what is changed in the recipe, and its value of every naming axis."""

    name: str
    overrides: tuple[str, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Grid:
    """The axes as given, and the cartesian product of their values: the last axis runs fastest."""

    axes: tuple[Axis, ...]
    points: tuple[Point, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that the labels of a point are values of."""
        return tuple(axis.key for axis in self.axes if axis.names_runs)

    @property
    def folder_name(self) -> str:
        """A name for all sweeps along these axes: keys that vary, and what all runs have in common.

        More values of an axis, more seeds, another device or order of the keys do not change it.
        """
        parts = [
            _slug(axis.key) if axis.names_runs else _part(axis.key, axis.texts[0])
            for axis in sorted(self.axes, key=_naming_order)
            if axis.names_runs or CHANGES.get(axis.key) != SURROUNDINGS
        ]
        return _bounded(",".join(parts) or "recipe")


def parse_grid(arguments: Sequence[str]) -> Grid:
    """Return the grid of ``KEY=V1,V2,...`` texts. RecipeError with all that is wrong with their form."""
    problems: list[str] = []
    axes: dict[str, Axis] = {}
    for argument in arguments:
        key, equals, written = argument.partition("=")
        texts = split_values(written)
        what = None
        if not equals or not all(key.split(".")):
            what = "not KEY=VALUE,VALUE..., such as policy.epsilon=0.001,0.01"
        elif key in axes:
            what = f"{key} is given twice; give all its values at once: {key}=VALUE,VALUE"
        elif len(texts) > 1 and not all(texts):
            what = "an empty value; remove a comma, or write null"
        else:
            twice = _first_repeated([_text(_value(text)) for text in texts])
            what = f"{shown(twice)} is given twice; remove one" if twice is not None else None
        if what is not None:
            problems.append(escaped(f"command line: {argument}: {what}"))
            continue
        option = argument.written.partition(" ")[0] if isinstance(argument, Given) else None
        axes[key] = Axis(key, tuple(texts), option)
    count = math.prod(len(axis.texts) for axis in axes.values())
    if count > LARGEST:
        problems.append(f"command line: {count} runs, more than the {LARGEST} of one sweep; give fewer values")
    if problems:
        raise RecipeError(problems)
    points = tuple(_points(tuple(axes.values())))
    same = _first_repeated([point.name.casefold() for point in points])
    if same is not None:
        raise RecipeError([f"command line: two runs would be called {same} in any case; change a value"])
    return Grid(tuple(axes.values()), points)


def split_values(text: str) -> list[str]:
    """Split at the commas that stand in no brackets, braces or quotes, as YAML has these.

    By hand, not as one YAML list: within a list, a bracket in a path ends the value, and one mistake spoils them all.
    """
    pieces, start, depth, quote = [], 0, 0, ""
    begins = True  # only where a value begins do quotes and brackets mean anything
    index = 0
    while index < len(text):
        character = text[index]
        if quote:
            if character == "\\" and quote == '"':
                index += 1
            elif character == quote:
                if quote == "'" and text[index + 1 : index + 2] == "'":  # '' stands for one
                    index += 1
                else:
                    quote = ""
        elif begins and character in _QUOTES:
            quote, begins = character, False
        elif character in _OPENING and (begins or depth):
            depth, begins = depth + 1, True
        elif character in _CLOSING and depth:
            depth, begins = depth - 1, False
        elif character == "," and not depth:
            pieces.append(text[start:index].strip())
            start, begins = index + 1, True
        elif character in ",:" and depth:
            begins = True
        elif not character.isspace():
            begins = False
        index += 1
    return [*pieces, text[start:].strip()]


def _points(axes: Sequence[Axis]) -> Iterator[Point]:
    for texts in product(*(axis.texts for axis in axes)):
        chosen = list(zip(axes, texts, strict=True))
        naming = [(axis, text) for axis, text in chosen if axis.names_runs]
        parts = [_part(axis.key, text) for axis, text in sorted(naming, key=lambda pair: _naming_order(pair[0]))]
        yield Point(
            _bounded(",".join(parts) or "run"),
            tuple(axis.override(text) for axis, text in chosen),
            tuple(_label(_value(text)) for _, text in naming),
        )


def _naming_order(axis: Axis) -> tuple[bool, str]:
    """Names do not depend on the order in which keys are given; the seed comes last."""
    return axis.key == "seed", axis.key


def _value(text: str) -> Any:
    try:
        return read_yaml(text).value
    except YamlSyntaxError:  # which is told, with its place, when the point's recipe is read
        return text


def _text(value: Any) -> str:
    """Write a value so that two spellings of it, such as 1e-3 and 0.001, read the same."""
    if isinstance(value, str):
        return value
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def _label(value: Any) -> str:
    """Write a value as a column of an overview has it: a section as ``kind=stochastic p=0.5``."""
    if isinstance(value, dict) and value:
        return " ".join(f"{key}={_text(item)}" for key, item in value.items())
    return _text(value)


def _part(key: str, text: str) -> str:
    """Return ``KEY=VALUE`` in letters that every file system takes; a hash tells apart what is replaced or cut."""
    value = _value(text)
    written = f"{key}={_text(value)}"
    if _SAFE.fullmatch(written) and len(written) <= _LONGEST_PART:
        return written
    slug = f"{_slug(key)}={_slug(_text(value))}"[: _LONGEST_PART - 9]
    return f"{slug.rstrip('-.')}-{_hash(json.dumps([key, value]))}"


def _bounded(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 9]}-{_hash(name)}"


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.+=]+", "-", text).strip("-.") or "other"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]


def _first_repeated(texts: Sequence[str]) -> str | None:
    seen: set[str] = set()
    for text in texts:
        if text in seen:
            return text
        seen.add(text)
    return None
