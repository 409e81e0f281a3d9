"""Splits read as they come and never kept: files in an order by seed and epoch, of each the rows in turn."""

from __future__ import annotations

import atexit
import gc
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from functools import cache
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch

from neq_cli.errors import RecipeValueError, one_line
from neq_cli.training.data.pixels import Range, read_opened
from neq_cli.training.data.quiet import quietly
from neq_cli.training.data.rows import Cell, opened_cell
from neq_cli.training.errors import DataError

_READ_TOGETHER = 100
"""Rows that are asked of the library at once: views of a row group, which it reads whole."""
_THREADS_SECONDS = 0.25


class Row(NamedTuple):
    """A row as it is stored, and where: number ``row`` of its file, both counted from 0."""

    file: int
    row: int
    cell: Cell
    label: Any


class RowReader:
    """Decodes rows in any process: ``reader[row]`` is (image in three channels, label), by the reader of files."""

    def __init__(self, split: str, files: Sequence[str], value_range: Range | None) -> None:
        self.split = split
        self.files = files
        self.value_range = value_range

    def __getitem__(self, row: Row) -> tuple[Any, int]:
        if row.label is None or row.label < 0:
            raise ValueError("its label names no class")
        return read_opened(opened_cell(row.cell), self.value_range), int(row.label)

    def place(self, row: Row) -> str:
        """Return what errors call a row: "hf/set train, row 3 of train-00000.parquet (cat.jpg)"."""
        path = (row.cell or {}).get("path")
        return f"{self.split}, row {row.row}{self.of_file(row.file)}" + (f" ({path})" if path else "")

    def of_file(self, file: int) -> str:
        """Return " of FILE" where the split has several."""
        return f" of {self.files[file]}" if len(self.files) > 1 else ""


class HeldRows:
    """Rows that stay in memory as they are stored, by their number: the probe's."""

    def __init__(self, reader: RowReader, rows: Sequence[Row]) -> None:
        self.reader = reader
        self.rows = rows
        self.samples = [(reader.place(row),) for row in rows]  # what errors call them

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.reader[self.rows[index]]


