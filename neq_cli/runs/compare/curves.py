"""The runs of a report, folded into numbered configurations; means over seeds, nothing drawn."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from neq_cli.events import EPOCH
from neq_cli.runs.compare.comparison import Comparison, Row, compare_runs
from neq_cli.runs.store.run import Run
from neq_cli.text import format_passes, printable

LONGEST_NAME = 200  # characters
_STEP = 1.5  # the factor from which a change of the learning rate is a step, not a slope
_MOST_STEPS = 8
_LARGEST = 1e30  # beyond it nothing is drawn


@dataclass(frozen=True)
class Configuration:
    """Runs that differ in the seed only, under the number that tables and figures call them by."""

    number: int  # from 1, in the order of the comparison: the baseline first
    row: Row
    runs: tuple[Run, ...]

    @property
    def name(self) -> str:
        return printable(self.row.approach, LONGEST_NAME)

    @property
    def kind(self) -> str:
        """The policy's kind: ``neq``, ``stochastic``, ``baseline``, ..."""
        return str(self.runs[0].setting("policy.kind"))

    @property
    def epochs(self) -> int:
        """Finished epochs of the longest run, or observations, as its ``unit`` says."""
        return max(run.epochs for run in self.runs)

    @property
    def unit(self) -> str:
        return self.row.unit


@dataclass(frozen=True)
class Study:
    """All configurations of a report, and the comparison that they are the rows of."""

    comparison: Comparison
    configurations: tuple[Configuration, ...]

    @property
    def baseline(self) -> Configuration | None:
        return next((each for each in self.configurations if each.row.is_baseline), None)

    @property
    def largest_flops(self) -> float:
        """The largest FLOPs of any epoch: all are told in the unit of these."""
        columns = [run.column(name) for run in self.runs for name in ("flops_paper", "flops_executed")]
        known = [column[np.isfinite(column) & (np.abs(column) <= _LARGEST)] for column in columns]
        return max((float(each.max()) for each in known if each.size), default=0.0)

    @property
    def runs(self) -> tuple[Run, ...]:
        return tuple(run for configuration in self.configurations for run in configuration.runs)


@dataclass(frozen=True)
class Curve:
    """A quantity by epoch, [places]: mean, lowest and highest of the runs that have a row there; NaN where none has."""

    at: NDArray[np.float64]  # see ``places``
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


@dataclass(frozen=True)
class LearningRate:
    """Where the learning rate made steps, as (row, rate from then on), and the rates it began and ended with."""

    steps: tuple[tuple[int, float], ...]
    gradual: bool  # it changes otherwise than by these steps
    first: float
    last: float
    unit: str  # what the rows are of
    axis: str  # what ``begins`` counts
    begins: tuple[float, ...]  # for each step, the place of the row before it: all that is earlier had the old rate

    @property
    def when(self) -> tuple[str, ...]:
        """From when on each step holds: "from epoch 100 on", between epochs "after epoch 2.31"."""
        if self.unit == self.axis:
            return tuple(f"from {self.unit} {row} on" for row, _ in self.steps)
        return tuple(f"after {self.axis} {format_passes(place)}" for place in self.begins)


def study(runs: Sequence[Run], baseline: Run | None = None, allow_differences: bool = False) -> Study:
    """Compare the runs as `neq compare` does and keep the runs beside their rows. NeqError as ``compare_runs``."""
    comparison = compare_runs(runs, baseline, allow_differences)
    by_path = {str(run.path): run for run in [*([baseline] if baseline else []), *runs]}
    configurations = tuple(
        Configuration(number, row, tuple(by_path[path] for path in row.runs))
        for number, row in enumerate(comparison.rows, 1)
    )
    return Study(comparison, configurations)


def places(run: Run) -> NDArray[np.float64]:
    """Return where each row of a run stands on an axis of epochs, [epochs]; see ``axis_word``."""
    passed = run.passed_epochs
    return np.arange(1.0, run.epochs + 1) if passed is None else passed


def axis_word(runs: Sequence[Run]) -> str:
    """Return what ``places`` count: epochs, or observations of runs that do not tell how far they are apart."""
    return " or ".join(dict.fromkeys(run.unit if run.passed_epochs is None else EPOCH for run in runs))


def curve(runs: Sequence[Run], values: Callable[[Run], NDArray[np.float64]]) -> Curve:
    """Fold ``values(run)``, [epochs of that run], over runs; what is not finite counts as not measured."""
    found = [places(run) for run in runs]
    at = np.unique(np.concatenate(found))
    table = np.full((len(runs), len(at)), np.nan)
    for number, (run, own) in enumerate(zip(runs, found, strict=True)):
        table[number, np.searchsorted(at, own)] = values(run)
    table[~(np.abs(table) <= _LARGEST)] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # epochs that no run measured
        return Curve(at, np.nanmean(table, axis=0), np.nanmin(table, axis=0), np.nanmax(table, axis=0))


def learning_rate(runs: Sequence[Run]) -> LearningRate | None:
    """Find the steps of the learning rate in the longest run; None where no run tells its learning rate."""
    told = [run for run in runs if "lr" in run.rows[0]]
    if not told:
        return None
    run = max(told, key=lambda run: run.epochs)
    rates, at = run.column("lr").tolist(), places(run)
    changes = [(row, old, new) for row, (old, new) in enumerate(pairwise(rates), 2)]
    steps = tuple((row, new) for row, old, new in changes if _is_step(old, new))
    gradual = len(steps) > _MOST_STEPS or any(old != new and not _is_step(old, new) for _, old, new in changes)
    steps = steps if len(steps) <= _MOST_STEPS else ()
    begins = tuple(float(at[row - 2]) for row, _ in steps)
    return LearningRate(steps, gradual, rates[0], rates[-1], run.unit, axis_word([run]), begins)


def _is_step(old: float, new: float) -> bool:
    if not (old > 0 and new > 0 and math.isfinite(old) and math.isfinite(new)):
        return False
    return max(old / new, new / old) >= _STEP
