"""CSV files that grow by whole rows and are cut back to an epoch, streamed; reading them is in untrusted.py.

By hand: no library appends rows that outlive a power loss, or cuts a table back to a row.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from neq_cli.runs.store.disk import atomic_write, sync_folder, write_and_sync

_LONGEST_LINE = 2**16
_EPOCH = re.compile(r"[0-9]{1,9}")
_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


def append_rows(path: Path, rows: Sequence[Sequence[str]]) -> None:
    """Add rows, and have them on the disk; a kill may leave the last of them torn. OSError."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    new = not path.exists()
    write_and_sync(os.open(path, _APPEND, 0o666), text.getvalue().encode())
    if new:
        sync_folder(path.parent)


@dataclass
class Beginning:
    """The part of a table that is whole, in order and of the epochs asked for."""

    columns: tuple[str, ...] = ()
    rows: list[int] = field(default_factory=list)  # rows[t - 1]: how many epoch t has
    size: int = 0  # bytes


def beginning(path: Path, epochs: int) -> Beginning:
    """Return how far the table has the header and the rows of epochs 1 to ``epochs``, one epoch after the other.

    It ends before the first row that is torn, damaged, out of order or of a later epoch. A missing file is an empty
    one. OSError.
    """
    found = Beginning()
    if not path.exists():
        return found
    for cells, end in _rows(path):
        if not found.columns:
            if cells[:1] != ["epoch"]:
                break
            found.columns = tuple(cells)
        else:
            if len(cells) != len(found.columns) or not _EPOCH.fullmatch(cells[0]):
                break
            epoch = int(cells[0])
            if epoch > epochs or epoch not in (len(found.rows), len(found.rows) + 1) or not epoch:
                break
            if epoch > len(found.rows):
                found.rows.append(0)
            found.rows[-1] += 1
        found.size = end
    return found


def cut(path: Path, size: int) -> None:
    """Shorten a file to its first ``size`` bytes, on the disk; a missing one may stay missing. OSError.

    A file that also lies elsewhere, by a hard link, is parted from it first: it would be shortened and grow there too.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        state = os.fstat(descriptor)
        if state.st_nlink == 1 and state.st_size > size:
            os.ftruncate(descriptor, size)
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if state.st_nlink > 1:
        atomic_write(path, lambda copy: _copy(path, copy, size))


def _copy(source: Path, target: Path, size: int) -> None:
    with source.open("rb") as reader, target.open("xb") as writer:
        while size and (block := reader.read(min(size, 2**20))):
            writer.write(block)
            size -= len(block)


def _rows(path: Path) -> Iterator[tuple[list[str], int]]:
    """Yield (cells, bytes up to the row's end) of every row before the first that is not whole CSV in UTF-8."""
    end = 0

    def lines() -> Iterator[str]:
        nonlocal end
        while (line := file.readline(_LONGEST_LINE)).endswith(b"\n"):
            end += len(line)
            yield line.decode()

    with path.open("rb") as file:
        rows = csv.reader(lines(), strict=True)
        try:
            for cells in rows:
                yield cells, end
        except (csv.Error, UnicodeDecodeError):
            return
