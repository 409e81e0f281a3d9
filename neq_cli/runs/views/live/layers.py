"""Layers on a screen of any size: folded into groups by their names, in as many rows and columns as have room."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from rich.cells import cell_len

from neq_cli.runs.views.drawing import FROZEN, PLAIN, QUIET, Line, bar, fit, shorten_names, span
from neq_cli.runs.views.live.run_view import LayerCounts, together
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


class LayerGroup(NamedTuple):
    """Layers shown as one: a prefix (``layer1.0``), a range (``features.0-7``) or a single layer's name."""

    label: str
    members: tuple[int, ...]  # positions in the list of names


class _Numbered(NamedTuple):
    stem: str  # "layer1." of "layer1.0", "conv" of "conv2"
    number: int
    group: LayerGroup


@lru_cache(maxsize=8)
def fold(names: tuple[str, ...], capacity: int) -> tuple[LayerGroup, ...]:
    """At most ``capacity`` groups that hold every layer once, as fine as fits.

    The names' last components go first; where names on one level still are too many, those that differ only by a number
    are joined in equal ranges; what has neither prefixes nor numbers is joined in order.
    """
    if capacity < 1 or not names:
        return ()
    paths = [name.split(".") for name in names]
    groups: list[LayerGroup] = []
    for depth in range(max(map(len, paths)), 0, -1):
        groups = _by_prefix(paths, depth)
        families = _families(groups)
        for size in range(1, max(map(len, families)) + 1):
            if sum(-(-len(family) // size) for family in families) <= capacity:
                return tuple(_in_ranges(families, size))
    return tuple(_in_order(groups, capacity))


def _by_prefix(paths: Sequence[Sequence[str]], depth: int) -> list[LayerGroup]:
    members: dict[str, list[int]] = {}
    for index, path in enumerate(paths):
        members.setdefault(".".join(path[:depth]), []).append(index)
    return [LayerGroup(label, tuple(indices)) for label, indices in members.items()]


def _families(groups: Sequence[LayerGroup]) -> list[list[_Numbered]]:
    """Groups whose labels differ only by the number they end in, in the order of each family's first."""
    families: dict[tuple[str, int], list[_Numbered]] = {}
    for index, group in enumerate(groups):
        match = re.fullmatch(r"(.*?)([0-9]{1,9})", group.label)
        if match is None:
            families[group.label, index] = [_Numbered(group.label, 0, group)]
        else:
            families.setdefault((match[1], -1), []).append(_Numbered(match[1], int(match[2]), group))
    return list(families.values())


def _in_ranges(families: Sequence[Sequence[_Numbered]], size: int) -> list[LayerGroup]:
    groups = []
    for family in families:
        ordered = sorted(family, key=lambda numbered: numbered.number)
        # Ranges of nearly equal length: 4 in ranges of 3 are 2 and 2.
        for part in _equal_parts(ordered, -(-len(family) // size)):
            last = part[-1].group.label[len(part[-1].stem) :]
            groups.append(_join(part[0].group, part, f"{part[0].group.label}-{last}"))
    return sorted(groups, key=lambda group: group.members[0])


def _in_order(groups: Sequence[LayerGroup], capacity: int) -> list[LayerGroup]:
    numbered = [_Numbered("", 0, group) for group in groups]
    parts = _equal_parts(numbered, capacity)
    return [_join(part[0].group, part, f"{part[0].group.label}..{part[-1].group.label}") for part in parts]


def _join(first: LayerGroup, part: Sequence[_Numbered], label: str) -> LayerGroup:
    members = sorted(index for numbered in part for index in numbered.group.members)
    return LayerGroup(label if len(part) > 1 else first.label, tuple(members))


def _equal_parts(items: Sequence[_Numbered], parts: int) -> list[Sequence[_Numbered]]:
    edges = [index * len(items) // parts for index in range(parts + 1)]
    return [items[start:end] for start, end in pairwise(edges)]
