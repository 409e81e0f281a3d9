"""How a task has its model called with a batch, the same in training, tests and the probe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from neq_cli.freezing.model.calling import Call, taken_keywords
from neq_cli.training.loop.tasks import Task

Forward = Callable[[nn.Module, Any, Any], Any]
"""Calls a model with a batch's inputs and targets, and returns its outputs."""


def parts_of(batch: Any) -> tuple[Any, Any]:
    """Return the inputs and the targets of a batch.

    They are its first element and its second where it has several in a row, the others together where there are three
    or more. Whatever else it is, such as a tensor of tokens or a mapping, is both.
    """
    if not isinstance(batch, tuple | list) or not batch:
        return batch, batch
    inputs, *targets = batch
    if not targets:
        return inputs, inputs
    return inputs, targets[0] if len(targets) == 1 else tuple(targets)


def forward_of(task: Task, model: nn.Module) -> Forward:
    """Return how a model is called: as the ``task`` says, else with the inputs, a mapping by keywords.

    ``model`` tells which keywords it takes; what is called may be a wrapper around it.
    """
    call: Forward | None = getattr(task, "call", None)
    if call is not None:
        return call

    def forward(called: nn.Module, inputs: Any, targets: Any) -> Any:
        if isinstance(inputs, Mapping) and (taken := taken_keywords(model, inputs)):
            return called(**taken)
        return called(inputs)

    return forward


def probe_call(task: Task) -> Call | None:
    """Return how the Freezer calls the model with a batch; None where it knows by itself."""
    call: Forward | None = getattr(task, "call", None)
    if call is None:
        return None
    return lambda model, batch: call(model, *parts_of(batch))
