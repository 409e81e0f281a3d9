"""Ends `neq` by Ctrl-C and other signals: by an exception in the main thread, else by a thread that watches it.

Imports next to nothing, for its handlers are to be there before anything else.
"""

from __future__ import annotations

import atexit
import os
import select
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any, NoReturn

from neq_cli.errors import Terminated

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""What ends a process. SIGUSR1 is what SLURM is asked to send some time before it ends a job (sbatch --signal), SIGHUP
what a terminal sends that goes away."""

_REPEATED = 1.0
_REPEATED_BY_TORCHRUN = 5.0
_UNANSWERED = 1.0
"""Seconds in which the main thread must have taken notice of a second signal: in C++ code it takes notice of none."""
_CLEANING_UP = 10.0
"""Seconds in which it must have ended, where nothing is to be saved, or a second signal came."""

_LOST, _ENDS = 0, 255  # told beside the numbers of signals

noting: list[Any] = []
"""The ``StopRequests`` that are entered, by which a first signal is no end."""
_watches: list[Watch] = []


def exit_code(name: str) -> int:
    """Return the exit code of a command that the signal of this name ends."""
    return 130 if name == "SIGINT" else 143


def last_words(name: str, message: str = "") -> str:
    """Return what a command that the signal of this name ends says last."""
    how = "interrupted" if name == "SIGINT" else f"ended by {name}"
    return f"{how}; {message}" if message else how


def repeats(number: int, seconds: float) -> bool:
    """Whether a signal that comes so long after the first only repeats it: launchers pass on what all were sent.

    Ctrl-C never does: somebody pressed it again.
    """
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    return number != signal.SIGINT and seconds < (_REPEATED_BY_TORCHRUN if launched else _REPEATED)


def leave(number: int) -> NoReturn:
    """End the process here and now, and those that ``multiprocessing`` started; all that it writes is whole on disk."""
    name = signal.Signals(number).name
    shown = "\x1b[?25h" if os.isatty(2) else ""  # the cursor, which a live display hides
    try:
        os.write(2, f"{shown}{last_words(name)}\n".encode())
        multiprocessing = sys.modules.get("multiprocessing")
        for process in multiprocessing.active_children() if multiprocessing is not None else ():
            process.kill()
    finally:
        os._exit(exit_code(name))


def finish(code: int) -> NoReturn:
    """End the process as the interpreter does, but for taking itself apart: meanwhile a signal kills it, by whatever.

    For what a signal ends; the interpreter has no such call of its own.
    """
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    finally:
        os._exit(code)


def answer(number: int) -> None:
    """Tell the thread that watches that the main thread has taken notice of a signal, and raise one that was lost."""
    for watch in _watches:
        if watch.lost is not None:
            lost, watch.lost = watch.lost, None
            raise lost
        watch.answers += 1
        if watch.received is None:
            watch.received, watch.received_at = signal.Signals(number).name, time.monotonic()


def end_by(number: int) -> NoReturn:
    """Raise what ends the program by this signal."""
    name = signal.Signals(number).name
    for watch in _watches:
        watch.raised = name
    raise Terminated(name)


class Watch:
    """From ``start`` to ``stop`` a signal raises Terminated in the main thread, and the next one ends the process.

    Python takes notice of signals in the main thread only, between two of its instructions. Where that thread does not
    come to it, as while another thread compiles the backward pass that it waits for, or where something catches all
    exceptions, a thread of our own ends the process. ``received`` is the name of the first signal, ``raised`` that of
    the one that ends the program; ``answers`` counts those that the main thread took notice of.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.received_at = 0.0
        self.raised: str | None = None
        self.answers = 0
        self.lost: Terminated | None = None
        self._handlers: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None

    def start(self) -> None:
        """Take over the signals, but those that the process was started to ignore; only in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, self._handle)
        _watches.append(self)
        self._unraisable, sys.unraisablehook = sys.unraisablehook, self._note_lost
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        threading.Thread(target=self._follow, args=(self._pipe[0],), name="signals", daemon=True).start()

    def stop(self, *, for_good: bool) -> None:
        """Give the signals back; ``for_good``: the process ends, and a signal, also an earlier one, makes it hurry."""
        if for_good and self._pipe is not None:
            for number in self._handlers:
                signal.signal(number, lambda number, frame: leave(number))
            os.write(self._pipe[1], bytes([_ENDS]))
            return
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self.end_thread()

    def end_thread(self) -> None:
        """Watch no longer."""
        if self._pipe is not None:
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._pipe[1])
            self._pipe = None
            _watches.remove(self)
            sys.unraisablehook = self._unraisable

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first = self.received is None
        answer(number)
        if first:
            end_by(number)
        if not repeats(number, time.monotonic() - self.received_at):
            leave(number)

    def _note_lost(self, unraisable: Any) -> None:
        """Take notice of an exception of ours that Python drops: it came in a ``__del__`` or a callback of its own."""
        if isinstance(unraisable.exc_value, Terminated) and self._pipe is not None:
            self.lost = unraisable.exc_value
            os.write(self._pipe[1], bytes([_LOST]))
        else:
            self._unraisable(unraisable)

    def _follow(self, pipe: int) -> None:
        """End the process where the main thread does not; ``pipe`` tells the numbers of the signals as they come."""
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # the main thread alone may be holding them back
        main, own, seen = threading.main_thread().ident, 0, 0
        first = second = 0.0
        deadline: float | None = None
        last: int = signal.SIGTERM
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([pipe], [], [], left)[0]:
                if second and self.answers >= seen and deadline == second + _UNANSWERED:
                    deadline = second + _CLEANING_UP
                    continue
                leave(last)
            told = os.read(pipe, 64)
            if not told:
                os.close(pipe)
                return
            for number in told:
                now = time.monotonic()
                if number == _ENDS:
                    deadline = now + _CLEANING_UP if first and deadline is None else deadline
                    continue
                if number == _LOST and main is not None:
                    own += 1
                    time.sleep(0.05)  # until the callback in which the exception was lost is over
                    signal.pthread_kill(main, next(iter(self._handlers)))
                    continue
                if number not in self._handlers:  # another's
                    continue
                if own:
                    own -= 1
                    continue
                seen += 1
                if not first:
                    first, last = now, number
                    deadline = None if any(one.waits for one in noting) else now + _CLEANING_UP
                elif not repeats(number, now - first):
                    deadline = now if second else now + _UNANSWERED
                    second, last = second or now, number


def _forget() -> None:
    """A forked child's signals are its own."""
    for watch in list(_watches):
        watch.end_thread()
    noting.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
