"""What pixels of files and of users' datasets stand for: uint8, or float in [0, 1] where 8 bits do not hold them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from neq_cli.errors import one_line
from neq_cli.training.errors import DataError, of_the_disk

_GREY = ("1", "L", "LA", "La")
Range = tuple[float, float]
"""The pixel values that become 0 and 1."""

_HALF_WORDS = ("I;16", "I;16L", "I;16B", "I;16N")
_WIDE = (*_HALF_WORDS, "I", "F")
"""Pillow's modes, all grey, that it cuts off at 255 where it makes them RGB."""
_CUT_DOWN = re.compile(r"(L|LA|RGB|RGBA|RGBX|RGBa|CMYK);16[BLN]")
"""How Pillow names pixels whose channels of 16 bits it reads as 8."""
_UNSIGNED = (torch.uint8, torch.uint16)
_SET_RANGE = "set data.value_range to what becomes black and white"


def read_image(path: Path | str, value_range: Range | None = None) -> Any:
    """Return the image of a file in three channels: a PIL image of 8 bits, or a float tensor [3, height, width].

    Floats in [0, 1] where it has more than 8 bits, or where ``value_range`` is given. It is not turned by its EXIF tag,
    and loses its transparency, as by torchvision's loader. Raises DataError, naming the file.
    """
    try:
        with Path(path).open("rb") as file:
            return read_opened(file, value_range)
    except Exception as error:
        raise cannot_be_used(path, error) from error


def read_opened(file: BinaryIO, value_range: Range | None = None) -> Any:
    """Return the image in an open file as ``read_image`` does. Raises whatever is wrong with it."""
    with Image.open(file) as opened:
        return in_colour(opened, value_range)


def in_colour(picture: Image.Image, value_range: Range | None = None) -> Any:
    """Return a picture of Pillow's as ``read_image`` does that of a file. ValueError where its range is not known."""
    if value_range is None and picture.mode not in _WIDE:
        return picture.convert("RGB")
    image = as_tensor(picture, value_range)
    return image if len(image) == 3 else image.repeat(3, 1, 1)


@dataclass(frozen=True)
class Header:
    """What a file says of its image before it is decoded."""

    height: int
    width: int
    grey: bool


def read_header(file: BinaryIO) -> Header:
    """Return the header of the image in an open file. Raises whatever is wrong with it."""
    with Image.open(file) as opened:
        return Header(opened.height, opened.width, opened.mode in (*_GREY, *_WIDE))


def cannot_be_used(path: Path | str, error: Exception) -> DataError:
    """Return the error for a file that something is wrong with."""
    mend = "make it readable" if of_the_disk(error) else "mend or remove it"
    return DataError(f"{path}: cannot be used ({one_line(error)}); {mend}")


def as_tensor(image: Any, value_range: Range | None = None) -> Tensor:
    """Return an image [channels, height, width] of a PIL image, an array [height, width, channels] or a tensor.

    Of 8 bits it stays uint8, and tensors and arrays of floats stay as they are. All else becomes float in [0, 1]:
    16 bits by the range of their type; what has another range by ``value_range``, outside of which pixels are cut off.
    Raises ValueError where the range is not known, or not that of such pixels.
    """
    if hasattr(image, "convert"):
        return _of_picture(image, value_range)
    tensor: Tensor = functional.to_image(image).as_subclass(Tensor)
    if value_range is None and tensor.dtype is torch.uint16:
        value_range = (0, 65535)
    if value_range is not None:
        return _scaled(tensor, value_range)
    if tensor.dtype not in (torch.uint8, torch.bool) and not tensor.is_floating_point():
        raise ValueError(f"pixels of {tensor.dtype}, whose range is not known; return uint8, or {_SET_RANGE}")
    return tensor


def comes_as_floats(image: Any) -> bool:
    """Whether a dataset yields floats, which are taken as its author has prepared them."""
    if isinstance(image, Tensor):
        return image.is_floating_point()
    return isinstance(image, np.ndarray) and image.dtype.kind == "f"


def _of_picture(image: Any, value_range: Range | None) -> Tensor:
    if image.mode in _WIDE:
        pixels = np.asarray(image)
        tensor = torch.from_numpy(pixels.astype(pixels.dtype.newbyteorder("="))).unsqueeze(0)
        return _scaled(tensor, _range_of(image, tensor) if value_range is None else value_range)
    if value_range is not None and _is_cut_down(image):
        raise ValueError("16 bits per channel in colour, read as 8: data.value_range cannot be had; store it as grey")
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    tensor = functional.to_image(image).as_subclass(Tensor)
    return tensor if value_range is None else _scaled(tensor, value_range)


def _range_of(image: Any, pixels: Tensor) -> Range:
    """Return the range of the type of a grey picture of more than 8 bits."""
    if image.mode in _HALF_WORDS:
        (bits, *_) = getattr(image, "tag_v2", {}).get(258, (16,))  # TIFF's BitsPerSample
        return 0, 2**bits - 1
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # what some Pillows call 16 bits; there can be no more
        return 0, 65535
    least, most = pixels.min().item(), pixels.max().item()
    if image.mode == "F" and least >= 0 and most <= 1:
        return 0, 1
    kind = "32-bit integers" if image.mode == "I" else "floats"
    raise ValueError(f"{kind} from {least:g} to {most:g}, whose range is not known; {_SET_RANGE}")


def _is_cut_down(image: Any) -> bool:
    """Whether Pillow reads 16 bits of each channel as 8; known until the picture is loaded."""
    for *_, arguments in getattr(image, "tile", ()):
        named = arguments if isinstance(arguments, tuple) else (arguments,)
        if any(isinstance(one, str) and _CUT_DOWN.fullmatch(one) for one in named):
            return True
    return False


def _scaled(pixels: Tensor, value_range: Range) -> Tensor:
    low, high = value_range
    if pixels.dtype in _UNSIGNED and high > torch.iinfo(pixels.dtype).max:
        bits = torch.iinfo(pixels.dtype).bits
        raise ValueError(f"pixels of {bits} bits end below data.value_range [{low:g}, {high:g}]; store all alike")
    values = (pixels.double() - low) / (high - low)
    if not values.isfinite().all():
        raise ValueError("pixels that are not finite numbers")
    return values.clamp(0, 1).float()
