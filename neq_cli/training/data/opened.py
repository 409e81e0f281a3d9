"""What opening data gives, before splitting and preparing: both parts as they are, and the names of their classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Stored:
    """A part that is in memory: images [n, channels, height, width], labels [n]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Source:
    """Both parts: ``Stored``, or datasets that yield (PIL image, array or tensor, label or mask)."""

    name: str
    train: Any
    test: Any
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()
    untested: str = ""  # the part that is not opened, as data.validation takes its place: "test/"
    as_it_is: bool = False  # what the datasets yield is not images with a label or a mask; classes may be none


def class_names(classes: Sequence[Any]) -> tuple[str, ...]:
    """Return one name per class; ImageNet gives several for each."""
    return tuple(str(name[0]) if isinstance(name, tuple | list) else str(name) for name in classes)


def numbered(classes: int) -> tuple[str, ...]:
    """Return the names of classes that have none: "0", "1", ..."""
    return tuple(map(str, range(classes)))


def place_of(source: Any, index: int, name: str, which: int = 0) -> str:
    """Name the file of an image of ``source``, or (``which`` 1) of its mask: its path, else its number in ``name``."""
    for attribute in ("samples", "_samples", "_image_files"):
        entries = getattr(source, attribute, None)
        if isinstance(entries, Sequence):
            path = entries[index][which] if isinstance(entries[index], tuple) else entries[index]
            if isinstance(path, str | Path):
                return str(path)
    return f"{'mask' if which else 'image'} {index} of {name}"
