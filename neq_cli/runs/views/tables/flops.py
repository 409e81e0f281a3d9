"""How `neq flops` shows its count: the four sums, then every layer's share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from neq_cli.text import format_flops, format_percent, printable, ratio_percent


def render_flops(name: str, estimate: Mapping[str, Any]) -> RenderableType:
    """Return tables of ``estimate``, whose keys are those of `neq flops --json`."""
    sums = Table(box=None, pad_edge=False)
    for column in (printable(name), "FLOPs", "nothing frozen", ""):
        sums.add_column(Text(column), justify="left" if column == printable(name) else "right")
    for accounting in ("paper", "executed"):
        value, dense = estimate[f"flops_{accounting}"], estimate[f"flops_{accounting}_dense"]
        share = format_percent(ratio_percent(value, dense))
        sums.add_row(accounting, format_flops(value), format_flops(dense), share)
    layers = Table(box=None, pad_edge=False)
    for column in ("layer", "kind", "neurons", "paper", "executed"):
        layers.add_column(column, justify="left" if column in ("layer", "kind") else "right", overflow="fold")
    for layer, row in estimate["layers"].items():
        paper, executed = format_flops(row["flops_paper"]), format_flops(row["flops_executed"])
        layers.add_row(Text(printable(layer)), Text(row["kind"]), str(row["neurons"]), paper, executed)
    unit = Text("one sample's back-propagation, one multiply-add each; per layer with nothing frozen", style="dim")
    notes = [Text(f"note: {printable(note)}", style="yellow") for note in estimate.get("notes", ())]
    return Group(sums, Text(), layers, unit, *notes)
