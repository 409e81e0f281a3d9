from __future__ import annotations

import math

import numpy as np

from neq_cli.runs.compare.curves import Curve
from neq_cli.runs.views.report.alike import on_one_line, on_one_spot


def test_spots_are_told_by_the_length_of_the_axes() -> None:
    # An axis from 0 to 100, of which a fortieth is 2.5; one from 80 to 90, of which 4.5 hundredths are 0.45.
    places = [(100.0, 90.0), (98.0, 89.6), (97.0, 90.0), (100.0, 89.5), (50.0, 80.0), (50.0, 80.0)]
    assert on_one_spot(places, "abcdef") == [["a", "b"], ["e", "f"]]


def test_unknown_places_are_nowhere() -> None:
    nan = (math.nan, 1.0)
    assert on_one_spot([nan, nan, (1.0, 1.0)], "abc") == []
    assert on_one_spot([], "") == []


def test_where_all_are_the_same_all_lie_together() -> None:
    assert on_one_spot([(0.0, 5.0)] * 3, "abc") == [["a", "b", "c"]]


def curve(*mean: float, at: tuple[float, ...] = ()) -> Curve:
    values = np.array(mean)
    return Curve(np.array(at or np.arange(1.0, len(mean) + 1)), values, values, values)


def test_lines_run_along_each_other_from_end_to_end() -> None:
    a, near, crossing = curve(100, 50, 0), curve(100.4, 49.6, 0.3), curve(100, 50, 1)
    assert on_one_line([a, near, crossing], "abc") == [["a", "b"]]
    # Where one has no value, the other must have none either.
    assert on_one_line([curve(100, math.nan, 0), a, curve(100, math.nan, 0)], "abc") == [["a", "c"]]
    assert on_one_line([a, curve(100, 50, 0, at=(1, 2, 4))], "ab") == []
    assert on_one_line([curve(math.nan)] * 2, "ab") == []
    assert on_one_line([curve(3.0, 3.0)] * 2, "ab") == [["a", "b"]]
