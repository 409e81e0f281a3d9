"""What is learnt: the loss, and the metrics kept on the device; classification, segmentation or a callable's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

from neq_cli.errors import RecipeValueError, TrainingError, one_line
from neq_cli.recipe.entrypoints import accepted_arguments, load_entrypoint
from neq_cli.training.loop.segmentation import Segmentation
from neq_cli.training.models.outputs import auxiliary_outputs, main_output

__all__ = ["Classification", "Segmentation", "Task", "auxiliary_outputs", "build_task", "find_task", "main_output"]


@runtime_checkable
class Task(Protocol):
    """What the engine asks of a task. Totals are one tensor, so that processes can add theirs up.

    It may have two more: ``better``, "lower" where a smaller ``metric`` is the better one, and ``call(model, inputs,
    targets)``, which returns the outputs where the model is not called with the inputs alone, or with a mapping's
    entries as keywords. That is called in training, in tests and in the probe: ``model.training`` tells which, and
    nothing else of the model may be looked at, since it may be wrapped.
    """

    metric: str  # the column of metrics.csv that tells how good the model is, such as "test_top1"

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Return the mean loss of a batch, a scalar to differentiate; ``outputs`` are the model's as they come.

        NaN in tests where the model tells none there.
        """

    def new_totals(self, device: torch.device) -> Tensor:
        """Return zeros to add up an epoch in."""

    def update(self, totals: Tensor, outputs: Any, targets: Any, loss: Tensor) -> None:
        """Add a batch to ``totals`` in place, without waiting for the device."""

    def results(self, totals: Tensor) -> dict[str, float]:
        """Return the metrics by name, "loss" first, always the same ones; waits for the device."""


class Classification:
    """Cross-entropy and top-1 accuracy in percent, over logits [batch, classes] and targets [batch].

    Targets of mixed images are shares [batch, classes]: right is then the class with the largest.
    """

    metric = "test_top1"

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """Return the batch's mean cross-entropy, auxiliary classifiers' included with their weights."""
        total = self._cross_entropy(main_output(outputs), targets)
        for weight, logits in auxiliary_outputs(outputs):
            total = total + weight * self._cross_entropy(logits, targets)
        return total

    def _cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)

    def new_totals(self, device: torch.device) -> Tensor:
        """Return zeros [3]: loss times images, images right, images. MPS has no float64."""
        return torch.zeros(3, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)

    def update(self, totals: Tensor, outputs: Any, targets: Tensor, loss: Tensor) -> None:
        """Add a batch; nothing is read back from the device."""
        with torch.no_grad():
            largest = targets.argmax(1) if targets.ndim > 1 else targets
            right = (main_output(outputs).argmax(1) == largest).sum()
            totals[0] += loss.detach() * len(targets)
            totals[1] += right
            totals[2] += len(targets)

    def results(self, totals: Tensor) -> dict[str, float]:
        """Return ``{"loss": mean, "top1": percent}``, NaN where nothing was added."""
        loss, right, images = totals.tolist()
        if not images:
            return {"loss": float("nan"), "top1": float("nan")}
        return {"loss": loss / images, "top1": 100 * right / images}


def build_task(name: str, label_smoothing: float = 0.0, classes: int | None = None) -> Task:
    """Return the task that a recipe names: ``classification``, ``segmentation``, or what ``pkg.mod:callable`` returns.

    The callable gets ``label_smoothing``, and the number of ``classes`` of the data, where it takes them, and must
    return something with the methods of ``Task``.
    """
    if name == "classification":
        return Classification(label_smoothing)
    if name == "segmentation" and classes is not None:
        return Segmentation(classes, label_smoothing)
    make = find_task(name)
    accepted, others = accepted_arguments(make)
    takes_smoothing = others or "label_smoothing" in accepted
    if label_smoothing and not takes_smoothing:
        raise RecipeValueError(
            "label_smoothing", f"{label_smoothing}, but the task '{name}' does not take it; remove it"
        )
    arguments: dict[str, Any] = {"label_smoothing": label_smoothing} if takes_smoothing else {}
    if "classes" in accepted and classes is not None:
        arguments["classes"] = classes
    try:
        task = make(**arguments)
    except Exception as error:
        raise RecipeValueError("task", f"'{name}' cannot be made: {one_line(error)}") from error
    if not isinstance(task, Task):
        missing = [part for part in ("metric", "loss", "new_totals", "update", "results") if not hasattr(task, part)]
        raise RecipeValueError("task", f"'{name}' returned a {type(task).__name__} without {', '.join(missing)}")
    for attribute, problem in _attribute_problems(task):
        raise RecipeValueError("task", f"'{name}': {attribute} {problem}")
    return task


def lower_is_better(task: Task) -> bool:
    """Whether a smaller value of the task's metric is the better one."""
    return getattr(task, "better", "higher") == "lower"


def _attribute_problems(task: Task) -> Iterator[tuple[str, str]]:
    if not isinstance(task.metric, str) or not task.metric.startswith("test_") or task.metric in ("test_", "test_loss"):
        yield "metric", f'is {task.metric!r}; it begins with "test_" and ends with a name of results, such as test_mae'
    better = getattr(task, "better", "higher")
    if better not in ("higher", "lower"):
        yield "better", f'is {better!r}; use "higher" or "lower"'
    if not callable(getattr(task, "call", None)) and getattr(task, "call", None) is not None:
        yield "call", "is no method; make it call(model, inputs, targets), or leave it out"


def checked_results(task: Task, totals: Tensor) -> dict[str, float]:
    """Return the task's metrics of an epoch; TrainingError where they are not those that the columns are made of."""
    found = task.results(totals)
    score = task.metric.removeprefix("test_")
    if not isinstance(found, dict) or next(iter(found), None) != "loss" or score not in found:
        told = ", ".join(map(str, found)) if isinstance(found, dict) else type(found).__name__
        raise TrainingError(f'task: results returned {told}; a dictionary with "loss" first and "{score}" is needed')
    return {name: float(value) for name, value in found.items()}


def find_task(name: str) -> Any:
    """Return the callable behind ``name``; RecipeValueError where there is none."""
    known = {"classification": Classification, "segmentation": Segmentation}
    if name in known:
        return known[name]
    if ":" not in name:
        raise RecipeValueError("task", f"'{name}' is neither classification, segmentation nor pkg.mod:callable")
    return load_entrypoint(name, "task")
