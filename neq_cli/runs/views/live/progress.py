"""What a user sees while a run goes: a live display, a plain line per epoch, or nothing, all fed by its records."""

from __future__ import annotations

import io
import math
import os
import time
from collections.abc import Callable, Mapping
from threading import Timer
from types import TracebackType
from typing import Literal, Protocol

from rich.console import Console

from neq_cli.events import OBSERVATION, Compiling, EpochRecord, Preparing, Record, RunStarted, StepProgress
from neq_cli.runs.views.live.dashboard import Dashboard
from neq_cli.runs.views.live.run_view import Pace, clock
from neq_cli.text import MISSING, counted, format_flops, format_metric, format_percent, printable, ratio_percent

_FIRST_LINE = 10.0  # seconds
Mode = Literal["auto", "rich", "plain", "off"]

_LONG_SECONDS = 2.0
"""A part of a start that takes less is not worth a line."""
_PREPARING_SECONDS = 5.0
"""Between two lines on how far one part of a start is."""


class Progress(Protocol):
    """Takes records between ``__enter__`` and ``__exit__``; ``message`` logs a line without breaking the display.

    What ``closing`` is given stands below all else when the display has ended.
    """

    def __enter__(self) -> Progress: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def show(self, record: Record) -> None:
        """Take in the next record; cheap, also where it is called several times a second."""

    def message(self, text: str) -> None:
        """Log a line, at once and for good."""

    def closing(self, text: str) -> None:
        """Take one of the last lines, once nothing more is shown."""


class CompilingLines:
    """A line of what compiles after ten seconds, after twenty, and so on by twice the time; one at its end."""

    def __init__(self) -> None:
        self._due = _FIRST_LINE

    def line(self, record: Compiling) -> str | None:
        """Return what to say now, None for nothing."""
        if record.ended:
            said, self._due = self._due > _FIRST_LINE, _FIRST_LINE
            return f"compiled in {record.seconds:.0f} s" if said else None
        if record.seconds < self._due:
            return None
        while self._due <= record.seconds:
            self._due *= 2
        return compiling_text(record)


def compiling_text(record: Compiling) -> str:
    """What compiles in a few words: "compiling, 40 s"."""
    return f"compiling, {record.seconds:.0f} s"


class PlainProgress:
    """One line for the run, one per finished epoch; no escape codes, nothing is ever rewritten."""

    def __init__(self, console: Console, now: Callable[[], float] = time.monotonic) -> None:
        self._file = console.file
        self._now = now
        self._started: RunStarted | None = None
        self._pace = Pace(now())
        self._compiling = CompilingLines()
        self._preparing: Preparing | None = None  # the part of a start that is going on
        self._said = -math.inf
        self._late = Timer(0, lambda: None)  # says what goes on for long; not yet started
        self._trained = False

    def __enter__(self) -> PlainProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._late.cancel()

    def show(self, record: Record) -> None:
        """Print what the record adds; steps only tell how long the rest will take."""
        if not isinstance(record, Preparing):
            self._late.cancel()
        if isinstance(record, RunStarted):
            self._started = record
            self._pace = Pace(self._now())
            self.message(started_line(record))
            for note in record.notes:
                self.message(f"note: {note}")
        elif isinstance(record, Preparing):
            self._show_preparing(record)
        elif isinstance(record, StepProgress):
            self._pace.step(record, self._now())
        elif isinstance(record, Compiling):
            line = self._compiling.line(record)
            if line is not None:
                self.message(line)
        elif isinstance(record, EpochRecord) and self._started is not None:
            self._trained = True
            self._pace.end_epoch(float(record.metrics["epoch_seconds"]), self._now())
            left = (self._started.epochs - record.epoch) * self._pace.epoch_total()
            self.message(epoch_line(record, self._started, left))

    def _show_preparing(self, record: Preparing) -> None:
        """Print what the run is busy with before its first epoch is over where that takes long, and how far it is."""
        now = self._now()
        if self._trained:
            return
        if self._preparing is None or record.what != self._preparing.what:
            self._late.cancel()
            self._late = Timer(_LONG_SECONDS, self.message, [record.text])
            self._late.daemon = True
            self._late.start()
            self._preparing, self._said = record, now
        elif now - self._said >= _PREPARING_SECONDS:
            self._said = now
            self.message(record.text)

    def message(self, text: str) -> None:
        """Print a text, line by line."""
        lines = [printable(line) for line in text.splitlines()]
        # Not through rich: it would wrap a line at the width it guesses.
        try:
            self._file.write("".join(f"{line}\n" for line in lines))
            self._file.flush()
        except BrokenPipeError:  # whoever read along has gone; the training has not
            self._file = io.StringIO()

    def closing(self, text: str) -> None:
        """Print it: nothing is below."""
        self.message(text)


