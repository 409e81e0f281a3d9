"""Notes Ctrl-C and other signals, so that a run finishes its step and saves; a second one leaves at once."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from neq_cli import signals
from neq_cli.errors import Terminated


class StopRequests:
    """While entered, the signals that end a process are noted instead: ``received`` is the first one's name.

    The next one raises Terminated wherever the program is. Inside ``at_once()``, where nothing would be lost, the first
    one does so too, as ``error`` tells. A signal that the process was started to ignore stays ignored. Outside the main
    thread, where Python takes no signals, nothing changes.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.waits = True
        self._received_at = 0.0
        self._raised = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            signals.noting.append(self)
            for number in signals.SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self in signals.noting:
            signals.noting.remove(self)

    def _note(self, number: int, frame: FrameType | None) -> None:
        signals.answer(number)
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_at = signal.Signals(number).name, now
            if not self.waits:
                self._raised = True
                signals.end_by(number)
        elif not signals.repeats(number, now - self._received_at):
            if self._raised:
                signals.leave(number)
            self._raised = True
            signals.end_by(number)

    def error(self, message: str = "", command: Sequence[str] = ()) -> Terminated:
        """Return what ends the run, with what the user should know and the command that goes on."""
        return Terminated(self.received or "SIGTERM", message, command)

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
        self.waits = not value
        if value and self.received is not None:
            raise self.error()
