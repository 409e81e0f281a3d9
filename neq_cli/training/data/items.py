"""Items of a user's dataset that are no images with a label or a mask: taken as they are, in batches it may make.

Chance in a dataset and in its batches is torch's on the CPU: it follows from seed, epoch and place alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import default_collate

from neq_cli.errors import one_line
from neq_cli.recipe import DataSection
from neq_cli.training.data.images import Images, Key
from neq_cli.training.data.pixels import cannot_be_used, comes_as_floats
from neq_cli.training.data.transforms import Preparation, drawn_from
from neq_cli.training.errors import DataError

Collate = Callable[[list[Any]], Any]
"""Makes a batch of items."""

_OF_IMAGES = (
    *("image_size", "base_size", "augment", "interpolation", "erasing", "mixup", "cutmix"),
    *("channels", "value_range", "mean", "std"),
)
_COLLATING = 0x632BE59BD9B4E019
"""What a batch draws starts from another number than what its first item draws."""


def own_collate(dataset: Any) -> Collate | None:
    """Return the ``collate`` of a dataset, or of what a ``torch.utils.data.Subset`` is of; None where it has none."""
    while not callable(getattr(dataset, "collate", None)):
        if not hasattr(dataset, "dataset"):
            return None
        dataset = dataset.dataset
    collate: Collate = dataset.collate
    return collate


def taken_as_they_are(dataset: Any, *, own_task: bool) -> bool:
    """Whether the items of ``dataset``, which has some, are no images with a label or a mask; its first one tells.

    One that has ``collate`` says so itself. Under neq's own tasks whatever may be an image is one; under an
    ``own_task`` only what is one, beside a whole number or a mask.
    """
    if own_collate(dataset) is not None:
        return True
    with drawn_from(0):
        item = dataset[0]
    if not (isinstance(item, tuple | list) and len(item) == 2):
        return own_task or not isinstance(item, tuple | list)
    inputs, target = item
    if isinstance(inputs, Tensor | np.ndarray):
        may_be_image = inputs.ndim in (2, 3)
    else:
        may_be_image = hasattr(inputs, "convert") if own_task else not isinstance(inputs, Mapping | tuple | list)
    return not may_be_image or (own_task and not _is_label_or_mask(target))


def _is_label_or_mask(target: Any) -> bool:
    if isinstance(target, Tensor | np.ndarray):
        return not comes_as_floats(target) and (target.ndim >= 2 or target.shape in ((), (1,)))
    return isinstance(target, int | np.integer | Image)


def image_keys_problems(section: DataSection, name: str) -> list[tuple[str, str]]:
    """Return (key, problem) pairs of what a recipe asks of images, where items are taken as they are."""
    defaults = type(section).model_fields
    why = f"is for images with a label or a mask, and the items of {name} are taken as they are"
    problems = [
        (key, f"{why}; do it in the dataset, and remove this")
        for key in _OF_IMAGES
        if getattr(section, key) != defaults[key].default
    ]
    if section.cache not in ("auto", "none"):
        problems.append(("cache", f"{section.cache} {why}; keep them in the dataset, and use none"))
    return problems


class Items(Images):
    """Some items of a dataset, each with the random integer that decided what was random in it.

    ``collate`` makes batches of them; torch's own ``default_collate`` where the dataset has none. ``varies``: chance
    is drawn anew in every epoch, as for what is trained on; else an item is the same every time. Raises DataError,
    naming the item, where the dataset raises anything.
    """

    def __init__(self, source: Any, indices: Tensor, *, name: str, varies: bool = False) -> None:
        super().__init__(indices, Preparation(), augmented=False)
        self.augmented = varies
        self.source = source
        self.name = name

    def __getitem__(self, key: Key) -> tuple[Any, int]:
        index, draw = self._resolved(key)
        try:
            with drawn_from(draw):
                return self.source[index], draw
        except DataError:
            raise
        except Exception as error:
            raise cannot_be_used(f"item {index} of {self.name}", error) from error

    def __getitems__(self, keys: Sequence[Key]) -> list[tuple[Any, int]]:
        return [self[key] for key in keys]

    def collate(self, drawn: list[tuple[Any, int]]) -> Any:
        """Return a batch of what ``__getitem__`` returned."""
        collate = own_collate(self.source) or default_collate
        try:
            with drawn_from(drawn[0][1] ^ _COLLATING):
                return collate([item for item, _ in drawn])
        except Exception as error:
            mend = "mend its collate" if own_collate(self.source) is not None else "give it a method collate(items)"
            what = f"{len(drawn)} items do not make a batch ({one_line(error)})"
            raise DataError(f"{self.name}: {what}; {mend}") from error
