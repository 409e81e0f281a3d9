"""One writer per run directory, by a lock that the kernel drops when its process dies; where there are no locks, a try.

A POSIX record lock is what network file systems know, and forked workers do not inherit it. It ends when its process
closes any descriptor of the file, so the holder opens the file once, and nobody who only reads ever opens it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
import threading
import weakref
from pathlib import Path
from typing import Any

from neq_cli.errors import RunDirectoryError
from neq_cli.runs.store.disk import check_own
from neq_cli.runs.store.untrusted import read_json
from neq_cli.text import printable

_UNKNOWN_HERE = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}
_HOLDER = re.compile(r"process [0-9]{1,10} on host \S{1,255}")
_OPEN = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK

Inode = tuple[int, int]

# Record locks do not keep one process from itself. A forked child has a copy of this table, but holds nothing.
_held: dict[Inode, int] = {}
_guard = threading.RLock()  # a lock that nothing refers to is released by whichever thread collects it


class LockTaken(RunDirectoryError):
    """Somebody else holds the lock, and will let go of it."""


class Lock:
    """Held until ``release``, until nothing refers to it any more, or until the process ends."""

    def __init__(self, descriptor: int, inode: Inode, note: str | None) -> None:
        """Use ``acquire``."""
        self.note = note  # what the user should know: the file system has no locks
        self._finalizer = weakref.finalize(self, _release, descriptor, inode, os.getpid())

    def release(self) -> None:
        """Let others in; more than once does nothing."""
        self._finalizer()


def acquire(path: Path, status: Path) -> Lock:
    """Lock the run directory that the file ``path`` lies in, or raise RunDirectoryError at once; the file stays.

    The error is a LockTaken where another holds it.

    ``status`` is the run's status.json, which is asked where the file system has no locks.
    """
    with _guard:
        try:
            _check_file(path)
            descriptor = os.open(path, _OPEN, 0o666)
        except OSError as error:
            reason = printable(error.strerror or error)
            raise RunDirectoryError(
                f"{printable(path)}: cannot be written: {reason}; choose another with -o"
            ) from error
        try:
            note = _lock(descriptor, path.parent, status)
            state = os.fstat(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        inode = (state.st_dev, state.st_ino)
        _held[inode] = os.getpid()
        lock = Lock(descriptor, inode, note)
    if state.st_nlink == 1:  # else it is also in a copy made of hard links, or somebody's own file
        with contextlib.suppress(OSError):  # the lock holds all the same
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on host {socket.gethostname()}\n".encode(), 0)
    return lock


def is_alive(process: int) -> bool:
    """Return whether there is a process of that number on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's process
        return True
    return True


def _release(descriptor: int, inode: Inode, process: int) -> None:
    if os.getpid() != process:  # a forked child, which held nothing
        return
    with _guard:
        _held.pop(inode, None)
        os.close(descriptor)


def _check_file(path: Path) -> None:
    """Look before the file is opened: closing it again would end the lock that this very process may hold."""
    check_own(path)
    try:
        state = path.lstat()
    except FileNotFoundError:
        return
    if _held.get((state.st_dev, state.st_ino)) == os.getpid():
        raise _refusal(path.parent, "this very process")


def _lock(descriptor: int, run: Path, status: Path) -> str | None:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise _refusal(run, _holder(descriptor)) from error
        if error.errno not in _UNKNOWN_HERE:
            reason = printable(error.strerror or error)
            raise RunDirectoryError(f"{printable(run)}: cannot be locked: {reason}; choose another with -o") from error
        return _without_locks(run, status)
    return None


def _holder(descriptor: int) -> str:
    with contextlib.suppress(OSError):
        line = os.pread(descriptor, 512, 0).decode(errors="replace").strip()
        if _HOLDER.fullmatch(line):
            return printable(line, 200)
    return "another process"


def _without_locks(run: Path, status: Path) -> str:
    """Refuse a run whose status names a living process of this machine; return what the user is to mind otherwise."""
    said = _read_status(status)
    process, host = said.get("pid"), said.get("host")
    elsewhere = ""
    if said.get("state") == "running" and host != socket.gethostname():
        elsewhere = f"; {status.name} has it running on host {printable(host, 100)}"
    elif said.get("state") == "running" and isinstance(process, int) and 0 < process < 2**31:
        living = process != os.getpid() and is_alive(process)
        if living:
            raise _refusal(run, f"process {process} on this host, as {status.name} has it")
    return f"{printable(run)}: its file system has no locks; see to it that no other process trains it{elsewhere}"


def _read_status(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except RunDirectoryError:  # missing or damaged: it tells nothing
        return {}


def _refusal(run: Path, holder: str) -> LockTaken:
    return LockTaken(f"{printable(run)}: being trained by {holder}; wait, stop it, or choose another with -o")
