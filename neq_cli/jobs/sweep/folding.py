"""What is said of many runs, each line once; which runs it is said of stands in front unless it is all of them."""

from __future__ import annotations

from collections.abc import Sequence


def folded(said: Sequence[tuple[str, Sequence[str]]], runs: int) -> tuple[str, ...]:
    """Return the lines of (name, lines) pairs; ``runs`` is how many there are, also of those nothing is said."""
    names: dict[str, list[str]] = {}
    for name, lines in said:
        for line in lines:
            names.setdefault(line, []).append(name)
    return tuple(f"{_of(names[line], runs)}{line}" for line in names)


def _of(names: Sequence[str], runs: int) -> str:
    if len(names) == runs and runs > 1:
        return ""
    more = len(names) - 1
    return f"{names[0]}{f' and {more} more' if more else ''}: "
