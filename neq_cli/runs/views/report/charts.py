"""The four kinds of figures: curves by epoch, points with error bars, densities, and the map of layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from neq_cli.runs.compare.curves import Curve
from neq_cli.runs.views.drawing import shorten
from neq_cli.runs.views.report.alike import on_one_spot
from neq_cli.runs.views.report.axes import Axis, above, far_ticks, keep_within, new_axes, span, whole_numbers
from neq_cli.runs.views.report.drawing import Style
from neq_cli.runs.views.report.fields import Density, LayerMap
from neq_cli.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LAYER_LABELS = 24
_LONGEST_LABEL = 48
_LONGEST_LAYER = 26
_FEWEST_EPOCHS = 4  # from which on whole numbers are enough beside an axis


@dataclass(frozen=True)
class Line:
    """One configuration in a figure; ``place`` chooses its colour, 0 is the baseline's."""

    name: str
    place: int
    number: int


def draw_curves(
    figure: Figure,
    style: Style,
    lines: Sequence[tuple[Line, Curve]],
    axis: Axis,
    steps: Sequence[tuple[float, float]],
    horizontal: str,
) -> None:
    """Draw means over runs with the span of the runs around them, and a mark at every step of the learning rate.

    ``steps`` are (place, rate), ``horizontal`` is what places count.
    """
    axes = new_axes(figure, horizontal, axis.label)
    for line, curve in lines:
        at = curve.at
        known = np.isfinite(curve.mean)
        mean, low, high = (values[known] / axis.unit for values in (curve.mean, curve.low, curve.high))
        colour = style.colour(line.place)
        axes.plot(at[known], mean, color=colour, linestyle=style.dashes(line.place), **_dot(mean))
        if (high > low).any():
            axes.fill_between(at[known], low, high, color=colour, alpha=0.2, linewidth=0)
    # Half of the first step beyond both ends: 0.5 of epochs.
    left = min(float(curve.at[0] / 2) for _, curve in lines)
    right = max(float(curve.at[-1] + curve.at[0] / 2) for _, curve in lines)
    axes.set_xlim(left, right)
    if axis.from_zero:
        axes.set_ylim(0, above([float(np.nanmax(curve.high, initial=0)) / axis.unit for _, curve in lines]))
    if axis.whole:
        whole_numbers(axes.yaxis)
    if math.isfinite(axis.limits[1]):
        keep_within(axes, axis, [value for _, curve in lines for value in (*curve.low, *curve.high)])
    axes.grid(axis="y")
    _mark_steps(axes, style, steps, style.ink)
    if right > _FEWEST_EPOCHS or all((curve.at % 1 == 0).all() for _, curve in lines):
        whole_numbers(axes.xaxis)
    _legend(figure, axes, style, [line for line, _ in lines])


def _dot(values: NDArray[np.float64]) -> dict[str, Any]:
    """A single epoch makes no line."""
    return {"marker": "o", "markersize": 4} if len(values) == 1 else {}


def draw_points(
    figure: Figure,
    style: Style,
    points: Sequence[tuple[Line, tuple[float, float], tuple[float, float]]],
    horizontal: Axis,
    vertical: Axis,
    front: Sequence[bool],
) -> None:
    """Draw one point a configuration, (x, y) with the standard deviations of both; the baseline's is hollow.

    Points on one spot have their numbers beside each other. A line joins those of which ``front`` says so, from left to
    right.
    """
    axes = new_axes(figure, horizontal.label, vertical.label)
    joined = sorted((x / horizontal.unit, y) for there, (_, (x, y), _) in zip(front, points, strict=True) if there)
    if len(joined) > 1:
        axes.plot(*zip(*joined, strict=True), color=style.mean, linewidth=0.9, linestyle=(0, (4, 2)), zorder=1)
    for line, (x, y), (spread_x, spread_y) in points:
        if not (math.isfinite(x) and math.isfinite(y)):
            continue
        colour = style.colour(line.place)
        x, spread_x = x / horizontal.unit, spread_x / horizontal.unit
        bars: dict[str, Any] = {"xerr": spread_x if spread_x > 0 else None, "yerr": spread_y if spread_y > 0 else None}
        face = style.paper if line.place == 0 else colour
        axes.errorbar(
            *(x, y), **bars, fmt="o", color=colour, markersize=5, mfc=face, elinewidth=0.9, capsize=2.5, capthick=0.9
        )
    keys = [line for line, _, _ in points]
    _number_points(axes, style, keys, [(x / horizontal.unit, y) for _, (x, y), _ in points])
    axes.margins(0.12)
    axes.grid()
    if math.isfinite(vertical.limits[1]):
        ends = [(y, spread if spread > 0 else 0.0) for _, (_, y), (_, spread) in points]
        keep_within(axes, vertical, [y + side * spread for y, spread in ends for side in (-1, 1)])
    if horizontal.from_zero:
        largest = [(x + (spread if spread > 0 else 0)) / horizontal.unit for _, (x, _), (spread, _) in points]
        axes.set_xlim(0, above(largest, 1.1))
    _legend(figure, axes, style, [line for line, _, _ in points], numbered=True)


def _number_points(axes: Axes, style: Style, keys: Sequence[Line], places: Sequence[tuple[float, float]]) -> None:
    together = on_one_spot(places, keys)
    for key, place in zip(keys, places, strict=True):
        group = next((each for each in together if key in each), [key])
        if group[0] is not key or not all(map(math.isfinite, place)):
            continue
        colour = style.colour(key.place) if len(group) == 1 else style.ink
        numbers = ", ".join(str(each.number) for each in group)
        label = axes.annotate(
            numbers, place, xytext=(5, 4), textcoords="offset points", color=colour, fontweight="bold"
        )
        label.set_parse_math(False)


