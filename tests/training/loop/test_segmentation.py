"""Per-pixel loss and mean IoU against counting by hand, and torchmetrics where it is installed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from rounding import apart
from torch import Tensor
from torchvision.models.segmentation import deeplabv3_resnet50, lraspp_mobilenet_v3_large

from neq_cli.errors import TrainingError
from neq_cli.training.loop.segmentation import Segmentation
from neq_cli.training.loop.tasks import Task, build_task

CPU = torch.device("cpu")
GENERATOR = torch.Generator().manual_seed(0)


def logits(batch: int = 2, classes: int = 4, size: tuple[int, int] = (5, 6)) -> Tensor:
    return torch.randn(batch, classes, *size, generator=GENERATOR)


def masks(batch: int = 2, classes: int = 4, size: tuple[int, int] = (5, 6), ignored: float = 0.2) -> Tensor:
    drawn = torch.randint(0, classes, (batch, *size), generator=GENERATOR, dtype=torch.uint8)
    return drawn.masked_fill(torch.rand(drawn.shape, generator=GENERATOR) < ignored, 255)


def mean_by_hand(outputs: Tensor, targets: Tensor) -> float:
    losses = []
    for image, mask in zip(outputs.double(), targets, strict=True):
        for row in range(mask.shape[0]):
            for column in range(mask.shape[1]):
                if mask[row, column] != 255:
                    scores = image[:, row, column]
                    losses.append(float(scores.exp().sum().log() - scores[int(mask[row, column])]))
    return sum(losses) / len(losses)


def loss_apart(outputs: Tensor, targets: Tensor) -> float:
    """Return how far two means over the pixels may lie apart, in single precision: each pixel is a difference of two.

    A pixel's own loss is rounded as often as there are classes, and a few times more: scaled, exp, log, difference.
    """
    scores = outputs.detach().double().abs()
    magnitude = float((scores.exp().sum(1).log() + scores.amax(1)).mean())
    return apart(targets.numel() + outputs.shape[1] + 8, torch.float32, magnitude)


def results_by_hand(predicted: Any, targets: Any, classes: int) -> tuple[float, float]:
    """Mean over the classes of the masks of intersection over union, and pixel accuracy, both in percent."""
    counted = targets != 255
    shares = []
    for number in range(classes):
        true, said = (targets == number) & counted, (predicted == number) & counted
        if true.any():
            shares.append((true & said).sum() / (true | said).sum())
    return 100 * float(np.mean(shares)), 100 * float((predicted == targets)[counted].mean())


def added_up(task: Segmentation, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    totals = task.new_totals(CPU)
    for outputs, targets in batches:
        task.update(totals, {"out": outputs}, targets, task.loss({"out": outputs}, targets))
    return totals


def test_the_loss_is_the_mean_over_pixels_that_are_not_ignored() -> None:
    outputs, targets = logits(), masks()
    assert (targets == 255).any()
    loss = Segmentation(4).loss({"out": outputs}, targets)
    assert loss.item() == pytest.approx(mean_by_hand(outputs, targets), abs=loss_apart(outputs, targets))


def test_the_auxiliary_head_counts_half() -> None:
    outputs, auxiliary, targets = logits(), logits(), masks()
    loss = Segmentation(4).loss({"out": outputs, "aux": auxiliary}, targets)
    expected = mean_by_hand(outputs, targets) + 0.5 * mean_by_hand(auxiliary, targets)
    assert loss.item() == pytest.approx(expected, abs=loss_apart(outputs, targets) + loss_apart(auxiliary, targets))


def test_a_batch_that_is_ignored_whole_trains_nothing() -> None:
    outputs = logits().requires_grad_()
    task, targets = Segmentation(4), torch.full((2, 5, 6), 255, dtype=torch.uint8)
    loss = task.loss(outputs, targets)
    loss.backward()  # type: ignore[no-untyped-call]
    assert outputs.grad is not None
    assert (loss.item(), outputs.grad.abs().max().item()) == (0.0, 0.0)
    totals = added_up(task, [(outputs.detach(), targets)])
    assert not totals.any()
    assert all(math.isnan(value) for value in task.results(totals).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adds_up_a_large_image(dtype: torch.dtype) -> None:
    outputs, targets = logits(1, 3, (300, 300)).to(dtype), masks(1, 3, (300, 300))
    loss = Segmentation(3).loss({"out": outputs}, targets)
    expected = Segmentation(3).loss({"out": outputs.double()}, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), abs=loss_apart(outputs, targets))


def test_metrics_are_those_of_the_whole_set_however_it_is_cut() -> None:
    task = Segmentation(4)
    batches = [(logits(), masks()), (logits(1, 4, (7, 3)), masks(1, 4, (7, 3))), (logits(3), masks(3, ignored=0.9))]
    results = task.results(added_up(task, batches))
    predicted = np.concatenate([outputs.argmax(1).flatten().numpy() for outputs, _ in batches])
    true = np.concatenate([targets.flatten().numpy() for _, targets in batches])
    miou, accuracy = results_by_hand(predicted, true, 4)
    assert results["miou"] == pytest.approx(miou, rel=apart(20))
    assert results["pixel_accuracy"] == pytest.approx(accuracy, rel=apart(20))
    assert list(results) == ["loss", "miou", "pixel_accuracy"]
    losses = [(mean_by_hand(outputs, targets), int((targets != 255).sum())) for outputs, targets in batches]
    pixels = sum(count for _, count in losses)
    close = max(loss_apart(*batch) for batch in batches)
    assert results["loss"] == pytest.approx(sum(loss * count for loss, count in losses) / pixels, abs=close)
    # Processes add up what each has.
    parts = sum((added_up(task, [batch]) for batch in batches), task.new_totals(CPU))
    assert torch.equal(parts[1:], added_up(task, batches)[1:])
    assert task.results(parts)["loss"] == pytest.approx(results["loss"], rel=apart(20))


def test_torchmetrics_agrees() -> None:
    classification = pytest.importorskip("torchmetrics").classification
    task, outputs, targets = Segmentation(4), logits(5), masks(5)
    jaccard = classification.MulticlassJaccardIndex(4, ignore_index=255)
    jaccard.update(outputs.argmax(1), targets.long())
    accuracy = classification.MulticlassAccuracy(4, ignore_index=255, average="micro")
    accuracy.update(outputs.argmax(1), targets.long())
    results = task.results(added_up(task, [(outputs, targets)]))
    assert results["miou"] == pytest.approx(100 * float(jaccard.compute()), rel=apart(20, torch.float32))
    assert results["pixel_accuracy"] == pytest.approx(100 * float(accuracy.compute()), rel=apart(20, torch.float32))


def test_a_class_that_no_mask_has_is_left_out_of_the_mean() -> None:
    predicted = torch.tensor([[[0, 1, 2, 1]]])
    outputs = torch.nn.functional.one_hot(predicted, 4).movedim(-1, 1).float()
    targets = torch.tensor([[[0, 1, 1, 0]]], dtype=torch.uint8)
    results = Segmentation(4).results(added_up(Segmentation(4), [(outputs, targets)]))
    # Class 0: 1 of 2 pixels; class 1: 1 of 3. Class 2 is said once and counts there; class 3 is nowhere.
    assert results["miou"] == pytest.approx(100 * (1 / 2 + 1 / 3) / 2)
    assert results["pixel_accuracy"] == 50.0


def test_outputs_beyond_the_classes_are_wrong() -> None:
    outputs = torch.zeros(1, 6, 1, 2)
    outputs[0, 5, 0, 0], outputs[0, 1, 0, 1] = 9.0, 9.0
    targets = torch.tensor([[[1, 1]]], dtype=torch.uint8)
    results = Segmentation(2).results(added_up(Segmentation(2), [(outputs, targets)]))
    assert results["miou"] == results["pixel_accuracy"] == 50.0


def test_labels_are_no_masks() -> None:
    with pytest.raises(TrainingError, match=r"^task: segmentation needs masks .*\[2\]; use task=classification"):
        Segmentation(4).loss(logits(), torch.tensor([1, 2]))


def test_it_is_built_for_the_classes_of_the_data() -> None:
    task = build_task("segmentation", 0.1, 7)
    assert isinstance(task, Segmentation)
    assert isinstance(task, Task)
    assert (task.classes, task.label_smoothing, task.metric) == (7, 0.1, "test_miou")


@pytest.mark.parametrize("make", [lambda: deeplabv3_resnet50(weights_backbone=None, aux_loss=True, num_classes=3)])
def test_torchvisions_outputs_are_understood(make: Any) -> None:
    model, task = make(), Segmentation(3)
    images, targets = torch.randn(2, 3, 32, 32, generator=GENERATOR), masks(2, 3, (32, 32))
    outputs = model(images)
    cross_entropy = torch.nn.functional.cross_entropy
    expected = cross_entropy(outputs["out"], targets.long(), ignore_index=255)
    expected = expected + 0.5 * cross_entropy(outputs["aux"], targets.long(), ignore_index=255)
    close = loss_apart(outputs["out"], targets) + loss_apart(outputs["aux"], targets)
    torch.testing.assert_close(task.loss(outputs, targets), expected, atol=close, rtol=0)
    small = lraspp_mobilenet_v3_large(weights_backbone=None, num_classes=3)(images)
    assert task.loss(small, targets).isfinite()


def test_logits_smaller_than_the_masks_are_scaled_up_to_them() -> None:
    task, small, targets = Segmentation(4), logits(size=(2, 3)).requires_grad_(), masks(size=(4, 6))
    whole = torch.nn.functional.interpolate(small, size=(4, 6), mode="bilinear", align_corners=False)
    assert torch.equal(task.loss({"logits": small}, targets), task.loss(whole, targets))
    task.loss({"logits": small}, targets).backward()
    assert small.grad is not None
    assert small.grad.shape == small.shape
    totals, expected = task.new_totals(CPU), task.new_totals(CPU)
    task.update(totals, {"logits": small}, targets, torch.tensor(1.0))
    task.update(expected, whole, targets, torch.tensor(1.0))
    assert torch.equal(totals, expected)
