"""What the epoch that ``Freezer.step()`` has just ended was trained with, for who records it; no more is kept of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from neq_cli.freezing.flops import Flops
from neq_cli.freezing.policies import Observation


@dataclass(frozen=True)
class Passed:
    """An epoch, or whatever lies between two calls of ``step()``.

    ``epoch``: its number, from 1. ``trained``: the sets that were in force, by layer (bool, [neurons]), and ``flops``
    what one sample's back-propagation cost with them. ``observations``: what ``step()`` returned. ``probe_seconds``:
    what it took, with all that keeping frozen rows and timing kernels took during the epoch.
    """

    epoch: int
    trained: Mapping[str, Tensor]
    flops: Flops
    observations: Mapping[str, Observation]
    probe_seconds: float
