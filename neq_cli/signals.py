"""Signals that ask a run to stop: noted, so that the step can be finished and saved; a second SIGINT leaves at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from neq_cli.errors import Terminated

# SIGUSR1 is what SLURM is asked to send some time before it ends a job (sbatch --signal), SIGHUP what a terminal sends
# that goes away.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")


class StopRequests:
    """While entered, the signals that end a process are noted instead: ``received`` is the first one's name.

    A SIGINT after another signal raises KeyboardInterrupt wherever the program is. Inside ``at_once()``, where nothing
    would be lost, the first signal of any kind does so too, as ``error`` tells. A signal that the process was started
    to ignore stays ignored. Outside the main thread, where Python takes no signals, nothing changes.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._at_once = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in _NAMES):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = self.received is not None and number == signal.SIGINT
        self.received = self.received or signal.Signals(number).name
        if again:
            raise KeyboardInterrupt
        if self._at_once:
            raise self.error()

    def error(self, message: str = "") -> Terminated:
        """Return what ends the run, with what the user should know."""
        return Terminated(self.received or "SIGTERM", message)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal ends what runs there and then."""
        self.set_at_once(True)
        try:
            yield
        finally:
            self.set_at_once(False)

    def set_at_once(self, value: bool) -> None:
        """Say whether from here on a signal ends what runs there and then; one that waited does so now."""
        self._at_once = value
        if value and self.received is not None:
            raise self.error()
