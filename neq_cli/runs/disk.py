"""Writing a file so that a kill or power loss leaves the old content or the new; POSIX systems only."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from neq_cli.errors import TrainingError
from neq_cli.runs.formatting import printable


def atomic_write(path: Path, content: bytes | Callable[[Path], object]) -> None:
    """Replace ``path`` in one step: after a kill or power loss it holds the old content or the new, never a part.

    ``content`` is the bytes, or a callable that writes them to the path it is given. File and folder are synced to
    disk. Errors (OSError, or what the callable raises) pass through; wrap in ``writing`` to make them one line.
    """
    # One fixed name: a killed write leaves one file, and the next write reuses it.
    partial = path.with_name(f".{path.name}.partial")
    try:
        if callable(content):
            content(partial)
            with partial.open("rb") as written:
                os.fsync(written.fileno())
        else:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure of the disk while ``path`` is written (full, read-only, gone) into a one-line TrainingError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        message = f"{printable(path)}: cannot be written: {printable(reason)}; finished epochs are kept"
        raise TrainingError(message) from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)
