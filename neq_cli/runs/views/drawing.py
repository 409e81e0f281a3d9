"""What a frame is built of: lines of styled text, each as wide as asked; knows no run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style

from neq_cli.runs.views.sparkline import bar, chart, shorten

PLAIN = Style()
STRONG = Style(bold=True)
QUIET = Style(dim=True)
FROZEN = Style(color="cyan")
DONE = Style(color="green")
GRAPH = Style(color="bright_blue")

Line = list[Segment]
GAP = 2


def span(text: str, style: Style = PLAIN) -> Segment:
    """A piece of a line."""
    return Segment(text, style)


def line_width(line: Line) -> int:
    """Terminal cells of a line."""
    return sum(cell_len(segment.text) for segment in line)


def fit(line: Line, width: int) -> Line:
    """The line in exactly ``width`` cells, cut or padded on the right."""
    return Segment.adjust_line_length(line, width)


def text_of(line: Line) -> str:
    """The line without its styles."""
    return "".join(segment.text for segment in line)


def ends(left: Line, right: Line, width: int) -> Line:
    """Two texts at the ends of a line; where they do not fit, the right one goes."""
    space = width - line_width(left) - line_width(right)
    if not right or space < GAP:
        return fit(left, width)
    return [*left, span(" " * space), *right]


def rule(title: str, note: str, width: int) -> Line:
    """A light rule with a title and, where there is room, a note at its end."""
    title = shorten(title, max(width - 6, 0))
    used = cell_len(title) + 4
    tail = f" {note} ─" if note and used + cell_len(note) + 4 <= width else ""
    light = "─" * max(width - used - cell_len(tail), 0)
    return fit([span("─ ", QUIET), span(title, STRONG), span(f" {light}─{tail}", QUIET)], width)


def bar_line(label: str, share: float, tail: str, width: int, style: Style) -> Line:
    """A label, a bar that takes what room there is, and a text right of it."""
    label_text = f"{label} "
    room = width - cell_len(label_text) - cell_len(tail) - 1
    if room < 4:
        return ends([span(label)], [span(tail)], width)
    heavy, light = bar(share, room)
    return [span(label_text), span(heavy, style), span(light, QUIET), span(f" {tail}")]


@dataclass(frozen=True)
class StatRow:
    """A named number with its history; ``tails`` say more about it, the longest first."""

    label: str
    value: str
    history: Sequence[float] = ()
    tails: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    drawing: Line | None = None  # instead of a history, as wide as the block's graphs
    rows: int = 1  # of its graph


@dataclass(frozen=True)
class StatColumns:
    """Columns that a block of rows shares, so that numbers and graphs stand below one another."""

    label: int
    value: int
    graph: int  # 0 where there is no room
    tail: int
    tier: int  # which of the tails


def stat_columns(tails: Sequence[tuple[str, ...]], width: int) -> StatColumns:
    """Fit columns into ``width``: the longest tails that leave room for a graph."""
    label, value = (14, 9) if width >= 50 else (11, 8)
    used = label + value + GAP
    tier, tail, graph = 0, 0, 0
    for tier in range(max(map(len, tails), default=0)):
        tail = max(cell_len(options[min(tier, len(options) - 1)]) for options in tails if options)
        graph = width - used - (tail + GAP if tail else 0)
        if graph >= 16:
            break
    return StatColumns(label, value, graph if graph >= 6 else 0, tail, tier)


def stat_lines(row: StatRow, columns: StatColumns, width: int, stretch: int = 1) -> list[Line]:
    """The row's lines, a value of its history ``stretch`` columns wide; a tall one has its words on the bottom line."""
    if row.drawing is not None:
        graph: list[Line] = [row.drawing]
    else:
        history = [value for value in row.history for _ in range(stretch)]
        graph = [[span(text, GRAPH)] for text in chart(history, columns.graph, row.rows, row.low, row.high)]
    tail = row.tails[min(columns.tier, len(row.tails) - 1)] if row.tails else ""
    label = span(shorten(row.label, columns.label).ljust(columns.label), QUIET)
    value = span(row.value.rjust(columns.value), STRONG)
    indent = span(" " * (columns.label + columns.value + GAP))
    lines = [[indent, *line] for line in graph[:-1]]
    bottom = [label, value, span(" " * GAP), *graph[-1], span(" " * GAP), span(tail.rjust(columns.tail))]
    return [fit(line, width) for line in [*lines, bottom]]
