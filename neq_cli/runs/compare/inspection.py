"""What a run's neurons did up to an epoch, as plain values; needs the neuron files of every epoch before it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neq_cli.errors import NeqError, RunDirectoryError, did_you_mean
from neq_cli.events import ENERGY_COLUMNS
from neq_cli.runs.compare.configurations import model_and_data, policy_label
from neq_cli.runs.compare.energy import is_measured, total, ways
from neq_cli.runs.compare.saving import nothing_saved
from neq_cli.runs.compare.statistics import mean_known
from neq_cli.runs.store.run import Run
from neq_cli.runs.store.tables import LayerRow
from neq_cli.text import plain_json, printable, ratio_percent

Arrays = Mapping[str, NDArray[Any]]
_MOST_NOTES = 200


@dataclass(frozen=True)
class LayerInspection:
    """One layer after the epoch looked at: ``frozen`` neurons are those the policy froze for the epoch that follows.

    ``during_indices`` are those that were not updated in the epoch itself.
    """

    name: str
    kind: str
    neurons: int
    frozen: int
    phi_mean: float
    velocity_abs_mean: float
    frozen_indices: tuple[int, ...]
    frozen_since: tuple[int, ...]  # for each of them, the first epoch of those in a row in which it was not updated
    frozen_during: int
    during_indices: tuple[int, ...]
    during_since: tuple[int, ...]  # as frozen_since


@dataclass(frozen=True)
class EpochChange:
    """What the policy decided after an epoch, in the layers looked at."""

    epoch: int
    frozen: int  # neurons frozen for the epoch that follows
    froze: int  # of these, updated during this epoch
    thawed: int  # not updated during this epoch, updated again in the one that follows
    frozen_during: int  # neurons not updated during this epoch


@dataclass(frozen=True)
class Inspection:
    """A run as it stood after ``epoch``; means, best and seconds are over the epochs up to it, whole model.

    Where the ``unit`` is the observation, all epochs here are numbers of observations but ``passed_epochs``.
    """

    path: str
    recipe: str
    description: str
    policy: str
    device: str
    status: str
    status_reason: str
    epoch: int
    epochs_done: int
    epochs_planned: int
    unit: str
    step: int | None  # optimiser steps up to ``epoch``, where the run tells them
    passed_epochs: float | None  # passes over the training data up to it
    neurons: int
    frozen: int  # for the epoch that follows, as the policy chose after ``epoch``
    frozen_during: int  # not updated in ``epoch``
    is_last: bool  # the run ended with ``epoch``: what was chosen after it was never in force
    frozen_mean_percent: float
    flops_paper: float  # mean per iteration and sample, multiply-adds
    flops_paper_percent: float  # of dense
    flops_executed: float
    flops_executed_percent: float
    metric: str
    lower_is_better: bool  # of the metric
    metric_final: float  # the last one measured
    metric_best: float
    metric_best_epoch: int | None
    seconds: float
    probe_percent: float  # of those seconds
    notes: tuple[str, ...]
    layer_glob: str | None
    layers: tuple[LayerInspection, ...]  # forward order
    changes: tuple[EpochChange, ...]  # one per epoch, in the layers above
    joules: float | None = None  # of the epochs up to it, NaN where not all are known; None where it was not measured
    co2_grams: float | None = None
    energy: tuple[str, ...] = ()  # how it was measured
    nothing_saved: str | None = None  # why all was executed up to it, though neurons were frozen; None where not


def inspect_run(run: Run, epoch: int | None = None, layer_glob: str | None = None) -> Inspection:
    """Look at a run after ``epoch`` (its last finished one if None), in the layers whose names match ``layer_glob``.

    Two sets: the one in force during that epoch, and the one that the policy chose after it, for the next. Raises
    NeqError for an epoch the run does not have and a glob that no layer matches, RunDirectoryError for damaged files.
    """
    epoch = run.epochs if epoch is None else epoch
    if not 1 <= epoch <= run.epochs:
        known = f"only {run.unit} 1" if run.epochs == 1 else f"{run.unit}s 1 to {run.epochs}"
        raise NeqError(f"--epoch {epoch}: {printable(run.path)} has {known}")
    rows = run.layers(epoch)
    neurons = run.neurons(epoch)
    _check_same_layers(run, epoch, rows, neurons)
    chosen = [row for row in rows if layer_glob is None or fnmatchcase(row.layer, layer_glob)]
    if layer_glob is not None and not chosen:
        raise NeqError(_no_such_layer(run, layer_glob, [row.layer for row in rows]))
    stood, changes = _history(run, epoch, [row.layer for row in chosen])
    layers = tuple(_layer(row, neurons[row.layer], *stood[row.layer]) for row in chosen)
    return Inspection(
        **_summary(run, epoch),
        neurons=sum(row.neurons for row in rows),
        frozen=sum(int((~arrays["trainable"]).sum()) for arrays in neurons.values()),
        frozen_during=sum(int((~arrays["trained"]).sum()) for arrays in neurons.values()),
        is_last=epoch == run.epochs and run.status.state == "finished",
        layer_glob=layer_glob,
        layers=layers,
        changes=changes,
    )


def fold_ranges(indices: Iterable[int]) -> str:
    """Write ascending indices with runs folded: ``0-3, 7, 12-15``."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def to_json(inspection: Inspection) -> dict[str, Any]:
    """Return the fields of ``Inspection`` as plain lists and dicts, with ``schema`` 1; what is not known is None."""
    return {"schema": 1, **plain_json(asdict(inspection))}


