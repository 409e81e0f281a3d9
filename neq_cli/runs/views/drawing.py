"""Lines of styled text, and numbers drawn with block and line characters; every one exactly as wide as asked."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style

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


def without_blanks(line: Line) -> Line:
    """The line without the blanks at its end."""
    kept = list(line)
    while kept and not kept[-1].text.rstrip(" "):
        kept.pop()
    return [*kept[:-1], kept[-1]._replace(text=kept[-1].text.rstrip(" "))] if kept else []


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


LEVELS = " ▁▂▃▄▅▆▇█"
ELLIPSIS = "…"
_WORD = re.compile(r"[^0-9.]+")


def averaged(values: Sequence[float], width: int) -> list[float]:
    """At most ``width`` values in order: all of them, or the means of as many equal stretches.

    NaN stays out of a mean; a stretch of nothing else is NaN.
    """
    if len(values) <= width:
        return list(values)
    edges = [index * len(values) // width for index in range(width + 1)]
    stretches = [[value for value in values[start:end] if math.isfinite(value)] for start, end in pairwise(edges)]
    return [sum(stretch) / len(stretch) if stretch else math.nan for stretch in stretches]


def chart(
    values: Sequence[float], width: int, rows: int = 1, low: float | None = None, high: float | None = None
) -> list[str]:
    """Draw values from left to right as columns of ``rows`` characters, top row first; NaN is blank.

    ``low`` and ``high`` are the values of the lowest and the highest mark; by default the extremes of what is drawn.
    One column stands for one value until they no longer fit, then for the mean of several.
    """
    if width < 1 or rows < 1:
        return [""] * max(rows, 0)
    points = averaged(values, width)
    known = [point for point in points if math.isfinite(point)]
    low = min(known, default=0.0) if low is None else low
    high = max(known, default=0.0) if high is None else high
    steps = rows * 8 - 1  # an eighth stays free, so that charts below one another do not melt into a block
    heights = [_level(point, low, high, steps) for point in points]
    lines = []
    for row in range(rows - 1, -1, -1):
        line = "".join(LEVELS[min(max(height - row * 8, 0), 8)] for height in heights)
        lines.append(line.ljust(width))
    return lines


def _level(value: float, low: float, high: float, steps: int) -> int:
    """1 to ``steps``: what was measured leaves a mark, however low it is; 0 for NaN."""
    if not math.isfinite(value):
        return 0
    if high <= low:
        return max(1, steps // 2)
    share = (min(max(value, low), high) - low) / (high - low)
    return 1 + round(share * (steps - 1))


def histogram(counts: Sequence[int], width: int) -> str:
    """Draw counts of equal bins in ``width`` columns; an empty column is blank, a single count leaves a mark.

    A bin that lies across two columns counts in both by its share, so that an even spread looks even at any width.
    """
    if width < 1 or not len(counts):
        return " " * max(width, 0)
    cumulative = np.concatenate([[0], np.cumsum(counts)])
    edges = np.interp(np.linspace(0, len(counts), width + 1), np.arange(len(counts) + 1), cumulative)
    columns = np.diff(edges)
    levels = np.ceil(7 * columns / max(columns.max(), 1e-9) - 1e-9).astype(int)
    return "".join(LEVELS[level] for level in levels)


def bar(share: float, width: int) -> tuple[str, str]:
    """The heavy and the light part of a bar. Only nothing looks empty and only everything looks full."""
    if width < 1:
        return "", ""
    share = min(max(share, 0.0), 1.0) if math.isfinite(share) else 0.0
    halves = round(share * width * 2)
    if share > 0:
        halves = max(halves, 1)
    if share < 1:
        halves = min(halves, width * 2 - 1)
    heavy = "━" * (halves // 2) + "╸" * (halves % 2)
    return heavy, "─" * (width - len(heavy))


def shorten(text: str, width: int) -> str:
    """``text`` in at most ``width`` terminal cells; what is too long loses its middle, where names differ least."""
    if cell_len(text) <= width:
        return text
    if width < 2:
        return ELLIPSIS * max(width, 0)
    head = (width - 1) // 2
    tail = width - 1 - head
    return _start(text, head) + ELLIPSIS + _start(text[::-1], tail)[::-1]


def _start(text: str, cells: int) -> str:
    """As many leading characters as fit in ``cells``; some are two cells wide."""
    used = 0
    for index, character in enumerate(text):
        used += cell_len(character)
        if used > cells:
            return text[:index]
    return text


@lru_cache(maxsize=8)  # the names on a screen stay, while their numbers change
def shorten_names(names: tuple[str, ...], width: int) -> list[str]:
    """Dotted names in at most ``width`` cells each: words are cut alike, numbers stay, as they tell layers apart.

    ``stages.2.blocks.17.attention`` in 17 cells is ``sta…2.blo…17.att…``: an ellipsis takes a dot's place.
    """
    long = {name for name in names if cell_len(name) > width}
    letters = max((len(word) for name in long for word in _WORD.findall(name)), default=0)
    short: dict[str, str] = {}
    while long and letters:
        letters -= 1
        short = {name: _cut_words(name, letters) for name in long}
        if all(cell_len(text) <= width for text in short.values()):
            break
    return [shorten(short.get(name, name), width) for name in names]


def _cut_words(name: str, letters: int) -> str:
    return re.sub(rf"([^0-9.]{{{letters}}})[^0-9.]+\.?", rf"\1{ELLIPSIS}", name) if letters else name
