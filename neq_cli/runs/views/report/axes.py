"""How an axis of a figure stands: its words with the unit, where it ends, and which numbers are written beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from neq_cli.runs.views.report.fields import Scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis as Side
    from matplotlib.figure import Figure

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K"))
_NEAREST = 0.07  # of an axis' length, between two numbers beside it


@dataclass(frozen=True)
class Axis:
    """What stands beside an axis: its words with the unit, what values are divided by, and whether it begins at 0.

    ``limits`` are values that cannot be passed, such as 0 and 100 %; ``whole``: what is counted has no fractions.
    """

    label: str
    unit: float = 1.0
    from_zero: bool = False
    limits: tuple[float, float] = (-math.inf, math.inf)
    whole: bool = False


def unit_of(values: Sequence[float]) -> tuple[float, str]:
    """Return what to divide FLOPs or counts by, and its letter in brackets: 138942464 is in ``(M)``, 900 in none."""
    largest = max((value for value in values if math.isfinite(value)), default=0.0)
    # Rounded as numbers in the text are: 999.996 K would be written 1000.00 K.
    return next(
        ((size, f" ({letter})") for size, letter in _PREFIXES if round(largest / size * 1000, 2) >= 1000), (1.0, "")
    )


def new_axes(figure: Figure, horizontal: str, vertical: str) -> Axes:
    """Return axes with these labels, whose numbers are written out: none is to be added to what a corner says."""
    axes = figure.add_subplot()
    axes.ticklabel_format(useOffset=False)
    for label in (axes.set_xlabel(horizontal), axes.set_ylabel(vertical)):
        label.set_parse_math(False)
    return axes


def span(epochs: int) -> tuple[float, float]:
    """Return the ends of an axis of epochs."""
    return 0.5, epochs + 0.5


def whole_numbers(side: Side, most: int = 6) -> None:
    """Write whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    side.set_major_locator(MaxNLocator(nbins=most, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))


def above(values: Sequence[float], factor: float = 1.05) -> float:
    """Return the upper end of an axis that begins at 0."""
    return max((value for value in values if math.isfinite(value)), default=0.0) * factor or 1.0


def keep_within(axes: Axes, axis: Axis, drawn: Sequence[float]) -> None:
    """End the vertical axis a little beyond the limits of ``axis`` at most, and write no number beyond them.

    ``drawn`` are the values to be seen: the bars around a mean may pass the limits.
    """
    from matplotlib.ticker import AutoLocator

    lowest, highest = axis.limits
    known = [value for value in drawn if math.isfinite(value)] or [0.0]
    low, high = axes.get_ylim()
    margin = 0.08 * (min(high, max(highest, *known)) - max(low, min(lowest, *known)))
    axes.set_ylim(max(low, min(lowest, *known) - margin), min(high, max(highest, *known) + margin))

    class Within(AutoLocator):
        def tick_values(self, vmin: float, vmax: float) -> list[float]:
            return [tick for tick in super().tick_values(vmin, vmax) if lowest - 1e-9 <= tick <= highest + 1e-9]

    axes.yaxis.set_major_locator(Within())


def far_ticks(scale: Scale, highest: float) -> list[float]:
    """Return 0 and powers of ten beyond the linear part, on both sides, five at most on each, with room between."""
    assert scale.linear is not None
    first, last = math.ceil(math.log10(scale.linear) - 1e-9), math.floor(math.log10(highest))
    every = max(1, -(-(last - first + 1) // 5))
    powers = [10.0**power for power in range(first, last + 1, every)]
    nearest = _NEAREST * 2 * float(scale.place(np.array(highest)))
    powers = [power for power in powers if float(scale.place(np.array(power))) >= nearest]
    return [*(-power for power in reversed(powers)), 0.0, *powers]
