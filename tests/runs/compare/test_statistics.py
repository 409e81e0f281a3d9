from __future__ import annotations

import itertools
import math
import statistics
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import permutation_test, ttest_ind, ttest_rel

from neq_cli.runs.compare.statistics import (
    MOST_PERMUTATIONS,
    Difference,
    difference,
    paired_interval,
    paired_p_value,
    summarise,
    unpaired_interval,
    unpaired_p_value,
)

# Percentages as test sets give them: hundredths, with ties, whose sums no float holds exactly.
hundredths = st.integers(-300, 300)


def test_mean_and_sample_deviation_by_hand() -> None:
    # (1, 2, 4): mean 7/3; squares of deviations 16/9 + 1/9 + 25/9 = 42/9; over n - 1 = 2: 7/3
    summary = summarise([1.0, 2.0, 4.0])
    assert summary.mean == pytest.approx(7 / 3)
    assert summary.std == pytest.approx(math.sqrt(7 / 3))
    assert summary.n == 3


def test_summary_leaves_out_what_was_not_measured() -> None:
    summary = summarise([93.0, math.nan, 95.5])
    assert (summary.mean, summary.n) == (94.25, 2)
    assert summary.std == statistics.stdev([93.0, 95.5])


def test_one_run_has_no_deviation_and_none_no_mean() -> None:
    assert math.isnan(summarise([3.0]).std)
    assert math.isnan(summarise([]).mean)


