"""The Pareto front: points, such as runs by FLOPs and test metric, that no other is at least as good as in both."""

from __future__ import annotations

import math
from collections.abc import Sequence


def on_front(points: Sequence[tuple[float, float]], lower_is_better: bool = False) -> list[bool]:
    """Return of every (cost, metric) whether it lies on the front: none is as good in both and better in one.

    A smaller cost is better, and a larger metric unless ``lower_is_better``. Equal points lie on it together, those
    that are not finite never do.
    """
    sign = 1.0 if lower_is_better else -1.0
    losses = [(cost, sign * metric) for cost, metric in points]
    order = sorted((index for index, one in enumerate(losses) if all(map(math.isfinite, one))), key=losses.__getitem__)
    front = [False] * len(points)
    least = math.inf  # of the metric, among all that cost no more
    last = (math.nan, math.nan)
    for index in order:
        if losses[index][1] < least or losses[index] == last:
            least, last, front[index] = losses[index][1], losses[index], True
    return front
