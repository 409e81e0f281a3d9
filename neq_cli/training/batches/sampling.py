"""In which order images are trained on, what decides their augmentation, and which process takes which of them.

By hand: torchdata's stateful loaders resume with the same workers and processes only; this order follows from seed and
epoch alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from neq_cli.training.data.images import Key


@dataclass(frozen=True)
class Share:
    """What one of several processes does: it is number ``rank``, from 0, of ``processes``.

    ``local_processes`` of them run on this machine and share its memory.
    """

    rank: int = 0
    processes: int = 1
    local_processes: int = 1

    def part(self, size: int) -> slice:
        """Return this process's part of ``size`` things in a row: all parts together are all, no two differ by 2."""
        least, more = divmod(size, self.processes)
        start = self.rank * least + min(self.rank, more)
        return slice(start, start + least + (self.rank < more))


ALONE = Share()


class ShuffledSampler(Sampler[Key]):
    """Every image once, in an order of its own each epoch, with the random integer that decides its augmentation.

    Order and integers follow from the seed and ``epoch`` alone, the number of epochs begun: set it to go on from there,
    and ``consumed`` to leave out as many images of the next pass as were trained on. A step of all processes takes one
    run of images in that order, ``batch_size`` for each process, the first for rank 0; the rest that fills no such step
    is left out.
    """

    def __init__(self, size: int, seed: int, batch_size: int = 1, share: Share = ALONE) -> None:
        self.size = size
        self.seed = seed
        self.batch_size = batch_size
        self.share = share
        self.epoch = 0
        self.consumed = 0

    def __len__(self) -> int:
        return self.steps() * self.batch_size

    def __iter__(self) -> Iterator[Key]:
        order, draws = self.begin()
        return zip(order.tolist(), draws.tolist(), strict=True)

    def steps(self, consumed: int = 0) -> int:
        """Return how many steps are left of an epoch of whose images all processes have taken ``consumed``."""
        return max(0, self.size - consumed) // (self.batch_size * self.share.processes)

    def position(self, consumed: int) -> Mapping[str, int] | None:
        """Return what finds the place again that a pass has come to, beside the numbers; None: they are enough."""
        return None

    def go_on_at(self, position: Mapping[str, int] | None) -> None:
        """Make use of a ``position`` in the pass that it is of."""

    def begin(self) -> tuple[Tensor, Tensor]:
        """Begin the next epoch; returns order and draws as ``shuffled`` does, of what this process trains on."""
        consumed, self.consumed = self.consumed, 0
        self.epoch += 1
        steps, processes = self.steps(consumed), self.share.processes
        order, draws = (
            values[consumed : consumed + steps * processes * self.batch_size]
            .view(steps, processes, self.batch_size)[:, self.share.rank]
            .flatten()
            for values in shuffled(self.size, self.seed, self.epoch)
        )
        return order, draws


def shuffled(size: int, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
    """Return the positions 0 to ``size`` - 1 in the order of ``epoch``, and as many integers below 2**63 - 1."""
    words = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))
    order = torch.randperm(size, generator=generator)
    draws = torch.randint(2**63 - 1, (size,), generator=generator)
    return order, draws
