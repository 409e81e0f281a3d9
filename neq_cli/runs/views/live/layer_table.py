"""Frozen neurons and mean |velocity| layer by layer, in as many rows and columns as a window has room for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from rich.cells import cell_len

from neq_cli.runs.views.drawing import FROZEN, PLAIN, QUIET, Line, fit, span
from neq_cli.runs.views.live.layer_groups import LayerGroup, fold
from neq_cli.runs.views.live.run_view import LayerCounts, together
from neq_cli.runs.views.sparkline import bar, shorten_names
from neq_cli.text import MISSING, format_percent

NARROWEST = 36  # a column: 15 for the name, a bar, the counts, the velocity
SHORTEST_BAR = 5
SHORTEST_NAME = 6  # a window too narrow for it does without velocities
COLUMN_GAP = 3
WIDE = 90  # longer bars than such a column's tell nothing more
ROOMY = 56  # from here on a column has a percentage too


class Layout(NamedTuple):
    """Which groups stand where: ``columns`` columns, filled from top to bottom, of ``rows`` rows each."""

    groups: tuple[LayerGroup, ...]
    columns: int
    rows: int


def lay_out(layers: Sequence[LayerCounts], width: int, rows: int) -> Layout:
    """Fit layers into ``rows`` rows: in few wide columns, then in more, then folded."""
    names = tuple(layer.name for layer in layers)
    most = max(1, (width + COLUMN_GAP) // (NARROWEST + COLUMN_GAP))
    groups = fold(names, rows * most)
    if not groups:
        return Layout((), 1, 0)
    columns = min(max(-(-len(groups) // rows), width // WIDE), len(groups))
    return Layout(groups, columns, -(-len(groups) // columns))


def layer_lines(
    layers: Sequence[LayerCounts], layout: Layout, width: int, epsilon: float | None, *, frozen_known: bool
) -> list[Line]:
    """A heading and the layout's rows, each ``width`` cells."""
    if not layout.groups:
        return []
    shown = [together(group.label, tuple(layers[index] for index in group.members)) for group in layout.groups]
    cell = _Cell(shown, (width - COLUMN_GAP * (layout.columns - 1)) // layout.columns)
    names = shorten_names(tuple(counts.name for counts in shown), cell.name)
    cells = [
        cell.line(name, counts, epsilon, frozen_known=frozen_known) for name, counts in zip(names, shown, strict=True)
    ]
    lines = [_beside([cell.heading()] * layout.columns, width)]
    return lines + [_beside(cells[row :: layout.rows], width) for row in range(layout.rows)]


def _beside(cells: Sequence[Line], width: int) -> Line:
    line: Line = []
    for index, cell in enumerate(cells):
        line += [*([span(" " * COLUMN_GAP)] if index else []), *cell]
    return fit(line, width)


class _Cell:
    """The columns inside a column: name, bar, counts, share where there is room, velocity."""

    def __init__(self, shown: Sequence[LayerCounts], width: int) -> None:
        self.counts = max(max(2 * len(str(layer.neurons)) + 1 for layer in shown), len("frozen"))
        self.share = 7 if width >= ROOMY else 0
        self.velocity = 10 if width >= ROOMY else 5
        if width < self.counts + self.velocity + SHORTEST_NAME:
            self.velocity = 0
        rest = width - self.counts - self.share - self.velocity
        longest = max(cell_len(layer.name) for layer in shown)
        self.name = max(min(longest, rest - SHORTEST_BAR - 2), min(rest - 1, 12), 0)
        self.bar = rest - self.name - 2 if rest - self.name >= SHORTEST_BAR + 2 else 0
        self.width = width

    def heading(self) -> Line:
        frozen = "frozen".rjust(self.counts + self.share)
        velocity = ("mean |v|" if self.share else "|v|").rjust(self.velocity)
        left = "layer".ljust(max(self.width - len(frozen) - len(velocity), 0))
        return fit([span(left + frozen + velocity, QUIET)], self.width)

    def line(self, name: str, layer: LayerCounts, epsilon: float | None, *, frozen_known: bool) -> Line:
        share = layer.frozen / layer.neurons if layer.neurons else 0.0
        counts = f"{layer.frozen}/{layer.neurons}" if frozen_known else f"{MISSING}/{layer.neurons}"
        line = [span(name + " " * (self.name - cell_len(name)))]
        if self.bar:
            heavy, light = bar(share if frozen_known else 0.0, self.bar)
            line += [span(" "), span(heavy, FROZEN), span(light, QUIET), span(" ")]
        else:
            line.append(span(" "))
        line.append(span(counts.rjust(self.counts)))
        if self.share:
            line.append(span(format_percent(100 * share if frozen_known else math.nan).rjust(self.share)))
        if self.velocity:
            quiet = epsilon is not None and layer.velocity < epsilon
            text = format_velocity(layer.velocity, digits=1 if self.share else 0)
            line.append(span(text.rjust(self.velocity), FROZEN if quiet else PLAIN))
        return fit(line, self.width)


def format_velocity(value: float, digits: int = 1) -> str:
    """A magnitude in few characters: ``3e-4``, ``3.2e-4``, ``0``; a dash where it is not known."""
    if not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{mantissa}e{int(exponent)}"
