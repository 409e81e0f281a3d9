"""Looks into a folder of data: how it is laid out, its classes, images and sizes; opened as training opens it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neq_cli.errors import NeqError, RecipeValueError, one_line
from neq_cli.recipe import DataSection
from neq_cli.text import printable
from neq_cli.training.data.hub import holds_tables
from neq_cli.training.data.mask_sources import folders_of, holds_masks, tested_folder
from neq_cli.training.data.pixels import Header, read_header
from neq_cli.training.data.rows import Rows
from neq_cli.training.data.sources import open_source
from neq_cli.training.data.splits import known_labels

MOST_LOOKED_AT = 500
"""Images whose sizes are read, evenly over all of them where there are more."""
FEW = 1000
"""Images below which a fifth of them is held out to be tested, else a tenth."""
_CLASSES_TOLD = 8


@dataclass(frozen=True)
class Survey:
    """What a folder holds. ``section`` opens it; ``validation`` in it is the share to test, where no part is for that.

    ``train`` counts the images that a training part has before any is held out. Sizes are of ``looked_at`` images of
    these: the median of their shorter sides in pixels, the smallest and the largest, height by width.
    """

    section: DataSection
    layout: str
    classes: tuple[str, ...]
    by_class: tuple[int, ...]  # images of each class to train on; empty for masks
    train: int
    test: int  # 0 where a share of the training part is tested
    looked_at: int
    shorter: int
    smallest: tuple[int, int]
    largest: tuple[int, int]
    grey: bool  # all that were looked at
    masked: bool

    @property
    def lines(self) -> tuple[str, ...]:
        """What was found, in a few lines."""
        tested = f"{self.test} to test" if self.test else "none set apart to test"
        which = "all" if self.looked_at == self.train else f"{self.looked_at} of them"
        low, high = ("x".join(map(str, size)) for size in (self.smallest, self.largest))
        sizes = low if low == high else f"{low} to {high}"
        colours = "grey, read in three channels" if self.grey else "in colour"
        return (
            f"{self.layout}: {len(self.classes)} class{'es' if len(self.classes) != 1 else ''}, "
            f"{self.train} images to train on, {tested}",
            f"sizes (height x width, of {which}): {sizes}, median of the shorter side {self.shorter}; {colours}",
            *([f"classes: {self._classes}"] if self.by_class else []),
        )

    @property
    def _classes(self) -> str:
        told = [f"{printable(name, 40)} {count}" for name, count in zip(self.classes, self.by_class, strict=True)]
        more = len(told) - _CLASSES_TOLD
        return ", ".join(told[:_CLASSES_TOLD]) + (f" and {more} more" if more > 0 else "")


def survey(folder: Path) -> Survey:
    """Return what ``folder`` holds. NeqError, one line, where it is no folder of images, or one cannot be read."""
    folder = folder.expanduser().absolute()
    try:
        if not folder.is_dir():
            raise NeqError(f"--data: no folder '{printable(folder)}'; give the one that your images are in")
        section, layout = _section(folder)
        source, section = _opened(section)
        return _looked_at(section, layout, source)
    except RecipeValueError as error:
        raise NeqError(f"--data: {error.reason}") from error
    except OSError as error:
        raise NeqError(f"--data: '{printable(folder)}' cannot be read ({one_line(error)})") from error


def _section(folder: Path) -> tuple[DataSection, str]:
    """Return how the folder is opened, and what that is called."""
    train, _ = folders_of(folder, validation=True)
    if not holds_masks(train) and holds_tables(folder):
        return DataSection(name=f"hf/{folder}"), "tables of images"
    name, layout = "image_folder", "a folder for each class"
    if holds_masks(train):
        name, layout = "segmentation_folder", "images with masks"
    section = DataSection(name=name, root=str(folder))
    if section.folder != folder:
        raise NeqError(f"--data: '{printable(folder)}' has a $ in its path, which a recipe expands; rename it")
    return section, layout


def _opened(section: DataSection) -> tuple[Any, DataSection]:
    """Return the open data and the section that opens it, with a ``validation`` where there is no test part."""
    held_out = section.model_copy(update={"validation": 0.1})
    if section.name in ("image_folder", "segmentation_folder"):
        section = section if tested_folder(section.folder) is not None else held_out
        return open_source(section), section
    try:
        return open_source(section), section
    except RecipeValueError as error:
        if error.key not in ("data.kwargs.test_split", "data.label_key"):
            raise
    return open_source(held_out), held_out  # which says what is wrong, if it is not that


def _looked_at(section: DataSection, layout: str, source: Any) -> Survey:
    count = len(source.train)
    if not count:
        raise NeqError("--data: there are no images to train on")
    every = -(-count // MOST_LOOKED_AT)
    headers = [_header(source.train, index) for index in range(0, count, every)]
    shorter = sorted(min(header.height, header.width) for header in headers)
    by_area = sorted(headers, key=lambda header: header.height * header.width)
    labels = known_labels(source.train)
    told = Counter([] if labels is None else labels.tolist())
    masked = labels is None
    if section.validation is not None:
        section = section.model_copy(update={"validation": 0.2 if count < FEW else 0.1})
    return Survey(
        section=section,
        layout=layout,
        classes=source.classes,
        by_class=() if masked else tuple(told[number] for number in range(len(source.classes))),
        train=count,
        test=len(source.test) if section.validation is None else 0,
        looked_at=len(headers),
        shorter=shorter[len(shorter) // 2],
        smallest=(by_area[0].height, by_area[0].width),
        largest=(by_area[-1].height, by_area[-1].width),
        grey=all(header.grey for header in headers),
        masked=masked,
    )


def _header(part: Any, index: int) -> Header:
    if isinstance(part, Rows):
        return part.header(index)
    path = Path(part.samples[index][0])
    try:
        with path.open("rb") as file:
            return read_header(file)
    except Exception as error:
        raise RecipeValueError("data", f"{path}: cannot be used ({one_line(error)}); mend or remove it") from error
