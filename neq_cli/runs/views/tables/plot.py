"""The course of a run drawn in the terminal: frozen share, FLOPs and metric by epoch; 40 columns or more.

By hand: rich draws no charts, and a plotting library for terminals would be one more dependency for one command.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest

import numpy as np
from numpy.typing import NDArray
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.text import Text

from neq_cli.runs.compare.curves import axis_word, learning_rate, places
from neq_cli.runs.store.run import KNOWN_METRICS, Run
from neq_cli.text import MISSING, format_metric, format_passes, printable

_ROWS = 7
_TWO_ABREAST = 100  # columns from which charts stand side by side
_NARROWEST = 30
_WIDEST = 120  # of one chart
_GAP = 4
_LARGEST = 1e30  # beyond it nothing is drawn
# Bits of a braille character's two columns of four dots, from the top.
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))


@dataclass(frozen=True)
class Series:
    """One quantity by epoch, [epochs], NaN where not measured, with the ends of its axis."""

    title: str
    style: str
    values: NDArray[np.float64]
    low: float
    high: float
    decimals: int


@dataclass(frozen=True)
class _Glyphs:
    """What a chart is drawn with: ``across`` x ``down`` dots a character."""

    across: int
    down: int
    side: str
    tick: str
    corner: str
    floor: str
    mark: str


_BRAILLE = _Glyphs(2, 4, "│", "┤", "└", "─", "┴")
_ASCII = _Glyphs(1, 1, "|", "+", "+", "-", "^")


def render_plot(run: Run) -> RenderableType:
    """Return charts of the frozen share, both FLOPs in percent of dense, and the run's metric.

    They take the terminal's width and need no colours; where its encoding has no braille they are drawn in ASCII.
    RunDirectoryError where the run has no metric.
    """
    rate = learning_rate([run])
    at = places(run)
    marks = tuple(float(at[row - 1]) for row, _ in rate.steps) if rate else ()
    words = tuple(f"{new:.3g} {when}" for (_, new), when in zip(rate.steps, rate.when, strict=True)) if rate else ()
    return _Plot(tuple(_series(run)), _Across(at, axis_word([run])), marks, words)


@dataclass(frozen=True)
class _Across:
    """The axis of epochs: where each value stands on it, [epochs], and what that counts."""

    places: NDArray[np.float64]
    word: str

    def column(self, place: float, columns: int) -> int:
        """The column that a place is drawn in: the first one at the left end, the last at the right."""
        first, last = float(self.places[0]), float(self.places[-1])
        return 0 if first == last else round((place - first) / (last - first) * (columns - 1))

    def numbers(self, columns: int) -> str:
        """What stands below: the first place, one in the middle where there is room, the last."""
        first, last = f"{self.word} {format_passes(self.places[0])}", format_passes(self.places[-1])
        if len(self.places) == 1 or columns < len(first) + 1 + len(last):
            return first[:columns]
        middle = math.floor((self.places[0] + self.places[-1]) / 2)
        number = format_passes(middle)
        line = list(first.ljust(columns))
        start = self.column(middle, columns) - len(number) // 2
        between = self.places[0] < middle < self.places[-1]
        if between and start > len(first) + 1 and start + len(number) < columns - len(last) - 1:
            line[start : start + len(number)] = number
        line[columns - len(last) :] = last
        return "".join(line)


@dataclass(frozen=True)
class _Plot:
    series: tuple[Series, ...]
    across: _Across
    marks: tuple[float, ...]  # places of steps of the learning rate
    words: tuple[str, ...]  # what they say

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        glyphs = _ASCII if options.ascii_only or not _has_braille(options.encoding) else _BRAILLE
        width = options.max_width
        abreast = 2 if width >= _TWO_ABREAST else 1
        each = max(min((width - _GAP * (abreast - 1)) // abreast, _WIDEST), _NARROWEST)
        margin = max(len(number) for series in self.series for number in _numbers(series))
        charts = [_chart(series, self.across, self.marks, each, margin, glyphs) for series in self.series]
        for start in range(0, len(charts), abreast):
            for line in zip_longest(*charts[start : start + abreast], fillvalue=Text()):
                yield _beside(line, each)
        if self.words:
            yield Text(f"{glyphs.mark} learning rate: {', '.join(self.words)}", style="dim")


def _has_braille(encoding: str) -> bool:
    try:
        "⣿│┤└─┴".encode(encoding)
    except (LookupError, UnicodeEncodeError):
        return False
    return True


def _beside(texts: Sequence[Text], width: int) -> Text:
    line = Text(no_wrap=True, overflow="crop")
    for text in texts:
        if line.plain:
            line.append(" " * (width + _GAP - cell_len(line.plain)))
        line.append_text(text)
    return line


def _series(run: Run) -> Iterator[Series]:
    def percent(part: str, whole: str) -> NDArray[np.float64]:
        with np.errstate(all="ignore"):
            return _drawable(100 * run.column(part) / run.column(whole))

    yield _from_zero("frozen, % of neurons", "cyan", percent("frozen", "neurons"))
    yield _from_zero("paper FLOPs, % of dense", "yellow", percent("flops_paper", "flops_paper_dense"))
    yield _from_zero("executed FLOPs, % of dense", "magenta", percent("flops_executed", "flops_executed_dense"))
    values = _drawable(run.column(run.metric))
    known = values[np.isfinite(values)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    if high == low:
        low, high = low - 0.5, high + 0.5
        if run.metric in KNOWN_METRICS and 0 <= known.sum() <= 100 * known.size:  # percentages, which end there
            low, high = max(low, 0.0), min(high, 100.0)
    final = format_metric(float(known[-1]), run.metric) if known.size else MISSING
    unit = ", %" if run.metric in KNOWN_METRICS else ""
    yield Series(f"{printable(run.metric, 40)}{unit}: {final} last", "green", values, low, high, _decimals(low, high))


def _from_zero(title: str, style: str, values: NDArray[np.float64]) -> Series:
    known = values[np.isfinite(values)]
    last = f"{known[-1]:.1f} last" if known.size else f"{MISSING} last"
    return Series(f"{title}: {last}", style, values, 0.0, max(100.0, float(known.max(initial=0.0))), 0)


def _drawable(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(np.abs(values) <= _LARGEST, values, np.nan)


def _decimals(low: float, high: float) -> int:
    """Enough for the axis' three numbers to differ."""
    return min(max(0, 2 - math.floor(math.log10(high - low))), 6)


