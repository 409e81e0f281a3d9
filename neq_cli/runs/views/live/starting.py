"""A line on a terminal while a command loads PyTorch, drawn at once and gone once it has."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment

from neq_cli.runs.views.live.dashboard import STARTING, SteadyLive
from neq_cli.runs.views.live.progress import Mode, can_show_frames
from neq_cli.runs.views.live.run_view import clock

LOADING = "loading PyTorch"


@contextmanager
def starting(mode: Mode = "auto", console: Console | None = None) -> Iterator[None]:
    """Show on a terminal, stderr's unless told, that PyTorch is being loaded inside; nothing elsewhere."""
    console = Console(stderr=True) if console is None else console
    if mode in ("plain", "off") or not (mode == "rich" or can_show_frames(console)):
        yield
        return
    # Once a second: what draws takes its turn with what imports.
    line = SteadyLive(_Line(), console=console, refresh_per_second=1, transient=True)
    with line:
        line.refresh()
        yield


class _Line:
    def __init__(self) -> None:
        self._began = time.monotonic()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text = f"{STARTING}: {LOADING}, {clock(time.monotonic() - self._began)}"
        yield Segment(text[: options.max_width])
