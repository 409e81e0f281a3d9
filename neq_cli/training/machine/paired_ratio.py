"""What one kind of step takes beside another, measured by turns: the median ratio, and an interval for it.

The interval is of order statistics: it asks nothing of how times are spread, but that rounds do not hang together.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
"""How often the interval is to hold the median ratio, at least; fewer than six rounds cannot tell so much."""


@dataclass(frozen=True)
class PairedRatio:
    """The median of the rounds' ratios, and the interval from ``low`` to ``high``.

    ``confidence``: how often such an interval holds the median of all rounds that could be measured, at least.
    """

    median: float
    low: float
    high: float
    confidence: float

    @property
    def is_noise(self) -> bool:
        """Whether the rounds do not tell the two apart: the interval covers 1."""
        return self.low <= 1 <= self.high


def paired_ratio(ratios: Sequence[float]) -> PairedRatio:
    """Return what the ``ratios`` say, one for each round that measured both kinds of step.

    A round's ratio lies below the median of all as often as above it, so that the number of those below is that of
    heads among as many tosses of a coin. From the k-th smallest to the k-th largest ratio, the interval misses that
    median where fewer than k fall on one side of it: k is the largest by which that happens in at most 5 % of all
    cases, or 1.
    """
    ordered = sorted(ratios)
    rounds = len(ordered)
    rank, missed = 1, _missed(1, rounds)
    while 2 * (rank + 1) <= rounds and _missed(rank + 1, rounds) <= 1 - CONFIDENCE:
        rank += 1
        missed = _missed(rank, rounds)
    return PairedRatio(statistics.median(ordered), ordered[rank - 1], ordered[rounds - rank], 1 - missed)


def _missed(rank: int, rounds: int) -> float:
    """Return how often fewer than ``rank`` of so many tosses are heads, or fewer than ``rank`` tails."""
    few: int = sum(math.comb(rounds, heads) for heads in range(rank))
    return min(1.0, 2 * few / float(2**rounds))
