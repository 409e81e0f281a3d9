"""What trackers are told of an epoch, beside numbers counted by hand, and the same when it is read back."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from tracked import TrackedLoop

from neq_cli import read_run
from neq_cli.events import EpochRecord, LayerState
from neq_cli.jobs.tracking import teller
from neq_cli.jobs.tracking.numbers import EDGES, EpochNumbers, counts, numbers_again, numbers_of


def test_velocities_are_counted_by_the_decade() -> None:
    """Bins are quarters of a decade from 1e-12 to 10: of 1e-3 the 37th, of 2e-3 (log10 -2.7) the 38th."""
    velocity = np.array([0.0, -1e-20, 1e-3, 2e-3, -2e-3, 1.5, 50.0, math.nan, math.inf], dtype=np.float32)
    found = counts(velocity)
    assert len(found) == len(EDGES) - 1 == 52
    assert {index: int(count) for index, count in enumerate(found) if count} == {
        0: 2,  # nothing, and next to nothing
        36 if np.log10(np.float64(np.float32(1e-3))) >= -3 else 35: 1,
        37: 2,
        48: 1,
        51: 1,  # beyond the scale
    }


def layer(name: str, trained: list[bool], velocity: list[float]) -> LayerState:
    numbers = np.array(velocity, dtype=np.float32)
    sets = np.array(trained)
    return LayerState(name, "Linear", numbers, numbers, numbers, sets, sets, 1.0, 1.0)


def test_a_row_and_its_layers() -> None:
    row = {"epoch": 4, "train_loss": 0.5, "test_top1": math.nan, "frozen": 1}
    layers = (
        layer("a.b", [True, False, True, True], [0.1, 0.1, math.nan, 0.1]),
        layer("", [True], [math.nan]),
        layer("empty", [], []),
    )
    found = numbers_of(EpochRecord(4, row, layers))
    assert found.epoch == 4
    shares = {"frozen_share/a.b": 0.25, "frozen_share/model": 0.0}
    assert found.scalars == {"epoch": 4.0, "train_loss": 0.5, "frozen": 1.0, **shares}
    assert {name: int(each.sum()) for name, each in found.histograms.items()} == {"log10_velocity/a.b": 3}


def test_an_epoch_read_back_is_told_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[EpochNumbers] = []

    class Listener:
        identity = "listener"

        def begin(self, run: object) -> int:
            return 0

        def epoch(self, numbers: EpochNumbers) -> None:
            told.append(numbers)

        def end(self, ended: object) -> None:
            pass

    monkeypatch.setitem(teller.TRACKERS, "tensorboard", Listener)
    TrackedLoop().record(tmp_path / "run", 3, ["tensorboard"])
    run = read_run(tmp_path / "run")
    again = [numbers_again(run, epoch) for epoch in (1, 2, 3)]
    assert [each.epoch for each in told] == [1, 2, 3]
    for one, other in zip(told, again, strict=True):
        assert one.scalars == other.scalars
        assert one.histograms.keys() == other.histograms.keys()
        for name, found in one.histograms.items():
            np.testing.assert_array_equal(found, other.histograms[name])
    assert told[0].histograms
