"""Batches of data: shuffled and augmented by seed and epoch alone, however many processes read them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from neq_cli.training.data import Data
from neq_cli.training.images import Images, KeptImages, Key, StoredImages
from neq_cli.training.problems import DataError, RecipeValueError

_KEPT_BYTES = 2**28  # a probe set up to this size stays in memory: it is read every epoch


class Batches(DataLoader[Any]):
    """A DataLoader of (images [batch, channels, height, width], labels [batch]) whose workers' errors end at once."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        try:
            yield from super().__iter__()
        except DataError as error:
            # Its traceback holds the workers, and torch waits five seconds for each when it is let go (torch 2.15).
            error.__traceback__ = None
            message = str(error)
        else:
            return
        raise DataError(message)


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
        self.epoch += 1
        words = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))
        order = torch.randperm(self.size, generator=generator)
        draws = torch.randint(2**63 - 1, (self.size,), generator=generator)
        return zip(order.tolist(), draws.tolist(), strict=True)


@dataclass(frozen=True)
class Loaders:
    """The three parts in batches, on the CPU, pinned for a GPU."""

    train: Batches  # whole batches only
    probe: Batches
    test: Batches

    def start_epoch(self, epoch: int) -> None:
        """Make the next pass over ``train`` that of ``epoch``, counted from 1; without it passes follow each other."""
        sampler = self.train.sampler
        if isinstance(sampler, ShuffledSampler):
            sampler.epoch = epoch - 1


def make_loaders(data: Data, batch_size: int, workers: int, seed: int, device: torch.device) -> Loaders:
    """Return the batches of a run on ``device``. The rest of an epoch that fills no batch is left out of it.

    A last batch of few images would make BatchNorm's statistics, and so the step, an outlier. Images in memory are
    prepared in the main process, which is faster than handing them over, unless they are resized. No pass touches the
    global random state. Raises RecipeValueError where ``batch_size`` is larger than the training data.
    """
    if batch_size > len(data.train):
        raise RecipeValueError(
            "batch_size",
            f"{batch_size} images per step, but {data.name} has {len(data.train)} to train on "
            f"(and {len(data.probe)} in the probe set); lower it",
        )
    shuffled = ShuffledSampler(len(data.train), seed)
    train = _loader(data.train, batch_size, workers, seed, device, sampler=shuffled, drop_last=True)
    test = _loader(data.test, batch_size, workers, seed, device)
    kept = 4 * prod(data.image_shape) * len(data.probe) <= _KEPT_BYTES
    probed = KeptImages(data.probe) if kept else data.probe
    probe = _loader(probed, batch_size, 0 if kept else workers, seed, device)
    return Loaders(train, probe, test)


def _loader(
    images: Images | KeptImages, batch_size: int, workers: int, seed: int, device: torch.device, **options: Any
) -> Batches:
    if isinstance(images, StoredImages) and not images.resizes:
        workers = 0
    batches = -(-len(images) // batch_size)
    workers = min(workers, batches)
    with warnings.catch_warnings():
        # How many workers there are is the recipe's decision, also where there are fewer CPUs.
        warnings.filterwarnings("ignore", message=".*worker processes in total")
        return Batches(
            cast("Dataset[Any]", images),
            batch_size,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            # Workers seed torch, random and NumPy from this; without it passes would draw from the global generator.
            generator=torch.Generator().manual_seed(seed),
            **options,
        )
