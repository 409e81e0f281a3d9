"""Images with a mask of class numbers each, read as they are asked for and prepared together; 255 classes at most."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from neq_cli.training.data.images import Key, ReadImages
from neq_cli.training.data.pixels import Range
from neq_cli.training.data.transforms import Preparation, drawn_from
from neq_cli.training.errors import DataError

MOST_CLASSES = 255
IGNORED = 255
"""What a mask holds, once read, where nothing is learnt or measured."""


class MaskedImages(ReadImages):
    """Some images of a dataset that yields (image, mask), as (float image [channels, h, w], uint8 mask [h, w]).

    ``whole`` ones are scaled and not cut, so that they may differ in size. Raises DataError, naming the file, where
    image or mask cannot be read, differ in size, or the mask holds a number that is none of ``classes``.
    """

    masked = True
    preparation: MaskPreparation

    def __init__(
        self,
        source: Any,
        indices: Tensor,
        preparation: MaskPreparation,
        *,
        name: str,
        classes: int,
        ignore_index: int = IGNORED,
        value_range: Range | None = None,
        channels: int | None = None,
        whole: bool = False,
        augmented: bool = False,
    ) -> None:
        super().__init__(
            source,
            indices,
            preparation,
            name=name,
            classes=classes,
            value_range=value_range,
            channels=channels,
            augmented=augmented,
        )
        self.ignore_index = ignore_index
        self.whole = whole
        self.checked = False

    def __getitems__(self, keys: Sequence[Key]) -> list[tuple[Tensor, Any]]:
        return [self._prepared(*self._resolved(key)) for key in keys]

    def _prepared(self, index: int, draw: int) -> tuple[Tensor, Tensor]:
        image, mask = self._kept(index, draw)
        if self.scales_at_random:
            image, mask = self.preparation.drawn(image, mask, draw)
            self._check_shape(image, index)
        return self.preparation.finished(image.unsqueeze(0))[0], mask

    def _fixed(self, indices: Sequence[int], draws: Sequence[int]) -> tuple[Any, Any]:
        pairs = [self._kept(index, draw) for index, draw in zip(indices, draws, strict=True)]
        images, masks = [image for image, _ in pairs], [mask for _, mask in pairs]
        return (images, masks) if self.differ else (torch.stack(images), torch.stack(masks))

    def _kept(self, index: int, draw: int) -> tuple[Tensor, Tensor]:
        """Return image and mask as they are every time."""
        image, mask = self._pair(index, draw)
        if self.scales_at_random:
            return image, mask
        image, mask = self.preparation.whole(image, mask) if self.whole else self.preparation.cut(image, mask)
        if not self.whole:
            self._check_shape(image, index)
        return image, mask

    def _check_shape(self, image: Tensor, index: int) -> None:
        if self.shape is not None and image.shape != self.shape:
            first = f"{self.shape[-2]}x{self.shape[-1]}"
            raise DataError(
                f"{self._place(index)}: {_size(image)} pixels (height x width), but the first image is {first}; "
                "set data.image_size"
            )

    def _pair(self, index: int, draw: int) -> tuple[Tensor, Tensor]:
        with self._named(index):
            read, target = self._source_item(index, draw)
            image = self._as_tensor(read, index)
        if self.checked:
            return image, target
        with self._named(index, 1):
            mask = as_mask(target)
        if image.shape[-2:] != mask.shape:
            raise DataError(
                f"{self._place(index, 1)}: {_size(mask)} pixels (height x width), but its image is {_size(image)}; "
                "make them alike"
            )
        if self.shape is not None and image.shape[0] != self.shape[0]:
            raise DataError(
                f"{self._place(index)}: {image.shape[0]} channels, but the first image has {self.shape[0]}; "
                "store all images with the same channels"
            )
        return image, self._classes_only(mask, index)

    def _classes_only(self, mask: Tensor, index: int) -> Tensor:
        """Return the mask as 8 bits, what is ignored as ``IGNORED``."""
        classes = self.classes or 0
        ignored = mask == self.ignore_index
        wrong = ((mask < 0) | (mask >= classes)) & ~ignored
        if wrong.any():
            row, column = wrong.nonzero()[0].tolist()
            raise DataError(
                f"{self._place(index, 1)}: class {int(mask[row, column])} in row {row}, column {column}, but there are "
                f"{classes} classes, from 0 on, and {self.ignore_index} is ignored; mend the mask, or set "
                "data.kwargs.num_classes or data.ignore_index"
            )
        return mask.masked_fill(ignored, IGNORED).to(torch.uint8)

    def batches(self, batch_size: int) -> list[list[int]] | None:
        """Return positions in batches of images that come out in one size; one by one where sizes are not known."""
        if not self.whole:
            return None
        sizes = self._sizes()
        if sizes is None:
            return [[position] for position in range(len(self))]
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for position, size in enumerate(sizes):
            groups[size].append(position)
        return [
            positions[start : start + batch_size]
            for positions in groups.values()
            for start in range(0, len(positions), batch_size)
        ]

    @property
    def differ(self) -> bool:
        if not self.whole:
            return self.scales_at_random
        sizes = self._sizes()
        return sizes is None or len(set(sizes)) > 1

    def _sizes(self) -> list[tuple[int, int]] | None:
        own = getattr(self.source, "sizes", None)
        if own is None:
            return None
        return [self.preparation.whole_size(*own[index]) for index in self.indices.tolist()]

    def read_from(self, cached: Any) -> None:
        super().read_from(cached)
        self.checked = True

    @property
    def whole_pixels(self) -> int | None:
        """Pixels of all images together, where they are whole and their sizes are known."""
        sizes = self._sizes() if self.whole else None
        return None if sizes is None else sum(height * width for height, width in sizes)


def as_mask(mask: Any) -> Tensor:
    """Return a mask [height, width] of integers of a PIL image, an array or a tensor, which may have one channel.

    Raises ValueError where it is a colour image, or holds anything but integers.
    """
    if isinstance(mask, Image):
        if mask.mode not in ("L", "P", "1", "I", "I;16", "I;16B", "I;16L"):
            raise ValueError(f"a colour image ({mask.mode}); a mask is grey or has a palette, and holds class numbers")
        mask = np.array(mask)
        mask = mask.astype(mask.dtype.newbyteorder("="))
    tensor = torch.as_tensor(mask)
    if tensor.ndim == 3 and tensor.shape[0] == 1:
        tensor = tensor[0]
    if tensor.ndim != 2:
        raise ValueError(f"a mask of shape {list(tensor.shape)}; [height, width] is needed")
    if tensor.is_floating_point() or tensor.is_complex():
        raise ValueError(f"a mask of {tensor.dtype}; whole numbers are needed")
    return tensor.to(torch.int64 if tensor.dtype not in (torch.uint8, torch.bool) else torch.int16)


def is_mask(target: Any) -> bool:
    """Whether a dataset's target is a mask, not a label."""
    return isinstance(target, Image) or getattr(target, "ndim", 0) >= 2


