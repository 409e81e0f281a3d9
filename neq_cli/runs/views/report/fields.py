"""What a report draws as fields of colour: how numbers are spread by epoch, and the frozen share by layer and epoch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from neq_cli.errors import NeqError
from neq_cli.runs.store.run import Run, unit_of_runs
from neq_cli.runs.store.tables import LAYER_COLUMNS
from neq_cli.runs.store.untrusted import damaged, parse_count, read_table
from neq_cli.text import printable

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
    unit: str  # of what its columns are: epochs, or observations


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
            run.unit,
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


MOST_ROWS = 100
MOST_COLUMNS = 200


@dataclass(frozen=True)
class LayerMap:
    """``percent`` is [rows, columns]: of the neurons of these layers in these epochs, those not updated, over all runs.

    Row r holds the layers ``names[r * layers_per_row :][:layers_per_row]``, in forward order; column c the epochs from
    ``c * epochs_per_column + 1`` on. NaN where no run has the epoch, or a layer has no neurons.
    """

    names: tuple[str, ...]
    percent: NDArray[np.float64]
    layers_per_row: int
    epochs_per_column: int
    epochs: int
    unit: str  # of what its columns are: epochs, or observations


def layer_map(runs: Sequence[Run]) -> LayerMap:
    """Fold runs of one configuration. RunDirectoryError for damaged files, NeqError where their layers differ."""
    epochs = max(run.epochs for run in runs)
    per_column = -(-epochs // MOST_COLUMNS)
    columns = -(-epochs // per_column)
    names = _names(runs[0])
    per_row = max(-(-len(names) // MOST_ROWS), 1)
    place = {name: index // per_row for index, name in enumerate(names)}
    sums = np.zeros((2, -(-len(names) // per_row), columns))  # frozen, all
    for run in runs:
        if (others := _names(run)) != names:
            what = f"{len(others)} layers where {printable(runs[0].path)} has {len(names)}, or others"
            raise NeqError(f"{printable(run.files.layers)}: {what}; report these runs apart")
        for epoch, name, neurons, frozen in _rows(run, place):
            sums[:, place[name], (epoch - 1) // per_column] += (frozen, neurons)
    with np.errstate(invalid="ignore"):
        percent = 100 * sums[0] / sums[1]
    return LayerMap(names, percent, per_row, per_column, epochs, unit_of_runs(runs))


def _names(run: Run) -> tuple[str, ...]:
    return tuple(dict.fromkeys(row.layer for row in run.layers(1)))


def _rows(run: Run, known: dict[str, int]) -> Iterator[tuple[int, str, int, int]]:
    """Yield epoch, layer, neurons and frozen of every row of the finished epochs."""
    path = run.files.layers
    rows = read_table(path)
    header = next(rows, None)
    if header is None:
        return
    columns = header[1]
    if any(column not in columns for column in LAYER_COLUMNS):
        raise damaged(path, f"its columns are not {', '.join(LAYER_COLUMNS)}", 1)
    places = [columns.index(column) for column in ("epoch", "layer", "neurons", "frozen")]
    for line, cells in rows:
        if len(cells) != len(columns):
            raise damaged(path, f"{len(cells)} cells where {len(columns)} belong", line)
        epoch_text, layer, neurons_text, frozen_text = (cells[place] for place in places)
        epoch = parse_count(path, line, "epoch", epoch_text)
        if epoch > run.epochs:  # torn: the epoch has no row in metrics.csv
            return
        neurons, frozen = (
            parse_count(path, line, column, text)
            for column, text in (("neurons", neurons_text), ("frozen", frozen_text))
        )
        if epoch < 1 or layer not in known or frozen > neurons:
            what = f"{run.unit} {epoch}, layer {printable(layer, 60)!r}, {frozen} of {neurons} neurons frozen"
            raise damaged(path, f"{what}: not as in {run.unit} 1", line)
        yield epoch, layer, neurons, frozen
