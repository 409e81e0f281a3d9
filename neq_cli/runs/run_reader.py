"""A run as it is read back from its directory, also while it is still being written; opens nothing else."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neq_cli.errors import RunDirectoryError
from neq_cli.runs.formatting import printable
from neq_cli.runs.reading import (
    Number,
    damaged,
    parse_count,
    parse_number,
    read_json,
    read_neurons,
    read_table,
    read_yaml,
)
from neq_cli.runs.run_dir import STATES, RunFiles
from neq_cli.runs.serialisation import LAYER_COLUMNS, NEURON_FIELDS

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
KNOWN_METRICS = ("test_top1", "test_miou")


@dataclass(frozen=True)
class RunStatus:
    """What status.json says, checked against the process where that can be done.

    ``state``: running, finished, interrupted, failed; killed (a process of this machine that is gone without having
    said so); running or killed (a process of another machine); unknown (no status.json).
    """

    state: str
    reason: str  # empty where none is given

    def __str__(self) -> str:
        return f"{self.state}: {self.reason}" if self.reason else self.state


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


@dataclass(frozen=True)
class Run:
    """A run with at least one finished epoch. ``layers`` and ``neurons`` read their files when called."""

    path: Path
    recipe: dict[str, Any]  # plain values, not validated
    environment: dict[str, Any]
    status: RunStatus
    metrics: tuple[dict[str, Number], ...]  # rows of metrics.csv; NaN where not measured

    @property
    def files(self) -> RunFiles:
        return RunFiles(self.path)

    @property
    def epochs(self) -> int:
        """Finished epochs."""
        return len(self.metrics)

    @property
    def epochs_planned(self) -> int:
        return int(self.recipe["epochs"])

    @property
    def recipe_name(self) -> str:
        """The recipe's name, or that of the folder where a copied run no longer knows it."""
        name = self.environment.get("recipe_name")
        return name if isinstance(name, str) and name else self.path.resolve().parent.name

    @property
    def metric(self) -> str:
        """The column that tells how good the model is; higher is better. RunDirectoryError where there is none."""
        named = self.environment.get("metric")
        for column in (named, *KNOWN_METRICS):
            if isinstance(column, str) and column in self.metrics[0]:
                return column
        raise RunDirectoryError(f"{printable(self.files.metrics)}: no column {' or '.join(KNOWN_METRICS)}")

    def setting(self, key: str) -> Any:
        """Return the recipe's value at a dotted key, None where it has none."""
        value: Any = self.recipe
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                return None
            value = value[part]
        return value

    def column(self, name: str) -> NDArray[np.float64]:
        """Return a column of metrics.csv, [epochs]."""
        return np.array([row[name] for row in self.metrics], dtype=np.float64)

    def layers(self, epoch: int) -> tuple[LayerRow, ...]:
        """Return the rows of layers.csv of an epoch, in forward order."""
        return _read_layers(self.files.layers, epoch)

    def neurons(self, epoch: int, fields: tuple[str, ...] = NEURON_FIELDS) -> dict[str, dict[str, NDArray[Any]]]:
        """Return ``{layer: {field: [neurons]}}`` after an epoch, or only the ``fields`` asked for; in no set order."""
        return read_neurons(self.files.neurons(epoch), fields)


def read_run(path: Path) -> Run:
    """Read a run directory, its table of epochs included.

    What was torn when the run was killed (a last line without its end, layers and neurons of an epoch that has no row
    in metrics.csv) is not part of the run. Raises RunDirectoryError, naming file and line, for everything else that
    is not as ``neq train`` writes it, and for a run without a finished epoch.
    """
    files = RunFiles(path)
    _check_is_run(files)
    recipe = read_yaml(files.recipe)
    epochs = recipe.get("epochs")
    if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1:
        raise damaged(files.recipe, f"epochs: {printable(repr(epochs), 60)} is not a whole number above 0")
    environment = read_json(files.environment) if files.environment.exists() else {}
    status = _read_status(files.status)  # before the metrics, so that a run read as finished is read whole
    metrics = _read_metrics(files.metrics) if files.metrics.exists() else ()
    if not metrics:
        raise RunDirectoryError(
            f"{printable(path)}: no finished epoch yet (status: {status}); train it further or anew"
        )
    return Run(path, recipe, environment, status, metrics)


def _check_is_run(files: RunFiles) -> None:
    try:
        if not files.root.exists():
            raise RunDirectoryError(f"{printable(files.root)}: no such run directory; `ls runs/*` shows what there is")
        begun = files.metrics.exists() or files.status.exists()
        if not files.root.is_dir() or not files.recipe.exists() or not begun:
            what = f"no {files.recipe.name} with {files.metrics.name} in it"
            raise RunDirectoryError(
                f"{printable(files.root)}: not a run directory: {what}; give one that `neq train` made"
            )
    except OSError as error:
        raise RunDirectoryError(f"{printable(files.root)}: cannot be read: {error.strerror or error}") from error


def _read_status(path: Path) -> RunStatus:
    if not path.exists():
        return RunStatus("unknown", "")
    status = read_json(path)
    state, reason = status.get("state"), printable(status.get("reason") or "", 500)
    if state not in STATES:
        raise damaged(path, f"state: {printable(repr(state), 60)} is not one of {', '.join(STATES)}")
    if state != "running":
        return RunStatus(state, reason)
    host, process = status.get("host"), status.get("pid")
    if host != socket.gethostname() or not isinstance(process, int) or not 0 < process < 2**31:
        return RunStatus("running or killed", f"started on {printable(host, 100)}, which cannot be asked from here")
    if _is_alive(process):
        return RunStatus("running", f"process {process}")
    return RunStatus("killed", f"process {process} is gone")


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's process
        return True
    return True


def _read_metrics(path: Path) -> tuple[dict[str, Number], ...]:
    rows = read_table(path)
    columns = _columns(path, next(rows, None), METRICS_NEEDED)
    metrics: list[dict[str, Number]] = []
    for line, cells in rows:
        _check_width(path, line, columns, cells)
        row = {column: parse_number(path, line, column, text) for column, text in zip(columns, cells, strict=True)}
        if row["epoch"] != len(metrics) + 1:
            raise damaged(path, f"epoch {row['epoch']} after epoch {len(metrics)}", line)
        metrics.append(row)
    return tuple(metrics)


def _read_layers(path: Path, epoch: int) -> tuple[LayerRow, ...]:
    rows = read_table(path)
    columns = _columns(path, next(rows, None), LAYER_COLUMNS)
    place = {column: columns.index(column) for column in LAYER_COLUMNS} if columns else {}
    found: list[LayerRow] = []
    for line, cells in rows:
        _check_width(path, line, columns, cells)
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
    lacking = [column for column in needed if column not in columns]
    if lacking:
        raise damaged(path, f"no column {', '.join(lacking)}", 1)
    if len(set(columns)) != len(columns):
        raise damaged(path, "a column stands twice", 1)
    return columns


def _check_width(path: Path, line: int, columns: list[str], cells: list[str]) -> None:
    if len(cells) != len(columns):
        raise damaged(path, f"{len(cells)} cells where {len(columns)} belong", line)
