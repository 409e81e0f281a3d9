"""The figures of a report, made up of the comparison and of what run files say; drawn when they are asked for."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from neq_cli.events import OBSERVATION
from neq_cli.runs.compare.curves import Configuration, Curve, Study, axis_word, curve, learning_rate
from neq_cli.runs.compare.front import on_front
from neq_cli.runs.compare.statistics import Summary
from neq_cli.runs.store.run import KNOWN_METRICS, Run
from neq_cli.runs.views.report.alike import on_one_line, on_one_spot
from neq_cli.runs.views.report.axes import Axis, unit_of
from neq_cli.runs.views.report.charts import (
    MOST_LAYER_LABELS,
    Line,
    draw_curves,
    draw_density,
    draw_layers,
    draw_points,
)
from neq_cli.runs.views.report.drawing import SERIES, Style
from neq_cli.runs.views.report.fields import Density, LayerMap, densities, layer_map
from neq_cli.runs.views.report.names import capital, metric_in_words
from neq_cli.text import counted, format_metric, format_percent, printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_DENSITIES = 6  # configurations whose neurons are drawn
MOST_MAPS = 12
_SYMBOLS = {"phi": "similarity φ", "delta_phi": "change of similarity Δφ", "velocity": "velocity v"}
_PER_ROW = ("delta_phi", "velocity")  # phi is a cosine


@dataclass(frozen=True)
class Picture:
    """A figure: what it is called, what it says in words, and how it is drawn. ``height`` is in inches of a page."""

    name: str  # of its file, without ending: letters, digits, dots and dashes
    section: str  # "points", "curves", "layers" or "neurons"
    title: str
    caption: str
    summary: str  # for those who do not see it
    legend: tuple[Line, ...]
    height: float
    draw: Callable[[Figure, Style], None]


def pictures(the_study: Study) -> Iterator[Picture]:
    """Yield the figures of a report, section by section; the run files they need are read as they are asked for."""
    yield from _points(the_study)
    for part, configurations in enumerate(parts(the_study), 1):
        yield from _curves(the_study, configurations, f"-{part}" if len(the_study.configurations) > SERIES + 1 else "")
    for configuration in freezing(the_study)[:MOST_MAPS]:
        yield from _layers(configuration)
    for configuration in observed(the_study)[:MOST_DENSITIES]:
        yield from _densities(configuration)


def parts(the_study: Study) -> list[tuple[Configuration, ...]]:
    """Deal the configurations out so that no figure has more lines than there are colours; the baseline is in each."""
    baseline = the_study.baseline
    others = [each for each in the_study.configurations if each is not baseline]
    first = (baseline,) if baseline else ()
    dealt = [others[start : start + SERIES] for start in range(0, len(others), SERIES)]
    return [(*first, *each) for each in dealt or [[]]]


def line(the_study: Study, configuration: Configuration) -> Line:
    """Return the name, colour and number of a configuration, the same in every figure."""
    has_baseline = the_study.baseline is not None
    place = configuration.number - 1 if has_baseline else configuration.number
    return Line(configuration.name, place, configuration.number)


def freezing(the_study: Study) -> list[Configuration]:
    """Return the configurations that ever froze a neuron."""
    return [each for each in the_study.configurations if any(np.nansum(run.column("frozen")) > 0 for run in each.runs)]


def observed(the_study: Study) -> list[Configuration]:
    """Return the configurations whose distributions are drawn: those of policy neq, or all where there is none."""
    return [each for each in the_study.configurations if each.kind == "neq"] or list(the_study.configurations)


def metric_label(metric: str) -> str:
    """``test top-1 accuracy (%)``; a task's own metric has no unit that neq knows."""
    return metric_in_words(metric) + (" (%)" if metric in KNOWN_METRICS else "")


def _limits(metric: str, values: Iterable[float]) -> tuple[float, float]:
    """Return what a metric cannot pass; nothing is known of a task's own, whatever it is called."""
    is_share = metric in KNOWN_METRICS and all(0 <= value <= 100 for value in values if math.isfinite(value))
    return (0.0, 100.0) if is_share else (-math.inf, math.inf)


