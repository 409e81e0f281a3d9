"""Time left against arithmetic written out."""

from __future__ import annotations

import math

import pytest

from neq_cli.events import StepProgress
from neq_cli.runs.views.live.run_view import Pace, clock


def at(step: int, steps: int = 100, phase: str = "train", epoch: int = 1) -> StepProgress:
    return StepProgress(epoch, step, steps, phase, 100.0, 1.0)


def test_nothing_is_known_before_the_first_step() -> None:
    pace = Pace(1000.0)
    assert math.isnan(pace.epoch_left(1001.0))
    assert math.isnan(pace.run_left(1001.0, 9))


def test_the_first_epoch_goes_by_its_own_steps() -> None:
    pace = Pace(1000.0)
    pace.step(at(25), 1010.0)  # 10 s for a quarter: 40 s an epoch
    assert pace.epoch_left(1010.0) == pytest.approx(30.0)
    assert pace.run_left(1010.0, 9) == pytest.approx(30.0 + 9 * 40.0)
    assert pace.epoch_left(1012.0) == pytest.approx(28.0)  # counts down between records


def test_the_first_test_phase_goes_by_its_own_steps() -> None:
    pace = Pace(0.0)
    pace.step(at(100), 40.0)
    pace.step(at(0, 20, "test"), 40.0)
    pace.step(at(5, 20, "test"), 42.0)  # a quarter in 2 s
    assert pace.epoch_left(42.0) == pytest.approx(6.0)


def test_finished_epochs_tell_what_test_and_probe_take() -> None:
    pace = Pace(0.0)
    pace.step(at(100), 40.0)
    pace.step(at(1, 20, "test"), 40.0)
    pace.end_epoch(50.0, 50.0)
    assert pace.epoch_left(50.0) == pytest.approx(50.0)
    pace.step(at(50, epoch=2), 70.0)  # 20 s for half of it: the same speed
    assert pace.epoch_left(70.0) == pytest.approx(30.0)
    assert pace.run_left(70.0, 8) == pytest.approx(30.0 + 8 * 50.0)


def test_the_current_speed_counts_by_how_far_the_epoch_is() -> None:
    pace = Pace(0.0)
    pace.step(at(100), 40.0)
    pace.step(at(1, 20, "test"), 40.0)
    pace.end_epoch(50.0, 50.0)
    pace.step(at(50, epoch=2), 90.0)  # half as fast: 80 s of training are 80 % of 100 s
    assert pace.epoch_total() == pytest.approx(50.0 + 0.5 * (100.0 - 50.0))


def test_a_replayed_epoch_leaves_the_estimate_sane() -> None:
    pace = Pace(0.0)
    pace.step(at(100), 0.008)
    pace.step(at(1, 20, "test"), 0.008)
    pace.end_epoch(50.0, 0.010)
    pace.step(at(50, epoch=2), 0.010 + 20.0)  # 40 s of training are 80 % of 50 s
    assert pace.epoch_total() == pytest.approx(50.0)


def test_only_recent_epochs_count() -> None:
    pace = Pace(0.0)
    pace.end_epoch(500.0, 500.0)
    for _ in range(10):
        pace.end_epoch(20.0, 500.0)
    assert pace.epoch_total() == pytest.approx(20.0)


def test_an_epoch_that_takes_longer_has_nothing_left_rather_than_less() -> None:
    pace = Pace(0.0)
    pace.end_epoch(10.0, 10.0)
    assert pace.epoch_left(100.0) == 0.0
    assert pace.run_left(100.0, 2) == pytest.approx(20.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0:00"),
        (59.6, "1:00"),
        (12 * 60 + 5, "12:05"),
        (5025, "1:23:45"),
        (47 * 3600, "47:00:00"),
        (3 * 86400 + 4 * 3600 + 12 * 60, "3 d 04:12"),
        (math.nan, "–"),
    ],
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
