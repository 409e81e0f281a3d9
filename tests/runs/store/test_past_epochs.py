"""Records that are written and read back, and what damage leaves of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from neq_cli.events import EpochRecord
from neq_cli.runs.store.run import Run, past_epochs

FROZEN = {"conv1": [[0, 2], [2], [1, 2, 3]], "bn1": [[], [1], [1]]}


def test_records_are_read_as_they_were_written(make_run: Callable[..., Run], records: Any) -> None:
    written: list[EpochRecord] = records(3, FROZEN)
    past = past_epochs(make_run("run", frozen=FROZEN))
    assert [(epoch.epoch, dict(epoch.metrics)) for epoch in past] == [
        (epoch.epoch, dict(epoch.metrics)) for epoch in written
    ]
    assert [epoch.layers for epoch in past[:-1]] == [(), ()]
    for layer, expected in zip(past[-1].layers, written[-1].layers, strict=True):
        for field in fields(layer):
            np.testing.assert_array_equal(getattr(layer, field.name), getattr(expected, field.name))


@pytest.mark.parametrize("file", ["layers.csv", "neurons/epoch_0003.safetensors"])
def test_without_its_layers_the_last_epoch_still_has_its_metrics(make_run: Callable[..., Run], file: str) -> None:
    run = make_run("run", frozen=FROZEN)
    (run.path / file).write_bytes(b"epoch,what\n")
    past = past_epochs(run)
    assert [epoch.metrics["test_top1"] for epoch in past] == [51, 52, 53]
    assert past[-1].layers == ()
