"""A meter: joules since it was made, of a counter or of sampled power; some have to be looked at now and then."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from neq_cli.errors import NeqError

JOULES_PER_KWH = 3.6e6


class EnergyError(NeqError):
    """Energy is asked for and nothing here tells it; the message is the reason and the mend."""


class Unmeasured(Exception):
    """Why one source cannot be measured here, in a few words."""


class Meter:
    """Adds up what ``spent`` returns: the joules since it was called last.

    ``source`` is what is measured ("cpu", "gpu"), ``how`` by what. ``every``: seconds after which it has to be looked
    at again, which a thread does from ``start`` to ``close``; None where it is enough to ask when one wants to know.
    """

    def __init__(
        self,
        source: str,
        how: str,
        spent: Callable[[], float],
        *,
        every: float | None = None,
        close: Callable[[], object] = lambda: None,
    ) -> None:
        self.source = source
        self.how = how
        self._spent = spent
        self._every = every
        self._close = close
        self._joules = 0.0
        self._lock = threading.Lock()
        self._failure: Exception | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to look at it now and then; once is enough."""
        if self._every is not None and self._thread is None:
            self._thread = threading.Thread(target=self._look, args=(self._every,), name="neq-energy", daemon=True)
            self._thread.start()

    def joules(self) -> float:
        """Return the joules since it was made. Raises whatever its source does, then and ever after."""
        with self._lock:
            if self._failure is None:
                try:
                    self._joules += self._spent()
                except Exception as error:
                    self._failure = error  # what was missed is not known: no later sum would be right
            if self._failure is not None:
                raise self._failure
            return self._joules

    def close(self) -> None:
        """Let go of the source."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        self._close()

    def _look(self, seconds: float) -> None:
        while not self._ended.wait(seconds):
            try:
                self.joules()
            except Exception:
                return  # told when somebody asks


def counted(read: Callable[[], float], largest: float | None = None) -> Callable[[], float]:
    """Return what a counter, which ``read`` returns, has gone on by since the last call.

    After ``largest`` it begins anew; None: it never should. Raises ValueError where it does all the same.
    """
    before = read()

    def spent() -> float:
        nonlocal before
        now = read()
        difference = now - before
        if difference < 0:
            if largest is None:
                raise ValueError(f"its counter fell from {before:g} to {now:g} joules")
            difference += largest
        before = now
        return difference

    return spent


def sampled(watts: Callable[[], float], clock: Callable[[], float] = time.perf_counter) -> Callable[[], float]:
    """Return the joules since the last call, of a power that ``watts`` tells, by the trapezoidal rule."""
    before, then = watts(), clock()

    def spent() -> float:
        nonlocal before, then
        power, now = watts(), clock()
        joules = (before + power) / 2 * (now - then)
        before, then = power, now
        return joules

    return spent
