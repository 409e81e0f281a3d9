"""What share of a model its neurons are, as a table: from a run's environment.json, or counted for a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from neq_cli.text import format_flops, format_percent, printable, ratio_percent

_NAMES_SHOWN = 8


def render_coverage(coverage: Mapping[str, Any]) -> RenderableType:
    """Return the table of a ``Coverage`` in plain values; names that came from files are printed as they are."""
    parameters, flops = coverage["parameters"], coverage["flops"]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("", "parameters", "", "forward", "", "names"):
        table.add_column(name, justify="left" if name == "names" or not table.columns else "right")
    outside = sum(part["parameters"] for part in coverage["outside"])
    outside_flops = sum(part["flops"] for part in coverage["outside"])

    def add(label: str, count: float, cost: float, names: str = "") -> None:
        share, cost_share = (format_percent(ratio_percent(*pair)) for pair in ((count, parameters), (cost, flops)))
        table.add_row(Text(label), f"{int(count):,}", share, format_flops(cost), cost_share, Text(names))

    add("neurons", parameters - outside, flops - outside_flops)
    for part in coverage["never_frozen"]:
        add(f"  never frozen: {printable(part['reason'])}", part["parameters"], part["flops"], _names(part))
    for part in coverage["outside"]:
        add(f"outside: {printable(part['reason'])}", part["parameters"], part["flops"], _names(part))
    return Group(table, Text("forward: multiply-adds of one sample's forward pass", style="dim"))


def _names(part: Mapping[str, Any]) -> str:
    names = [printable(name) for name in part["names"]]
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
