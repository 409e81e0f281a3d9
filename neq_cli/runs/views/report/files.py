"""Writing the figures of a report as files for papers; replaces figures that neq wrote, and no other file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from neq_cli.errors import NeqError
from neq_cli.runs.store.disk import atomic_write
from neq_cli.runs.views.report.drawing import MARK, PRINT, Format, drawn
from neq_cli.runs.views.report.pictures import Picture
from neq_cli.text import printable

_MARK_WITHIN = 4096  # bytes


def write_pictures(all_pictures: Iterable[Picture], folder: Path, form: Format) -> list[Path]:
    """Write every figure into ``folder``, one printed column wide, PNG at 300 dpi; return the files.

    Figures that neq wrote are replaced. NeqError where another file has a figure's name, or the disk refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for picture in all_pictures:
            path = folder / f"{picture.name}.{form}"
            check_replaceable(path)
            atomic_write(path, drawn(picture.draw, PRINT, printed_height(picture), picture.name, form))
            written.append(path)
    except OSError as error:
        where = printable(error.filename or folder)
        raise NeqError(
            f"{where}: cannot be written: {printable(error.strerror or error)}; choose another folder"
        ) from error
    return written


def check_replaceable(path: Path) -> None:
    """Raise NeqError where ``path`` is there and not of neq's making, to be read from its first bytes. OSError."""
    if not (path.exists() or path.is_symlink()):
        return
    if path.is_file() and not path.is_symlink():
        with path.open("rb") as file:
            if MARK.encode() in file.read(_MARK_WITHIN):
                return
    raise NeqError(f"{printable(path)}: already exists and was not written by neq report; choose another place")


def printed_height(picture: Picture) -> float:
    """The page's proportions, and room for the legend below."""
    return picture.height * 0.7 + 0.14 * len(picture.legend)
