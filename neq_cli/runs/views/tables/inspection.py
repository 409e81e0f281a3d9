"""An inspection as it is printed: summary, layers, frozen neurons, changes; readable from 80 columns on.

Frozen is what stood still in the epoch looked at; what the policy then chose stands beside it, called next.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from neq_cli.events import OBSERVATION
from neq_cli.runs.compare.inspection import Inspection, LayerInspection, fold_ranges
from neq_cli.text import (
    MISSING,
    format_flops,
    format_joules,
    format_metric,
    format_percent,
    format_seconds,
    in_training,
    printable,
    ratio_percent,
)

_CHANGES_SHOWN = 10
_TABLE_STYLE: dict[str, Any] = {
    "title_justify": "left",
    "title_style": "bold",
    "caption_justify": "left",
    "caption_style": "dim",
    "header_style": "dim",
    "box": None,
    "padding": (0, 2, 0, 0),
}
_STATUS_STYLES = {"finished": "green", "running": "cyan", "failed": "red", "killed": "red"}


def render(inspection: Inspection) -> RenderableType:
    """Return everything of an inspection; text that came from files is printed as it is, never as markup."""
    return Group(
        _title(inspection),
        _summary(inspection),
        "",
        _layers(inspection),
        "",
        *_frozen_neurons(inspection),
        "",
        _changes(inspection),
    )


def _title(inspection: Inspection) -> Text:
    title = Text(printable(inspection.recipe), style="bold")
    title.append(f"  {inspection.description}  {inspection.policy}", style="not bold")
    return title.append(f"\n{printable(inspection.path)}", style="dim not bold")


def _summary(inspection: Inspection) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in _summary_lines(inspection):
        table.add_row(Text(name), value)
    return table


def _summary_lines(inspection: Inspection) -> Iterator[tuple[str, Text]]:
    status = Text(inspection.status, style=_STATUS_STYLES.get(inspection.status, "yellow"))
    if inspection.status_reason:
        status.append(f" ({printable(inspection.status_reason)})", style="default")
    yield "status", status
    if inspection.device:
        yield "device", Text(printable(inspection.device))
    unit = inspection.unit
    done = f"{inspection.epochs_done} of {inspection.epochs_planned}"
    shown = "" if inspection.epoch == inspection.epochs_done else f"; all below: after {unit} {inspection.epoch}"
    place = in_training(inspection.step, inspection.passed_epochs) if unit == OBSERVATION else ""
    yield f"{unit}s", Text(done + shown + place)
    mean = format_percent(inspection.frozen_mean_percent)
    during = f"{_of_all(inspection, inspection.frozen_during)} in {unit} {inspection.epoch}"
    yield "frozen", Text(f"{during}; {mean} in the mean")
    following = "would freeze next" if inspection.is_last else f"frozen in {unit} {inspection.epoch + 1}"
    yield "next", Text(f"{_of_all(inspection, inspection.frozen)} {following}")
    yield "paper FLOPs", Text(_flops(inspection.flops_paper, inspection.flops_paper_percent, unit))
    yield "executed FLOPs", Text(_flops(inspection.flops_executed, inspection.flops_executed_percent, unit))
    if inspection.nothing_saved is not None:
        yield "nothing saved", Text(inspection.nothing_saved)
    final, best = (format_metric(v, inspection.metric) for v in (inspection.metric_final, inspection.metric_best))
    when = "" if inspection.metric_best_epoch is None else f" in {unit} {inspection.metric_best_epoch}"
    yield printable(inspection.metric), Text(f"{final} final, {best} best{when}")
    probe = format_percent(inspection.probe_percent)
    yield "time", Text(f"{format_seconds(inspection.seconds)}, of which probing {probe}")
    if inspection.joules is not None:
        yield "energy", Text(_energy(inspection))
    for note in inspection.notes:
        yield "note", Text(printable(note))


def _of_all(inspection: Inspection, frozen: int) -> str:
    share = format_percent(ratio_percent(frozen, inspection.neurons))
    return f"{frozen} of {inspection.neurons} neurons ({share})"


def _energy(inspection: Inspection) -> str:
    joules, grams = inspection.joules, inspection.co2_grams
    emitted = "" if grams is None or math.isnan(grams) else f", {grams:.3g} g of CO2"
    how = f" ({' and then '.join(inspection.energy)})" if inspection.energy else ""
    return f"{format_joules(math.nan if joules is None else joules)}{emitted}{how}"


def _flops(value: float, percent: float, unit: str) -> str:
    return f"{format_flops(value)} per iteration in the mean {unit} ({format_percent(percent)} of dense)"


def _layers(inspection: Inspection) -> Table:
    unit, epoch = inspection.unit, inspection.epoch
    following = "what would freeze after it" if inspection.is_last else f"frozen in {unit} {epoch + 1}"
    table = Table(
        title=f"Layers in {unit} {epoch}, observed at its end",
        caption=f"frozen: not updated in {unit} {epoch}; next: {following}\n"
        f"since: {unit} from which the frozen ones have stood still, the earliest and the median",
        **{**_TABLE_STYLE, "padding": (0, 1, 0, 0)},
    )
    table.add_column("layer", overflow="fold")
    table.add_column("kind", overflow="fold")
    for name in ("frozen", "", "next", "|velocity|", "phi", "since", "median"):
        table.add_column(name, justify="right", no_wrap=True)
    for layer in inspection.layers:
        table.add_row(*_layer_cells(layer), style="" if layer.frozen_during or layer.frozen else "dim")
    return table


def _layer_cells(layer: LayerInspection) -> tuple[Text | str, ...]:
    first = str(min(layer.during_since)) if layer.frozen_during else ""
    median = f"{statistics.median(layer.during_since):g}" if layer.frozen_during else ""
    return (
        Text(layer_name(layer)),
        Text(printable(layer.kind)),
        f"{layer.frozen_during}/{layer.neurons}",
        f"{ratio_percent(layer.frozen_during, layer.neurons):.0f}%" if layer.neurons else MISSING,
        str(layer.frozen),
        MISSING if math.isnan(layer.velocity_abs_mean) else f"{layer.velocity_abs_mean:.1e}",
        MISSING if math.isnan(layer.phi_mean) else f"{layer.phi_mean:.4f}",
        first,
        median,
    )


def layer_name(layer: LayerInspection) -> str:
    """Return the name to print; a model that is one layer has an empty one."""
    return printable(layer.name) or "(the model itself)"


def _frozen_neurons(inspection: Inspection) -> Iterator[RenderableType]:
    unit, epoch = inspection.unit, inspection.epoch
    yield Text(f"Frozen in {unit} {epoch}", style="bold")
    yield _indices(inspection.layers, [layer.during_indices for layer in inspection.layers])
    yield ""
    yield Text("Would freeze next" if inspection.is_last else f"Frozen in {unit} {epoch + 1}", style="bold")
    yield _indices(inspection.layers, [layer.frozen_indices for layer in inspection.layers])


def _indices(layers: Sequence[LayerInspection], chosen: Sequence[Sequence[int]]) -> RenderableType:
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(overflow="fold", max_width=36)
    table.add_column(overflow="fold")
    for layer, indices in zip(layers, chosen, strict=True):
        if indices:
            whole = " (all)" if len(indices) == layer.neurons else ""
            table.add_row(Text(f"{layer_name(layer)}:"), fold_ranges(indices) + whole)
    return table if table.row_count else Text("none", style="dim")


def _changes(inspection: Inspection) -> Table:
    changes = inspection.changes
    where = "" if inspection.layer_glob is None else f" in {printable(inspection.layer_glob)}"
    caption = "froze, thawed: by what the policy chose at its end, which is next"
    table = Table(title=Text(f"Changes{where}"), caption=caption, **_TABLE_STYLE)
    for name in (inspection.unit, "frozen", "froze", "thawed", "next"):
        table.add_column(name, justify="right", no_wrap=True)
    earlier = changes[:-_CHANGES_SHOWN]
    if earlier:
        span = f"1 to {earlier[-1].epoch}"
        froze, thawed = sum(change.froze for change in earlier), sum(change.thawed for change in earlier)
        table.add_row(span, "", str(froze), str(thawed), str(earlier[-1].frozen), style="dim")
    for change in changes[-_CHANGES_SHOWN:]:
        numbers = (change.epoch, change.frozen_during, change.froze, change.thawed, change.frozen)
        table.add_row(*map(str, numbers))
    if len(changes) > 1:
        froze, thawed = sum(change.froze for change in changes), sum(change.thawed for change in changes)
        table.add_row("all", "", str(froze), str(thawed), str(changes[-1].frozen), style="bold")
    return table
