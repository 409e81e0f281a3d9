"""Lines on stderr: what is wrong or worth a warning, once where several processes have the same to say."""

from __future__ import annotations

import sys


def complain(message: str) -> None:
    """Print a line to stderr, once where several processes have the same one."""
    # Nobody has joined others before this module is there.
    distributed = sys.modules.get("neq_cli.training.processes.joined")
    if distributed is None or distributed.joined().say_once(message):
        print(message, file=sys.stderr)


def warning_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Return a warning of Python's, from a library or the user's own code, in one line as ours are."""
    return f"warning: {' '.join(str(message).split())} ({filename}:{lineno})\n"
