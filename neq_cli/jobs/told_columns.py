"""The columns of metrics.csv that a loop of one's own tells: the same ones in every row, and none of the Recorder's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from neq_cli.errors import FreezingError, did_you_mean
from neq_cli.events import ENERGY_COLUMNS

_OWN = ("epoch", "neurons", "frozen", "epoch_seconds", "probe_seconds", *ENERGY_COLUMNS)
_FIRST, _LAST = ("lr", "train_loss"), ("images_per_second",)
"""Columns that displays and reports look for, before and behind the others; empty where a loop does not tell them."""


class ToldColumns:
    """Which columns a loop tells, as its first row has them, or rows that were ``recorded`` before.

    ``metric`` is the one that the run is judged by, which the first row must have.
    """

    def __init__(self, metric: str, recorded: Sequence[str] = ()) -> None:
        self._metric = metric
        self._names: tuple[str, ...] = tuple(name for name in recorded if not is_own(name))

    def row(self, given: Mapping[str, Any], epoch: int) -> dict[str, float]:
        """Return a number for each column, NaN for what is not ``given``. FreezingError for what is no such column."""
        if own := [name for name in given if is_own(name)]:
            raise FreezingError(f"Recorder.epoch: {own[0]}: is what the Recorder tells itself; give it another name")
        numbers = {name: _number(name, value) for name, value in given.items()}
        if not self._names:
            if self._metric not in numbers:
                hint = did_you_mean(self._metric, numbers) or f"; it has {', '.join(numbers) or 'none'}"
                raise FreezingError(f"Recorder.epoch: no column {self._metric!r}, which the run is judged by{hint}")
            others = [name for name in numbers if name not in (*_FIRST, *_LAST)]
            self._names = (*_FIRST, *others, *_LAST)
        new = [name for name in numbers if name not in self._names]
        if new:
            raise FreezingError(f"Recorder.epoch: {new[0]}: is new in epoch {epoch}; give it from the first epoch on")
        return {name: numbers.get(name, math.nan) for name in self._names}


def is_own(column: str) -> bool:
    """Return whether a column is one that the Recorder tells itself."""
    return column in _OWN or column.startswith("flops_")


def _number(name: str, value: Any) -> float:
    if isinstance(value, Real):
        return float(value)
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return float(value.item())
    raise FreezingError(f"Recorder.epoch: {name}: is a {type(value).__name__}; give a number")