@given(st.lists(hundredths, min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_paired_p_counts_every_sign_assignment(values: list[int]) -> None:
    # Exact arithmetic, one assignment at a time.
    differences = [Fraction(value, 100) for value in values]
    sums = [
        abs(sum(sign * value for sign, value in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    expected = sum(total >= abs(sum(differences)) for total in sums) / len(sums)
    assert paired_p_value([float(value) for value in differences]) == expected


@given(st.lists(hundredths, min_size=1, max_size=5), st.lists(hundredths, min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_unpaired_p_counts_every_dealing(first: list[int], second: list[int]) -> None:
    values, others = [Fraction(v, 100) for v in first], [Fraction(v, 100) for v in second]
    pool = values + others

    def distance(chosen: tuple[int, ...]) -> Fraction:
        group = [pool[index] for index in chosen]
        rest = [value for index, value in enumerate(pool) if index not in chosen]
        return abs(sum(group, Fraction(0)) / len(group) - sum(rest, Fraction(0)) / len(rest))

    seen = distance(tuple(range(len(values))))
    dealings = list(itertools.combinations(range(len(pool)), len(values)))
    expected = sum(distance(chosen) >= seen for chosen in dealings) / len(dealings)
    assert unpaired_p_value([float(v) for v in values], [float(v) for v in others]) == pytest.approx(
        expected, abs=1e-12
    )


@pytest.mark.parametrize(("pairs", "smallest"), [(3, 0.25), (5, 0.0625), (6, 0.03125)])
def test_smallest_p_of_pairs(pairs: int, smallest: float) -> None:
    assert paired_p_value([0.1 * (index + 1) for index in range(pairs)]) == smallest


def test_smallest_p_without_pairs() -> None:
    assert unpaired_p_value([1.0, 2.0, 3.0], [4.0, 5.0, 6.0]) == pytest.approx(2 / 20)
    assert unpaired_p_value([1.0, 2.0], [4.0, 5.0, 6.0]) == pytest.approx(1 / 10)


def test_equal_runs_have_p_one() -> None:
    assert paired_p_value([0.0, 0.0, 0.0]) == 1
    assert unpaired_p_value([94.1, 94.1, 94.1], [94.1, 94.1, 94.1]) == 1


def test_beyond_a_million_permutations_there_is_no_p() -> None:
    assert MOST_PERMUTATIONS == 2**20
    assert paired_p_value([1.0] * 20) == 2 / 2**20
    assert paired_p_value([1.0] * 21) is None
    assert unpaired_p_value([1.0] * 12, [2.0] * 12) is None  # C(24, 12) = 2,704,156
    found = difference([(seed, 1.0) for seed in range(21)], [(seed, 2.0) for seed in range(21)])
    assert (found.p_value, found.why_no_p, found.mean) == (None, "too many permutations", -1)


def test_equal_seeds_are_paired() -> None:
    found = difference([(3, 90.5), (1, 94.0), (2, 92.25)], [(1, 93.0), (2, 92.0), (3, 90.0)])
    # By seed: 1.0, 0.25, 0.5. Sums that reach 1.75 in size: +++ and ---.
    assert (found.test, found.pairs, found.p_value) == ("paired", 3, 0.25)
    assert found.mean == pytest.approx(1.75 / 3)


def test_only_shared_seeds_are_paired_where_there_are_enough() -> None:
    group = [(1, 5.0), (2, 6.0), (3, 7.0), (9, 100.0)]
    found = difference(group, [(1, 4.0), (2, 4.0), (3, 4.0), (8, -100.0)])
    assert (found.test, found.pairs, found.mean) == ("paired", 3, 2.0)


def test_two_shared_seeds_among_more_are_not_paired() -> None:
    found = difference([(1, 1.0), (2, 2.0), (3, 3.0)], [(1, 4.0), (2, 5.0), (7, 6.0)])
    assert (found.test, found.pairs, found.mean) == ("unpaired", 0, -3.0)
    assert found.p_value == pytest.approx(0.1)


def test_a_seed_that_stands_twice_is_not_paired() -> None:
    found = difference([(1, 1.0), (1, 2.0), (2, 3.0), (3, 3.0)], [(1, 4.0), (2, 5.0), (3, 6.0)])
    assert (found.test, found.mean) == ("unpaired", 2.25 - 5.0)


@pytest.mark.parametrize("runs", [1, 2])
def test_below_three_runs_n_is_too_small(runs: int) -> None:
    baseline = [(seed, 1.0) for seed in range(3)]
    few = [(seed, 2.0) for seed in range(runs)]
    for found in (difference(few, baseline), difference(few, baseline[:runs]), difference(baseline, few)):
        assert (found.p_value, found.why_no_p) == (None, "n too small")
    assert difference(few, baseline[:runs]).test == "paired"


@pytest.mark.parametrize("seed", range(4))
def test_p_values_are_those_of_scipy(seed: int) -> None:
    """Of the distance as scipy's statistic: its own two-sided p of unequal groups is twice the smaller tail's."""
    random = np.random.default_rng(seed)
    values, others = random.normal(1, 1, 6), random.normal(0, 1, 6 if seed % 2 else 4)
    found = permutation_test(
        (values, others),
        lambda one, other, axis: np.abs(one.mean(axis) - other.mean(axis)),
        permutation_type="independent",
        alternative="greater",
        n_resamples=np.inf,
        vectorized=True,
    )
    assert unpaired_p_value(list(values), list(others)) == pytest.approx(found.pvalue)
    differences = values - random.normal(0, 1, 6)
    found = permutation_test(
        (differences, np.zeros(6)),
        lambda one, other, axis: np.abs((one - other).sum(axis)),
        permutation_type="samples",
        alternative="greater",
        n_resamples=np.inf,
        vectorized=True,
    )
    assert paired_p_value(list(differences)) == pytest.approx(found.pvalue)


@pytest.mark.parametrize("runs", [2, 3, 5, 40])
def test_intervals_are_those_of_scipy(runs: int) -> None:
    random = np.random.default_rng(runs)
    values, others = random.normal(91, 0.5, runs), random.normal(90, 2, runs + 1)
    found = ttest_ind(values, others, equal_var=False).confidence_interval(0.95)
    assert unpaired_interval(list(values), list(others)) == pytest.approx((found.low, found.high))
    found = ttest_rel(values, others[:-1]).confidence_interval(0.95)
    assert paired_interval(list(values - others[:-1])) == pytest.approx((found.low, found.high))


def test_a_difference_has_the_interval_of_its_test() -> None:
    group, baseline = [(1, 93.0), (2, 95.0), (3, 97.0)], [(1, 91.0), (2, 92.0), (3, 93.0)]
    # 2, 3 and 4 by seed: 3 ± t(2) / sqrt(3), and t(2) is sqrt(2 * 0.95^2 / (1 - 0.95^2)).
    half = math.sqrt(2 * 0.95**2 / (1 - 0.95**2)) / math.sqrt(3)
    assert difference(group, baseline).interval == pytest.approx((3 - half, 3 + half))
    apart = difference(group, [(seed + 9, value) for seed, value in baseline])
    assert apart.interval == pytest.approx(unpaired_interval([93, 95, 97], [91, 92, 93]))
    assert difference(group[:2], baseline[:2]).interval == pytest.approx(paired_interval([2.0, 3.0]))
    assert difference(group[:1], baseline[:1]).interval is None
    assert difference(group, baseline[:1]).interval is None
    assert difference([(1, 1e300), (2, -1e300)], [(1, 0.0), (2, 1e300)]).interval is None
    assert difference([(1, 5.0), (2, 5.0)], [(3, 4.0), (4, 4.0)]).interval == (1, 1)


@pytest.mark.parametrize(
    ("mean", "p_value", "interval", "least", "is_noise"),
    [
        (0.84, None, (-18.6, 20.3), None, True),  # two runs
        (0.84, None, None, None, True),  # one run
        (3.0, 0.25, (0.5, 5.5), 0.25, False),  # three pairs cannot give less
        (3.0, 0.5, (0.5, 5.5), 0.25, True),
        (3.0, 0.03, (0.5, 5.5), 0.01, False),
        (3.0, 0.06, (-0.1, 6.1), 0.01, True),
        (-3.0, None, (-5.5, -0.5), 2**-21, False),  # too many permutations
    ],
)
def test_what_is_noise(
    mean: float, p_value: float | None, interval: tuple[float, float] | None, least: float | None, is_noise: bool
) -> None:
    assert Difference(mean, p_value, "paired", 3, "", interval, least).is_noise is is_noise


@pytest.mark.parametrize("runs", [3, 4, 5])
def test_the_least_p_is_that_of_values_that_do_not_overlap(runs: int) -> None:
    group = [(seed, 10.0 + seed) for seed in range(runs)]
    for baseline in ([(seed, 1.0 - seed / 9) for seed in range(runs)], [(seed + 50, seed / 9) for seed in range(3)]):
        found = difference(group, baseline)
        assert found.p_value == pytest.approx(found.least_p)
        assert found.is_least_p
