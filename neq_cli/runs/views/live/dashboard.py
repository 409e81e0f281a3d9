"""The live display of a run on a terminal; it draws a few frames a second and leaves the last one standing."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from threading import RLock
from types import TracebackType

from rich.cells import cell_len
from rich.console import Console, ConsoleDimensions, ConsoleOptions, ConsoleRenderable, RenderResult
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType, Segment
from rich.text import Text

from neq_cli import signals
from neq_cli.errors import Terminated
from neq_cli.events import EpochRecord, Preparing, Record, RunStarted
from neq_cli.runs.views.drawing import Line, text_of, without_blanks
from neq_cli.runs.views.live.frame import Painter
from neq_cli.runs.views.live.run_view import RunView
from neq_cli.runs.views.live.run_view import clock as time_text
from neq_cli.text import folded, printable, to_go_on

FRAMES_PER_SECOND = 4
STARTING = "starting"
LOWEST_LAST = 4  # rows of a last frame, whatever is to come below it


class Dashboard:
    """Shows records as a frame that fills the window, and messages above it."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console
        self.view: RunView | None = None
        self._preparing: Preparing | None = None  # before there is a view
        self._preparing_since = clock()
        self._clock = clock
        self._painter = Painter()
        self._closing: list[str] = []
        self._below = 0  # rows that the last lines take, and the shell's prompt
        self._lock = RLock()  # records come from the training thread, frames are drawn in another
        self._live = SteadyLive(
            self,
            console=console,
            refresh_per_second=FRAMES_PER_SECOND,
            # Results go to stdout: only one that shares the screen may be caught, to be printed above the frame.
            redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),
        )
        self._streams = (sys.stdout, sys.stderr)

    def __enter__(self) -> Dashboard:
        self._streams = (sys.stdout, sys.stderr)
        _on_screen.append(self)
        self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            if self.view is not None:
                self.view.ended, self.view.completed = self._clock(), bool(self._closing)
            self._below = 1 + rows_of([*self._closing, *said_last(error, self.console.width)], self.console.width)
            self._live.transient = self.view is None  # there is nothing worth a last frame
        self._live.stop()
        _on_screen.remove(self)
        closing, self._closing = self._closing, []
        for text in closing:
            self.message(text)

    def show(self, record: Record) -> None:
        """Take in a record; the next frame shows it."""
        with self._lock:
            if isinstance(record, RunStarted):
                self.view = RunView(record, self._clock())
            elif self.view is not None:
                self.view.show(record, self._clock())
            elif isinstance(record, Preparing):
                if self._preparing is None or record.what != self._preparing.what:
                    self._preparing_since = self._clock()
                self._preparing = record
        if isinstance(record, RunStarted):
            for note in record.notes:
                self.message(f"note: {note}")

    def message(self, text: str) -> None:
        """Print text above the frame, where it stays in the terminal's history; the frame repeats its last line."""
        lines = [printable(line) for line in text.splitlines()] or [""]
        with self._lock:
            if self.view is not None:
                self.view.message = lines[-1]
        print_whole(self.console, lines)

    def closing(self, text: str) -> None:
        """Keep a line to be printed below the last frame, which is then that of a run that has come to its end."""
        self._closing.append(text)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        with self._lock:
            if self.view is None:
                yield Segment(self._starting()[: options.max_width])
                return
            height = height_above(self._below, options.size.height)
            lines = self._painter.frame(self.view, options.max_width, height, self._clock())
        yield from segments_of(lines)

    def _starting(self) -> str:
        if self._preparing is None:
            return STARTING
        return f"{STARTING}: {self._preparing.text}, {time_text(self._clock() - self._preparing_since)}"


def height_above(below: int, height: int) -> int:
    """Return how high a frame is, so that what comes below the last one does not push its head off the screen."""
    return max(height - below, min(LOWEST_LAST, height))


def segments_of(lines: Sequence[Line]) -> Iterator[Segment]:
    """Yield a frame without the blanks that fill up its lines: whoever copies from the screen is better off so."""
    for index, line in enumerate(lines):
        if index:
            yield Segment.line()
        # A last line of nothing would be none to rich, and the frame a line lower.
        yield from without_blanks(line) or ([Segment(" ")] if index == len(lines) - 1 else [])


def print_whole(console: Console, lines: Iterable[str]) -> None:
    """Print lines, broken between words where they are too long: within a path, the terminal breaks what it must."""
    console.print(Text("\n".join(part for line in lines for part in folded(line, console.width))), soft_wrap=True)


def rows_of(texts: Iterable[str], width: int) -> int:
    """Return how many rows of a terminal these texts take."""
    parts = [part for text in texts for line in text.splitlines() for part in folded(line, width)]
    return sum(max(-(-cell_len(part) // max(width, 1)), 1) for part in parts)


def said_last(error: BaseException | None, width: int) -> list[str]:
    """Return what the command line says when ``error`` has ended the command."""
    if isinstance(error, Terminated):
        return [to_go_on(signals.last_words(error.signal, str(error)), error.command, width)]
    return [] if error is None else [str(error) or type(error).__name__]


class SteadyLive(Live):
    """A Live that survives a resized window and, where the terminal can, shows each frame whole.

    Between frames the cursor stands at the beginning of the last line: what a terminal echoes, as ^C, would behind its
    end begin a new line, and push the frame's head off the screen.
    """

    _size: ConsoleDimensions | None = None

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        drawn = super().process_renderables(renderables)
        if not self.console.is_interactive:
            return drawn
        size, self._size = self._size, self.console.size
        if size is not None and size != self._size:
            # The terminal has wrapped or moved the old frame, so its lines can't be counted back: start on a clear one.
            drawn = [Control.home(), Control.clear(), *drawn]
        return [_Raw("\x1b[?2026h"), *drawn, _Raw("\r\x1b[?2026l")]


class _Raw:
    """A control sequence that rich has no name for; 2026 is the synchronised update, ignored where it is not known."""

    def __init__(self, sequence: str) -> None:
        self.sequence = sequence

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Segment(self.sequence, None, [(ControlType.CURSOR_UP, 0)])


_on_screen: list[Dashboard] = []


def _give_back_streams() -> None:
    """A forked child, such as a data loader's worker, writes plainly: its copy of the display must not draw."""
    for dashboard in _on_screen:
        sys.stdout, sys.stderr = dashboard._streams
    _on_screen.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_give_back_streams)


def render_frame(width: int, height: int, records: Iterable[Record], elapsed: float = 0.0) -> str:
    """The frame after ``records`` as plain text, for a README or a test.

    Finished epochs took the seconds that their metrics say; ``elapsed`` is how long the running one had been going.
    """
    view: RunView | None = None
    began = 0.0
    for record in records:
        if isinstance(record, RunStarted):
            view = RunView(record, began)
        elif view is not None:
            if isinstance(record, EpochRecord):
                began += float(record.metrics["epoch_seconds"])
            view.show(record, began if isinstance(record, EpochRecord) else began + elapsed)
    if view is None:
        return STARTING
    return "\n".join(text_of(line).rstrip() for line in Painter().frame(view, width, height, began + elapsed))
