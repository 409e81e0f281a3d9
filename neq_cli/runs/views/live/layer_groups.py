"""Layers folded into few groups by their names, so that every layer is counted on a screen of any height."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple


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
