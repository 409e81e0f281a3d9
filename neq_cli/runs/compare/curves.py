"""The runs of a report, folded into numbered configurations; means over seeds, nothing drawn."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from neq_cli.runs.compare.comparison import Comparison, Row, compare_runs
from neq_cli.runs.store.run import Run
from neq_cli.text import printable

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
        """Finished epochs of the longest run."""
        return max(run.epochs for run in self.runs)


@dataclass(frozen=True)
class Study:
    """All configurations of a report, and the comparison that they are the rows of."""

    comparison: Comparison
    configurations: tuple[Configuration, ...]

    @property
    def baseline(self) -> Configuration | None:
        return next((each for each in self.configurations if each.row.is_baseline), None)

    @property
    def runs(self) -> tuple[Run, ...]:
        return tuple(run for configuration in self.configurations for run in configuration.runs)


@dataclass(frozen=True)
class Curve:
    """A quantity by epoch, [epochs]: mean, lowest and highest of the runs that have the epoch; NaN where none has."""

    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


@dataclass(frozen=True)
class LearningRate:
    """Where the learning rate made steps, as (epoch, rate from then on), and the rates it began and ended with."""

    steps: tuple[tuple[int, float], ...]
    gradual: bool  # it changes otherwise than by these steps
    first: float
    last: float


def study(runs: Sequence[Run], baseline: Run | None = None, allow_differences: bool = False) -> Study:
    """Compare the runs as `neq compare` does and keep the runs beside their rows. NeqError as ``compare_runs``."""
    comparison = compare_runs(runs, baseline, allow_differences)
    by_path = {str(run.path): run for run in [*([baseline] if baseline else []), *runs]}
    configurations = tuple(
        Configuration(number, row, tuple(by_path[path] for path in row.runs))
        for number, row in enumerate(comparison.rows, 1)
    )
    return Study(comparison, configurations)


def curve(runs: Sequence[Run], values: Callable[[Run], NDArray[np.float64]]) -> Curve:
    """Fold ``values(run)``, [epochs of that run], over runs; what is not finite counts as not measured."""
    table = np.full((len(runs), max(run.epochs for run in runs)), np.nan)
    for place, run in enumerate(runs):
        table[place, : run.epochs] = values(run)
    table[~(np.abs(table) <= _LARGEST)] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # epochs that no run measured
        return Curve(np.nanmean(table, axis=0), np.nanmin(table, axis=0), np.nanmax(table, axis=0))


def learning_rate(runs: Sequence[Run]) -> LearningRate | None:
    """Find the steps of the learning rate in the longest run; None where no run tells its learning rate."""
    told = [run for run in runs if "lr" in run.rows[0]]
    if not told:
        return None
    rates = max(told, key=lambda run: run.epochs).column("lr").tolist()
    changes = [(epoch, old, new) for epoch, (old, new) in enumerate(pairwise(rates), 2)]
    steps = tuple((epoch, new) for epoch, old, new in changes if _is_step(old, new))
    gradual = len(steps) > _MOST_STEPS or any(old != new and not _is_step(old, new) for _, old, new in changes)
    return LearningRate(steps if len(steps) <= _MOST_STEPS else (), gradual, rates[0], rates[-1])


def _is_step(old: float, new: float) -> bool:
    if not (old > 0 and new > 0 and math.isfinite(old) and math.isfinite(new)):
        return False
    return max(old / new, new / old) >= _STEP
