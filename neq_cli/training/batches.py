"""Batches read by worker processes, which need no global random state and whose errors end them at once."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from neq_cli.training.problems import DataError


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


def in_batches(images: Dataset[Any], batch_size: int, workers: int, seed: int, **options: Any) -> Batches:
    """Return ``images``, whatever they yield, in batches read by ``workers`` processes that stay for the next pass."""
    batches = -(-len(images) // batch_size)  # type: ignore[arg-type]
    workers = min(workers, batches)
    with warnings.catch_warnings():
        # How many workers there are is the recipe's decision, also where there are fewer CPUs.
        warnings.filterwarnings("ignore", message=".*worker processes in total")
        return Batches(
            images,
            batch_size,
            num_workers=workers,
            # Workers seed torch, random and NumPy from this; without it passes would draw from the global generator.
            generator=torch.Generator().manual_seed(seed),
            **{"persistent_workers": workers > 0, **options},
        )
