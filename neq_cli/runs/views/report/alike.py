"""Which points and lines of a chart lie on each other, or so near that nobody could tell them apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from neq_cli.runs.compare.curves import Curve

Key = TypeVar("Key")
_NEAR_X, _NEAR_Y = 0.025, 0.045  # of an axis' length: about a number's width and height beside a point
_NEAR_LINE = 0.005  # about half a line's width


def on_one_spot(places: Sequence[tuple[float, float]], keys: Sequence[Key]) -> list[list[Key]]:
    """Return the groups of ``keys`` whose places, (x, y), nobody could tell apart; x has an axis that begins at 0."""
    known = [place for place in range(len(places)) if all(map(math.isfinite, places[place]))]
    wide = max((abs(places[place][0]) for place in known), default=0.0)
    heights = [places[place][1] for place in known]
    high = max(heights) - min(heights) if heights else 0.0

    def near(one: int, other: int) -> bool:
        return (
            abs(places[one][0] - places[other][0]) <= _NEAR_X * wide
            and abs(places[one][1] - places[other][1]) <= _NEAR_Y * high
        )

    return [[keys[place] for place in group] for group in _groups(known, near)]


def on_one_line(curves: Sequence[Curve], keys: Sequence[Key]) -> list[list[Key]]:
    """Return the groups of ``keys`` whose curves run along each other from end to end."""
    means = [curve.mean for curve in curves]
    finite = [mean[np.isfinite(mean)] for mean in means]
    known = [place for place, values in enumerate(finite) if values.size]
    ends = [(float(finite[place].min()), float(finite[place].max())) for place in known]
    high = max((top for _, top in ends), default=0.0) - min((low for low, _ in ends), default=0.0)

    def near(one: int, other: int) -> bool:
        if not np.array_equal(curves[one].at, curves[other].at):
            return False
        apart = np.abs(means[one] - means[other])
        same_gaps = bool((np.isnan(means[one]) == np.isnan(means[other])).all())
        return same_gaps and bool((apart[np.isfinite(apart)] <= _NEAR_LINE * high).all())

    return [[keys[place] for place in group] for group in _groups(known, near)]


def _groups(places: Sequence[int], near: Callable[[int, int], bool]) -> list[list[int]]:
    """Return the groups of more than one place, each near the first of its group."""
    groups: list[list[int]] = []
    for place in places:
        group = next((each for each in groups if near(each[0], place)), None)
        if group is None:
            groups.append([place])
        else:
            group.append(place)
    return [group for group in groups if len(group) > 1]
