"""The front of a search as a terminal table: what each of its runs was trained with, its metric and executed FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from neq_cli.text import counted, format_flops, format_metric, printable


@dataclass(frozen=True)
class FrontRow:
    """A run: its name, its value of every key that was searched, and what it came to."""

    name: str
    labels: tuple[str, ...]
    flops: float  # executed, per iteration: mean over the rows of the run
    metric: float  # the last value measured
    metric_name: str
    lower_is_better: bool


def front_lines(rows: Sequence[FrontRow], keys: Sequence[str], finished: int) -> list[str]:
    """Return the table, the cheapest run first, under a line that says of how many runs it is the front."""
    if not rows:
        return []
    better = "lower" if rows[0].lower_is_better else "higher"
    metric = printable(rows[0].metric_name.removeprefix("test_"), 40)
    head = ["run", *keys, metric, "executed FLOPs"]
    cells = [
        [row.name, *row.labels, format_metric(row.metric, row.metric_name), format_flops(row.flops, rows[-1].flops)]
        for row in rows
    ]
    table = [[printable(cell) for cell in line] for line in (head, *cells)]
    widths = [max(len(line[column]) for line in table) for column in range(len(head))]
    count = f"{len(rows)} of {counted(finished, 'run')}"
    title = f"{count} on the front of {metric} ({better} is better) against executed FLOPs"
    return [title, *("  ".join(map(str.ljust, line, widths)).rstrip() for line in table)]
