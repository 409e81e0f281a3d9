"""Datasets of prepared images: read one by one, or in memory and prepared in batches; with labels, not masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from neq_cli.training.data.channels import in_channels
from neq_cli.training.data.opened import place_of
from neq_cli.training.data.pixels import Range, cannot_be_used
from neq_cli.training.data.transforms import Preparation, drawn_from
from neq_cli.training.errors import DataError

# What a dataset is asked for: a position, or a position and the random integer that decides the augmentation.
Key = int | tuple[int, int]


class Images(Dataset[tuple[Tensor, Any]]):
    """Some images of a source, as (float image [channels, height, width], label); augmented or not.

    Where augmentation mixes images, a label is the share of each class, float [classes].
    """

    masked = False  # whether targets are masks, not labels
    streamed = False  # whether they come in an order of their own, and are not kept
    collate: Any = None  # makes a batch of what it yields, where torch's own way is not enough

    def __init__(self, indices: Tensor, preparation: Preparation, *, augmented: bool) -> None:
        self.indices = indices
        self.preparation = preparation
        self.augmented = augmented and preparation.varies

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: Key) -> tuple[Tensor, Any]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[Key]) -> list[tuple[Tensor, Any]]:
        """Prepare a batch in one go; DataLoader asks for this where it is there."""
        indices, draws = zip(*map(self._resolved, keys), strict=True)
        images, labels = self._fixed(indices, draws)
        finished = self._finished(images, draws)
        if self.augmented and self.preparation.completes:
            finished, labels = self.preparation.completed(finished, labels, draws)
        return list(zip(finished.unbind(), labels.unbind() if labels.ndim > 1 else labels.tolist(), strict=True))

    def fixed(self, positions: Sequence[int]) -> tuple[Any, Any]:
        """Return images before augmentation and normalisation, and labels int64 [batch]: what a cache keeps.

        A tensor [batch, channels, height, width], or a list where ``differ`` allows each a size of its own. Masks are
        uint8, and as images are: [batch, height, width], or a list.
        """
        indices = self.indices[list(positions)].tolist()
        return self._fixed(indices, indices)

    @property
    def scales_at_random(self) -> bool:
        """Whether augmentation cuts and scales images, one by one on the CPU."""
        return self.augmented and self.preparation.scales_at_random

    @property
    def differ(self) -> bool:
        """Whether images may differ in size until augmentation has scaled them."""
        return False

    @property
    def whole_pixels(self) -> int | None:
        """Pixels of all images together where they are not as large as those that are probed, None else."""
        return None

    @property
    def keys(self) -> Sampler[Any] | None:
        """What is asked for, one after the other, where that is not positions."""
        return None

    def batches(self, batch_size: int) -> list[list[int]] | None:
        """Return positions in batches where images of a batch must be chosen by their size; None: any will do."""
        return None

    def _fixed(self, indices: Sequence[int], draws: Sequence[int]) -> tuple[Any, Any]:
        raise NotImplementedError

    def _resolved(self, key: Key) -> tuple[int, int]:
        """Return the source's index and a draw; without one given, chance decides where it may, else nothing does."""
        position, draw = key if isinstance(key, tuple) else (key, None)
        index = int(self.indices[position])
        if not self.augmented:
            return index, index
        return index, int(torch.randint(2**63 - 1, ())) if draw is None else draw

    def _finished(self, images: Tensor | list[Tensor], draws: Sequence[int]) -> Tensor:
        if isinstance(images, list):
            varied = self.preparation.varied
            pairs = zip(images, draws, strict=True)
            images = torch.cat([varied(image.unsqueeze(0), torch.tensor([draw])) for image, draw in pairs])
        elif self.augmented:
            images = self.preparation.varied(images, torch.tensor(draws))
        return self.preparation.finished(images)


