"""Batches of images that were decoded once, in the first pass, and are augmented and normalised where they train.

The way of an image, and who does what of it in which process:

    sources       a file or a row of an array         -> opened
    images        ReadImages, ImagesInMemory          -> decoded, resized (``fixed``)
    workers       each core decodes whole batches     -> the first pass alone, where images are cached
    cache_place   decides: device, memory or none
    cache         CachedBatches: one tensor, on the device or in memory; CachedSeparately: sizes differ
    transforms    augmented and normalised: cached ones by whole batches where they train, others one by one
    loaders       batches in the order of seed and epoch (sampling), the same with a cache and without

By hand: PyTorch's loaders read every image anew in every epoch, and its workers hold a copy each of what they cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from neq_cli.errors import TrainingError
from neq_cli.training.batches.sampling import ShuffledSampler
from neq_cli.training.batches.workers import in_batches
from neq_cli.training.data.images import Images, ImagesInMemory, ReadImages
from neq_cli.training.machine.limits import usable_cores
from neq_cli.training.startup import READING, Startup

_LEAST_SHARE = 100
"""Images for which one more process is worth its start."""


@dataclass(frozen=True)
class Decoding:
    """How images are decoded before they are cached.

    ``sharing``: how many processes that do so have this machine's cores in common.
    """

    batch_size: int
    workers: int
    seed: int
    sharing: int = 1
    startup: Startup = field(default_factory=Startup)


@dataclass(frozen=True)
class _CachedTensors:
    """Decoded images [all, channels, height, width], labels [all] on the CPU; image i of the part is at ``rows[i]``."""

    images: Tensor
    labels: Tensor
    rows: Tensor


class CachedBatches:
    """Batches of (images [batch, channels, height, width], labels [batch]) on ``device``, in any number of passes.

    Images are decoded in the first pass and cached at ``place``. With a ``sampler`` they are shuffled, augmented where
    the part is, and come in whole batches of the sampler's only. Raises DataError as the part does, and TrainingError
    where they do not fit.
    """

    def __init__(
        self,
        images: Images,
        place: torch.device,
        device: torch.device,
        decoding: Decoding,
        sampler: ShuffledSampler | None = None,
    ) -> None:
        self.images = images
        self.place = place
        self.device = device
        self.decoding = decoding
        self.sampler = sampler
        self._cached: _CachedTensors | None = None

    def __len__(self) -> int:
        if self.sampler is not None:
            return self.sampler.steps()
        return -(-len(self.images) // self.decoding.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if not len(self.images):
            return
        if self._cached is None:
            with self.decoding.startup.part(READING):
                self._cached = _decoded(self.images, self.place, self.decoding)
        order = draws = torch.arange(len(self.images))  # without a sampler nothing is augmented, so no draw is used
        if self.sampler is not None:
            order, draws = self.sampler.begin()
        # What the pass needs is sent at once, so that no batch waits for the device.
        rows = self._cached.rows[order]
        labels = None if self.images.masked else self._cached.labels[rows].to(self.device)
        own_draws, draws, rows = draws.tolist(), draws.to(self.device), rows.to(self.place)
        preparation, size = self.images.preparation, self.decoding.batch_size
        for start in range(0, len(order), size):
            batch = slice(start, start + size)
            images = self._taken(self._cached.images, rows[batch])
            if self.images.augmented:
                images = preparation.varied(images, draws[batch])
            images = preparation.finished(images)
            # Masks are as large as images, and so sent batch by batch.
            targets = self._taken(self._cached.labels, rows[batch]) if labels is None else labels[batch]
            if self.images.augmented and preparation.completes:
                images, targets = preparation.completed(images, targets, own_draws[batch])
            yield images, targets

    def _taken(self, images: Tensor, rows: Tensor) -> Tensor:
        """Return copies of the images at ``rows`` on the device: a model may overwrite its input in place."""
        if self.device.type != "cuda" or self.place.type == "cuda":
            return images.index_select(0, rows).to(self.device)
        pinned = torch.empty((len(rows), *images.shape[1:]), dtype=images.dtype, pin_memory=True)
        return torch.index_select(images, 0, rows, out=pinned).to(self.device, non_blocking=True)


class CachedSeparately:
    """Batches of images that may differ in size, decoded in the first pass; workers augment them in each.

    For augmentation that cuts and scales images one by one, on the CPU.
    """

    def __init__(self, images: ReadImages, decoding: Decoding, sampler: ShuffledSampler, *, pin_memory: bool) -> None:
        self.images = copy(images)
        self.decoding = decoding
        self.sampler = sampler
        self.batches = in_batches(
            self.images,
            decoding.batch_size,
            decoding.workers,
            decoding.seed,
            sampler=sampler,
            drop_last=True,
            pin_memory=pin_memory,
        )

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if not isinstance(self.images.source, _Decoded):
            # Before the first pass over ``batches``: workers take the images along when they start.
            with self.decoding.startup.part(READING):
                self.images.read_from(_Decoded(self.images, self.decoding))
        return iter(self.batches)


class _Decoded:
    """Images of several sizes in a few long tensors, as many as they were read in batches: a dataset of its own."""

    def __init__(self, images: ReadImages, decoding: Decoding) -> None:
        self.masked = images.masked
        self.strips: list[Tensor] = []
        self.masks: list[Tensor] = []
        self.found: list[tuple[int, int, tuple[int, ...], int]] = []  # strip, start, shape, label
        for strip, shapes, targets in _read(images, decoding):
            start = 0
            labels = [0] * len(shapes) if self.masked else targets.tolist()
            for shape, label in zip(shapes.tolist(), labels, strict=True):
                self.found.append((len(self.strips), start, tuple(shape), label))
                start += shape[0] * shape[1] * shape[2]
            self.strips.append(strip.clone())  # out of the memory that is shared with the worker
            if self.masked:
                self.masks.append(targets.clone())

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        strip, start, (channels, height, width), label = self.found[index]
        pixels = height * width
        image = self.strips[strip].narrow(0, start, channels * pixels).view(channels, height, width)
        if not self.masked:
            return image, label
        # All images have the same channels, so that masks begin at as large a part of their strip.
        return image, self.masks[strip].narrow(0, start // channels, pixels).view(height, width)


def _decoded(images: Images, place: torch.device, decoding: Decoding) -> _CachedTensors:
    everything = torch.arange(len(images))
    if isinstance(images, ImagesInMemory) and images.unchanged:
        if place.type == "cpu":
            return _CachedTensors(images.images, images.labels, images.indices)
        chosen = images.images[images.indices]
        return _CachedTensors(
            _room(len(images), chosen, place).copy_(chosen), images.labels[images.indices], everything
        )
    cached: Tensor | None = None
    labels, start = [], 0
    for batch, batch_labels in _read(images, decoding):
        if cached is None:
            cached = _room(len(images), batch, place)
        cached[start : start + len(batch)] = batch
        start += len(batch)
        labels.append(batch_labels.clone())
    assert cached is not None  # an empty part is never decoded
    return _CachedTensors(cached, torch.cat(labels), everything)


def _room(count: int, batch: Tensor, place: torch.device) -> Tensor:
    try:
        return torch.empty((count, *batch.shape[1:]), dtype=batch.dtype, device=place)
    except RuntimeError as error:  # torch.OutOfMemoryError is one, and so is what the CPU's allocator raises
        raise TrainingError(f"data.cache: no room for {count} images on {place}; use none") from error


def _read(images: Images, decoding: Decoding) -> Iterator[tuple[Tensor, ...]]:
    """Yield what ``_Fixed`` makes of one batch after the other, decoded by processes that then end.

    By as many as there are cores, for it is done once: threads would not do, as most of the work on a small image is
    Python's. ``workers`` 0 asks for none. Smaller batches leave what they hold together as it is.
    """
    processes = _processes(len(images), decoding)
    size = max(1, decoding.batch_size * decoding.workers // processes) if processes else decoding.batch_size
    options = {"sampler": images.keys, "collate_fn": _as_it_is, "persistent_workers": False}
    batches = in_batches(_Fixed(images), size, processes, decoding.seed, **options)
    for number, batch in enumerate(batches, 1):
        decoding.startup.count(READING, min(number * size, len(images)), len(images))
        yield batch


def _processes(images: int, decoding: Decoding) -> int:
    if not decoding.workers:
        return 0
    worthwhile = -(-images // _LEAST_SHARE)
    return max(decoding.workers, min(usable_cores() // decoding.sharing, worthwhile))


class _Fixed(Dataset[Any]):
    """A part's images before augmentation, batch by batch; those that differ in size end to end, with their shapes."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, positions: Sequence[Any]) -> tuple[Tensor, ...]:
        images, targets = self.images.fixed(positions)
        if isinstance(images, Tensor):
            return images, targets
        if isinstance(targets, list):
            targets = torch.cat([mask.flatten() for mask in targets])
        return torch.cat([image.flatten() for image in images]), torch.tensor([i.shape for i in images]), targets


def _as_it_is(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return batch
