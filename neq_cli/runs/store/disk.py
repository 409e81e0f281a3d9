"""Writing a file so that a kill or power loss leaves the old content or the new, never through a link; POSIX only.

By hand: no maintained library also refuses links and parts hard links.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from neq_cli.errors import RunDirectoryError, TrainingError
from neq_cli.text import printable

PARTIAL = ".*.partial"  # what a killed write may leave
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def atomic_write(path: Path, content: bytes | Callable[[Path], object]) -> None:
    """Replace ``path`` in one step: after a kill or power loss it holds the old content or the new, never a part.

    ``content`` is the bytes, or a callable that writes them to the path it is given. File and folder are synced to
    disk. Errors (OSError, or what the callable raises) pass through; wrap in ``writing`` to make them one line.
    """
    # One fixed name: a killed write leaves one file, and the next write takes it away.
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)  # a leftover, or a link, through which the callable would write
        if callable(content):
            content(partial)
            descriptor = os.open(partial, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        else:
            write_and_sync(os.open(partial, _NEW, 0o666), content)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_and_sync(descriptor: int, content: bytes) -> None:
    """Write all of ``content``, have it on the disk, and close the descriptor. OSError."""
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Have a folder's names on the disk. OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing(path: Path, mend: str | None = None) -> Iterator[None]:
    """Turn a failure of the disk while ``path`` is written (full, read-only, gone) into one line.

    That is a TrainingError, for a run that goes on no more; with a ``mend``, where nothing was begun that could fail,
    a RunDirectoryError that says it.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        message = f"{printable(path)}: cannot be written: {printable(reason)}; {mend or 'finished epochs are kept'}"
        raise (TrainingError if mend is None else RunDirectoryError)(message) from error


def check_writable(folder: Path) -> None:
    """Raise OSError where files may not be put into ``folder``, before anything slow is begun."""
    if not os.access(folder, os.W_OK | os.X_OK):
        read_only = os.statvfs(folder).f_flag & os.ST_RDONLY
        number = errno.EROFS if read_only else errno.EACCES
        raise OSError(number, os.strerror(number), str(folder))


def check_own(path: Path, *, folder: bool = False) -> None:
    """Raise RunDirectoryError unless ``path`` is missing or a file (a folder) that is no link: writes would go astray.

    OSError where the disk does not tell.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    kind = "folder" if folder else "regular file"
    if not (stat.S_ISDIR(mode) if folder else stat.S_ISREG(mode)):
        what = "a link" if stat.S_ISLNK(mode) else f"not a {kind}"
        raise RunDirectoryError(f"{printable(path)}: {what}, where neq writes; put a {kind} in its place, or remove it")
