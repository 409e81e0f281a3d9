"""Time and work until a run first reaches the baseline's final metric, and how good each is after equal time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from neq_cli.runs.compare.statistics import Summary, summarise
from neq_cli.runs.store.run import Run
from neq_cli.text import ratio_percent


@dataclass(frozen=True)
class Goal:
    """What the runs of a configuration take to the baseline's final metric.

    ``flops`` are multiply-adds on one sample, forward passes and executed back-propagation of all epochs up to there,
    and ``flops_percent`` is of the baseline's whole training; both are NaN where runs do not tell ``training_flops``.
    """

    target: float  # mean over the baseline's runs of the last value measured
    reached: int  # runs that came to it; the rest of this is over these
    seconds: Summary
    flops: Summary
    flops_percent: float
    equal_seconds: float  # the shortest of all configurations' trainings, mean over its runs
    at_equal_time: Summary  # the last value measured by then, over all runs


def goal(runs: Sequence[Run], baseline: Sequence[Run], target: float, equal_seconds: float) -> Goal:
    """Return how the ``runs`` of one configuration do beside those of the ``baseline``."""
    reached = [(run, epoch) for run in runs if (epoch := _first_epoch(run, target)) is not None]
    flops = summarise([float(training_flops(run)[: epoch + 1].sum()) for run, epoch in reached])
    whole = summarise([float(training_flops(run).sum()) for run in baseline])
    return Goal(
        target=target,
        reached=len(reached),
        seconds=summarise([float(_elapsed(run)[epoch]) for run, epoch in reached]),
        flops=flops,
        flops_percent=ratio_percent(flops.mean, whole.mean),
        equal_seconds=equal_seconds,
        at_equal_time=summarise([_value_at(run, equal_seconds) for run in runs]),
    )


def training_flops(run: Run) -> NDArray[np.float64]:
    """Return what each epoch takes on one sample, [epochs], forward and backward as executed; NaN where not told.

    Multiply-adds; an observation takes the part of them that it is of an epoch.
    """
    passed = run.passed_epochs
    if passed is None or "flops_forward" not in run.rows[0]:  # the latter of an earlier version
        return np.full(run.epochs, math.nan)
    return (run.column("flops_forward") + run.column("flops_executed")) * np.diff(passed, prepend=0.0)


def _first_epoch(run: Run, target: float) -> int | None:
    # The mean of runs that are alike is rounded. NaN is neither at least nor at most anything.
    values, rounding = run.column(run.metric), 1e-9 * abs(target)
    good = values <= target + rounding if run.lower_is_better else values >= target - rounding
    found = np.flatnonzero(good)
    return int(found[0]) if found.size else None


def _elapsed(run: Run) -> NDArray[np.float64]:
    return np.nancumsum(run.column("epoch_seconds"))


def _value_at(run: Run, seconds: float) -> float:
    # A clock that has ticked as long to the last digit has ticked as long.
    values = run.column(run.metric)[_elapsed(run) <= seconds * (1 + 1e-9)]
    known = values[~np.isnan(values)]
    return float(known[-1]) if known.size else math.nan
