"""What a run does before its steps follow each other: told as it happens, and how long each part took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from neq_cli.events import Preparing

_TELL_SECONDS = 0.25
"""Between two reports of one part's progress."""
_SLOW_SECONDS = 1.0
_LEAST_SECONDS = 0.05
"""Parts that took less are not listed."""

READING = "reading images"


class Startup:
    """The parts of a start, until ``finish``; ``tell`` is given a record when one begins, and as it goes on.

    A part within another one is that one's.
    """

    def __init__(
        self, tell: Callable[[Preparing], None] = lambda record: None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.tell = tell
        self.clock = clock
        self.seconds: dict[str, float] = {}
        self.finished = False
        self._stepped = self._within = False
        self._told = clock()

    @contextmanager
    def part(self, what: str, *, told: bool = True) -> Iterator[None]:
        """Tell that ``what`` begins, and add up what it takes."""
        if self.finished or self._within:
            yield
            return
        self._within = True
        if told:
            self._tell(Preparing(what))
        began = self.clock()
        try:
            yield
        finally:
            self._within = False
            self.add(what, self.clock() - began)

    def step(self, *, compiled: bool) -> AbstractContextManager[None]:
        """Return what a training step runs in: a part if it is the first one, in which libraries choose algorithms."""
        if self._stepped:
            return nullcontext()
        self._stepped = True
        return self.part("compiling") if compiled else self.part("the first step", told=False)

    def count(self, what: str, done: int, total: int) -> None:
        """Tell how far a part is; cheap, also where it is called often."""
        if self.clock() - self._told >= _TELL_SECONDS:
            self._tell(Preparing(what, done, total))

    def add(self, what: str, seconds: float) -> None:
        """Add to what a part took."""
        self.seconds[what] = self.seconds.get(what, 0.0) + seconds

    def _tell(self, record: Preparing) -> None:
        self._told = self.clock()
        self.tell(record)

    def summary(self) -> str:
        """Return what was spent since the last summary, in one line: "8.1 s (reading images 6.9 s)"; "" if little."""
        parts, self.seconds = self.seconds, {}
        if sum(parts.values()) < _SLOW_SECONDS:
            return ""
        listed = [f"{what} {taken:.1f} s" for what, taken in parts.items() if taken >= _LEAST_SECONDS]
        return f"{sum(parts.values()):.1f} s ({', '.join(listed)})"

    def finish(self) -> None:
        """Let what comes from here on be no part of the start."""
        self.finished = True
