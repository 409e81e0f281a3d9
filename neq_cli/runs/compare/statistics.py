"""Means over seeds, exact permutation tests, intervals of differences; beyond a million permutations there is no p.

Nothing is sampled. By hand: scipy.stats.permutation_test gives the same p, as a test shows, but evaluates the statistic
for every permutation, where sums grown value by value take a hundredth of the time.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FEWEST_RUNS = 3
CONFIDENCE = 0.95  # of intervals
CUSTOMARY_LEVEL = 0.05  # of p, below which people call a difference significant
MOST_PERMUTATIONS = 2**20
_LARGEST = 1e150  # its square is a float too
_TIE = 1e-9  # of the sum of magnitudes: sums that differ by less differ by rounding only


@dataclass(frozen=True)
class Summary:
    """Runs folded into one number: sample standard deviation (n - 1), NaN below two runs."""

    mean: float
    std: float
    n: int


@dataclass(frozen=True)
class Difference:
    """How far a group of runs lies from the baseline's."""

    mean: float
    p_value: float | None  # two-sided; None where there is none
    test: str  # "paired" or "unpaired"
    pairs: int  # seeds that both have, 0 where unpaired
    why_no_p: str  # empty, "n too small", "too many permutations"
    interval: tuple[float, float] | None = None  # of ``CONFIDENCE``; None where no spread is known
    least_p: float | None = None  # the smallest p that so many runs can give

    @property
    def is_noise(self) -> bool:
        """Whether the runs do not tell the two apart: no spread is known, 0 is in the interval, or p is not small.

        A p that so few runs could not make smaller says nothing.
        """
        if self.interval is None or self.interval[0] <= 0 <= self.interval[1]:
            return True
        return self.p_value is not None and self.p_value >= CUSTOMARY_LEVEL and not self.is_least_p

    @property
    def is_least_p(self) -> bool:
        """Whether no smaller p was possible."""
        return self.p_value is not None and self.least_p is not None and self.p_value <= self.least_p * (1 + _TIE)


def mean_known(values: NDArray[np.float64]) -> float:
    """Mean of what is not NaN; NaN where nothing is left."""
    known = values[~np.isnan(values)]
    with np.errstate(invalid="ignore", over="ignore"):  # infinities of both signs
        return float(known.mean()) if known.size else math.nan


def summarise(values: Sequence[float]) -> Summary:
    """Mean and sample standard deviation of what is not NaN."""
    known = [value for value in values if not math.isnan(value)]
    finite = all(abs(value) <= _LARGEST for value in known)
    # Infinities of both signs have no mean; `fmean` raises for them, and where a sum is too large for a float.
    mean = math.nan if not known else statistics.fmean(known) if finite else sum(value / len(known) for value in known)
    std = statistics.stdev(known) if len(known) > 1 and finite else math.nan
    return Summary(mean, std, len(known))


def difference(group: Sequence[tuple[int | None, float]], baseline: Sequence[tuple[int | None, float]]) -> Difference:
    """Compare runs, each (seed, value) with a finite value, with the baseline's.

    Paired where at least ``FEWEST_RUNS`` seeds stand once in both, or where both have the very same seeds: then the
    difference is the mean over those seeds, and p comes from all sign flips. Otherwise it is the difference of the
    means, and p comes from all ways of dealing the values into groups of these sizes. Pairs take out what the seed
    itself does (the same first weights, the same order of images), so they tell smaller differences apart.

    The interval is Student's of the paired differences, Welch's of unpaired ones: it takes values for normally
    distributed, which p does not, and there is one from two runs a side on.
    """
    shared = _shared_seeds(group, baseline)
    if len(shared) >= FEWEST_RUNS or (shared and len(shared) == len(group) == len(baseline)):
        of_group, of_baseline = dict(group), dict(baseline)
        differences = [of_group[seed] - of_baseline[seed] for seed in shared]
        mean = statistics.fmean(differences)
        interval = paired_interval(differences)
        if len(shared) < FEWEST_RUNS:
            return Difference(mean, None, "paired", len(shared), "n too small", interval)
        p_value = paired_p_value(differences)
        why = "" if p_value is not None else "too many permutations"
        return Difference(mean, p_value, "paired", len(shared), why, interval, 2 / 2 ** len(shared))
    values, others = [value for _, value in group], [value for _, value in baseline]
    mean = statistics.fmean(values) - statistics.fmean(others)
    interval = unpaired_interval(values, others)
    if min(len(values), len(others)) < FEWEST_RUNS:
        return Difference(mean, None, "unpaired", 0, "n too small", interval)
    p_value = unpaired_p_value(values, others)
    why = "" if p_value is not None else "too many permutations"
    least = (2 if len(values) == len(others) else 1) / math.comb(len(values) + len(others), len(values))
    return Difference(mean, p_value, "unpaired", 0, why, interval, least)


