"""What `neq flops` prints."""

from __future__ import annotations

from io import StringIO
from typing import Any

from rich.console import Console

from neq_cli.runs.views.tables.costs import render_flops

ESTIMATE = {
    "flops_paper": 69.75e6,
    "flops_executed": 138.5e6,
    "flops_paper_dense": 139.5e6,
    "flops_executed_dense": 138.5e6,
    "layers": {
        "conv1": {"kind": "Conv2d", "neurons": 16, "flops_paper": 884736.0, "flops_executed": 442368.0},
        "fc": {"kind": "Linear", "neurons": 10, "flops_paper": 1280.0, "flops_executed": 1280.0},
    },
}


def printed(estimate: dict[str, Any], width: int = 80, name: str = "resnet32") -> list[list[str]]:
    out = StringIO()
    Console(file=out, width=width).print(render_flops(name, estimate))
    return [line.split() for line in out.getvalue().splitlines()]


def test_sums_first_then_layers() -> None:
    lines = printed(ESTIMATE)
    assert lines[1] == ["paper", "69.75M", "139.50M", "50.0%"]
    assert lines[2] == ["executed", "138.50M", "138.50M", "100.0%"]
    assert ["conv1", "Conv2d", "16", "884.74K", "442.37K"] in lines
    assert ["fc", "Linear", "10", "1.28K", "1.28K"] in lines


def test_markup_in_names_is_text() -> None:
    layers = {"[red]x[/red]": ESTIMATE["layers"]["fc"]}  # type: ignore[index]
    lines = printed(ESTIMATE | {"layers": layers}, name="[bold]r")
    assert lines[0][0] == "[bold]r"
    assert any(line[:1] == ["[red]x[/red]"] for line in lines)
