"""How phi, delta_phi and velocity of all neurons are spread, epoch by epoch; one neuron file in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from neq_cli.runs.store.run import Run

FIELDS = ("phi", "delta_phi", "velocity")
MOST_EPOCHS = 160  # of a longer run, as many are read, evenly spread
_BINS = 120
_PILOTS = 20  # epochs that the range is taken from
_TAIL = 0.002  # share of a pilot epoch's neurons that may lie outside on either side
_WIDEST = 1e6


@dataclass(frozen=True)
class Scale:
    """Where a value stands on the axis: as it is, or asinh(value / linear), which is linear near 0 and logarithmic far
    from it."""

    linear: float | None

    def place(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        return values if self.linear is None else np.arcsinh(values / self.linear)

    def value(self, places: NDArray[np.float64]) -> NDArray[np.float64]:
        """Undo ``place``."""
        return places if self.linear is None else np.sinh(places) * self.linear


@dataclass(frozen=True)
class Density:
    """One quantity of a run. ``shares`` is [bins, epochs read]: each column adds up to 1 where any value is finite."""

    field: str
    epochs: tuple[int, ...]  # those read
    epochs_done: int
    scale: Scale
    edges: NDArray[np.float64]  # [bins + 1], values; bins are of equal width on the scale
    shares: NDArray[np.float64]
    mean: NDArray[np.float64]  # [epochs read], of the finite values
    outside: float  # share of all values beyond the edges; they are counted in the outermost bins


def densities(run: Run, threshold: float | None = None) -> tuple[Density, ...]:
    """Read a run's neuron files twice over, a few for the range and then each sampled epoch, into one density a field.

    ``threshold`` is the policy's epsilon: delta_phi and velocity are then drawn linear up to it, logarithmic beyond.
    RunDirectoryError for damaged files.
    """
    epochs = sampled(run.epochs, MOST_EPOCHS)
    limits = _limits(run, sampled_of(epochs, _PILOTS))
    scales = {name: Scale(None if name == "phi" else _linear(limits[name], threshold)) for name in FIELDS}
    edges = {name: _edges(scales[name], limits[name]) for name in FIELDS}
    shares = {name: np.zeros((_BINS, len(epochs))) for name in FIELDS}
    means = {name: np.full(len(epochs), np.nan) for name in FIELDS}
    outside, total = dict.fromkeys(FIELDS, 0), dict.fromkeys(FIELDS, 0)
    for column, epoch in enumerate(epochs):
        for name, values in _values(run, epoch).items():
            if len(values):
                counts, beyond = _histogram(values, scales[name], edges[name])
                shares[name][:, column] = counts / len(values)
                means[name][column] = values.mean()
                outside[name] += beyond
                total[name] += len(values)
    return tuple(
        Density(
            name,
            epochs,
            run.epochs,
            *(scales[name], edges[name], shares[name], means[name]),
            outside[name] / max(total[name], 1),
        )
        for name in FIELDS
    )


def sampled(epochs: int, most: int) -> tuple[int, ...]:
    """Return at most ``most`` of the epochs 1 to ``epochs``, evenly spread, the first and the last among them."""
    if epochs <= most:
        return tuple(range(1, epochs + 1))
    return tuple(round(epoch) for epoch in np.linspace(1, epochs, most))


def sampled_of(epochs: Sequence[int], most: int) -> tuple[int, ...]:
    """Return at most ``most`` of these epochs, evenly spread."""
    return tuple(epochs[place - 1] for place in sampled(len(epochs), most))


def _values(run: Run, epoch: int) -> dict[str, NDArray[np.float64]]:
    """Return every field's finite values over all layers."""
    layers = run.neurons(epoch, FIELDS)
    found = {}
    for name in FIELDS:
        parts = [layers[layer][name] for layer in sorted(layers)]
        values = np.concatenate(parts).astype(np.float64) if parts else np.zeros(0)
        found[name] = values[np.isfinite(values)]
    return found


def _limits(run: Run, epochs: Iterable[int]) -> dict[str, tuple[float, float]]:
    spans: dict[str, list[tuple[float, float]]] = {name: [] for name in FIELDS}
    for epoch in epochs:
        for name, values in _values(run, epoch).items():
            if len(values):
                low, high = np.quantile(values, [_TAIL, 1 - _TAIL])
                spans[name].append((float(low), float(high)))
    limits = {}
    for name, span in spans.items():
        low, high = min((low for low, _ in span), default=0.0), max((high for _, high in span), default=1.0)
        low, high = (min(max(side, -_WIDEST), _WIDEST) for side in (low, high))
        if name == "phi":
            high = max(high, 1.0)  # the value of a neuron that has not changed at all
            limits[name] = _widened(low, high)
        else:
            widest = max(abs(low), abs(high))  # zero in the middle: the sign matters
            limits[name] = _widened(-widest, widest)
    return limits


def _widened(low: float, high: float) -> tuple[float, float]:
    margin = max(high - low, 1e-9, 1e-6 * abs(high)) * 0.02
    return low - margin, high + margin


def _linear(limits: tuple[float, float], threshold: float | None) -> float:
    if threshold is not None and math.isfinite(threshold) and threshold > 0:
        return max(threshold, limits[1] * 1e-9)
    return limits[1] / 100


def _edges(scale: Scale, limits: tuple[float, float]) -> NDArray[np.float64]:
    low, high = scale.place(np.array(limits))
    return scale.value(np.linspace(low, high, _BINS + 1))


def _histogram(values: NDArray[np.float64], scale: Scale, edges: NDArray[np.float64]) -> tuple[NDArray[np.int64], int]:
    """Return counts, what lies outside in the outermost bins, and how many values those are."""
    low, high = scale.place(edges[[0, -1]])
    places = scale.place(values)
    outside = int(((places < low) | (places > high)).sum())
    counts, _ = np.histogram(np.clip(places, low, high), bins=_BINS, range=(low, high))
    return counts, outside
