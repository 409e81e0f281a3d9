"""Runs that never trained: records made up by the test, written by the real writer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from neq_cli.events import EpochRecord, LayerState, RunStarted
from neq_cli.recipe import Recipe
from neq_cli.runs.store.run import Run, read_run
from neq_cli.runs.store.writer import RunWriter

Frozen = Mapping[str, Sequence[Sequence[int]]]
SIZES = {"conv1": 4, "bn1": 3, "fc": 2}


def make_recipe(**changes: Any) -> dict[str, Any]:
    """Return a resolved recipe; ``policy={"kind": "neq"}`` and the like go straight to the model."""
    plain = {
        "model": {"name": "resnet32"},
        "data": {"name": "CIFAR10"},
        "epochs": 3,
        "optimizer": {"name": "sgd", "lr": 0.1},
        "policy": {"kind": "neq"},
    }
    return Recipe.model_validate({**plain, **changes}).model_dump()


def make_record(
    epoch: int,
    trained: Mapping[str, np.ndarray],
    trainable: Mapping[str, np.ndarray],
    metrics: Mapping[str, float],
) -> EpochRecord:
    """Return a record with numbers that tell epoch, layer and neuron apart."""
    layers = []
    for index, (name, during) in enumerate(trained.items()):
        base = np.arange(len(during), dtype=np.float32) + 10 * index + 100 * epoch
        layers.append(
            LayerState(
                name=name,
                kind="Linear" if name == "fc" else "Conv2d",
                phi=1 - base / 1000,
                delta_phi=-base / 7,
                velocity=base / 3 * np.float32(-1) ** np.arange(len(during), dtype=np.float32),
                trained=during,
                trainable=trainable[name],
                flops_paper=100.0 * during.sum(),
                flops_executed=200.0 * len(during),
            )
        )
    neurons = sum(map(len, trained.values()))
    row = {
        "epoch": epoch,
        "lr": 0.1,
        "test_top1": 50.0 + epoch,
        "neurons": neurons,
        "frozen": sum(layer.frozen for layer in layers),
        "flops_paper": 1000.0,
        "flops_executed": 1500.0,
        "flops_paper_dense": 2000.0,
        "flops_executed_dense": 2000.0,
        "epoch_seconds": 10.0,
        "probe_seconds": 0.5,
        **metrics,
    }
    return EpochRecord(epoch, row, tuple(layers))


def make_records(
    epochs: int, frozen: Frozen, metrics: Sequence[Mapping[str, float]], sizes: Mapping[str, int]
) -> list[EpochRecord]:
    """Return records; ``frozen[layer][t - 1]`` are the neurons that the policy froze after epoch t."""
    records = []
    trained = {name: np.ones(size, dtype=bool) for name, size in sizes.items()}
    for epoch in range(1, epochs + 1):
        trainable = {name: np.ones(size, dtype=bool) for name, size in sizes.items()}
        for name, sets in frozen.items():
            if epoch <= len(sets):
                trainable[name][list(sets[epoch - 1])] = False
        records.append(make_record(epoch, trained, trainable, metrics[epoch - 1] if metrics else {}))
        trained = trainable
    return records


@pytest.fixture
def recipe() -> Callable[..., dict[str, Any]]:
    return make_recipe


@pytest.fixture
def records() -> Callable[..., list[EpochRecord]]:
    """``records(epochs, frozen={}, metrics=[], sizes=SIZES)``."""

    def make(
        epochs: int, frozen: Frozen | None = None, metrics: Sequence[Mapping[str, float]] = (), sizes: Any = None
    ) -> list[EpochRecord]:
        return make_records(epochs, frozen or {}, metrics, sizes or SIZES)

    return make


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Run]:
    """``make_run(name, recipe=..., epochs=planned, frozen=..., metrics=..., environment=..., finish=True)``.

    ``metric`` is what it goes by, and ``lower`` whether less of it is better; ``unit`` and ``planned`` are what it says
    of its rows.
    """

    def make(
        name: str = "run",
        recipe: dict[str, Any] | None = None,
        epochs: int | None = None,
        frozen: Frozen | None = None,
        metrics: Sequence[Mapping[str, float]] = (),
        environment: dict[str, Any] | None = None,
        sizes: Mapping[str, int] | None = None,
        finish: bool = True,
        metric: str = "test_top1",
        lower: bool = False,
        unit: str = "epoch",
        planned: int = 3,
    ) -> Run:
        recipe = recipe or make_recipe()
        path, sizes = tmp_path / name, sizes or SIZES
        started = RunStarted(
            *("digits", "resnet32 on CIFAR10", "neq epsilon=0.001 mu=0.5", "cpu", planned, 7),
            *(metric, sizes, ("a note",)),
            lower_is_better=lower,
            unit=unit,
        )
        writer = RunWriter.create(path, yaml.safe_dump(recipe, sort_keys=False), environment or {})
        writer.write_started(started)
        for record in make_records(epochs or len(metrics) or recipe["epochs"], frozen or {}, metrics, sizes):
            writer.write_epoch(record)
        if finish:
            writer.finish()
        return read_run(path)

    return make


def passes(rows: int, every: int, steps: int) -> list[dict[str, float]]:
    """Return the columns that tell where observations stand, one every so many steps, of so many an epoch."""
    return [{"step": every * row, "passed_epochs": every * row / steps} for row in range(1, rows + 1)]


@pytest.fixture
def make_observed(make_run: Callable[..., Run]) -> Callable[..., Run]:
    """``make_observed(name, rows=8, every=100, steps=400, planned=12, metrics=...)``, and what ``make_run`` takes.

    A run with a row for every so many optimiser steps, of so many an epoch: 100, 200... and 0.25, 0.5... epochs.
    """

    def make(
        name: str = "observed",
        *,
        rows: int = 8,
        every: int = 100,
        steps: int = 400,
        planned: int = 12,
        metrics: Sequence[Mapping[str, float]] = (),
        **others: Any,
    ) -> Run:
        own = metrics or [{}] * rows
        rows_told = [{**place, **row} for place, row in zip(passes(len(own), every, steps), own, strict=True)]
        return make_run(name, metrics=rows_told, unit="observation", planned=planned, **others)

    return make
