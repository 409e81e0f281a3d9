"""A few training images looked at before anything is trained: whether their sizes differ, and whether all are grey."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from neq_cli.errors import RecipeValueError
from neq_cli.training.data.opened import Stored, place_of
from neq_cli.training.data.pixels import as_tensor

MOST = 16
"""Images that are looked at, at even distances: enough for a folder where sizes or colours are mixed at all."""


def check_sizes(name: str, parts: Sequence[Any]) -> None:
    """Raise RecipeValueError where two images that are looked at differ in size, of parts of data called ``name``.

    Images that are not looked at are refused when they are read.
    """
    first: tuple[int, ...] | None = None
    for part in parts:
        for index, image in _some(part):
            height, width = image.shape[-2:]
            first = first or (height, width)
            if first != (height, width):
                what = f"{height}x{width} pixels (height x width), but others have {first[0]}x{first[1]}"
                mend = f"give one size for all, such as data.image_size={min(*first, height, width)}"
                raise RecipeValueError("data.image_size", f"{place_of(part, index, name)}: {what}; {mend}")


def all_grey(source: Any) -> bool:
    """Whether none of the images that are looked at has any colour; one that has ends the search."""
    return all(is_grey(image) for _, image in _some(source))


def is_grey(image: Tensor) -> bool:
    """Whether one or more images [..., channels, height, width] have no colour."""
    return bool((image == image[..., :1, :, :]).all())


def _some(source: Any) -> Iterator[tuple[int, Tensor]]:
    """Yield some images with their numbers; those that cannot be read are told of when they are trained on."""
    size = len(source)
    for index in sorted({number * (size - 1) // (MOST - 1) for number in range(MOST)}):
        if isinstance(source, Stored):
            yield index, source.images[index]
            continue
        try:
            image = as_tensor(source[index][0])
        except Exception:
            continue
        yield index, image