def _history(
    run: Run, epoch: int, names: Sequence[str]
) -> tuple[dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]], tuple[EpochChange, ...]]:
    """Follow the sets from epoch 1: since when each neuron stands still in ``epoch`` and after it, and the changes.

    The first epoch of those in a row, by layer, [neurons]; 0 where the neuron is updated.
    """
    stood: dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
    changes = []
    for past in range(1, epoch + 1):
        layers = run.neurons(past, ("trained", "trainable"))
        frozen = froze = thawed = during = 0
        for name in names:
            trained, trainable = _sets(run, past, layers, name)
            _, before = stood.get(name, (None, np.zeros(len(trained), dtype=np.int64)))
            if len(before) != len(trained):
                raise RunDirectoryError(
                    f"{_place(run, past)}: {printable(name)} changes its number of neurons; {_MEND}"
                )
            stood[name] = _since(before, trained, trainable, past)
            frozen += int((~trainable).sum())
            froze += int((trained & ~trainable).sum())
            thawed += int((~trained & trainable).sum())
            during += int((~trained).sum())
        changes.append(EpochChange(past, frozen, froze, thawed, during))
    return stood, tuple(changes)


def _since(
    before: NDArray[np.int64], trained: NDArray[np.bool_], trainable: NDArray[np.bool_], epoch: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    during = np.where(trained, 0, np.where(before > 0, before, epoch))
    return during, np.where(trainable, 0, np.where(during > 0, during, epoch + 1))


def _sets(run: Run, epoch: int, layers: Mapping[str, Arrays], name: str) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    if name not in layers:
        raise RunDirectoryError(f"{_place(run, epoch)}: no layer {printable(name)}; {_MEND}")
    return layers[name]["trained"], layers[name]["trainable"]


_MEND = "the run directory is damaged, restore it or train again"


def _place(run: Run, epoch: int) -> str:
    return printable(run.files.neurons(epoch))


def _check_same_layers(run: Run, epoch: int, rows: Sequence[LayerRow], neurons: Mapping[str, Arrays]) -> None:
    sizes = {row.layer: row.neurons for row in rows}
    if len(sizes) != len(rows) or sizes != {name: len(arrays["trained"]) for name, arrays in neurons.items()}:
        both = f"{printable(run.files.layers)} and {_place(run, epoch)}"
        raise RunDirectoryError(f"{both}: not the same layers or numbers of neurons; {_MEND}")


def _no_such_layer(run: Run, layer_glob: str, names: Sequence[str]) -> str:
    if any(name.startswith(f"{layer_glob}.") for name in names):
        return f"--layer {layer_glob}: no layer of that name, but layers within it; give '{layer_glob}.*'"
    hint = did_you_mean(layer_glob, names) or f"; its first layers: {', '.join(map(printable, names[:5]))}"
    return f"--layer {layer_glob}: matches none of the {len(names)} layers of {printable(run.path)}{hint}"


def _layer(row: LayerRow, arrays: Arrays, during: NDArray[np.int64], after: NDArray[np.int64]) -> LayerInspection:
    frozen, still = np.flatnonzero(~arrays["trainable"]), np.flatnonzero(~arrays["trained"])
    return LayerInspection(
        name=row.layer,
        kind=row.kind,
        neurons=row.neurons,
        frozen=len(frozen),
        phi_mean=mean_known(arrays["phi"].astype(np.float64)),
        velocity_abs_mean=mean_known(np.abs(arrays["velocity"].astype(np.float64))),
        frozen_indices=tuple(frozen.tolist()),
        frozen_since=tuple(after[frozen].tolist()),
        frozen_during=len(still),
        during_indices=tuple(still.tolist()),
        during_since=tuple(during[still].tolist()),
    )


def _notes(notes: object) -> tuple[str, ...]:
    if not isinstance(notes, list):
        return ()
    more = [f"and {len(notes) - _MOST_NOTES} more"] if len(notes) > _MOST_NOTES else []
    return tuple(map(str, [*notes[:_MOST_NOTES], *more]))


def _told(run: Run, epoch: int, column: str) -> float | None:
    value = run.rows[epoch - 1].get(column, math.nan)
    return float(value) if math.isfinite(value) else None


def _summary(run: Run, epoch: int) -> dict[str, Any]:
    columns = {name: run.column(name)[:epoch] for name in run.rows[0]}
    means = {name: mean_known(values) for name, values in columns.items()}
    measured = columns[run.metric]
    known = np.flatnonzero(~np.isnan(measured))
    best_of = np.argmin if run.lower_is_better else np.argmax
    best = int(known[best_of(measured[known])]) if known.size else None
    seconds = float(np.nansum(columns["epoch_seconds"]))
    return {
        "path": str(run.path),
        "recipe": run.recipe_name,
        "description": model_and_data(run),
        "policy": policy_label([run]),
        "device": str(run.environment.get("device") or ""),
        "status": run.status.state,
        "status_reason": run.status.reason,
        "epoch": epoch,
        "epochs_done": run.epochs,
        "epochs_planned": run.epochs_planned,
        "unit": run.unit,
        "step": None if (step := _told(run, epoch, "step")) is None else int(step),
        "passed_epochs": _told(run, epoch, "passed_epochs"),
        "frozen_mean_percent": ratio_percent(means["frozen"], means["neurons"]),
        "flops_paper": means["flops_paper"],
        "flops_paper_percent": ratio_percent(means["flops_paper"], means["flops_paper_dense"]),
        "flops_executed": means["flops_executed"],
        "flops_executed_percent": ratio_percent(means["flops_executed"], means["flops_executed_dense"]),
        "metric": run.metric,
        "lower_is_better": run.lower_is_better,
        "metric_final": float(measured[known[-1]]) if known.size else math.nan,
        "metric_best": math.nan if best is None else float(measured[best]),
        "metric_best_epoch": None if best is None else best + 1,
        "seconds": seconds,
        "probe_percent": ratio_percent(float(np.nansum(columns["probe_seconds"])), seconds),
        "notes": _notes(run.environment.get("notes")),
        **{column: total(run, column, epoch) for column in ENERGY_COLUMNS if column in run.rows[0]},
        "energy": ways(run) if is_measured(run) else (),
        "nothing_saved": nothing_saved(run, epoch),
    }
