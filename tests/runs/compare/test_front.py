"""The front against its definition: every point compared with every other."""

from __future__ import annotations

import math
import random

import pytest

from neq_cli.runs.compare.front import on_front

Point = tuple[float, float]


def beats(one: Point, other: Point, lower_is_better: bool) -> bool:
    sign = -1 if lower_is_better else 1
    as_good = one[0] <= other[0] and sign * one[1] >= sign * other[1]
    return as_good and one != other


@pytest.mark.parametrize("lower_is_better", [False, True])
def test_it_is_what_no_other_point_beats(lower_is_better: bool) -> None:
    draw = random.Random(7)
    for count in range(1, 40):
        # Few values, so that many are equal in one or both.
        points = [(float(draw.randrange(8)), float(draw.randrange(8))) for _ in range(count)]
        expected = [not any(beats(other, one, lower_is_better) for other in points) for one in points]
        assert on_front(points, lower_is_better) == expected
        assert any(expected)


def test_points_that_are_not_finite_neither_lie_on_it_nor_keep_others_off() -> None:
    points = [(1.0, math.nan), (math.nan, 99.0), (2.0, 50.0), (-math.inf, 100.0)]
    assert on_front(points) == [False, False, True, False]
    assert on_front([]) == []
