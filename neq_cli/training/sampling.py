"""In which order images are trained on, and the random integers that decide their augmentation: by seed and epoch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from neq_cli.training.images import Key


class ShuffledSampler(Sampler[Key]):
    """Every image once, in an order of its own each epoch, with the random integer that decides its augmentation.

    Order and integers follow from the seed and ``epoch`` alone, the number of epochs begun: set it to go on from there.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Key]:
        order, draws = self.begin()
        return zip(order.tolist(), draws.tolist(), strict=True)

    def begin(self) -> tuple[Tensor, Tensor]:
        """Begin the next epoch; returns its order and draws as ``shuffled`` does."""
        self.epoch += 1
        return shuffled(self.size, self.seed, self.epoch)


def shuffled(size: int, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
    """Return the positions 0 to ``size`` - 1 in the order of ``epoch``, and as many integers below 2**63 - 1."""
    words = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))
    order = torch.randperm(size, generator=generator)
    draws = torch.randint(2**63 - 1, (size,), generator=generator)
    return order, draws