def _points(the_study: Study) -> Iterator[Picture]:
    metrics = {configuration.row.metric for configuration in the_study.configurations}
    if len(metrics) > 1:
        return
    metric = metrics.pop()
    for accounting in ("paper", "executed"):
        points = []
        for configuration in the_study.configurations:
            row = configuration.row
            x: Summary = getattr(row, f"flops_{accounting}")
            points.append((line(the_study, configuration), (x.mean, row.final.mean), (x.std, row.final.std)))
        lower = the_study.configurations[0].row.lower_is_better
        better = "Down" if lower else "Up"
        front = on_front([where for _, where, _ in points], lower)
        numbers = [str(key.number) for (key, _, _), there in zip(points, front, strict=True) if there]
        beaten = f"on the front, joined by a dashed line, where no other is as good in both: {', '.join(numbers)}"
        unit, prefix = unit_of([the_study.largest_flops])
        label = f"{accounting} FLOPs per iteration{prefix}"
        together = " ".join(map(_one_spot, on_one_spot([where for _, where, _ in points], [k for k, _, _ in points])))
        yield Picture(
            name=f"accuracy-against-{accounting}-flops",
            section="points",
            title=f"Final {metric_in_words(metric)} against {accounting} FLOPs",
            caption="One point a configuration, numbered as in the table; bars: one sample standard deviation over "
            f"seeds, FLOPs: mean of all {the_study.comparison.units}. {better} and to the left is better; "
            f"{beaten}." + (f" {together}" if together else ""),
            summary="; ".join(
                f"{key.number} {key.name}: {x / unit:.4g}{prefix.strip(' ()')} and {format_metric(y, metric)}"
                for key, (x, y), _ in points[:20]
            )
            + f"; {beaten}"
            + (f". {together}" if together else ""),
            legend=tuple(key for key, _, _ in points),
            height=3.2,
            draw=partial(
                draw_points,
                points=points,
                horizontal=Axis(label, unit, True),
                vertical=Axis(f"final {metric_label(metric)}", limits=_limits(metric, [y for _, (_, y), _ in points])),
                front=front,
            ),
        )


def _curves(the_study: Study, configurations: Sequence[Configuration], suffix: str) -> Iterator[Picture]:
    keys = [line(the_study, configuration) for configuration in configurations]
    steps, remark = _steps(configurations)
    horizontal = axis_word([run for configuration in configurations for run in configuration.runs])
    metrics = {configuration.row.metric for configuration in configurations}
    quantities: list[tuple[str, str, str, Callable[[Run], NDArray[np.float64]]]] = [
        ("flops-paper", "Paper FLOPs", "paper FLOPs per iteration", lambda run: run.column("flops_paper")),
        ("flops-executed", "Executed FLOPs", "executed FLOPs per iteration", lambda run: run.column("flops_executed")),
        ("updated-neurons", "Updated neurons", "updated neurons", updated_neurons),
    ]
    metric = metrics.pop() if len(metrics) == 1 else ""
    if metric:
        what = capital(metric_in_words(metric))
        quantities.append(("accuracy", what, metric_label(metric), lambda run: run.column(metric)))
    for name, title, label, values in quantities:
        found = [curve(configuration.runs, values) for configuration in configurations]
        unit, prefix = 1.0, ""
        if name == "accuracy":
            axis = Axis(label, limits=_limits(metric, [value for each in found for value in (*each.low, *each.high)]))
        else:
            largest = [float(np.nanmax(each.high, initial=0)) for each in found]
            unit, prefix = unit_of(largest if name == "updated-neurons" else [the_study.largest_flops])
            axis = Axis(f"{label}{prefix}", unit, from_zero=True, whole=name == "updated-neurons" and not prefix)
        yield Picture(
            name=f"{name}-by-epoch{suffix}",
            section="curves" + suffix,
            title=f"{title} by {horizontal}",
            caption=" ".join(filter(None, [remark, *map(_one_line, on_one_line(found, keys))])),
            summary="; ".join(_in_words(key, each, unit, prefix) for key, each in zip(keys, found, strict=True)),
            legend=tuple(keys),
            height=3.0,
            draw=partial(
                draw_curves,
                lines=list(zip(keys, found, strict=True)),
                axis=axis,
                steps=steps,
                horizontal=horizontal,
            ),
        )


def _one_spot(keys: Sequence[Line]) -> str:
    return f"{_numbers(keys)} lie on one spot, or nearly so."


def _one_line(keys: Sequence[Line]) -> str:
    return f"{_numbers(keys)} lie on one line."


def _numbers(keys: Sequence[Line]) -> str:
    *first, last = (str(key.number) for key in keys)
    return f"Configurations {', '.join(first)} and {last}"


def updated_neurons(run: Run) -> NDArray[np.float64]:
    """Neurons that were trained during each epoch, [epochs]."""
    return run.column("neurons") - run.column("frozen")


def _in_words(key: Line, found: Curve, unit: float, prefix: str) -> str:
    known = found.mean[np.isfinite(found.mean)] / unit
    if not known.size:
        return f"{key.name}: never measured"
    unit_word = prefix.strip(" ()")
    return f"{key.name}: {known[0]:.4g}{unit_word} first, {known[-1]:.4g}{unit_word} last"


def _steps(configurations: Sequence[Configuration]) -> tuple[tuple[tuple[float, float], ...], str]:
    """Return the steps of the learning rate to mark among curves, as (place, rate), and what to say of it."""
    rates = [learning_rate(configuration.runs) for configuration in configurations]
    known = [rate for rate in rates if rate is not None]
    told = {tuple(zip(each.begins, (rate for _, rate in each.steps), strict=True)) for each in known}
    if len(told) > 1:
        return (), "The learning rates of these configurations differ, so their steps are not marked."
    if not known:
        return (), ""
    # Between epochs it is known to fall at a row's end; where all rows are epochs, it is drawn between two of them.
    finest = next((each for each in known if each.unit == OBSERVATION), known[0])
    offset = 0.0 if finest.unit == OBSERVATION else 0.5
    steps = tuple((begin + offset, rate) for begin, (_, rate) in zip(finest.begins, finest.steps, strict=True))
    words = [f"{when} {rate:.3g}" for when, (_, rate) in zip(finest.when, finest.steps, strict=True)]
    if any(rate.gradual for rate in known):
        first = f"{known[0].first:.3g} in the first {known[0].unit}"
        words.append(f"changing gradually, {first} and {known[0].last:.3g} in the last")
    return steps, f"Learning rate: {'; '.join([f'{known[0].first:.3g}', *words])}." if words else ""


