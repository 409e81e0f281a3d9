"""What a search may choose: KEY=LOW..HIGH and KEY=V1,V2,... on the command line; checks their form, not values."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from neq_cli.errors import RecipeError
from neq_cli.jobs.sweep.grid import Axis, parse_grid
from neq_cli.recipe.keys import CHANGES
from neq_cli.recipe.values import SURROUNDINGS
from neq_cli.text import escaped

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"\s*({_NUMBER})\s*\.\.\s*({_NUMBER})\s*")
_WHOLE = re.compile(r"\s*[+-]?\d+\s*\.\.\s*[+-]?\d+\s*")
_BY_LOGARITHM = 100  # from LOW to HIGH; so epsilon is, and shares of at least 1 % are not


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included, of which as many lie in each power of ten where ``log``."""

    key: str
    low: float
    high: float
    log: bool
    whole: bool = False

    @property
    def ends(self) -> tuple[str, str]:
        """What is checked before anything is trained, as YAML."""
        return self.text(self.low), self.text(self.high)

    def text(self, value: float) -> str:
        """Return a value as a recipe's change has it; it reads back as the very same number."""
        return str(int(value)) if self.whole else repr(float(value))

    def __str__(self) -> str:
        return f"{self.ends[0]}..{self.ends[1]}{' by the logarithm' if self.log else ''}"


@dataclass(frozen=True)
class Choice:
    """One of several values, each as YAML."""

    key: str
    ends: tuple[str, ...]

    def text(self, value: str) -> str:
        return value

    def __str__(self) -> str:
        return ",".join(self.ends)


@dataclass(frozen=True)
class Space:
    """What is chosen, and the changes that all runs have in common."""

    dimensions: tuple[Range | Choice, ...]
    fixed: tuple[str, ...]

    def overrides(self, chosen: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the changes of a run; ``chosen`` has a value for every dimension, by its key."""
        return (*self.fixed, *(f"{one.key}={one.text(chosen[one.key])}" for one in self.dimensions))

    def corners(self) -> list[tuple[str, ...]]:
        """Return the changes of runs in which every end and every choice is met, with the first of the others."""
        first = {one.key: one.ends[0] for one in self.dimensions}
        met = [{**first, one.key: end} for one in self.dimensions for end in one.ends]
        return list(dict.fromkeys((*self.fixed, *(f"{key}={text}" for key, text in one.items())) for one in met))

    def with_fractions(self, keys: Sequence[str]) -> Space:
        """Return the space in which the ranges of ``keys`` are not of whole numbers alone."""
        ranges = [
            replace(one, whole=False) if isinstance(one, Range) and one.key in keys else one for one in self.dimensions
        ]
        return replace(self, dimensions=tuple(ranges))

    @property
    def definition(self) -> str:
        """What makes it this search and no other: surroundings, such as the device, do not."""
        fixed = [text for text in self.fixed if CHANGES.get(text.partition("=")[0]) != SURROUNDINGS]
        return json.dumps([sorted(f"{one.key}={one}" for one in self.dimensions), sorted(fixed)])


def parse_space(arguments: Sequence[str]) -> Space:
    """Return the space of ``KEY=...`` texts. RecipeError with all that is wrong with their form."""
    problems: list[str] = []
    dimensions: list[Range | Choice] = []
    fixed: list[str] = []
    for axis in parse_grid(arguments).axes:
        ranges = [text for text in axis.texts if _RANGE.fullmatch(text)]
        problem = _problem(axis, ranges)
        if problem is not None:
            problems.append(escaped(f"command line: {axis.key}={','.join(axis.texts)}: {problem}"))
        elif ranges:
            low, high = _ends(ranges[0])
            log = low > 0 and high / low >= _BY_LOGARITHM
            dimensions.append(Range(axis.key, low, high, log, whole=_WHOLE.fullmatch(ranges[0]) is not None))
        elif len(axis.texts) > 1:
            dimensions.append(Choice(axis.key, axis.texts))
        else:
            fixed.append(f"{axis.key}={axis.texts[0]}")
    if not problems and not dimensions:
        problems.append("command line: nothing to search; give a range, such as policy.epsilon=1e-4..1e-1, or choices")
    if problems:
        raise RecipeError(problems)
    return Space(tuple(dimensions), tuple(fixed))


def _problem(axis: Axis, ranges: Sequence[str]) -> str | None:
    if axis.key == "seed" and (ranges or len(axis.texts) > 1):
        return "a search has one seed; give one, and train the runs of the front with others afterwards"
    if ranges and len(axis.texts) > 1:
        return "a range stands alone; give LOW..HIGH, or single values"
    if ranges:
        low, high = _ends(ranges[0])
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            return "a range goes from the smaller number to the larger one, LOW..HIGH"
    return None


def _ends(text: str) -> tuple[float, float]:
    match = _RANGE.fullmatch(text)
    assert match is not None
    return float(match[1]), float(match[2])