def _numbers(series: Series) -> list[str]:
    """What stands beside top, middle and bottom of the axis."""
    middle = (series.low + series.high) / 2
    return [_number(value, series.decimals) for value in (series.high, middle, series.low)]


def _chart(
    series: Series, across: _Across, marks: Sequence[float], width: int, margin: int, glyphs: _Glyphs
) -> list[Text]:
    """Return title, plot, axis with ``marks`` at places, and the numbers below it; no line is wider than ``width``."""
    numbers = _numbers(series)
    columns = max(width - margin - 1, 1)
    labels = {0: numbers[0], _ROWS // 2: numbers[1], _ROWS - 1: numbers[2]}
    lines = [Text(_ascii(series.title, glyphs)[:width], style="bold")]
    for row, drawn in enumerate(_raster(series, across, columns, glyphs)):
        side = glyphs.tick if row in labels else glyphs.side
        line = Text(f"{labels.get(row, ''):>{margin}}{side}", style="dim")
        lines.append(line.append(drawn, style=f"not dim {series.style}"))
    floor = [glyphs.floor] * columns
    for place in marks:
        floor[across.column(place, columns)] = glyphs.mark
    lines.append(Text(" " * margin + glyphs.corner + "".join(floor), style="dim"))
    lines.append(Text(" " * (margin + 1) + across.numbers(columns), style="dim"))
    return lines


def _ascii(text: str, glyphs: _Glyphs) -> str:
    return text if glyphs is not _ASCII else text.replace(MISSING, "-").encode("ascii", "replace").decode()


def _number(value: float, decimals: int) -> str:
    return f"{value:.{decimals}f}" if abs(value) < 1e6 and (value == 0 or abs(value) >= 1e-5) else f"{value:.1e}"


def _raster(series: Series, across: _Across, columns: int, glyphs: _Glyphs) -> list[str]:
    """Draw the line through all known values, in rows of ``columns`` characters, top row first."""
    dots, down = columns * glyphs.across, _ROWS * glyphs.down
    lit = np.zeros((down, dots), dtype=bool)
    points = _points(series, across, dots, down)
    for x, y in points[:1]:
        lit[round(y), x] = True
    for (x, y), (next_x, next_y) in pairwise(points):
        steps = max(next_x - x, math.ceil(abs(next_y - y)), 1)
        lit[
            np.round(np.linspace(y, next_y, steps + 1)).astype(int),
            np.round(np.linspace(x, next_x, steps + 1)).astype(int),
        ] = True
    return [_characters(lit[row * glyphs.down : (row + 1) * glyphs.down], glyphs) for row in range(_ROWS)]


def _points(series: Series, across: _Across, dots: int, down: int) -> list[tuple[int, float]]:
    """Return (x, y) in dots, y down from the top, by epoch; epochs that share a column become their mean."""
    known = np.flatnonzero(np.isfinite(series.values))
    columns = np.array([across.column(float(across.places[index]), dots) for index in known], dtype=int)
    points = []
    for place in np.unique(columns):
        mean = float(series.values[known[columns == place]].mean())
        share = min(max((mean - series.low) / (series.high - series.low), 0.0), 1.0)
        points.append((int(place), (1 - share) * (down - 1)))
    return points


def _characters(dots: NDArray[np.bool_], glyphs: _Glyphs) -> str:
    if glyphs is _ASCII:
        return "".join("*" if dot else " " for dot in dots[0])
    codes = np.zeros(dots.shape[1] // 2, dtype=int)
    for column, bits in enumerate(_DOTS):
        for row, bit in enumerate(bits):
            codes += bit * dots[row, column::2]
    return "".join(chr(0x2800 + code) if code else " " for code in codes)
