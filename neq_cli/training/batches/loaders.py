"""The batches of a run: shuffled and augmented by seed and epoch alone, on any number of processes and workers."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

import torch

from neq_cli.errors import RecipeValueError
from neq_cli.recipe.values import Cache
from neq_cli.training.batches.cache import CachedBatches, CachedSeparately, Decoding
from neq_cli.training.batches.cache_place import choose_cache
from neq_cli.training.batches.sampling import ALONE, Share, ShuffledSampler
from neq_cli.training.batches.streaming import StreamedSampler
from neq_cli.training.batches.workers import Batches, in_batches
from neq_cli.training.data.images import CachedItems, Images, ImagesInMemory, ReadImages
from neq_cli.training.data.parts import Data
from neq_cli.training.data.streamed_images import StreamedImages
from neq_cli.training.startup import Startup

_KEPT_BYTES = 2**28  # a probe set up to this size stays in memory: it is read every epoch

Passes = Batches | CachedBatches | CachedSeparately


@dataclass(frozen=True)
class Loaders:
    """The three parts in batches (float images [batch, channels, height, width], int64 labels [batch]).

    In place of labels stand uint8 masks [batch, height, width] where the data has them, and shares of classes, float
    [batch, classes], where training images are mixed. Test images of masks are whole, those of one batch of one size.
    On the training device where images are cached, else on the CPU, pinned for a GPU. Of several processes each has its
    share: no image is in two of them. Items that are taken as they are come in batches of whatever their dataset makes.
    """

    train: Passes  # whole batches only, as many in each process
    probe: Passes
    test: Passes  # empty where there are more processes than images
    note: str  # where images are cached, and why: "data.cache: memory, 184 MB"
    place: Literal["memory", "device", "none"] = "none"  # where

    def start_epoch(self, epoch: int, consumed: int = 0) -> None:
        """Make the next pass over ``train`` that of ``epoch``, counted from 1; without it passes follow each other.

        It leaves out the first ``consumed`` images of the epoch, counted over all processes, however many there were.
        """
        sampler = self._sampler()
        sampler.epoch, sampler.consumed = epoch - 1, consumed

    def steps(self, consumed: int = 0) -> int:
        """Return how many batches such a pass has, in each process; ``len(train)`` is that of a whole epoch."""
        return self._sampler().steps(consumed)

    @property
    def streamed(self) -> bool:
        """Whether training images are read as they come, whatever is cached."""
        return isinstance(self._sampler(), StreamedSampler)

    def position(self, consumed: int) -> Mapping[str, int] | None:
        """Return where in its files a pass over a stream is after ``consumed`` images; None of all other data."""
        return self._sampler().position(consumed)

    def go_on_at(self, position: Mapping[str, int] | None) -> None:
        """Begin the pass that a ``position`` is of there, and read nothing of what comes before."""
        self._sampler().go_on_at(position)

    def _sampler(self) -> ShuffledSampler:
        sampler = self.train.sampler
        assert isinstance(sampler, ShuffledSampler)
        return sampler


def make_loaders(
    data: Data,
    batch_size: int,
    workers: int,
    seed: int,
    device: torch.device,
    *,
    cache: Cache = "auto",
    share: Share = ALONE,
    startup: Startup | None = None,
) -> Loaders:
    """Return the batches of a run on ``device``, the same ones whatever ``cache`` and ``workers`` are.

    ``share`` tells which of them, of ``batch_size`` images each, are this process's: step by step, those of W processes
    are together what one process with W times the ``batch_size`` would have. The rest of an epoch that fills no step
    of all is left out of it: a batch of few images would make BatchNorm's statistics, and so the step, an outlier.
    Nothing is decoded before the first pass, which tells ``startup`` how far it is, and no pass touches the global
    random state. Raises RecipeValueError where the training or the probe images are too few, or where ``cache`` cannot
    be had.
    """
    check_sizes(data, batch_size, share.processes)
    data = replace(data, probe=_part(data.probe, share), test=_part(data.test, share))
    choice = choose_cache(data, cache, device, share.local_processes)
    if isinstance(data.train, StreamedImages):
        shuffled: ShuffledSampler = StreamedSampler(data.train, seed, batch_size, share)
    else:
        shuffled = ShuffledSampler(len(data.train), seed, batch_size, share)
    startup = Startup() if startup is None else startup
    reading = Decoding(batch_size, workers, seed, share.local_processes, startup)
    # The probe set is so small that starting workers for it takes longer than reading it.
    item_bytes = data.image_bytes if data.as_it_is or data.image_shape is None else 4 * prod(data.image_shape)
    few = item_bytes * len(data.probe) <= _KEPT_BYTES
    probe_reading = replace(reading, workers=0 if few else workers)
    if choice.place == "none":
        probed = CachedItems(data.probe) if few else data.probe
        return Loaders(
            _read(data.train, reading, device, shuffled),
            _read(probed, probe_reading, device),
            _read(data.test, reading, device),
            choice.note,
        )
    place = device if choice.place == "device" else torch.device("cpu")
    return Loaders(
        _cached(data.train, place, device, reading, shuffled),
        CachedBatches(data.probe, place, device, probe_reading),
        _read(data.test, reading, device) if data.test.differ else CachedBatches(data.test, place, device, reading),
        choice.note,
        choice.place,
    )


def tested_once(data: Data, batch_size: int, workers: int, seed: int, device: torch.device) -> Batches:
    """Return the test part in the very batches of a run with one process, read as they are asked for, not kept."""
    return _read(data.test, Decoding(batch_size, workers, seed), device)


def check_sizes(data: Data, batch_size: int, processes: int) -> None:
    """Raise RecipeValueError where the training or the probe images are too few for so many ``processes``."""
    if batch_size * processes > len(data.train):
        where = f" in each of {processes} processes" if processes > 1 else ""
        raise RecipeValueError(
            "batch_size",
            f"{batch_size} images per step{where}, but {data.name} has {len(data.train)} to train on "
            f"(and {len(data.probe)} in the probe set); lower it",
        )
    if len(data.probe) < processes:
        raise RecipeValueError(
            "data.probe_size", f"{len(data.probe)} probe images for {processes} processes; give it at least {processes}"
        )


def _part(images: Images, share: Share) -> Images:
    part = copy(images)
    part.indices = images.indices[share.part(len(images))]
    return part


def _cached(
    images: Images, place: torch.device, device: torch.device, reading: Decoding, sampler: ShuffledSampler
) -> Passes:
    if images.streamed:
        return _read(images, reading, device, sampler)  # they do not come again in this order
    if not images.scales_at_random:
        return CachedBatches(images, place, device, reading, sampler)
    if isinstance(images, ReadImages):
        return CachedSeparately(images, reading, sampler, pin_memory=device.type == "cuda")
    return _read(images, reading, device, sampler)  # in memory already


def _read(
    images: Images | CachedItems, reading: Decoding, device: torch.device, sampler: ShuffledSampler | None = None
) -> Batches:
    # Images in memory are prepared in the main process, which is faster than handing them over, unless it scales them.
    workers = 0 if isinstance(images, ImagesInMemory) and not images.resizes else reading.workers
    keys = images.keys if sampler is None and isinstance(images, Images) else sampler
    order: dict[str, Any] = {"sampler": keys, "drop_last": sampler is not None}
    chosen = images.batches(reading.batch_size) if sampler is None and isinstance(images, Images) else None
    if chosen is not None:
        order = {"batch_sampler": chosen}
    if images.collate is not None:
        order["collate_fn"] = images.collate
    return in_batches(
        images,
        reading.batch_size,
        workers,
        reading.seed,
        pin_memory=device.type == "cuda",
        **order,
    )
