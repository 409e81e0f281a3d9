"""A run in a cell of a notebook: its key figures, and the course of its metric and of its frozen share, as HTML."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence

from neq_cli.events import OBSERVATION
from neq_cli.runs.compare.configurations import model_and_data, policy_label
from neq_cli.runs.compare.statistics import mean_known
from neq_cli.runs.store.run import Run
from neq_cli.text import format_metric, format_percent, format_seconds, in_training, printable, ratio_percent

_WIDTH, _HEIGHT, _MARGIN = 260, 60, 3  # pixels


def run_as_html(run: Run) -> str:
    """Return a table and two small plots; nothing in it is taken for markup that a run's files say."""
    rows = "".join(f"<tr><th>{html.escape(key)}</th><td>{html.escape(value)}</td></tr>" for key, value in _facts(run))
    share = 100 * run.metrics["frozen"] / run.metrics["neurons"].clip(min=1)
    metric = printable(run.metric)
    plots = _plot(metric, run.column(run.metric).tolist(), run.metric) + _plot("frozen, %", share.tolist(), "")
    return f"<table>{rows}</table>{plots}"


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    yield "run", printable(run.path)
    yield "what", f"{model_and_data(run)}, {policy_label([run])}"
    last = run.rows[-1]
    place = in_training(last.get("step"), last.get("passed_epochs")) if run.unit == OBSERVATION else ""
    yield "status", f"{printable(run.status)}, {run.unit} {run.epochs} of {run.epochs_planned}{place}"
    known = [value for value in run.column(run.metric).tolist() if math.isfinite(value)]
    if known:
        best = min(known) if run.lower_is_better else max(known)
        numbers = (format_metric(value, run.metric) for value in (known[-1], best))
        yield printable(run.metric), " final, ".join(numbers) + " best"
    for name in ("paper", "executed"):
        now, dense = mean_known(run.column(f"flops_{name}")), mean_known(run.column(f"flops_{name}_dense"))
        yield f"{name} FLOPs", f"{format_percent(ratio_percent(now, dense))} of dense"
    yield "time", format_seconds(sum(value for value in run.column("epoch_seconds").tolist() if math.isfinite(value)))


def _plot(title: str, values: Sequence[float], metric: str) -> str:
    """Return a line over the rows, with its range; gaps where nothing was measured."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return ""
    low, high = min(known), max(known)
    across, up = (_WIDTH - 2 * _MARGIN) / max(len(values) - 1, 1), (_HEIGHT - 2 * _MARGIN) / ((high - low) or 1.0)
    lines: list[list[str]] = [[]]
    for place, value in enumerate(values):
        if math.isfinite(value):
            lines[-1].append(f"{_MARGIN + across * place:.1f},{_HEIGHT - _MARGIN - up * (value - low):.1f}")
        else:
            lines.append([])
    drawn = "".join(
        f'<polyline points="{" ".join(line)}" fill="none" stroke="currentColor"/>' for line in lines if line
    )
    name = html.escape(f"{title}: {format_metric(low, metric)} to {format_metric(high, metric)}")
    return (
        f'<figure style="display:inline-block;margin:0 1em 0 0"><figcaption>{name}</figcaption>'
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="{name}">{drawn}</svg></figure>'
    )
