"""One picture of a run for a window of any size: from a RunView to lines that fill the width and fit the height."""

from __future__ import annotations

from dataclasses import replace

from neq_cli.runs.views.drawing import QUIET, Line, StatRow, fit, shorten, span, stat_columns, stat_lines
from neq_cli.runs.views.live.frame_rows import (
    epoch_rule,
    flops_row,
    frozen_row,
    frozen_rule,
    identity_line,
    learning_rate_row,
    loss_row,
    metric_row,
    policy_line,
    progress_lines,
    total_line,
    velocity_row,
)
from neq_cli.runs.views.live.layers import Layout, lay_out, layer_lines
from neq_cli.runs.views.live.run_view import RunView

# What a low window keeps, the most needed first, with so many rows for layers at least.
NEEDED = ("epoch", "phase", "loss", "metric", "total", "paper FLOPs", "identity", "frozen rule")
LAYER_ROWS = 2
# What a usual one has too, but not at the cost of its layers.
USUAL = ("executed FLOPs", "velocity", "epoch rule", "policy", "heading", "message")
USUAL_LAYER_ROWS = 5
# What a high window has room for, once the layers have theirs.
WELCOME = ("frozen", "learning rate", "test loss", "blank")
TOP_TO_BOTTOM = (
    *("identity", "policy", "epoch", "phase", "blank", "epoch rule", "loss", "test loss", "metric", "learning rate"),
    *("paper FLOPs", "executed FLOPs", "frozen", "velocity", "frozen rule", "total", "heading", "layers", "message"),
)
TALLEST_GRAPH = 10


class Painter:
    """Draws frames; between epochs only the progress bars anew, as everything else stays."""

    def __init__(self) -> None:
        self._still_of: object = None
        self._still: list[tuple[str, Line]] = []

    def frame(self, view: RunView, width: int, height: int, now: float) -> list[Line]:
        """At most ``height`` lines of exactly ``width`` cells; ``now`` is in seconds of the clock that fed the view."""
        if width < 1 or height < 1:
            return []
        margin = 1 if width >= 60 else 0
        ended = view.ended is not None
        state = (view, view.epochs_done, view.epoch, view.frozen_known, view.message, ended, width, height)
        if state != self._still_of:
            self._still = [
                (name, _in_margins(line, width, margin)) for name, line in _still(view, width - 2 * margin, height)
            ]
            self._still_of = state
        bars = dict(zip(("epoch", "phase"), progress_lines(view, width - 2 * margin, now), strict=True))
        return [_in_margins(bars[name], width, margin) if name in bars else line for name, line in self._still]


def _in_margins(line: Line, width: int, margin: int) -> Line:
    return fit([span(" " * margin), *line], width)


def _still(view: RunView, width: int, height: int) -> list[tuple[str, Line]]:
    """The lines from top to bottom with the names of what they show; those of the progress bars are empty."""
    kept = NEEDED[: max(height - LAYER_ROWS, min(height, 2))]
    # The last frame leaves messages to the lines above it.
    usual = USUAL if view.ended is None else tuple(name for name in USUAL if name != "message")
    kept += usual[: max(height - USUAL_LAYER_ROWS - len(NEEDED), 0)]
    room = height - len(kept)
    layout = lay_out(view.layers, width, room)
    spare = room - layout.rows
    welcome = WELCOME[:spare]
    graph_rows = min(1 + (spare - len(welcome)) // 2, TALLEST_GRAPH)

    parts = _fixed_parts(view, width) | _layer_parts(view, layout, width)
    parts |= _stat_parts(view, width, {*kept, *welcome}, graph_rows)
    shown = {*kept, *welcome, "layers"}
    return [(name, line) for name in TOP_TO_BOTTOM if name in shown for line in parts[name]][:height]


def _fixed_parts(view: RunView, width: int) -> dict[str, list[Line]]:
    return {
        "identity": [identity_line(view, width)],
        "policy": [policy_line(view, width)],
        "epoch": [[]],
        "phase": [[]],
        "blank": [[]],
        "epoch rule": [epoch_rule(view, width)],
        "frozen rule": [frozen_rule(view, width)],
        "total": [total_line(view, width)],
        "message": [[span(shorten(view.message, width), QUIET)]],
    }


def _layer_parts(view: RunView, layout: Layout, width: int) -> dict[str, list[Line]]:
    lines = layer_lines(view.layers, layout, width, view.epsilon, frozen_known=view.frozen_known)
    return {"heading": lines[:1], "layers": lines[1:]}


def _stat_parts(view: RunView, width: int, wanted: set[str], graph_rows: int) -> dict[str, list[Line]]:
    rows: dict[str, StatRow] = {
        "loss": replace(loss_row(view, "train_loss"), rows=graph_rows),
        "test loss": loss_row(view, "test_loss"),
        "metric": replace(metric_row(view), rows=graph_rows),
        "learning rate": learning_rate_row(view),
        "paper FLOPs": flops_row(view, "paper"),
        "executed FLOPs": flops_row(view, "executed"),
        "frozen": frozen_row(view),
        "velocity": velocity_row(view, 0),
    }
    columns = stat_columns([row.tails for name, row in rows.items() if name in wanted], width)
    rows["velocity"] = velocity_row(view, columns.graph)
    # In a wide window an epoch is several columns wide, and the graphs fill as the run goes.
    stretch = max(columns.graph // max(view.started.epochs, 1), 1)
    return {name: stat_lines(row, columns, width, stretch) for name, row in rows.items()}
