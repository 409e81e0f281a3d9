"""One picture prepared as a run's test images were, without its data; what a file holds, in 1 or 3 channels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from neq_cli.errors import NeqError, one_line
from neq_cli.recipe import Recipe
from neq_cli.training.data.catalogue import Shape, Statistics
from neq_cli.training.data.catalogue import statistics as statistics_of
from neq_cli.training.data.channels import in_channels
from neq_cli.training.data.masks import MaskPreparation
from neq_cli.training.data.pixels import Range, as_tensor, comes_as_floats, in_colour, read_image
from neq_cli.training.data.transforms import Preparation


@dataclass(frozen=True)
class Known:
    """What is known of the images that weights were trained on; ``statistics`` None: not told."""

    classes: int | None = None
    image_shape: Shape | None = None
    statistics: Statistics | None = None
    normalised: bool | None = None  # None: not told


class UnknownPreparation(NeqError):
    """How a run's images were prepared cannot be had from its recipe and what is told of its data."""


@dataclass(frozen=True)
class Transform:
    """What a run's network sees of one image, prepared as its test images were. Pickles, and draws nothing at random.

    ``shape`` is [channels, height, width] where all of the run's images came in one size, to which others are scaled.
    """

    preparation: Preparation
    channels: int
    shape: Shape | None = None
    value_range: Range | None = None

    def __call__(self, image: Any) -> Tensor:
        """Return float32 [channels, height, width] of a picture of Pillow's, the path of one, or an array or tensor.

        Arrays are [height, width, channels], tensors [channels, height, width]; of 8 or 16 bits, or float in [0, 1].
        An image of another size than the run's is scaled, and one of a segmentation to its shorter side. Raises
        NeqError, one line, for what is no image.
        """
        place = str(image) if isinstance(image, str | Path) else "the image"
        return self.prepared(self.pixels(image), place)

    def pixels(self, image: Any) -> Tensor:
        """Return the image in the run's channels, in its own size: uint8, or float in [0, 1]."""
        if isinstance(image, str | Path):
            image = read_image(image, self.value_range)
        try:
            if isinstance(image, Image.Image):
                image = in_colour(image, self.value_range)
            elif not comes_as_floats(image):  # floats are taken as they are
                image = as_tensor(image, self.value_range)
            return in_channels(image, self.channels)
        except (OSError, TypeError, ValueError) as error:
            raise NeqError(f"the image cannot be used ({one_line(error)})") from error

    def prepared(self, pixels: Tensor, place: str = "the image") -> Tensor:
        """Return what the network sees of ``pixels``; ``place`` is what messages call the image."""
        if isinstance(self.preparation, MaskPreparation):
            image, _ = self.preparation.whole(pixels, torch.zeros(pixels.shape[-2:], dtype=torch.uint8))
            return self.preparation.finished(image.unsqueeze(0))[0]
        return self._sized(pixels, place).test(pixels.unsqueeze(0))[0]

    def scales(self, pixels: Tensor) -> bool:
        """Whether the image has another size than the run's images, which all came in one."""
        if self.preparation.size is not None or isinstance(self.preparation, MaskPreparation) or self.shape is None:
            return False
        return pixels.shape[-2:] != self.shape[1:]

    def told(self) -> dict[str, Any]:
        """Return how an image is prepared, in plain values, for programs other than neq.

        In this order: pixels from ``value_range`` (None: the range of their type) to [0, 1]; the shorter side scaled to
        ``resize`` pixels (None: not); the middle cut to ``image_size`` [height, width] (None: whole); ``mean`` taken
        off and divided by ``std``, channel by channel (None: not).
        """
        size = self.preparation.size
        cut: list[int] | None = None if size is None else [size, size]
        shorter = self.preparation.shorter
        if isinstance(self.preparation, MaskPreparation):
            cut = None
        elif cut is None and self.shape is not None:
            cut = list(self.shape[1:])
            shorter = cut[0] if cut[0] == cut[1] else None
        return {
            "channels": self.channels,
            "value_range": None if self.value_range is None else list(self.value_range),
            "resize": shorter,
            "image_size": cut,
            "interpolation": self.preparation.interpolation,
            "antialias": True,
            "mean": None if self.preparation.mean is None else list(self.preparation.mean),
            "std": None if self.preparation.std is None else list(self.preparation.std),
        }

    def _sized(self, pixels: Tensor, place: str) -> Preparation:
        """Return the preparation; of data of one size, one that scales whatever has another."""
        if self.shape is None or not self.scales(pixels):
            return self.preparation
        side = self.shape[1]
        if side != self.shape[2]:
            height, width = pixels.shape[-2:]
            wanted = f"{self.shape[2]}x{side}"
            raise NeqError(f"{place}: {width}x{height} pixels, and the run's images are {wanted}; scale it before")
        return replace(self.preparation, image_size=side)


def transform_of(recipe: Recipe, known: Known, channels: int, shape: Shape | None) -> Transform:
    """Return how the run's test images were prepared.

    Raises UnknownPreparation where that is not told, and RecipeValueError for statistics of other channels.
    """
    section = recipe.data
    if section.entrypoint is not None and not known.normalised:
        why = "prepares images itself" if known.normalised is False else "may prepare images itself, which is not told"
        raise UnknownPreparation(f"{section.entrypoint} {why}; call the model in Python with what it makes of them")
    mean, std = known.statistics if known.statistics is not None else statistics_of(section, channels)
    if len(mean) != channels:
        raise UnknownPreparation(f"data.mean has {len(mean)} numbers, and the run's images have {channels} channels")
    options: dict[str, Any] = {"interpolation": section.interpolation, "mean": mean, "std": std}
    preparation: Preparation
    if recipe.task == "segmentation":
        preparation = MaskPreparation(section.image_size, section.augment, base_size=section.base_size, **options)
    else:
        preparation = Preparation(section.image_size, section.augment, **options)
    return Transform(preparation, channels, shape, section.pixel_range)