def _size(image: Tensor) -> str:
    return f"{image.shape[-2]}x{image.shape[-1]}"


@dataclass(frozen=True)
class MaskPreparation(Preparation):
    """How images [channels, height, width] with masks [height, width] are prepared; both always move alike.

    ``base_size`` is the shorter side that images are scaled to before anything is cut; None: ``image_size``, or as it
    is where that is None too.
    """

    base_size: int | None = None

    @property
    def shorter(self) -> int | None:
        return self.base_size or self.image_size

    @property
    def scales_at_random(self) -> bool:
        return self.augment == "segmentation"

    def whole(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return both scaled: what tests see."""
        side = self.shorter
        if side is None or min(image.shape[-2:]) == side:
            return image, mask
        return _plain(v2.Resize(side, _interpolation(self.interpolation), antialias=True)(*_joint(image, mask)))

    def whole_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width that ``whole`` scales an image of this size to."""
        side = self.shorter
        if side is None or min(height, width) == side:
            return height, width
        longer = int(side * max(height, width) / min(height, width))
        return (side, longer) if height <= width else (longer, side)

    def cut(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the middle of both, scaled: what is probed, and trained on without augmentation."""
        image, mask = self.whole(image, mask)
        if self.image_size is None:
            return image, mask
        return _plain(v2.CenterCrop(self.image_size)(*_joint(image, mask)))

    def drawn(self, image: Tensor, mask: Tensor, draw: int) -> tuple[Tensor, Tensor]:
        """Scale by 0.5 to 2, mirror every other one, cut at random; ``draw`` decides. What is too small is padded.

        As torchvision's segmentation training does it: zeros below and to the right, ``IGNORED`` in the mask. Without
        ``image_size`` what is cut is as large as the image was.
        """
        height, width = image.shape[-2:]
        base = self.base_size or self.image_size or min(height, width)
        size = (height, width) if self.image_size is None else (self.image_size, self.image_size)
        with drawn_from(draw):
            image, mask = _scaled_and_mirrored(base, self.interpolation)(*_joint(image, mask))
            below, right = (max(0, wanted - there) for wanted, there in zip(size, image.shape[-2:], strict=True))
            if below or right:
                image = functional.pad(image, [0, 0, right, below], fill=0)
                mask = functional.pad(mask, [0, 0, right, below], fill=IGNORED)
            return _plain(v2.RandomCrop(size)(image, mask))


@lru_cache(maxsize=16)
def _scaled_and_mirrored(base: int, interpolation: str) -> v2.Transform:
    # torchvision's largest size is left out of what is drawn.
    sizes = max(1, base // 2), 2 * base + 1
    scaled = v2.RandomResize(*sizes, _interpolation(interpolation), antialias=True)
    return v2.Compose([scaled, v2.RandomHorizontalFlip()])


def _interpolation(name: str) -> v2.InterpolationMode:
    return v2.InterpolationMode(name)


def _joint(image: Tensor, mask: Tensor) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """Tell torchvision which is which: a mask is never interpolated between two classes."""
    return tv_tensors.Image(image), tv_tensors.Mask(mask)


def _plain(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    image, mask = pair
    return image.as_subclass(torch.Tensor), mask.as_subclass(torch.Tensor)
