"""Runs in a list as it is printed, a line each, and as JSON has it; the run's path last, in one piece, to be copied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from neq_cli.events import EPOCH
from neq_cli.runs.store.brief import DAMAGED, Brief
from neq_cli.text import MISSING, format_metric, plain_json, printable

_STYLES = {"finished": "green", "running": "cyan", "failed": "red", "killed": "red", DAMAGED: "red"}
_REASONS_SHOWN = 10


def render_list(briefs: Sequence[Brief]) -> RenderableType:
    """Return the table of runs in their order, and below it what is wrong with those that are damaged."""
    metrics = {brief.metric for brief in briefs if brief.metric is not None}
    score = metrics.pop() if len(metrics) == 1 else "score"
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("begun", "status", "epoch", score, "best", "run"):
        table.add_column(Text(name), justify="right" if name in ("epoch", score, "best") else "left", no_wrap=True)
    for brief in briefs:
        named = "" if score != "score" or brief.metric is None else f"{brief.metric} "
        table.add_row(
            f"{brief.began.astimezone():%Y-%m-%d %H:%M}",
            Text(brief.status.state, style=_STYLES.get(brief.status.state, "")),
            _epochs(brief),
            Text(named + _score(brief.last, brief)),
            _score(brief.best, brief),
            Text(printable(brief.path)),
        )
    return Group(table, *_reasons(briefs))


def width_of(content: RenderableType) -> int:
    """Return the columns that ``content`` needs so that no path is broken."""
    return Measurement.get(Console(width=10_000), Console(width=10_000).options, content).maximum


def to_json(briefs: Sequence[Brief]) -> dict[str, Any]:
    """Return plain values: ``schema`` (1) and ``runs``, each with ``path``, ``recipe``, ``state``, ``reason``,
    ``began`` (with its time zone), ``epochs``, ``epochs_planned``, ``unit``, ``metric``, ``metric_last`` and
    ``metric_best``; what is not known is None.
    """
    runs = [
        {
            "path": str(brief.path),
            "recipe": brief.recipe or None,
            "state": brief.status.state,
            "reason": brief.status.reason or None,
            "began": brief.began.isoformat(),
            "epochs": brief.epochs,
            "epochs_planned": brief.planned,
            "unit": brief.unit,
            "metric": brief.metric,
            "metric_last": brief.last,
            "metric_best": brief.best,
        }
        for brief in briefs
    ]
    return {"schema": 1, "runs": plain_json(runs)}


def _epochs(brief: Brief) -> str:
    if brief.status.state == DAMAGED:
        return MISSING
    of = "" if brief.planned is None else f"/{brief.planned}"
    return f"{brief.epochs}{of}" + ("" if brief.unit == EPOCH else " obs")


def _score(value: float, brief: Brief) -> str:
    return MISSING if brief.metric is None or math.isnan(value) else format_metric(value, brief.metric)


def _reasons(briefs: Sequence[Brief]) -> list[RenderableType]:
    damaged = [brief for brief in briefs if brief.status.state == DAMAGED]
    lines: list[RenderableType] = [Text(brief.status.reason, style="dim") for brief in damaged[:_REASONS_SHOWN]]
    if len(damaged) > _REASONS_SHOWN:
        lines.append(Text(f"and {len(damaged) - _REASONS_SHOWN} more that are damaged", style="dim"))
    return ["", *lines] if lines else []
