"""For how long torch.compile has been compiling, told while it does: minutes, for a large network."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from neq_cli.events import Compiling

_EVERY = 1.0
_APART = 1.0
"""Seconds between two compilations that do not count as one, as those of a network's parts do."""


@contextmanager
def told(show: Callable[[Compiling], object]) -> Iterator[None]:
    """Inside, have ``show`` told every second while something is compiled, and at its end; by a thread of its own."""
    from torch._dynamo.callback import callback_handler  # imports the compiler, which takes seconds

    clock = _Clock(show)
    thread = threading.Thread(target=clock.follow, name="compiling", daemon=True)
    thread.start()
    callback_handler.register_start_callback(clock.begin)
    callback_handler.register_end_callback(clock.end)
    try:
        yield
    finally:
        callback_handler.remove_start_callback(clock.begin)
        callback_handler.remove_end_callback(clock.end)
        clock.close()
        thread.join()


class _Clock:
    """What compiles says when, in whatever thread; ``follow`` tells of it."""

    def __init__(self, show: Callable[[Compiling], object]) -> None:
        self._show = show
        self._changed = threading.Condition()
        self._runs = self._closed = False
        self._began = self._ended = -float("inf")

    def begin(self, _: Any) -> None:
        with self._changed:
            now = time.monotonic()
            if now - self._ended > _APART:
                self._began = now
            self._runs = True
            self._changed.notify()

    def end(self, _: Any) -> None:
        with self._changed:
            self._runs, self._ended = False, time.monotonic()
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed, self._runs = True, False
            self._changed.notify()

    def follow(self) -> None:
        """Tell until ``close``."""
        told = False  # of something that has not been said to have ended
        while True:
            with self._changed:
                if not self._runs and not self._closed and not told:
                    self._changed.wait()
                runs, closed, now = self._runs, self._closed, time.monotonic()
                over = told and not runs and (closed or now - self._ended > _APART)
                seconds = (self._ended if over else now) - self._began
            # Outside the lock: what compiles does not wait for a terminal.
            if over:
                self._show(Compiling(seconds, ended=True))
                told = False
            elif runs:
                self._show(Compiling(seconds))
                told = True
            if closed:
                return
            with self._changed:
                if (runs or told) and not self._closed:
                    self._changed.wait(_EVERY)
