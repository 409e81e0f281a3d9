"""Prints lines on stderr: what is wrong or worth a warning, once where several processes have the same to say.

Holds the processes that this one has joined, so that the command line asks them without importing torch.
"""

from __future__ import annotations

import sys
from typing import Protocol


class Company(Protocol):
    """The processes that train together, as far as the lines on stderr depend on them."""

    def say_once(self, message: str) -> bool:
        """Whether this process is the one that prints the message."""
        ...

    def linger(self) -> None:
        """Stay until the others have found out why this process ends."""
        ...

    def leave(self) -> None:
        """Let go of the others, where all has gone well."""
        ...


_company: list[Company] = []  # at most one


def keep_company(company: Company) -> None:
    """Have the lines of this process said once among all; ``training.processes`` calls it once it has joined others."""
    _company[:] = [company]


def complain(message: str) -> None:
    """Print a line to stderr, once where several processes have the same one."""
    if all(company.say_once(message) for company in _company):
        print(message, file=sys.stderr)


def columns() -> int | None:
    """Return how wide the terminal is that these lines go to, None where they go to none."""
    import shutil  # here, since `neq` imports this module before it has taken over the signals

    return max(shutil.get_terminal_size().columns, 1) if sys.stderr is not None and sys.stderr.isatty() else None


def linger() -> None:
    """Stay until other processes have found out why this one ends, where it has joined any."""
    for company in _company:
        company.linger()


def leave() -> None:
    """Let go of other processes at the end of a command that went well, where this one has joined any."""
    for company in _company:
        company.leave()


def warning_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Return a warning of Python's, from a library or the user's own code, in one line as ours are."""
    return f"warning: {' '.join(str(message).split())} ({filename}:{lineno})\n"
