"""Data, network and task for `detection.yaml`: objects are found in images that differ in size."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import box_iou

Target = dict[str, Tensor]
CLASSES = ("disc", "square")


class Shapes:
    """Images [3, height, width] of noise with one to three coloured discs and squares, drawn as they are asked for.

    Items are (image, {"boxes": [objects, 4], "labels": [objects]}), as torchvision's detectors take them.
    """

    classes = CLASSES

    def __init__(self, size: int, first: int) -> None:
        self.size = size
        self.first = first

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        if not 0 <= index < self.size:
            raise IndexError(index)
        generator = torch.Generator().manual_seed(self.first + index)

        def draw(low: int, high: int) -> int:
            return int(torch.randint(low, high, (), generator=generator))

        height, width = draw(64, 97), draw(64, 97)
        image = 0.2 * torch.rand(3, height, width, generator=generator)
        down, across = torch.arange(height)[:, None], torch.arange(width)
        boxes, labels = [], []
        for _ in range(draw(1, 4)):
            radius, label = draw(8, 15), draw(0, len(CLASSES))
            y, x = draw(radius, height - radius), draw(radius, width - radius)
            far = (
                ((down - y) ** 2 + (across - x) ** 2).sqrt() if label == 0 else (down - y).abs().max((across - x).abs())
            )
            image[:, far < radius] = 0.3 + 0.7 * torch.rand(3, 1, generator=generator)
            boxes.append([x - radius, y - radius, x + radius, y + radius])
            labels.append(label)
        return image, {"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": torch.tensor(labels)}

    @staticmethod
    def collate(items: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
        """Return a batch: images of several sizes make no tensor."""
        images, targets = zip(*items, strict=True)
        return list(images), list(targets)


def shapes(size: int = 250) -> tuple[Shapes, Shapes]:
    """Return training and test data."""
    return Shapes(size, 0), Shapes(size // 5, size)


def retinanet(num_classes: int = len(CLASSES), width: int = 32, side: int = 64) -> nn.Module:
    """Return a small RetinaNet with random weights; an image's shorter side is scaled to ``side``.

    One of torchvision's own may stand in its place: `torchvision.models.detection:retinanet_resnet50_fpn`.
    """
    channels = (3, width, 2 * width, 4 * width)
    stages = [
        nn.Sequential(nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU())
        for before, after in pairwise(channels)
    ]
    backbone = nn.Sequential(*stages)
    backbone.out_channels = channels[-1]
    anchors = AnchorGenerator(sizes=((12, 16, 20, 24, 28),), aspect_ratios=((1.0,),))
    return RetinaNet(
        backbone, num_classes, anchor_generator=anchors, min_size=side, max_size=2 * side, detections_per_img=20
    )


class Detection:
    """The model's own losses, and the AP50 of its detections in percent: their average precision at an overlap of half.

    Detections are counted in a histogram of their scores, which processes can add up: totals are the loss times images,
    images, and for each class its objects, then the right and the wrong detections in each of ``STEPS`` of the score.
    """

    metric = "test_ap50"
    STEPS = 200

    def __init__(self, classes: int = len(CLASSES)) -> None:
        self.classes = classes

    def call(self, model: nn.Module, images: list[Tensor], targets: list[Target]) -> Any:
        """Return losses by name in training, detections in tests and in the probe."""
        return model(images, targets) if model.training else model(images)

    def loss(self, outputs: Any, targets: list[Target]) -> Tensor:
        """Return the sum of the losses; torchvision's detectors tell none in tests."""
        return sum(outputs.values()) if isinstance(outputs, dict) else torch.tensor(torch.nan)

    def new_totals(self, device: torch.device) -> Tensor:
        """Return zeros; see the class."""
        return torch.zeros(2 + self.classes * (1 + 2 * self.STEPS), device=device)

    def update(self, totals: Tensor, outputs: Any, targets: list[Target], loss: Tensor) -> None:
        """Add a batch."""
        totals[0] += loss.detach() * len(targets)
        totals[1] += len(targets)
        if isinstance(outputs, dict):
            return
        by_class = totals[2:].view(self.classes, 1 + 2 * self.STEPS)
        for found, target in zip(outputs, targets, strict=True):
            for label, counts in enumerate(by_class):
                chosen, there = found["labels"] == label, target["boxes"][target["labels"] == label]
                scores = found["scores"][chosen]
                right = matches(found["boxes"][chosen], scores, there)
                places = (scores * self.STEPS).long().clamp(max=self.STEPS - 1) + self.STEPS * (~right).long()
                counts[0] += len(there)
                counts[1:].scatter_add_(0, places, torch.ones_like(scores, dtype=counts.dtype))

    def results(self, totals: Tensor) -> dict[str, float]:
        """Return the mean loss, and AP50 as the mean over the classes that there are; NaN where there are none."""
        precisions = [
            average_precision(counts[0], *counts[1:].view(2, self.STEPS))
            for counts in totals[2:].cpu().double().view(self.classes, -1)
            if counts[0]
        ]
        mean = sum(precisions) / len(precisions) if precisions else float("nan")
        return {"loss": float(totals[0] / totals[1]), "ap50": 100 * mean}


def matches(boxes: Tensor, scores: Tensor, there: Tensor, least: float = 0.5) -> Tensor:
    """Return which of the detected ``boxes`` are right, bool [boxes].

    In the order of their scores, each takes the object that it overlaps most, which must be by ``least`` and not taken.
    """
    right = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    if not len(there):
        return right
    overlaps = box_iou(boxes, there)
    taken: set[int] = set()
    for place in scores.argsort(descending=True).tolist():
        overlap, which = overlaps[place].max(0)
        if overlap >= least and int(which) not in taken:
            taken.add(int(which))
            right[place] = True
    return right


def average_precision(objects: Tensor, right: Tensor, wrong: Tensor) -> float:
    """Return the area under precision by recall; ``right`` and ``wrong`` are detections by score, the lowest first.

    As Pascal VOC has it since 2010: a precision counts where no higher recall has a better one.
    """
    right, wrong = right.flip(0).cumsum(0), wrong.flip(0).cumsum(0)
    recall = right / objects
    precision = (right / (right + wrong).clamp(min=1)).flip(0).cummax(0).values.flip(0)
    return float((recall.diff(prepend=recall.new_zeros(1)) * precision).sum())
