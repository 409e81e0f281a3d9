"""A split of a table as images with a label or a mask each: columns as Hugging Face's library stores images on disk."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image
from torch import Tensor

from neq_cli.errors import RecipeValueError, one_line
from neq_cli.training.data.masks import MOST_CLASSES, as_mask
from neq_cli.training.data.pixels import Header, Range, read_header, read_opened

Cell = Mapping[str, Any] | None
"""What a column of images holds in a row: ``bytes`` of a file and its ``path``, one of which may be None."""


class Rows:
    """Rows, read as (image in three channels, label or PIL mask as it is) by the reader that reads files.

    ``table[row]`` is a mapping of columns. ``targets`` [rows] are the labels, None where ``mask_key`` names a column of
    masks.
    """

    def __init__(
        self,
        split: str,
        table: Any,
        image_key: str,
        *,
        targets: Tensor | None = None,
        mask_key: str | None = None,
        value_range: Range | None = None,
    ) -> None:
        self.targets = targets
        self.samples = _Places(split, table, (image_key, mask_key))
        self._table = table
        self._keys = (image_key, mask_key)
        self._value_range = value_range
        self._sizes: list[tuple[int, int]] | None = None

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        row = self._table[index]
        image_key, mask_key = self._keys
        image = read_opened(opened_cell(row[image_key]), self._value_range)
        return image, _picture(row[mask_key]) if self.targets is None else int(self.targets[index])

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of every image, from its header. Raises RecipeValueError where one cannot be read."""
        if self._sizes is None:
            headers = map(self.header, range(len(self)))
            self._sizes = [(header.height, header.width) for header in headers]
        return self._sizes

    def largest_class(self, ignore_index: int) -> int:
        """Return the largest number in all masks but ``ignore_index``; -1 where there is none. Reads every mask."""
        largest = -1
        for index in range(len(self)):
            try:
                values = as_mask(_picture(self._table[index][self._keys[1]]))
            except Exception as error:
                raise self._cannot_be_used(index, 1, error) from error
            kept = values[values != ignore_index]
            largest = max(largest, int(kept.max()) if kept.numel() else -1)
            if largest >= MOST_CLASSES:
                said = f"{largest} is no class, a number from 0 to {MOST_CLASSES - 1}; correct the mask"
                raise RecipeValueError("data.name", f"{self.samples[index][1]}: {said}")
        return largest

    def header(self, index: int) -> Header:
        """Return what an image's file says before it is decoded. Raises RecipeValueError where it cannot be read."""
        try:
            return read_header(opened_cell(self._table[index][self._keys[0]]))
        except Exception as error:
            raise self._cannot_be_used(index, 0, error) from error

    def _cannot_be_used(self, index: int, which: int, error: Exception) -> RecipeValueError:
        return RecipeValueError("data.name", f"{self.samples[index][which]}: cannot be used ({one_line(error)})")


class _Places(Sequence[Any]):
    """What errors call the image and the mask of every row: ``("test, row 3 (cat.jpg)", "test, row 3, its mask")``."""

    def __init__(self, split: str, table: Any, keys: tuple[str, str | None]) -> None:
        self._split = split
        self._table = table
        self._keys = keys

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: Any) -> Any:
        return tuple(self._place(index, key, mask=bool(which)) for which, key in enumerate(self._keys))

    def _place(self, index: int, key: str | None, *, mask: bool) -> str:
        cell: Cell = None
        with suppress(Exception):  # it is being named because something is wrong with it
            cell = None if key is None else self._table[index][key]
        name = (cell or {}).get("path")
        return f"{self._split}, row {index}{', its mask' if mask else ''}" + (f" ({name})" if name else "")


def opened_cell(cell: Cell) -> BinaryIO:
    """Return the file of a cell, open. ValueError where it holds none."""
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise ValueError("no image in this row")
    return io.BytesIO(Path(cell["path"]).read_bytes() if cell["bytes"] is None else cell["bytes"])


def _picture(cell: Cell) -> Any:
    with Image.open(opened_cell(cell)) as opened:
        opened.load()
        return opened
