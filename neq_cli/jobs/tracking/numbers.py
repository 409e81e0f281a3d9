"""What trackers are told of an epoch: its row of metrics.csv, each layer's frozen share and spread of |velocity|."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neq_cli.events import EpochRecord
from neq_cli.runs.store.run import Run

EDGES = np.linspace(-12.0, 1.0, 53)
"""Of the bins of log10 |velocity|, four a decade, the same for all layers and epochs; what lies beyond is at the ends.

So is 0, which has no logarithm. Nothing that matters is lost: no policy tells 1e-12 from 0.
"""


@dataclass(frozen=True)
class EpochNumbers:
    """A finished epoch: ``scalars`` by column of metrics.csv, or ``frozen_share/LAYER``; what is no number is left out.

    ``histograms``: counts of neurons in the bins of ``EDGES``, [52], by ``log10_velocity/LAYER``.
    """

    epoch: int
    scalars: Mapping[str, float]
    histograms: Mapping[str, NDArray[np.int64]]


def numbers_of(record: EpochRecord) -> EpochNumbers:
    """Return what trackers are told of an epoch that has just been finished."""
    return _numbers(record.epoch, record.metrics, {each.name: (each.trained, each.velocity) for each in record.layers})


def numbers_again(run: Run, epoch: int) -> EpochNumbers:
    """Return what trackers are told of an epoch that ``run`` has recorded. RunDirectoryError where it is damaged."""
    row = next(row for row in run.rows if row["epoch"] == epoch)
    neurons = run.neurons(epoch, ("trained", "velocity"))
    return _numbers(epoch, row, {name: (each["trained"], each["velocity"]) for name, each in sorted(neurons.items())})


def counts(velocity: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return how many neurons' log10 |velocity| lies in each bin of ``EDGES``; those without a velocity in none."""
    sizes = np.abs(velocity[np.isfinite(velocity)].astype(np.float64))
    with np.errstate(divide="ignore"):
        logarithms = np.clip(np.log10(sizes), EDGES[0], EDGES[-1])
    return np.histogram(logarithms, EDGES)[0].astype(np.int64)


def _numbers(epoch: int, row: Mapping[str, float | int], layers: Mapping[str, tuple[Any, Any]]) -> EpochNumbers:
    scalars = {name: float(value) for name, value in row.items() if math.isfinite(value)}
    histograms = {}
    for name, (trained, velocity) in layers.items():
        shown = name or "model"  # a model that is a single layer
        if len(trained):
            scalars[f"frozen_share/{shown}"] = 1 - float(np.mean(trained))
        found = counts(velocity)
        if found.any():
            histograms[f"log10_velocity/{shown}"] = found
    return EpochNumbers(epoch, scalars, histograms)
