"""The frozen share by layer and epoch, from layers.csv, which is streamed; long runs and deep models are binned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from neq_cli.errors import NeqError
from neq_cli.runs.store.run import Run
from neq_cli.runs.store.serialisation import LAYER_COLUMNS
from neq_cli.runs.store.untrusted import damaged, parse_count, read_table
from neq_cli.text import printable

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
    return LayerMap(names, percent, per_row, per_column, epochs)


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
            what = f"epoch {epoch}, layer {printable(layer, 60)!r}, {frozen} of {neurons} neurons frozen"
            raise damaged(path, f"{what}: not as in epoch 1", line)
        yield epoch, layer, neurons, frozen
