"""From pixels to what the network sees: sizes, augmentation, normalisation; whole batches where images are alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as images_functional

_IMAGENET_SIZE = 224
_IMAGENET_RESIZE = 256 / 224  # torchvision's ImageNet tests scale the shorter side to 256 and cut 224 from the middle


@dataclass(frozen=True)
class Preparation:
    """How images are prepared. ``mean`` and ``std`` are per channel, of pixels in [0, 1]; None: not normalised."""

    image_size: int | None = None
    augment: Literal["none", "crop", "cifar", "imagenet"] = "none"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @property
    def size(self) -> int | None:
        """Pixels of a side of what the network sees; None is the images' own size."""
        return _IMAGENET_SIZE if self.image_size is None and self.augment == "imagenet" else self.image_size

    def test(self, images: Tensor) -> Tensor:
        """Prepare uint8 or float images [batch, channels, height, width] without any chance in it."""
        return self._finished(self._resized(images))

    def train(self, images: Tensor, draws: Tensor) -> Tensor:
        """Prepare images with augmentation. ``draws`` [batch] are the random integers, below 2**63, that decide it."""
        if self.augment == "imagenet":
            return self._finished(resized_crop_and_mirror(images, draws, int(self.size or _IMAGENET_SIZE)))
        images = self._resized(images)
        if self.augment == "crop":
            images = crop_and_mirror(images, draws, padding=images.shape[-1] // 8, mirror=False)
        elif self.augment == "cifar":
            images = crop_and_mirror(images, draws, padding=4, mirror=True)
        return self._finished(images)

    def _resized(self, images: Tensor) -> Tensor:
        size = self.size
        if size is None or (tuple(images.shape[-2:]) == (size, size) and self.augment != "imagenet"):
            return images
        shorter = round(size * _IMAGENET_RESIZE) if self.augment == "imagenet" else size
        resized = images_functional.resize(images, [shorter], antialias=True)
        cut: Tensor = images_functional.center_crop(resized, [size, size])
        return cut

    def _finished(self, images: Tensor) -> Tensor:
        images = images_functional.to_dtype(images, torch.float32, scale=True)
        if self.mean is not None and self.std is not None:
            images = images_functional.normalize(images, list(self.mean), list(self.std))
        return images


def crop_and_mirror(images: Tensor, draws: Tensor, *, padding: int, mirror: bool) -> Tensor:
    """Pad images [batch, channels, height, width] with zeros, cut each at a place of its own, mirror every other one.

    One draw decides an image: its rest modulo 2 padding + 1 is the row, the same of its bits from 16 up the column, and
    bit 32 the mirror. 63 bits are so many more than are used that the choices are even and independent.
    """
    height, width = images.shape[-2:]
    padded = functional.pad(images, (padding,) * 4)
    cropped = torch.empty_like(images)
    places = zip((draws % (2 * padding + 1)).tolist(), ((draws >> 16) % (2 * padding + 1)).tolist(), strict=True)
    for index, (row, column) in enumerate(places):
        cropped[index] = padded[index, :, row : row + height, column : column + width]
    if mirror:
        chosen = ((draws >> 32) & 1).bool()
        cropped[chosen] = cropped[chosen].flip(-1)
    return cropped


def resized_crop_and_mirror(images: Tensor, draws: Tensor, size: int) -> Tensor:
    """Cut a random part of each image and scale it to ``size``, mirror every other one (torchvision's defaults)."""
    augment = v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()])
    augmented = []
    for image, draw in zip(images, draws.tolist(), strict=True):
        with drawn_from(draw):
            augmented.append(augment(image))
    return torch.stack(augmented)


class drawn_from:
    """Within it the global CPU generator starts from ``seed``; it is put back after.

    A class, not ``contextlib.contextmanager``, which costs as much as the work: this runs for every image.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        self.state = torch.get_rng_state()
        # Not torch.manual_seed: that also seeds CUDA, which a worker process must not touch.
        torch.default_generator.manual_seed(self.seed)

    def __exit__(self, *error: object) -> None:
        torch.set_rng_state(self.state)