def draw_density(figure: Figure, style: Style, density: Density, label: str, threshold: float | None) -> None:
    """Draw each epoch's distribution as a column of shades, its mean as a line, the threshold's two sides dashed."""
    axes = new_axes(figure, density.unit, label)
    places = density.scale.place(density.edges)
    low, high = float(places[0]), float(places[-1])
    top = float(density.shares.max(initial=0.0)) or 1.0
    # The square root lets what few neurons do be seen beside the many that stand still.
    extent = (*span(density.epochs_done), low, high)
    axes.imshow(
        _shades(np.sqrt(density.shares / top), style),
        origin="lower",
        aspect="auto",
        extent=extent,
        interpolation="none",
    )
    mean = density.scale.place(density.mean)
    axes.plot(density.epochs, np.clip(mean, low, high), color=style.mean, **_dot(mean))
    if threshold is not None and threshold > 0:
        for side in (-threshold, threshold):
            place = float(density.scale.place(np.array(side)))
            axes.axhline(place, color=style.ink, linewidth=0.7, linestyle=(0, (4, 3)))
    axes.set_xlim(*span(density.epochs_done))
    axes.set_ylim(low, high)
    whole_numbers(axes.xaxis)
    if density.scale.linear is not None:
        ticks = far_ticks(density.scale, float(density.edges[-1]))
        axes.set_yticks(density.scale.place(np.array(ticks)).tolist(), [_power(tick) for tick in ticks])
    _shade_key(figure, axes, style, "share of neurons per bin", [f"{100 * top * at**2:.3g}%" for at in (0, 0.5, 1)])


def draw_layers(figure: Figure, style: Style, layers: LayerMap, steps: Sequence[tuple[float, float]]) -> None:
    """Draw a row for each layer or few of them, from the input at the top down to the output."""
    axes = new_axes(figure, layers.unit, "")
    rows, columns = layers.percent.shape
    extent = (0.5, columns * layers.epochs_per_column + 0.5, rows - 0.5, -0.5)
    axes.imshow(_shades(layers.percent / 100, style), aspect="auto", extent=extent, interpolation="none")
    axes.set_xlim(*span(layers.epochs))
    every = -(-rows // MOST_LAYER_LABELS)
    ticks = range(0, rows, every)
    names = [layers.names[row * layers.layers_per_row] for row in ticks]
    axes.set_yticks(list(ticks), [shorten(printable(name) or "(the model itself)", _LONGEST_LAYER) for name in names])
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    axes.tick_params(axis="y", labelsize=style.font_size * 0.8, length=2)
    _mark_steps(axes, style, steps, style.mean)  # seen on light and dark shades alike
    whole_numbers(axes.xaxis)
    _shade_key(figure, axes, style, "neurons not updated", ["0%", "50%", "100%"])


def _mark_steps(axes: Axes, style: Style, steps: Sequence[tuple[float, float]], colour: str) -> None:
    for place, rate in steps:
        axes.axvline(place, color=colour, linewidth=0.8, linestyle=(0, (1, 2)))
        label = axes.annotate(
            f"lr {rate:.3g}",
            (place, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 2),
            textcoords="offset points",
            ha="left" if len(steps) > 3 else "center",
            va="bottom",
            rotation=35 if len(steps) > 3 else 0,
            fontsize=style.font_size * 0.85,
        )
        label.set_parse_math(False)


def _legend(figure: Figure, axes: Axes, style: Style, lines: Sequence[Line], numbered: bool = False) -> None:
    if not style.legend or not lines:
        return
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=style.colour(line.place), marker="o", markersize=3.5, linestyle="none")
        if numbered
        else Line2D([], [], color=style.colour(line.place), linestyle=style.dashes(line.place))
        for line in lines
    ]
    # A legend leaves out labels that begin with an underscore.
    names = [f"{line.number}  {shorten(line.name, _LONGEST_LABEL)}" for line in lines]
    legend = figure.legend(handles, names, loc="outside lower center", ncols=1)
    for label in legend.get_texts():
        label.set_parse_math(False)


def _shades(shares: NDArray[np.float64], style: Style) -> NDArray[np.uint8]:
    """Return [rows, columns, 4] of one colour, the more opaque the larger the share; NaN is transparent like 0."""
    shades = np.empty((*shares.shape, 4), dtype=np.uint8)
    shades[..., :3] = style.density
    shades[..., 3] = np.round(255 * np.clip(np.nan_to_num(shares), 0, 1))
    return shades


def _shade_key(figure: Figure, axes: Axes, style: Style, label: str, marks: Sequence[str]) -> None:
    key = axes.inset_axes((1.03, 0.15, 0.035, 0.7))
    key.imshow(_shades(np.linspace(0, 1, 64)[:, None], style), origin="lower", aspect="auto", extent=(0, 1, 0, 1))
    key.set_xticks([])
    key.yaxis.tick_right()
    key.set_yticks(np.linspace(0, 1, len(marks)).tolist(), list(marks), fontsize=style.font_size * 0.95)
    key.yaxis.set_label_position("right")
    key.set_ylabel(label, fontsize=style.font_size * 0.95)
    for side in ("top", "right"):
        key.spines[side].set_visible(True)


def _power(value: float) -> str:
    return f"{value:g}".replace("-", "−")
