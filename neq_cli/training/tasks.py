"""What is learnt: the loss, and the metrics kept on the device; classification only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

from neq_cli.training.entrypoints import accepted_arguments, load_entrypoint
from neq_cli.training.problems import RecipeValueError, one_line

# Weights of auxiliary classifiers: Szegedy et al. 2015 for GoogLeNet; 0.4 is what PyTorch's Inception v3 fine-tuning
# tutorial uses; 0.5 is torchvision's segmentation training.
_GOOGLENET_AUXILIARY = 0.3
_INCEPTION_AUXILIARY = 0.4
_DICT_AUXILIARY = 0.5


@runtime_checkable
class Task(Protocol):
    """What the engine asks of a task. Totals are one tensor, so that processes can add theirs up."""

    metric: str  # the column of metrics.csv that tells how good the model is, such as "test_top1"

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Return the mean loss of a batch, a scalar to differentiate; ``outputs`` are the model's as they come."""

    def new_totals(self, device: torch.device) -> Tensor:
        """Return zeros to add up an epoch in."""

    def update(self, totals: Tensor, outputs: Any, targets: Any, loss: Tensor) -> None:
        """Add a batch to ``totals`` in place, without waiting for the device."""

    def results(self, totals: Tensor) -> dict[str, float]:
        """Return the metrics by name, "loss" first; waits for the device."""


class Classification:
    """Cross-entropy and top-1 accuracy in percent, over logits [batch, classes] and targets [batch]."""

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
            right = (main_output(outputs).argmax(1) == targets).sum()
            totals[0] += loss.detach() * len(targets)
            totals[1] += right
            totals[2] += len(targets)

    def results(self, totals: Tensor) -> dict[str, float]:
        """Return ``{"loss": mean, "top1": percent}``, NaN where nothing was added."""
        loss, right, images = totals.tolist()
        if not images:
            return {"loss": float("nan"), "top1": float("nan")}
        return {"loss": loss / images, "top1": 100 * right / images}


def main_output(outputs: Any) -> Tensor:
    """Return the tensor that predictions are read from: of a tensor, of torchvision's tuples, of a mapping."""
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        for key in ("logits", "out"):
            if key in outputs:
                return cast(Tensor, outputs[key])
        raise TypeError(f"the model returned a mapping without 'logits' or 'out': {', '.join(map(str, outputs))}")
    if hasattr(outputs, "logits"):
        return cast(Tensor, outputs.logits)
    raise TypeError(f"the model returned a {type(outputs).__name__}; a tensor or a mapping with 'logits' is needed")


def auxiliary_outputs(outputs: Any) -> list[tuple[float, Tensor]]:
    """Return (weight, logits) of the auxiliary classifiers that ``outputs`` hold, none in eval mode."""
    if isinstance(outputs, Tensor):
        return []
    if isinstance(outputs, Mapping):
        found = [(_DICT_AUXILIARY, outputs.get("aux"))]
    elif hasattr(outputs, "aux_logits1"):
        found = [(_GOOGLENET_AUXILIARY, outputs.aux_logits1), (_GOOGLENET_AUXILIARY, outputs.aux_logits2)]
    else:
        found = [(_INCEPTION_AUXILIARY, getattr(outputs, "aux_logits", None))]
    return [(weight, logits) for weight, logits in found if logits is not None]


def build_task(name: str, label_smoothing: float = 0.0) -> Task:
    """Return the task that a recipe names: ``classification``, or what ``pkg.mod:callable`` returns.

    The callable gets ``label_smoothing`` where it takes it, and must return something with the methods of ``Task``.
    """
    if name == "classification":
        return Classification(label_smoothing)
    make = find_task(name)
    accepted, others = accepted_arguments(make)
    takes_smoothing = others or "label_smoothing" in accepted
    if label_smoothing and not takes_smoothing:
        raise RecipeValueError(
            "label_smoothing", f"{label_smoothing}, but the task '{name}' does not take it; remove it"
        )
    try:
        task = make(label_smoothing=label_smoothing) if takes_smoothing else make()
    except Exception as error:
        raise RecipeValueError("task", f"'{name}' cannot be made: {one_line(error)}") from error
    if not isinstance(task, Task):
        missing = [part for part in ("metric", "loss", "new_totals", "update", "results") if not hasattr(task, part)]
        raise RecipeValueError("task", f"'{name}' returned a {type(task).__name__} without {', '.join(missing)}")
    return task


def find_task(name: str) -> Any:
    """Return the callable behind ``name``; RecipeValueError where there is none."""
    if name == "classification":
        return Classification
    if ":" not in name:
        raise RecipeValueError("task", f"'{name}' is neither classification nor pkg.mod:callable")
    return load_entrypoint(name, "task")