def paired_interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """Return Student's interval of the mean of paired differences; None of one, or where a float cannot hold it."""
    if len(differences) < 2 or not _are_moderate(differences):
        return None
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return _around(statistics.fmean(differences), error, len(differences) - 1)


def unpaired_interval(values: Sequence[float], others: Sequence[float]) -> tuple[float, float] | None:
    """Return Welch's interval of the difference of the means; None where a side has one value, or too large ones."""
    if min(len(values), len(others)) < 2 or not _are_moderate([*values, *others]):
        return None
    parts = [(statistics.variance(side) / len(side), len(side) - 1) for side in (values, others)]
    square = sum(part for part, _ in parts)
    # Welch and Satterthwaite: the freedom of the sum of two variances, each as well known as its runs make it.
    weights = sum((part / square) ** 2 / freedom for part, freedom in parts) if square else 1.0
    return _around(statistics.fmean(values) - statistics.fmean(others), math.sqrt(square), 1 / weights)


def _are_moderate(values: Sequence[float]) -> bool:
    return all(abs(value) <= _LARGEST for value in values)


def _around(mean: float, error: float, freedom: float) -> tuple[float, float]:
    if not error:
        return mean, mean
    from scipy.special import stdtrit  # takes a moment, and few commands need it

    half = float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * error
    return mean - half, mean + half


def paired_p_value(differences: Sequence[float]) -> float | None:
    """Exact two-sided sign-flip test of paired differences; None beyond ``MOST_PERMUTATIONS``.

    Where the two do not differ, each difference is as likely to have the other sign. p is the share of the 2^n
    assignments of signs whose sum is at least as far from zero as the one seen. The one seen and its mirror image
    always count, so p is never below 2 / 2^n: 0.25 for three pairs, 0.0625 for five, 0.03125 for six.
    """
    if 2 ** len(differences) > MOST_PERMUTATIONS:
        return None
    sums = np.zeros(1)
    for value in differences:
        sums = np.concatenate([sums + value, sums - value])
    tolerance = _TIE * sum(map(abs, differences))
    return float(np.mean(np.abs(sums) >= abs(sum(differences)) - tolerance))


def unpaired_p_value(values: Sequence[float], others: Sequence[float]) -> float | None:
    """Exact two-sided permutation test of a difference of means; None beyond ``MOST_PERMUTATIONS``.

    Where the two do not differ, every way of dealing all values into groups of these sizes is as likely. p is the
    share of them whose means are at least as far apart as those seen: never below 1 / C(n + m, n), and never below
    2 / C(2n, n) where both have n runs (0.1 for three and three, 0.0079 for five and five).
    """
    few, many = sorted((list(values), list(others)), key=len)
    pool = few + many
    if math.comb(len(pool), len(few)) > MOST_PERMUTATIONS:
        return None
    # sums[k] holds the sum of every subset of k values, grown value by value.
    sums = [np.zeros(1)] + [np.zeros(0)] * len(few)
    for value in pool:
        for size in range(len(few), 0, -1):
            sums[size] = np.concatenate([sums[size], sums[size - 1] + value])
    # With the total fixed, the means lie as far apart as the smaller group's sum lies from its expected share.
    expected = sum(pool) * len(few) / len(pool)
    tolerance = _TIE * sum(map(abs, pool))
    return float(np.mean(np.abs(sums[-1] - expected) >= abs(sum(few) - expected) - tolerance))


def _shared_seeds(group: Sequence[tuple[int | None, float]], baseline: Sequence[tuple[int | None, float]]) -> list[int]:
    """Seeds that stand in both; none where either has a seed twice, since nobody knows which belongs to which."""
    seeds, others = [seed for seed, _ in group], [seed for seed, _ in baseline]
    if len(set(seeds)) != len(seeds) or len(set(others)) != len(others):
        return []
    return [seed for seed in seeds if seed is not None and seed in others]
