"""Images and their masks prepared together; one image at a time, on the CPU, by torchvision's v2 transforms."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from neq_cli.training.data.transforms import Preparation, drawn_from

IGNORED = 255
"""What a mask holds, once read, where nothing is learnt or measured."""


@dataclass(frozen=True)
class JointPreparation(Preparation):
    """How images [channels, height, width] with masks [height, width] are prepared; both always move alike.

    ``base_size`` is the shorter side that images are scaled to before anything is cut; None: ``image_size``, or as it
    is where that is None too.
    """

    base_size: int | None = None

    @property
    def scales_at_random(self) -> bool:
        return self.augment == "segmentation"

    def whole(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return both scaled: what tests see."""
        side = self.base_size or self.image_size
        if side is None or min(image.shape[-2:]) == side:
            return image, mask
        return _plain(v2.Resize(side, _interpolation(self.interpolation), antialias=True)(*_joint(image, mask)))

    def whole_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width that ``whole`` scales an image of this size to."""
        side = self.base_size or self.image_size
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
