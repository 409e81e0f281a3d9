"""Semantic segmentation: per-pixel cross-entropy, mean IoU and pixel accuracy from a confusion matrix on the device.

By hand: one tensor that processes add up, where torchmetrics would synchronise metric by metric.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from neq_cli.errors import TrainingError
from neq_cli.training.data.masks import IGNORED
from neq_cli.training.models.outputs import auxiliary_outputs, main_output, scaled_to


class Segmentation:
    """Over logits [batch, classes, height, width] and masks [batch, height, width] of class numbers, 255 ignored.

    Logits of another height and width are scaled to the masks'.

    Totals are float64 [2 + classes * (classes + 1)]: loss times pixels, pixels, and how many pixels of each class were
    taken for each, the last column for whatever a model with more outputs than there are classes may say. MPS has no
    float64: counts above 2**24 are rounded there.
    """

    metric = "test_miou"

    def __init__(self, classes: int, label_smoothing: float = 0.0) -> None:
        self.classes = classes
        self.label_smoothing = label_smoothing

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of the pixels that are not ignored; auxiliary heads' with half its weight."""
        if targets.ndim != 3:
            raise TrainingError(
                f"task: segmentation needs masks [batch, height, width], and the data's targets are "
                f"{list(targets.shape)}; use task=classification, or data with masks"
            )
        classes = targets.long()
        total = self._cross_entropy(main_output(outputs), classes)
        for weight, logits in auxiliary_outputs(outputs):
            total = total + weight * self._cross_entropy(logits, classes)
        return total

    def _cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        # Half precision could not add up so many pixels. A batch that is ignored whole is a loss of 0, not 0 / 0.
        pixels = (targets != IGNORED).sum().clamp(min=1)
        logits = scaled_to(logits.float(), targets)
        if logits.is_cuda and torch.are_deterministic_algorithms_enabled():
            logits, targets = logits.movedim(1, -1).flatten(0, -2), targets.flatten()  # images have no such kernel
        summed = functional.cross_entropy(
            logits, targets, ignore_index=IGNORED, label_smoothing=self.label_smoothing, reduction="sum"
        )
        return summed / pixels

    def new_totals(self, device: torch.device) -> Tensor:
        """Return zeros; see the class."""
        size = 2 + self.classes * (self.classes + 1)
        return torch.zeros(size, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)

    def update(self, totals: Tensor, outputs: Any, targets: Tensor, loss: Tensor) -> None:
        """Add a batch; nothing is read back from the device."""
        with torch.no_grad():
            predicted = scaled_to(main_output(outputs), targets).argmax(1).clamp_(max=self.classes).flatten()
            true = targets.flatten().long()
            counted = true != IGNORED
            # Ignored pixels add nothing to the first cell: what is left out by index would have to be waited for.
            cells = torch.where(counted, true * (self.classes + 1) + predicted, 0)
            ones = counted.to(totals.dtype)
            totals[2:].scatter_add_(0, cells, ones)
            pixels = ones.sum()
            totals[0] += loss.detach() * pixels
            totals[1] += pixels

    def results(self, totals: Tensor) -> dict[str, float]:
        """Return ``{"loss": mean, "miou": percent, "pixel_accuracy": percent}``, NaN where nothing was added.

        The mean is over the classes that occur in the masks.
        """
        values = totals.detach().cpu().double()
        loss, pixels = values[:2].tolist()
        if not pixels:
            return {"loss": float("nan"), "miou": float("nan"), "pixel_accuracy": float("nan")}
        confusion = values[2:].view(self.classes, self.classes + 1)
        right, true, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)[: self.classes]
        present = true > 0
        shares = right[present] / (true + predicted - right)[present]
        return {
            "loss": loss / pixels,
            "miou": 100 * shares.mean().item(),
            "pixel_accuracy": 100 * right.sum().item() / pixels,
        }
