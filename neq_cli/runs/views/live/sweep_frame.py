"""One picture of a sweep for a window of any size: from a SweepState to lines that fit its width and height."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size
from rich.style import Style

from neq_cli.runs.views.drawing import DONE, QUIET, STRONG, Line, bar, bar_line, ends, fit, line_width, shorten, span
from neq_cli.runs.views.live.run_view import clock
from neq_cli.runs.views.live.sweep_state import FAILED, FINISHED, PENDING, RUNNING, STOPPED, SweepState, SweptRun
from neq_cli.text import MISSING, counted, format_metric, format_percent, printable

_WRONG = Style(color="red")
_STYLES = {RUNNING: STRONG, FAILED: _WRONG, STOPPED: _WRONG, FINISHED: DONE, PENDING: QUIET}
# Which rows a low window keeps; of those that are finished, the latest.
_MOST_WANTED = (RUNNING, FAILED, STOPPED, FINISHED, PENDING)
_STATE_WIDTH = len(FINISHED)
_LONGEST_LABEL, _SHORTEST_LABEL = 24, 4
_GAP = "  "
_EPOCH_WIDTH = 9
METRIC_HEADINGS = {"test_top1": "top-1", "test_miou": "mIoU"}


def sweep_frame(state: SweepState, width: int, height: int, now: float) -> list[Line]:
    """At most ``height`` lines of exactly ``width`` cells; ``now`` is in seconds of the clock that fed the state."""
    if width < 1 or height < 1:
        return []
    margin = 1 if width >= 60 else 0
    room = width - 2 * margin
    head = [_identity(state, room), _progress(state, room, now)]
    if state.message and height >= 8:
        head.append([span(shorten(printable(state.message), room), QUIET)])
    lines = head[: max(height - 1, 1)] if height < 4 else [*head, [], *_table(state, room, height - len(head) - 1, now)]
    return [fit([span(" " * margin), *fit(line, room)], width) for line in lines[:height]]


def _identity(state: SweepState, width: int) -> Line:
    at_once = f"{state.jobs} at once" if state.jobs > 1 else "one at a time"
    name = shorten(printable(state.title), max(width - 8, 0))
    left = [span("sweep ", QUIET), span(name, STRONG), span(f"  {at_once}", QUIET)]
    folder = shorten(printable(state.folder), max(width - line_width(left) - 2, 0))
    return ends(left, [span(folder, QUIET)], width)


def _progress(state: SweepState, width: int, now: float) -> Line:
    done = f"{state.count(FINISHED)}/{counted(len(state.runs), 'run')}"
    failed = state.count(FAILED)
    label = f"{done}, {failed} failed" if failed else done
    elapsed = clock((state.ended if state.ended is not None else now) - state.began)
    if state.ended is not None:
        what = "finished in" if state.count(FINISHED) == len(state.runs) else "ended after"
        return bar_line(label, state.share, f"{what} {elapsed}", width, DONE)
    left = clock(state.seconds_left(now))
    return bar_line(label, state.share, f"{elapsed} gone  {left:>7} left", width, DONE)


def _table(state: SweepState, width: int, height: int, now: float) -> list[Line]:
    """The heading and a row per run; where there are more than fit, a last line counts those left out."""
    fits = len(state.runs) <= height - 1
    shown = state.runs if fits else _chosen(state.runs, height - 2)
    labels = _labels(state, shown, width)
    lines = [_heading(state, labels, width)]
    lines += [_row(run, cells, width, now) for run, cells in zip(shown, labels[1:], strict=True)]
    if not fits:
        lines.append([span(f"and {_counts([run for run in state.runs if run not in shown])}", QUIET)])
    return lines[: max(height, 0)]


def _chosen(runs: Sequence[SweptRun], count: int) -> list[SweptRun]:
    """The ``count`` runs most worth a row, in the order of the grid, so that rows stay where they are."""

    def urgency(run: SweptRun) -> tuple[int, float]:
        latest = -run.ended if run.state == FINISHED and math.isfinite(run.ended) else 0.0
        return _MOST_WANTED.index(run.state), latest

    wanted = {run.name for run in sorted(runs, key=urgency)[: max(count, 0)]}
    return [run for run in runs if run.name in wanted]


def _counts(runs: Sequence[SweptRun]) -> str:
    counts = {state: sum(run.state == state for run in runs) for state in (*_MOST_WANTED[:3], PENDING, FINISHED)}
    return ", ".join(f"{count} {state}" for state, count in counts.items() if count) + " more"


def _labels(state: SweepState, runs: Sequence[SweptRun], width: int) -> list[list[str]]:
    """What differs between runs in columns of equal width, headings first; long ones are cut alike until all fit."""
    last = [key.rpartition(".")[2] for key in state.keys]
    headings = [short if last.count(short) == 1 else key for key, short in zip(state.keys, last, strict=True)]
    if not headings:
        return [["run"], *([run.name] for run in runs)]
    rows = [headings, *([printable(label) for label in run.labels] for run in runs)]
    # Of all runs, so that columns stay where they are when other rows are shown.
    widest = [
        max(cell_len(heading), *(cell_len(printable(run.labels[column])) for run in state.runs), 0)
        for column, heading in enumerate(headings)
    ]
    limit, room = _LONGEST_LABEL, max(width - len(_GAP) - _STATE_WIDTH - 36, width // 3)
    while limit > _SHORTEST_LABEL and sum(min(size, limit) + len(_GAP) for size in widest) > room:
        limit -= 1
    widths = [min(size, limit) for size in widest]
    return [[_padded(shorten(text, size), size) for text, size in zip(row, widths, strict=True)] for row in rows]


def _padded(text: str, width: int) -> str:
    return text + " " * (width - cell_len(text))


def _heading(state: SweepState, labels: Sequence[Sequence[str]], width: int) -> Line:
    metrics = {run.metric for run in state.runs if run.metric}
    metric = metrics.pop() if len(metrics) == 1 else ""
    name = METRIC_HEADINGS.get(metric, printable(metric).removeprefix("test_") or "score")
    left = f"{_GAP.join(labels[0])}{_GAP}{'state':<{_STATE_WIDTH}}"
    right = f"{shorten(name, 7):>7}{_GAP}frozen{_GAP}{'time':>7}     "
    return ends([span(left, QUIET)], [span(f"{'epoch':>{_EPOCH_WIDTH}}{right}", QUIET)], width)


def _row(run: SweptRun, labels: Sequence[str], width: int, now: float) -> Line:
    left = f"{_GAP.join(labels)}{_GAP}"
    state = span(f"{run.state:<{_STATE_WIDTH}}", _STYLES[run.state])
    if run.state == FAILED:
        reason = _cut(printable(run.reason), max(width - cell_len(left) - _STATE_WIDTH - 2, 0))
        return [span(left), state, span(f"{_GAP}{reason}", _WRONG)]
    epoch = f"{run.epochs_done}/{run.epochs}"
    score = format_metric(run.score, run.metric)
    numbers = f"{score:>7}{_GAP}{format_percent(100 * run.frozen_share):>6}{_GAP}{_time(run, now)}"
    tail = f"{epoch:>{_EPOCH_WIDTH}}{numbers}"
    used = cell_len(left) + _STATE_WIDTH
    room = width - used - cell_len(tail) - len(_GAP)
    if run.state == PENDING and not run.passed_epochs:
        return [span(left), state]
    middle: Line = [span(" " * max(room + len(_GAP), 0))]
    if room >= 6 and run.state == RUNNING:
        heavy, light = bar(run.passed_epochs / max(run.epochs, 1), min(room, 40))
        blank = " " * (room - min(room, 40))
        middle = [span(_GAP), span(heavy, DONE), span(light + blank, QUIET)]
    return [span(left), state, *middle, span(tail)]


def _cut(text: str, width: int) -> str:
    """A sentence in at most ``width`` cells: its beginning says most."""
    return text if cell_len(text) <= width else f"{set_cell_size(text, width - 1)}…" if width else ""


def _time(run: SweptRun, now: float) -> str:
    if run.state == RUNNING:
        return f"{clock(run.seconds_left(now)):>7} left"
    took = clock(run.ended - run.began) if math.isfinite(run.began) else MISSING
    return f"{took:>7}     "