class Silent:
    """Shows nothing."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    def show(self, record: Record) -> None:
        """Take in a record and do nothing."""

    def message(self, text: str) -> None:
        """Take in a text and do nothing."""

    def closing(self, text: str) -> None:
        """Take in a text and do nothing."""


def choose_progress(mode: Mode, console: Console | None = None) -> Progress:
    """The display for ``--progress``: ``auto`` is rich on a terminal that can show it, plain elsewhere and in CI.

    ``console`` is where it shows, stderr by default, so that stdout has nothing but results.
    """
    console = Console(stderr=True) if console is None else console
    if mode == "off":
        return Silent()
    if mode == "rich" or (mode == "auto" and can_show_frames(console)):
        return Dashboard(console)
    return PlainProgress(console)


def can_show_frames(console: Console) -> bool:
    """Whether it is a terminal that moves its cursor and knows block characters, with somebody to look at it."""
    continuous_integration = os.environ.get("CI", "").lower() not in ("", "0", "false")
    return (
        console.is_terminal
        and console.file.isatty()  # FORCE_COLOR makes rich call a pipe a terminal
        and not console.is_dumb_terminal
        and console.encoding.lower().startswith("utf")
        and not continuous_integration
    )


def started_line(started: RunStarted) -> str:
    """The run in one line."""
    steps = f" of {counted(started.steps_per_epoch, 'step')}" if started.steps_per_epoch else ""
    length = f"{counted(started.epochs, 'epoch')}{steps}"
    if started.unit == OBSERVATION:
        every = f", one every {counted(started.steps_per_epoch, 'step')}" if started.steps_per_epoch else ""
        length = counted(started.epochs, started.unit) + every
    size = f"{counted(sum(started.layers.values()), 'neuron')} in {counted(len(started.layers), 'layer')}"
    return f"{started.recipe_name}: {started.description}, {started.policy}, {started.device}, {length}, {size}"


def epoch_line(record: EpochRecord, started: RunStarted, seconds_left: float) -> str:
    """A finished epoch, or observation, in one line, for people and for grep; what was not measured is a dash.

    Frozen neurons and FLOPs are those in force during it.
    """
    metrics = record.metrics
    neurons, frozen = int(metrics["neurons"]), int(metrics["frozen"])
    share = format_percent(ratio_percent(frozen, neurons))
    parts = [
        f"{started.unit} {record.epoch:>{len(str(started.epochs))}}/{started.epochs}",
        f"loss {_number(metrics['train_loss'], '.4f')}",
        f"{started.metric.removeprefix('test_')} {_metric(metrics, started.metric)}",
        f"frozen {frozen:>{len(str(neurons))}}/{neurons} {f'({share})':<8}",
        f"flops {_flops(metrics, 'paper')}, {_flops(metrics, 'executed')}",
        f"{_number(metrics['images_per_second'], '.0f')} {started.counted}/s",
        f"{_number(metrics['epoch_seconds'], '.1f')} s",
        f"eta {clock(seconds_left)}",
    ]
    return "  ".join(parts)


def _number(value: float, form: str) -> str:
    return format(float(value), form) if math.isfinite(value) else MISSING


def _metric(metrics: Mapping[str, float | int], metric: str) -> str:
    # Right-aligned, as a percentage between 0.00 and 100.00 is.
    return f"{format_metric(float(metrics.get(metric, math.nan)), metric):>5}"


def _flops(metrics: Mapping[str, float | int], accounting: str) -> str:
    now, dense = float(metrics[f"flops_{accounting}"]), float(metrics[f"flops_{accounting}_dense"])
    whole = format_flops(dense)
    return f"{format_flops(now, like=dense):>{len(whole)}}/{whole} {accounting}"
