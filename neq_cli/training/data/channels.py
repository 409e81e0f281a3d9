"""Brings images to one channel or three: grey is repeated, of equal channels one is kept, colours become brightness."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from torchvision.transforms.v2 import functional

from neq_cli.recipe import DataSection
from neq_cli.training.data.looked_at import all_grey, is_grey
from neq_cli.training.data.opened import Source, Stored
from neq_cli.training.data.pixels import Range, as_tensor

_MADE_GREY = "in colour, and made grey"


def in_channels(image: Any, channels: int | None, value_range: Range | None = None) -> Tensor:
    """Return an image as ``as_tensor`` does, in 1 or 3 ``channels``; None leaves it those that it has.

    Brightness is that of Pillow where it is a picture of 8 bits. Raises ValueError where it has neither 1 nor 3.
    """
    if channels == 1 and getattr(image, "mode", None) == "RGB" and value_range is None:
        image = image.convert("L")
    tensor = as_tensor(image, value_range)
    return tensor if channels is None else _brought(tensor, channels)


def brought_to_channels(section: DataSection, source: Source) -> tuple[Source, tuple[str, ...]]:
    """Return the source with what it has in memory brought to ``data.channels``, and a note where images are changed.

    Those of files, which come in three channels, are brought there as they are read.
    """
    channels = section.asked_channels
    if isinstance(source.train, Stored):
        if channels is None or channels == source.train.images.shape[1]:
            return source, ()
        parts = (source.train, source.test)
        train, test = (Stored(_brought(part.images, channels), part.labels) for part in parts)
        changed = "grey, and repeated in three channels" if channels == 3 else _MADE_GREY
        note = f"data.channels: the images of {source.name} are {changed}"
        return replace(source, train=train, test=test), (note,)
    if section.entrypoint is not None:  # whose images are looked at when they are trained on
        return source, ()
    grey = all_grey(source.train)
    if grey and channels != 1:
        said = f"the images of {source.name} are grey, as far as looked at, and read in three equal channels"
        return source, (f"data.channels: {said}; data.channels=1 keeps one, where the model takes one",)
    if channels == 1 and not grey:
        return source, (f"data.channels: the images of {source.name} are {_MADE_GREY}",)
    return source, ()


def _brought(images: Tensor, channels: int) -> Tensor:
    """Return images [..., channels there, height, width] in ``channels``."""
    there = images.shape[-3]
    if there == channels:
        return images
    if there not in (1, 3):
        raise ValueError(f"{there} channels, and data.channels={channels} is for images of 1 or 3; leave it out")
    if channels == 3:
        return images.repeat_interleave(3, dim=-3)
    return images[..., :1, :, :] if is_grey(images) else functional.rgb_to_grayscale(images)
