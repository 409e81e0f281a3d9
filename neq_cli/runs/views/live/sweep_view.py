"""What a user sees while a sweep goes: a live overview, a plain line per run that starts or ends, or nothing."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol

from rich.console import Console, ConsoleOptions, RenderResult

from neq_cli.runs.views.live.dashboard import SteadyLive, height_above, print_whole, rows_of, said_last, segments_of
from neq_cli.runs.views.live.progress import Mode, can_show_frames
from neq_cli.runs.views.live.run_view import clock
from neq_cli.runs.views.live.sweep_frame import sweep_frame
from neq_cli.runs.views.live.sweep_state import FAILED, FINISHED, PENDING, RUNNING, SweepState, SweptRun
from neq_cli.text import counted, format_metric, format_passes, format_percent, printable

SECONDS_PER_FRAME = 0.25
_ENDING_ROWS = 2


class SweepView(Protocol):
    """Shown a sweep between ``__enter__`` and ``__exit__``; times are seconds of the clock that the state is fed by."""

    def __enter__(self) -> SweepView: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def begin(self, state: SweepState) -> None:
        """Take the state, which is kept up to date from outside."""

    def changed(self, run: SweptRun, now: float) -> None:
        """Take note that a run has started or ended."""

    def show(self, now: float) -> None:
        """Show how things stand; cheap, may be called many times a second."""

    def message(self, text: str) -> None:
        """Log a line, at once and for good."""


class SilentSweep:
    """Shows nothing."""

    def __enter__(self) -> SilentSweep:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    def begin(self, state: SweepState) -> None:
        """Take in the state and do nothing."""

    def changed(self, run: SweptRun, now: float) -> None:
        """Take in a run and do nothing."""

    def show(self, now: float) -> None:
        """Do nothing."""

    def message(self, text: str) -> None:
        """Take in a text and do nothing."""


class PlainSweep(SilentSweep):
    """One line for the sweep, one per run that starts or ends; no escape codes, nothing is ever rewritten."""

    def __init__(self, console: Console) -> None:
        self._file = console.file
        self._state: SweepState | None = None

    def begin(self, state: SweepState) -> None:
        """Print what there is to do."""
        self._state = state
        self.message(begin_line(state))

    def changed(self, run: SweptRun, now: float) -> None:
        """Print what became of the run."""
        if self._state is not None:
            self.message(run_line(run, self._state, now))

    def message(self, text: str) -> None:
        """Print a text, line by line."""
        self._file.write("".join(f"{printable(line)}\n" for line in text.splitlines()))
        self._file.flush()


class SweepOverview:
    """A table of the runs that is drawn anew a few times a second and stays when the sweep ends."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._state: SweepState | None = None
        self._now = self._drawn = -math.inf
        self._below = 0  # rows that come below the last frame, with the shell's prompt
        # Drawn by whoever calls show, so that no thread is running while processes are started.
        self._live = SteadyLive(
            self,
            console=console,
            auto_refresh=False,
            redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),
        )

    def __enter__(self) -> SweepOverview:
        self._live.start(refresh=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        width = self.console.width
        # The command line ends with where the runs are, and how to compare them.
        self._below = 1 + (rows_of(said_last(error, width), width) if error is not None else _ENDING_ROWS)
        self._live.stop()

    def begin(self, state: SweepState) -> None:
        """Show the first frame."""
        self._state = state
        self.show(state.began)

    def changed(self, run: SweptRun, now: float) -> None:
        """Show it in a frame of its own."""
        self._drawn = -math.inf
        self.show(now)

    def show(self, now: float) -> None:
        """Draw a frame, unless the last one was drawn just now."""
        self._now = now
        if now - self._drawn >= SECONDS_PER_FRAME:
            self._drawn = now
            self._live.refresh()

    def message(self, text: str) -> None:
        """Print text above the frame, where it stays in the terminal's history."""
        lines = [printable(line) for line in text.splitlines()] or [""]
        if self._state is not None:
            self._state.message = lines[-1]
        print_whole(self.console, lines)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._state is None:
            return
        height = height_above(self._below, options.size.height)
        yield from segments_of(sweep_frame(self._state, options.max_width, height, self._now))


def choose_sweep_view(mode: Mode, console: Console | None = None) -> SweepView:
    """The display for ``--progress``, as ``choose_progress`` chooses it for one run; on stderr unless told."""
    console = Console(stderr=True) if console is None else console
    if mode == "off":
        return SilentSweep()
    if mode == "rich" or (mode == "auto" and can_show_frames(console)):
        return SweepOverview(console)
    return PlainSweep(console)


def begin_line(state: SweepState) -> str:
    """The sweep in one line."""
    finished = f", {state.skipped} finished already" if state.skipped else ""
    runs = counted(len(state.runs), "run")
    return f"sweep of {state.title}: {runs}{finished}, {state.jobs} at once, in {state.folder}"


def run_line(run: SweptRun, state: SweepState, now: float) -> str:
    """What became of a run in one line, for people and for grep."""
    if run.state == RUNNING:
        before = f" after epoch {format_passes(run.epochs_before)}" if run.epochs_before else ""
        return f"started      {run.name}{before}"
    if run.state == PENDING:
        return f"queued again {run.name}"
    counted = f"{state.count(FINISHED)}/{len(state.runs)} finished"
    if run.state == FAILED:
        return f"failed       {run.name}: {run.reason}"
    took = clock(run.ended - run.began)
    parts = [f"{run.state:<12} {run.name}", f"epoch {run.epochs_done}/{run.epochs}"]
    if run.metric:
        parts.append(f"{run.metric.removeprefix('test_')} {format_metric(run.score, run.metric)}")
    parts += [f"frozen {format_percent(100 * run.frozen_share)}", f"took {took}", counted]
    return "  ".join([*parts, *([f"eta {clock(state.seconds_left(now))}"] if run.state == FINISHED else [])])


def plan_lines(runs: Sequence[SweptRun]) -> list[str]:
    """Every run of a sweep in one line, with what is there of it."""
    width = max((len(run.name) for run in runs), default=0)
    lines = []
    for run in runs:
        what = f"to train, {counted(run.epochs, 'epoch')}"
        if run.state == FINISHED:
            what = "finished"
        elif run.passed_epochs:
            what = f"to go on with after epoch {format_passes(run.passed_epochs)} of {run.epochs}"
        lines.append(f"{run.name:<{width}}  {what}")
    return lines
