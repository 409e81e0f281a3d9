"""A line that shows how far a pass over data is, on a terminal alone: elsewhere it takes no line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from neq_cli.runs.views.live.progress import can_show_frames


@contextmanager
def pass_shown(what: str, console: Console | None = None) -> Iterator[Callable[[int, int], object]]:
    """Yield what is told how many batches are done, of how many."""
    console = Console(stderr=True) if console is None else console
    if not can_show_frames(console):
        yield lambda done, batches: None
        return
    columns = (TextColumn(what), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, batches: progress.update(task, completed=done, total=batches)