class ImagesInMemory(Images):
    """Images [all, channels, height, width] in memory, uint8 or float in [0, 1], with labels [all]."""

    def __init__(
        self, images: Tensor, labels: Tensor, indices: Tensor, preparation: Preparation, *, augmented: bool
    ) -> None:
        super().__init__(indices, preparation, augmented=augmented)
        self.images = images
        self.labels = labels

    @property
    def resizes(self) -> bool:
        """Whether preparing an image costs more than a few copies."""
        size = self.preparation.size
        return size is not None and (tuple(self.images.shape[-2:]) != (size, size) or self.preparation.cuts_from_larger)

    @property
    def unchanged(self) -> bool:
        """Whether ``fixed`` returns images as they are stored."""
        return not self.resizes or self.scales_at_random

    def _fixed(self, indices: Sequence[int], draws: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = list(indices)
        return self.preparation.fixed(self.images[chosen], augmented=self.augmented), self.labels[chosen]


class ReadImages(Images):
    """Images of a dataset that yields (PIL image, array or tensor, label), read as they are asked for.

    ``value_range``: the values of their pixels that become 0 and 1, where those are not their type's; ``channels``: how
    many they are brought to, where they do not keep their own. Raises DataError, naming the file, where an image cannot
    be read, has another ``shape`` or ``dtype`` than the first one, or a label that is none of ``classes``.
    """

    def __init__(
        self,
        source: Any,
        indices: Tensor,
        preparation: Preparation,
        *,
        name: str,
        shape: torch.Size | None = None,
        dtype: torch.dtype | None = None,
        classes: int | None = None,
        value_range: Range | None = None,
        channels: int | None = None,
        augmented: bool,
    ) -> None:
        super().__init__(indices, preparation, augmented=augmented)
        self.source = source
        self.name = name
        self.shape = shape
        self.dtype = dtype
        self.classes = classes
        self.value_range = value_range
        self.channels = channels

    @property
    def differ(self) -> bool:
        return self.scales_at_random

    def _fixed(self, indices: Sequence[int], draws: Sequence[int]) -> tuple[Tensor | list[Tensor], Tensor]:
        """Read images one by one, and scale them in one go where all have the same size."""
        read = [self._read(index, draw) for index, draw in zip(indices, draws, strict=True)]
        images, labels = [image for image, _ in read], torch.tensor([label for _, label in read])
        if self.differ:
            return images, labels
        alike = len({image.shape for image in images}) == 1
        groups = [torch.stack(images)] if alike else [image.unsqueeze(0) for image in images]
        return torch.cat([self.preparation.fixed(group, augmented=self.augmented) for group in groups]), labels

    def read_from(self, cached: Any) -> None:
        """Read from ``cached`` from now on, which holds what ``fixed`` returned of each image in turn."""
        self.source, self.indices = cached, torch.arange(len(self))
        self.value_range = None  # they are scaled already

    def _source_item(self, index: int, draw: int) -> tuple[Any, Any]:
        with drawn_from(draw):  # a dataset of the user's own may hold chance too
            image, target = self.source[index]
        return image, target

    @contextmanager
    def _named(self, index: int, which: int = 0) -> Iterator[None]:
        """Turn whatever is raised within into a DataError that names the file."""
        try:
            yield
        except DataError:
            raise
        except Exception as error:
            raise cannot_be_used(self._place(index, which), error) from error

    def _read(self, index: int, draw: int) -> tuple[Tensor, int]:
        with self._named(index):
            source_image, label = self._source_item(index, draw)
            image, label = self._as_tensor(source_image, index), as_label(label)
        if self.shape is not None:
            sized = self.preparation.size is not None
            if image.shape != ((self.shape[0], *image.shape[1:]) if sized else self.shape):
                raise DataError(
                    f"{self._place(index)}: {_shape(image.shape)}, but the first image is {_shape(self.shape)}; "
                    "set data.image_size, and store all images with the same channels"
                )
        if self.classes is not None and not 0 <= label < self.classes:
            raise DataError(f"{self._place(index)}: label {label}, but there are {self.classes} classes, from 0 on")
        return image, label

    def _as_tensor(self, image: Any, index: int) -> Tensor:
        tensor = in_channels(image, self.channels, self.value_range)
        if self.dtype is not None and tensor.dtype is not self.dtype:
            raise DataError(
                f"{self._place(index)}: {_depth(tensor.dtype)}, but others have {_depth(self.dtype)}; "
                "store all images alike"
            )
        return tensor

    def _place(self, index: int, which: int = 0) -> str:
        """Name the file of an image, or (``which`` 1) of its mask."""
        return place_of(self.source, index, self.name, which)


def as_label(target: Any) -> int:
    """Return a label; ValueError where it is no whole number, which would be cut off."""
    label = int(target)
    if label != target:
        raise ValueError(f"label {float(target):g} is no whole number; numbers are learnt by a task of your own")
    return label


def _depth(dtype: torch.dtype) -> str:
    return "8 bits" if dtype is torch.uint8 else f"more than 8 bits ({str(dtype).removeprefix('torch.')})"


def _shape(shape: torch.Size) -> str:
    return "x".join(map(str, shape))


class CachedItems(Dataset[tuple[Tensor, int]]):
    """Another dataset whose items are cached once they have been read: for the small probe set."""

    def __init__(self, source: Dataset[tuple[Tensor, int]]) -> None:
        self.source = source
        self.collate = getattr(source, "collate", None)
        self.cached: dict[int, tuple[Tensor, int]] = {}

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index not in self.cached:
            self.cached[index] = self.source[index]
        return self.cached[index]
