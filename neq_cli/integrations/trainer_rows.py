"""Rows of a run directory from a Trainer's log history, each with what was logged at most up to its own step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from neq_cli.jobs.recorder import Recorder

_TIMES = ("_runtime", "_per_second", "_time")


class Rows:
    """The row of an observation waits, after ``expect``, until ``write``: what belongs to it is logged in between.

    The first row says which columns there are: those ``expected``, and what has been evaluated by then. What is told
    later is left out, and noted once. ``observed`` is the step of the row before; ``columns`` and ``late`` go on where
    those of an earlier process stood.
    """

    def __init__(
        self, recorder: Recorder, expected: Sequence[str], observed: int, columns: list[str], late: list[str]
    ) -> None:
        self.recorder, self.columns, self.late = recorder, columns, late
        self._expected, self._before = expected, observed
        self._waiting: dict[str, float] | None = None

    def expect(self, step: int, epoch: float, learning_rate: float) -> None:
        """Have a row wait for what the trainer has to say of ``step``."""
        self._waiting = {"lr": learning_rate, "step": step, "passed_epochs": epoch}

    def write(self, log_history: Sequence[Mapping[str, Any]]) -> None:
        """Write the row that waits, if one does."""
        if self._waiting is None:
            return
        row, self._waiting = self._waiting, None
        step = int(row["step"])
        row["train_loss"] = train_loss(log_history, self._before, step)
        told = evaluated(log_history, self._before, step)
        if not self.columns:
            self.columns = list(dict.fromkeys([*row, *self._expected, *told]))
        for name in told:
            if name not in self.columns and name not in self.late:
                self.late.append(name)
                self.recorder.note(f"{name}: first told at step {step}, too late for a column; give columns=[{name!r}]")
        # The log repeats a learning rate; the row's own is that of its step.
        known = {**told, **row}
        self.recorder.epoch(**{name: known.get(name, math.nan) for name in self.columns})
        self._before = step


def train_loss(log_history: Iterable[Mapping[str, Any]], after: int, until: int) -> float:
    """Return the mean loss of the steps logged in (``after``, ``until``], each entry being the mean since the last."""
    total, steps, before = 0.0, 0, after
    for entry in log_history:
        if after < entry["step"] <= until and _is_number(entry.get("loss")):
            total += entry["loss"] * (entry["step"] - before)
            steps, before = steps + entry["step"] - before, entry["step"]
    return total / steps if steps else math.nan


def evaluated(log_history: Iterable[Mapping[str, Any]], after: int, until: int) -> dict[str, float]:
    """Return the last metrics of evaluations in (``after``, ``until``], without how long they took."""
    return {
        name: float(value)
        for entry in log_history
        if after < entry["step"] <= until
        for name, value in entry.items()
        if name.startswith("eval_") and not name.endswith(_TIMES) and _is_number(value)
    }


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
