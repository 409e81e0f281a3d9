"""What a framework logs of its training, as the columns of a run directory: the same ones in every row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from neq_cli.jobs.told_columns import is_own

_TAKEN = ("lr", "step", "passed_epochs")
"""Columns of another meaning: metrics of these names, and of the Recorder's own columns', are not taken over."""


class LoggedMetrics:
    """Columns are what is logged by the first row, or expected before it, and ``metric``; what comes later is left out.

    An empty cell (NaN) where a metric was not logged since the row before. All that was ``logged`` last is a mapping in
    which a metric that was not logged anew is the same object as before.
    """

    def __init__(self, metric: str | None) -> None:
        self.metric = metric
        self.columns: list[str] = []
        self._complete = False
        self._shown: dict[str, Any] = {}  # as it was last looked at
        self._since: dict[str, float] = {}  # logged since the row before

    def expect(self, logged: Mapping[str, Any]) -> None:
        """Take down what will be logged."""
        self.columns = list(_numbers(logged))

    def judged_by(self) -> str:
        """Return the metric that tells how good the model is: that given, else the first expected, else train_loss."""
        self.metric = self.metric or next(iter(self.columns), "train_loss")
        return self.metric

    def look(self, logged: Mapping[str, Any]) -> None:
        """Take down what is new, so that it is saved where the next row is yet to come."""
        found = _numbers(logged)
        self._since |= {name: float(value) for name, value in found.items() if value is not self._shown.get(name)}
        self._shown = found

    def row(self, logged: Mapping[str, Any]) -> dict[str, float]:
        """Return the next row's numbers."""
        self.look(logged)
        new, self._since = self._since, {}
        if not self._complete:
            names = dict.fromkeys((*self.columns, self.judged_by(), *new))
            self.columns, self._complete = list(names), True
        return {name: new.get(name, math.nan) for name in self.columns}

    def state_dict(self) -> dict[str, Any]:
        """Return what the next row depends on, as plain values."""
        own = {"metric": self.metric, "complete": self._complete}
        return {**own, "columns": list(self.columns), "since": dict(self._since)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``."""
        self.metric, self._complete = state["metric"], bool(state["complete"])
        self.columns, self._since = list(state["columns"]), dict(state["since"])


def lower_is_better(metric: str) -> bool:
    """Return whether a metric of this name is an error."""
    return any(word in metric.lower() for word in ("loss", "error", "perplexity"))


def _numbers(logged: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in logged.items() if not _is_taken(name) and _is_number(value)}


def _is_taken(name: str) -> bool:
    return name in _TAKEN or is_own(name)


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float)) or getattr(value, "numel", lambda: 0)() == 1