def _layers(configuration: Configuration) -> Iterator[Picture]:
    found = layer_map(configuration.runs)
    if not found.names:
        return
    rates = learning_rate(configuration.runs)
    steps = [(row - 0.5, rate) for row, rate in rates.steps] if rates else []
    during = "up to the observation" if found.unit == OBSERVATION else "during the epoch"
    caption = f"Each cell: neurons not updated {during}, of those of the layer; input at the top, output below"
    caption += "; not every layer is named." if len(found.percent) > MOST_LAYER_LABELS else "."
    if len(configuration.runs) > 1:
        caption += f" Mean of {len(configuration.runs)} runs."
    if found.layers_per_row > 1 or found.epochs_per_column > 1:
        caption += f" A cell takes together {counted(found.layers_per_row, 'layer')} and "
        caption += f"{counted(found.epochs_per_column, found.unit)}; a row is named after its first layer."
    yield Picture(
        name=f"frozen-by-layer-{_slug(configuration)}",
        section="layers",
        title=f"{configuration.number}  {configuration.name}",
        caption=caption,
        summary=_layers_in_words(found),
        legend=(),
        height=min(1.4 + 0.14 * len(found.percent), 4.6),
        draw=partial(draw_layers, layers=found, steps=steps),
    )


def _layers_in_words(found: LayerMap) -> str:
    with np.errstate(invalid="ignore"):
        known = np.where(np.isfinite(found.percent), found.percent, 0).mean(axis=1)
    most, least = int(known.argmax()), int(known.argmin())
    name = [printable(found.names[row * found.layers_per_row], 80) for row in (most, least)]
    share = [format_percent(float(known[row])) for row in (most, least)]
    return (
        f"Frozen share of {len(found.names)} layers over {found.epochs} {found.unit}s: most in {name[0]}, {share[0]} "
        f"in the mean {found.unit}; least in {name[1]}, {share[1]}"
    )


def _densities(configuration: Configuration) -> Iterator[Picture]:
    run = configuration.runs[0]
    epsilon = run.setting("policy.epsilon")
    is_number = isinstance(epsilon, (int, float)) and not isinstance(epsilon, bool)
    threshold = float(epsilon) if is_number and configuration.kind == "neq" else None
    seed = run.setting("seed")
    for density in densities(run, threshold):
        shown = threshold if density.field == "velocity" else None
        yield Picture(
            name=f"{density.field.replace('_', '-')}-by-{density.unit}-{_slug(configuration)}",
            section=f"neurons-{configuration.number}",
            title=capital(_SYMBOLS[density.field]) + f" by {density.unit}",
            caption=_density_caption(density, shown),
            summary=_density_in_words(density, configuration.name, seed),
            legend=(),
            height=3.0,
            draw=partial(
                draw_density,
                density=density,
                label=f"{_SYMBOLS[density.field]} ({_unit_of_values(density)})",
                threshold=shown,
            ),
        )


def _unit_of_values(density: Density) -> str:
    return f"per {density.unit}" if density.field in _PER_ROW else "cosine"


def _density_caption(density: Density, threshold: float | None) -> str:
    words = ["Line: mean of all neurons."]
    until = "until the next observation" if density.unit == OBSERVATION else "for the next epoch"
    if threshold is not None and threshold > 0:
        words.append(f"Between the dashed lines, |v| < {threshold:g}, a neuron is frozen {until}.")
    if density.scale.linear is not None:
        words.append(f"Axis: linear up to about {density.scale.linear:.2g}, logarithmic beyond.")
    if len(density.epochs) < density.epochs_done:
        words.append(f"{len(density.epochs)} of {density.epochs_done} {density.unit}s are drawn, evenly spread.")
    if density.outside:
        words.append(f"{100 * density.outside:.2g}% of the values lie beyond the axis and are counted at its ends.")
    return " ".join(words)


def _density_in_words(density: Density, name: str, seed: object) -> str:
    known = density.mean[np.isfinite(density.mean)]
    means = (
        f"mean {known[0]:.3g} after the first {density.unit}, {known[-1]:.3g} after the last"
        if known.size
        else "never known"
    )
    whose = f"{_SYMBOLS[density.field]} over the neurons of {name}, seed {printable(seed, 20)}"
    return f"Distribution of {whose}, by {density.unit}: {means}"


def _slug(configuration: Configuration) -> str:
    name = re.sub(r"[^A-Za-z0-9.]+", "-", configuration.name).strip("-.").lower()[:60]
    return f"{configuration.number}-{name}".rstrip("-.")
