"""A run as it is read back from its directory, also while it is still being written; opens nothing else."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neq_cli.errors import RunDirectoryError
from neq_cli.events import EPOCH, OBSERVATION, EpochRecord, LayerState
from neq_cli.recipe.recorded import is_recorded
from neq_cli.runs.store.lock import is_alive
from neq_cli.runs.store.neurons import NEURON_FIELDS, read_neurons
from neq_cli.runs.store.paths import STATES, RunFiles
from neq_cli.runs.store.tables import LayerRow, read_layers, read_metrics
from neq_cli.runs.store.untrusted import Number, damaged, read_json, read_yaml, unreadable
from neq_cli.text import printable

KNOWN_METRICS = ("test_top1", "test_miou")
_MOST_EPOCHS = 10**9


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
class Run:
    """A run with at least one finished epoch; ``rows`` of metrics.csv, NaN where not measured.

    Where its ``unit`` is not the epoch, "epoch" here counts observations, a row each, as the files do. ``layers`` and
    ``neurons`` read their files when called.
    """

    path: Path
    recipe: dict[str, Any]  # plain values, not validated
    environment: dict[str, Any]
    status: RunStatus
    rows: tuple[dict[str, Number], ...]

    @property
    def files(self) -> RunFiles:
        return RunFiles(self.path)

    @property
    def epochs(self) -> int:
        """Finished epochs."""
        return len(self.rows)

    @property
    def epochs_planned(self) -> int:
        """How many epochs the run is meant to have; those it has where it was recorded without saying so."""
        observed = self.unit == OBSERVATION
        planned = self.environment.get("rows_planned") if observed else self.recipe.get("epochs")
        if planned is None or (observed and not _is_count(planned)):
            return self.epochs
        return int(planned)

    @property
    def unit(self) -> str:
        """What a row is of: EPOCH, or OBSERVATION where there is one every so many optimiser steps."""
        # Callbacks and loops of one's own need not say it: their rows do.
        told = [row["passed_epochs"] for row in self.rows] if "passed_epochs" in self.rows[0] else []
        if is_recorded(self.recipe) and any(passed % 1 != 0 for passed in told):  # also NaN: no whole number
            return OBSERVATION
        return _unit(self.environment)

    @property
    def passed_epochs(self) -> NDArray[np.float64] | None:
        """Passes over the training data up to each row, [epochs]; None of observations that do not tell, in order."""
        if "passed_epochs" in self.rows[0]:
            told = self.column("passed_epochs")
            if np.isfinite(told).all() and (np.diff(told, prepend=0.0) > 0).all() and told[-1] <= _MOST_EPOCHS:
                return told
        return None if self.unit == OBSERVATION else np.arange(1.0, self.epochs + 1)

    @property
    def recipe_name(self) -> str:
        """The recipe's name, or that of the folder where a copied run no longer knows it."""
        name = self.environment.get("recipe_name")
        return name if isinstance(name, str) and name else self.path.resolve().parent.name

    @property
    def metric(self) -> str:
        """The column that tells how good the model is. RunDirectoryError where there is none."""
        named = self.environment.get("metric")
        for column in (named, *KNOWN_METRICS):
            if isinstance(column, str) and column in self.rows[0]:
                return column
        raise RunDirectoryError(f"{printable(self.files.metrics)}: no column {' or '.join(KNOWN_METRICS)}")

    @property
    def lower_is_better(self) -> bool:
        """Whether the smallest value of ``metric`` is the best one; higher is better where the run does not tell."""
        return self.environment.get("metric_better") == "lower"

    def _repr_html_(self) -> str:
        from neq_cli.runs.views.notebook import run_as_html  # only a notebook asks

        return run_as_html(self)

    def setting(self, key: str) -> Any:
        """Return the recipe's value at a dotted key, None where it has none."""
        value: Any = self.recipe
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                return None
            value = value[part]
        return value

    @property
    def metrics(self) -> dict[str, NDArray[np.float64]]:
        """The columns of metrics.csv by name, each [epochs]; NaN where not measured."""
        return {name: self.column(name) for name in self.rows[0]}

    def column(self, name: str) -> NDArray[np.float64]:
        """Return a column of metrics.csv, [epochs]."""
        return np.array([row[name] for row in self.rows], dtype=np.float64)

    def layers(self, epoch: int) -> tuple[LayerRow, ...]:
        """Return the rows of layers.csv of an epoch, in forward order."""
        return read_layers(self.files.layers, epoch)

    def neurons(self, epoch: int, fields: tuple[str, ...] = NEURON_FIELDS) -> dict[str, dict[str, NDArray[Any]]]:
        """Return ``{layer: {field: [neurons]}}`` after an epoch, or only the ``fields`` asked for; in no set order."""
        return read_neurons(self.files.neurons(epoch), fields)


def read_run(path: str | Path) -> Run:
    """Read a run directory, its table of epochs included.

    What was torn when the run was killed (a last line without its end, layers and neurons of an epoch that has no row
    in metrics.csv) is not part of the run. Raises RunDirectoryError, naming file and line, for everything else that
    is not as ``neq train`` writes it, and for a run without a finished epoch.
    """
    path = Path(path)
    files = RunFiles(path)
    _check_is_run(files)
    recipe = read_yaml(files.recipe)
    epochs = recipe.get("epochs")
    untold = epochs is None and is_recorded(recipe)
    if not untold and not _is_count(epochs):
        raise damaged(files.recipe, f"epochs: {printable(repr(epochs), 60)} is not a whole number above 0")
    environment = read_json(files.environment) if _is_there(files.environment) else {}
    status = read_status(files.status)  # before the metrics, so that a run read as finished is read whole
    metrics = read_metrics(files.metrics) if _is_there(files.metrics) else ()
    if not metrics:
        mend = "wait for its first" if status.state == "running" else "train it further or anew"
        unit = _unit(environment)
        raise RunDirectoryError(f"{printable(path)}: no finished {unit} yet (status: {status}); {mend}")
    return Run(path, recipe, environment, status, metrics)


def unit_of_runs(runs: Sequence[Run]) -> str:
    """Return what the rows of runs of one configuration are of; observations where those of any run are."""
    return OBSERVATION if any(run.unit == OBSERVATION for run in runs) else EPOCH


def _unit(environment: Mapping[str, Any]) -> str:
    return OBSERVATION if environment.get("unit") == OBSERVATION else EPOCH


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MOST_EPOCHS


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
        raise unreadable(files.root, error) from error


def read_status(path: Path) -> RunStatus:
    """Return what a status.json says, checked as ``RunStatus`` tells. RunDirectoryError where it is damaged."""
    if not _is_there(path):
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
    if is_alive(process):
        return RunStatus("running", f"process {process}")
    return RunStatus("killed", f"process {process} is gone")


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # no permission to look: reading it then says so
        return True


def past_epochs(run: Run) -> tuple[EpochRecord, ...]:
    """Return the records of all finished epochs; the last has its layers, unless their files cannot be read."""
    *earlier, last = run.rows
    epochs = [EpochRecord(int(row["epoch"]), row, ()) for row in earlier]
    return (*epochs, EpochRecord(int(last["epoch"]), last, _layers(run)))


def _layers(run: Run) -> tuple[LayerState, ...]:
    try:
        neurons = run.neurons(run.epochs)
        return tuple(
            LayerState(
                name=row.layer,
                kind=row.kind,
                flops_paper=row.flops_paper,
                flops_executed=row.flops_executed,
                **neurons[row.layer],
            )
            for row in run.layers(run.epochs)
        )
    except (RunDirectoryError, KeyError):  # which `neq inspect` says; the training does not need them
        return ()
