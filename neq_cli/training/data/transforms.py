"""From pixels to what the network sees: sizes, augmentation, normalisation; whole batches where images are alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as images_functional

from neq_cli.recipe.values import Augment

_IMAGENET_SIZE = 224
_IMAGENET_RESIZE = 256 / 224  # torchvision's ImageNet tests scale the shorter side to 256 and cut 224 from the middle


# Draws of one image for several purposes start from different numbers.
_ERASING = 0x2545F4914F6CDD1D
_MIXING = 0x5851F42D4C957F2D


@dataclass(frozen=True)
class Mixing:
    """MixUp and CutMix with these alphas, 0 for none, of images of so many classes."""

    mixup: float
    cutmix: float
    classes: int

    def mixed(self, images: Tensor, labels: Tensor, draw: int) -> tuple[Tensor, Tensor]:
        """Mix each image of a batch with its neighbour by MixUp or, with even chance where both are on, CutMix."""
        ways = [v2.MixUp(alpha=self.mixup, num_classes=self.classes)] if self.mixup else []
        if self.cutmix:
            ways.append(v2.CutMix(alpha=self.cutmix, num_classes=self.classes))
        with drawn_from(draw ^ _MIXING):
            way = ways[int(torch.randint(len(ways), ()))]
            mixed, shares = way(images, labels)
        return mixed, shares


@dataclass(frozen=True)
class Preparation:
    """How images are prepared. ``mean`` and ``std`` are per channel, of pixels in [0, 1]; None: not normalised."""

    image_size: int | None = None
    augment: Augment = "none"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    erasing: float = 0.0  # share of images of which a random part becomes noise
    mixing: Mixing | None = None

    @property
    def size(self) -> int | None:
        """Pixels of a side of what the network sees; None is the images' own size."""
        return _IMAGENET_SIZE if self.image_size is None and self.cuts_from_larger else self.image_size

    @property
    def shorter(self) -> int | None:
        """Pixels that the shorter side of a test image is scaled to, before its middle is cut; None: not scaled."""
        size = self.size
        return round(size * _IMAGENET_RESIZE) if size is not None and self.cuts_from_larger else size

    @property
    def cuts_from_larger(self) -> bool:
        """Whether images are prepared as ImageNet's are: cut from larger ones, at random to train and to test."""
        return self.augment in ("imagenet", "randaugment")

    @property
    def scales_at_random(self) -> bool:
        """Whether augmentation cuts images before they are scaled, so that they may come in any size."""
        return self.cuts_from_larger

    @property
    def varies(self) -> bool:
        """Whether there is any chance in how training images are prepared."""
        return self.augment != "none" or self.completes

    @property
    def completes(self) -> bool:
        """Whether there is something to do after normalisation."""
        return self.erasing > 0 or self.mixing is not None

    def test(self, images: Tensor) -> Tensor:
        """Prepare uint8 or float images [batch, channels, height, width] without any chance in it."""
        return self.finished(self.fixed(images, augmented=False))

    def train(self, images: Tensor, draws: Tensor) -> Tensor:
        """Prepare images with augmentation. ``draws`` [batch] are the random integers, below 2**63, that decide it."""
        return self.finished(self.varied(self.fixed(images, augmented=True), draws))

    # Both are made of the next three steps; what the first returns can be kept.

    def fixed(self, images: Tensor, *, augmented: bool) -> Tensor:
        """Return images as they are every time: scaled, unless augmentation is going to cut and scale them."""
        return images if augmented and self.scales_at_random else self._resized(images)

    def varied(self, images: Tensor, draws: Tensor) -> Tensor:
        """Return images augmented; ``draws`` are on their device."""
        if self.scales_at_random:
            return resized_crop_and_mirror(
                images, draws, int(self.size or _IMAGENET_SIZE), self.interpolation, vary=self.augment == "randaugment"
            )
        if self.augment == "crop":
            return crop_and_mirror(images, draws, padding=images.shape[-1] // 8, mirror=False)
        if self.augment == "cifar":
            return crop_and_mirror(images, draws, padding=4, mirror=True)
        return images

    def finished(self, images: Tensor) -> Tensor:
        """Return images as float32 in [0, 1], normalised; floats that need neither are returned as they are."""
        scaled: Tensor = images_functional.to_dtype(images, torch.float32, scale=True)
        if self.mean is None or self.std is None:
            return scaled
        mean, std = _by_channel(self.mean, images.device), _by_channel(self.std, images.device)
        centred = scaled.sub(mean) if scaled is images else scaled.sub_(mean)  # in place only what is new
        return centred.div_(std)

    def completed(self, images: Tensor, labels: Tensor, draws: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return finished images [batch, ...] erased in part and mixed with each other, and what they then are.

        Labels become shares of classes, float [batch, classes], where images are mixed; then one draw decides for all.
        """
        if self.erasing:
            images = erased(images, draws, self.erasing)
        if self.mixing is None:
            return images, labels
        return self.mixing.mixed(images, labels, draws[0])

    def _resized(self, images: Tensor) -> Tensor:
        size = self.size
        if size is None or (tuple(images.shape[-2:]) == (size, size) and not self.cuts_from_larger):
            return images
        mode = v2.InterpolationMode(self.interpolation)
        resized = images_functional.resize(images, [self.shorter], interpolation=mode, antialias=True)
        cut: Tensor = images_functional.center_crop(resized, [size, size])
        return cut


@lru_cache(maxsize=16)
def _by_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    # Kept: copying a few numbers to a GPU makes the host wait for it.
    return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)


def crop_and_mirror(images: Tensor, draws: Tensor, *, padding: int, mirror: bool) -> Tensor:
    """Pad images [batch, channels, height, width] with zeros, cut each at a place of its own, mirror every other one.

    One draw decides an image: its rest modulo 2 padding + 1 is the row, the same of its bits from 16 up the column, and
    bit 32 the mirror. 63 bits are so many more than are used that the choices are even and independent. ``draws``
    [batch] are on the images' device; nothing waits for it.
    """
    rows, columns = draws % (2 * padding + 1), (draws >> 16) % (2 * padding + 1)
    mirrored = (draws >> 32) & 1 if mirror else torch.zeros_like(draws)
    cut = _windows if images.device.type == "cpu" else _gathered
    return cut(images, rows, columns, mirrored, padding)


def _windows(images: Tensor, rows: Tensor, columns: Tensor, mirrored: Tensor, padding: int) -> Tensor:
    """Cut by copying windows: 2 to 4 times as fast as a gather on a CPU, for rows of pixels are copied whole."""
    count, channels, height, width = images.shape
    sides = 2 if mirrored.any() else 1
    high, wide = height + 2 * padding, width + 2 * padding
    padded = images.new_zeros(sides, count, channels, high, wide)
    inside = padded[..., padding : padding + height, padding : padding + width]
    inside[0] = images
    if sides == 2:
        inside[1] = images.flip(-1)
        columns = torch.where(mirrored.bool(), 2 * padding - columns, columns)
    # Every place of the padded images begins a window [channels, height, width]; one index picks one for each image.
    shape, strides = (channels, height, width), (high * wide, wide, 1)
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    windows = padded.as_strided((padded.numel() - last, *shape), (1, *strides))
    numbers = torch.arange(count) + count * mirrored
    return windows.index_select(0, (numbers * channels * high + rows) * wide + columns)


def _gathered(images: Tensor, rows: Tensor, columns: Tensor, mirrored: Tensor, padding: int) -> Tensor:
    """Cut by gathering pixels: for devices where every element is copied by itself anyhow."""
    count, channels, height, width = images.shape
    padded = functional.pad(images, (padding,) * 4)
    across = torch.arange(width, device=images.device)
    across = torch.where(mirrored.bool()[:, None], width - 1 - across, across) + columns[:, None]
    down = torch.arange(height, device=images.device) + rows[:, None]
    pixels = down[:, :, None] * (width + 2 * padding) + across[:, None, :]
    pixels = pixels.view(count, 1, -1).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, pixels).view(images.shape)


def resized_crop_and_mirror(
    images: Tensor, draws: Tensor, size: int, interpolation: str = "bilinear", *, vary: bool = False
) -> Tensor:
    """Cut a random part of each image and scale it to ``size``, mirror every other one (torchvision's defaults).

    ``vary`` adds RandAugment: two operations at nine tenths of their strength.
    """
    mode = v2.InterpolationMode(interpolation)
    steps = [v2.RandomResizedCrop(size, interpolation=mode, antialias=True), v2.RandomHorizontalFlip()]
    if vary:
        steps.append(v2.RandAugment(num_ops=2, magnitude=9, num_magnitude_bins=11))
    augment = v2.Compose(steps)
    augmented = []
    for image, draw in zip(images, draws.tolist(), strict=True):
        with drawn_from(draw):
            augmented.append(augment(image))
    return torch.stack(augmented)


def erased(images: Tensor, draws: Sequence[int], share: float) -> Tensor:
    """Return finished images of which ``share`` have a random rectangle of noise in them, as the draws decide."""
    erase = v2.RandomErasing(share, value="random")
    changed = []
    for image, draw in zip(images, draws, strict=True):
        with drawn_from(draw ^ _ERASING):
            changed.append(erase(image))
    return torch.stack(changed)


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
