"""Is `neq` for one run of a sweep: it saves and ends when the sweep that started it is gone.

A module of its own, for it is what ``python -m`` starts, and imports nothing heavy before it watches.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading


def main() -> None:
    """Be `neq` with the arguments given; standard input is a pipe that the sweep holds open while it lives."""
    threading.Thread(target=_end_with_the_sweep, daemon=True).start()
    sys.argv[0] = "neq"
    from neq_cli.cli import main as neq

    neq()


def _end_with_the_sweep() -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
