from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from neq_cli.training.machine.paired_ratio import CONFIDENCE, paired_ratio


@pytest.mark.parametrize("rounds", [*range(6, 31), 57])
def test_the_interval_leaves_out_half_of_the_rest_on_either_side(rounds: int) -> None:
    """With scipy's distribution of the number of rounds below the median, which is that of heads among tosses."""
    ratios = np.random.default_rng(rounds).lognormal(sigma=0.2, size=rounds)
    found = paired_ratio(ratios.tolist())
    rank = int(stats.binom.ppf((1 - CONFIDENCE) / 2, rounds, 0.5))
    assert (found.low, found.high) == (np.sort(ratios)[rank - 1], np.sort(ratios)[-rank])
    assert found.median == np.median(ratios)
    assert found.confidence == pytest.approx(1 - 2 * stats.binom.cdf(rank - 1, rounds, 0.5), abs=1e-12)
    assert found.confidence >= CONFIDENCE


def test_it_holds_the_median_as_often_as_it_says() -> None:
    """Of skewed ratios too: the interval is asked for nothing but its coverage."""
    draws = np.random.default_rng(0).exponential(size=(4000, 9))
    found = [paired_ratio(row.tolist()) for row in draws]
    held = np.mean([each.low <= math.log(2) <= each.high for each in found])
    assert found[0].confidence == 1 - 2 * 10 / 512
    assert abs(held - found[0].confidence) < 0.012  # four standard deviations of 4000 draws


@pytest.mark.parametrize(("rounds", "confidence"), [(1, 0), (2, 0.5), (3, 0.75), (5, 0.9375), (6, 0.96875)])
def test_few_rounds_give_their_whole_span_and_say_how_sure_it_is(rounds: int, confidence: float) -> None:
    found = paired_ratio([1 + number / 10 for number in range(rounds)])
    assert (found.low, found.high, found.confidence) == (1, 1 + (rounds - 1) / 10, confidence)


def test_what_covers_one_is_noise() -> None:
    assert paired_ratio([0.851, 1.295, 1.02, 0.97, 1.1, 0.99]).is_noise
    assert not paired_ratio([0.8, 0.85, 0.81, 0.83, 0.84, 0.82]).is_noise
    assert not paired_ratio([1.1, 1.2, 1.15, 1.05, 1.3, 1.01]).is_noise
    # Of nine rounds one on either side may be disturbed.
    assert not paired_ratio([0.8] * 8 + [1.5]).is_noise
    assert paired_ratio([0.8] * 7 + [1.5] * 2).is_noise
