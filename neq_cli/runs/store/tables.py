"""metrics.csv and layers.csv, row by row: their columns, cells as they are written, and rows as they are read.

What was torn when the run was killed is left out; all else must be whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from neq_cli.events import LayerState
from neq_cli.runs.store.untrusted import Number, damaged, parse_count, parse_number, read_table

METRICS_NEEDED = (
    "epoch",
    "neurons",
    "frozen",
    "flops_paper",
    "flops_executed",
    "flops_paper_dense",
    "flops_executed_dense",
    "epoch_seconds",
    "probe_seconds",
)
LAYER_COLUMNS = (
    "epoch",
    "layer",
    "kind",
    "neurons",
    "frozen",
    "phi_mean",
    "velocity_abs_mean",
    "flops_paper",
    "flops_executed",
)
_MOST_COLUMNS = 1000
_MOST_CELLS = 1_000_000  # of metrics.csv, which is kept in memory
_MOST_LAYERS = 10_000


@dataclass(frozen=True)
class LayerRow:
    """One row of layers.csv; FLOPs and ``frozen`` are those in force during the epoch."""

    epoch: int
    layer: str
    kind: str
    neurons: int
    frozen: int
    phi_mean: Number
    velocity_abs_mean: Number
    flops_paper: Number
    flops_executed: Number


def cell(value: float | int) -> str:
    """Write a number so that reading gives the same one back; NaN is an empty cell."""
    if isinstance(value, (int, np.integer)):
        return str(int(value))
    return "" if math.isnan(value) else repr(float(value))


def layer_row(epoch: int, layer: LayerState) -> list[str]:
    """Return the row of layers.csv; means are over the neurons whose value is not NaN."""
    means = (_mean(layer.phi), _mean(np.abs(layer.velocity)))
    numbers = (layer.neurons, layer.frozen, *means, layer.flops_paper, layer.flops_executed)
    return [str(epoch), layer.name, layer.kind, *map(cell, numbers)]


def _mean(values: NDArray[np.float32]) -> float:
    """Mean of what is not NaN, in float64; NaN where nothing is left."""
    known = values[~np.isnan(values)]
    return float(known.mean(dtype=np.float64)) if known.size else math.nan


def read_metrics(path: Path) -> tuple[dict[str, Number], ...]:
    """Return the rows of metrics.csv; RunDirectoryError unless they are of the epochs 1, 2, 3..."""
    rows = read_table(path)
    columns = _columns(path, next(rows, None), METRICS_NEEDED)
    metrics: list[dict[str, Number]] = []
    for line, cells in rows:
        _check_width(path, line, columns, cells)
        row = {column: parse_number(path, line, column, text) for column, text in zip(columns, cells, strict=True)}
        if row["epoch"] != len(metrics) + 1:
            raise damaged(path, f"epoch {row['epoch']} after epoch {len(metrics)}", line)
        if len(columns) * len(metrics) >= _MOST_CELLS:
            raise damaged(path, f"more than {_MOST_CELLS} cells", line)
        metrics.append(row)
    return tuple(metrics)


def read_columns(path: Path, wanted: Sequence[str]) -> dict[str, list[Number]]:
    """Return those of the columns ``wanted`` that metrics.csv has, and "epoch"; the others' cells are not looked at."""
    rows = read_table(path)
    columns = _columns(path, next(rows, None), METRICS_NEEDED)
    found: dict[str, list[Number]] = {name: [] for name in ("epoch", *wanted) if name in columns}
    places = [(name, columns.index(name), values) for name, values in found.items()]
    for line, cells in rows:
        _check_width(path, line, columns, cells)
        for name, place, values in places:
            values.append(parse_number(path, line, name, cells[place]))
        if found["epoch"][-1] != len(found["epoch"]):
            raise damaged(path, f"epoch {found['epoch'][-1]} after epoch {len(found['epoch']) - 1}", line)
        if len(found["epoch"]) >= _MOST_CELLS:
            raise damaged(path, f"more than {_MOST_CELLS} rows", line)
    return found


def read_layers(path: Path, epoch: int) -> tuple[LayerRow, ...]:
    """Return the rows of an epoch in layers.csv, in forward order."""
    rows = read_table(path)
    columns = _columns(path, next(rows, None), LAYER_COLUMNS)
    place = {column: columns.index(column) for column in LAYER_COLUMNS} if columns else {}
    found: list[LayerRow] = []
    for line, cells in rows:
        _check_width(path, line, columns, cells)
        if len(found) == _MOST_LAYERS:
            raise damaged(path, f"more than {_MOST_LAYERS} layers in an epoch", line)
        row_epoch = parse_count(path, line, "epoch", cells[place["epoch"]])
        if row_epoch > epoch:  # what follows is of later epochs, or torn
            break
        if row_epoch == epoch:
            text = {column: cells[index] for column, index in place.items()}
            found.append(_layer_row(path, line, text))
    return tuple(found)


def _layer_row(path: Path, line: int, text: dict[str, str]) -> LayerRow:
    def count(column: str) -> int:
        return parse_count(path, line, column, text[column])

    def number(column: str) -> Number:
        return parse_number(path, line, column, text[column])

    if count("frozen") > count("neurons"):
        raise damaged(path, f"{count('frozen')} frozen of {count('neurons')} neurons", line)
    return LayerRow(
        epoch=count("epoch"),
        layer=text["layer"],
        kind=text["kind"],
        neurons=count("neurons"),
        frozen=count("frozen"),
        phi_mean=number("phi_mean"),
        velocity_abs_mean=number("velocity_abs_mean"),
        flops_paper=number("flops_paper"),
        flops_executed=number("flops_executed"),
    )


def _columns(path: Path, header: tuple[int, list[str]] | None, needed: tuple[str, ...]) -> list[str]:
    if header is None:  # the process ended before the first line was complete
        return []
    columns = header[1]
    if len(columns) > _MOST_COLUMNS:
        raise damaged(path, f"{len(columns)} columns", 1)
    lacking = [column for column in needed if column not in columns]
    if lacking:
        raise damaged(path, f"no column {', '.join(lacking)}", 1)
    if len(set(columns)) != len(columns):
        raise damaged(path, "a column stands twice", 1)
    return columns


def _check_width(path: Path, line: int, columns: list[str], cells: list[str]) -> None:
    if len(cells) != len(columns):
        raise damaged(path, f"{len(cells)} cells where {len(columns)} belong", line)