class RowStream:
    """A split of ``length`` rows in ``files``, of which those that are being read are all that is in memory.

    ``table`` is the library's stream of images and labels as they are stored, in the columns ``keys``. ``told`` says
    what the length is known from, and ``key`` which argument of the recipe tells another.
    """

    def __init__(
        self,
        reader: RowReader,
        table: Any,
        keys: tuple[str, str],
        *,
        length: int,
        told: str,
        key: str,
        buffer: int,
        counts: Sequence[int] | None = None,
    ) -> None:
        self.reader = reader
        self.table = table
        self.keys = keys
        self.length = length
        self.told = told
        self.key = key
        self.buffer = buffer  # rows that are shuffled together
        self.counts = counts  # rows of each file, where that is known
        self.held: dict[int, int] = {}

    def __len__(self) -> int:
        return self.length

    def hold(self, seed: int, count: int, keep: int) -> HeldRows:
        """Keep the first ``count`` rows, in the order of files that epoch 0 has, out of all epochs from 1 on.

        Returns the last ``keep`` of them. RecipeValueError, one line, where they cannot be read.
        """
        order, kept = self.order(seed, 0), []
        try:
            # Every file is read from its beginning, so that what is held of it are its first rows.
            self.held = self._passed(order, count)
            kept = list(self.part(order, count - keep, count))
        except DataError as error:
            raise RecipeValueError("data.name", str(error)) from error
        return HeldRows(self.reader, kept)

    def order(self, seed: int, epoch: int) -> list[int]:
        """Return the files in the order of an epoch, which follows from both numbers alone."""
        files: list[int] = torch.randperm(len(self.reader.files), generator=drawn_by(seed, epoch)).tolist()
        return files

    def part(self, order: Sequence[int], start: int, stop: int) -> Iterator[Row]:
        """Yield the rows from ``start`` up to ``stop`` of files in ``order``.

        DataError where the split has fewer, or ends later than it should.
        """
        passed = self._passed(order, start)
        place = max(0, len(passed) - 1)
        with closing(self.rows(order, place, passed.get(order[place], 0))) as rows:
            number = start
            for row in islice(rows, stop - start):
                number += 1
                yield row
            if number < stop:
                raise self.ended(number)
            if stop == self.length and next(rows, None) is not None:
                raise DataError(
                    f"{self.reader.split} has more rows than the {self.length} of {self.told}; "
                    f"correct data.kwargs.{self.key}"
                )

    def rows(
        self, order: Sequence[int], place: int = 0, row: int = 0, leave_out: Mapping[int, int] | None = None
    ) -> Generator[Row, None, None]:
        """Yield the rows of files in ``order``, from ``row`` of the file at ``place`` of it on.

        ``leave_out``: of which file how many of the first rows are none. DataError where a file cannot be read.
        """
        for file in order[place:]:
            yield from self._rows_of(file, max(row, (leave_out or {}).get(file, 0)))
            row = 0

    def ended(self, rows: int) -> DataError:
        """Return the error for a split that has ``rows``, fewer than was told."""
        what = f"{self.reader.split} has {rows} rows, not the {self.length} of {self.told}"
        return DataError(f"{what}; set data.kwargs.{self.key}={rows}")

    def _passed(self, order: Sequence[int], count: int) -> dict[int, int]:
        """Return of which files, in order, how many rows the first ``count`` are; DataError where there are fewer."""
        passed: dict[int, int] = {}
        left = count
        for file in order:
            if not left:
                break
            rows = self._count(file, left) if self.counts is None else self.counts[file]
            passed[file] = min(rows, left)
            left -= passed[file]
        if left:
            raise self.ended(count - left)
        return passed

    def _count(self, file: int, enough: int) -> int:
        """Return how many rows a file has, or so many as are ``enough``."""
        rows = 0
        with closing(self._batches(file, 0)) as batches:
            for _, batch in batches:
                rows += batch.num_rows
                if rows >= enough:
                    break
        return rows

    def _rows_of(self, file: int, start: int) -> Iterator[Row]:
        with closing(self._batches(file, start)) as batches:
            for first, batch in batches:
                columns = (batch.column(key).to_pylist() for key in self.keys)
                for number, (cell, label) in enumerate(zip(*columns, strict=True), first):
                    yield Row(file, number, cell, label)

    def _batches(self, file: int, start: int) -> Generator[tuple[int, Any], None, None]:
        """Yield rows from ``start`` on as Arrow has them, none of which is copied, with the number of the first."""
        _let_threads_end()
        number = 0
        shard = self.table.shard(len(self.reader.files), file).with_format("arrow")
        # Closed here and not where it is collected, which may be never: pyarrow's threads read the file it has open.
        with closing(shard.iter(batch_size=_READ_TOGETHER)) as batches:
            while (batch := self._next(batches, file, number)) is not None:
                skipped = min(max(start - number, 0), batch.num_rows)
                if skipped < batch.num_rows:
                    yield number + skipped, batch.slice(skipped)
                number += batch.num_rows

    def _next(self, batches: Iterator[Any], file: int, number: int) -> Any:
        try:
            with quietly():
                return next(batches, None)
        except Exception as error:
            where = f"{self.reader.split}{f', after row {number - 1}' if number else ''}{self.reader.of_file(file)}"
            what = f"{where}: cannot be read ({one_line(error).rstrip('.')})"
            raise DataError(f"{what}; mend or remove the file, or see to the network") from error


def drawn_by(*numbers: int) -> torch.Generator:
    """Return a generator of its own for these numbers."""
    words = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))


@cache
def _let_threads_end() -> None:
    """Let pyarrow's threads let go of what they read before the interpreter ends: else they end it by SIGABRT.

    See github.com/apache/arrow/issues/45214, for which the library itself sleeps where it joins streams.
    """
    atexit.register(time.sleep, _THREADS_SECONDS)
    atexit.register(gc.collect)  # atexit calls what came last first
