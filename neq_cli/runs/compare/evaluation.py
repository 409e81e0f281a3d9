"""What weights come to on a test set: metrics, and from counts of pairs of classes the confusion, recall and IoU."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neq_cli.events import EPOCH
from neq_cli.runs.store.untrusted import Number
from neq_cli.text import plain_json, ratio_percent

MOST_IN_JSON = 1000
"""Classes of which JSON has the whole matrix."""

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Pairs:
    """How often a true class was taken for a predicted one; only pairs that occurred, in order of their classes.

    A prediction of ``classes`` itself stands for all outputs of a model beyond the classes of the data.
    """

    classes: int
    true: Counts
    predicted: Counts
    counts: Counts

    def matrix(self) -> Counts:
        """Return the counts [classes, classes + 1]: rows are true classes, the last column is of other outputs."""
        found = np.zeros((self.classes, self.classes + 1), dtype=np.int64)
        found[self.true, self.predicted] = self.counts
        return found

    def by_class(self) -> tuple[Counts, Counts, Counts]:
        """Return for each class how often it was right, occurred and was predicted, [classes] each."""
        right, true, predicted = (np.zeros(self.classes + 1, dtype=np.int64) for _ in range(3))
        same = self.true == self.predicted
        np.add.at(right, self.true[same], self.counts[same])
        np.add.at(true, self.true, self.counts)
        np.add.at(predicted, self.predicted, self.counts)
        return right[:-1], true[:-1], predicted[:-1]

    def most_confused(self, limit: int) -> list[tuple[int, int, int]]:
        """Return (true, predicted, count) of the commonest mistakes, the commonest first."""
        wrong = np.flatnonzero(self.true != self.predicted)
        order = wrong[np.argsort(-self.counts[wrong], kind="stable")][:limit]
        return [(int(self.true[one]), int(self.predicted[one]), int(self.counts[one])) for one in order]


@dataclass(frozen=True)
class Evaluation:
    """One pass over a test set. ``metrics`` are the task's, "loss" first; ``recorded`` those of the run's own table.

    ``pairs`` are of images, or of pixels where ``segmentation``; None for tasks that have no classes.
    """

    run: str  # the recipe's name
    place: str  # of the weights
    weights: str  # "best", "last", "final", or "file"
    epoch: int | None
    data: str
    images: int
    counted: str  # what they are: "images", or "items"
    metrics: Mapping[str, float]
    recorded: Mapping[str, Number]
    pairs: Pairs | None = None
    class_names: tuple[str, ...] = ()
    segmentation: bool = False
    unit: str = EPOCH  # or OBSERVATION: what ``epoch`` counts

    def name(self, number: int) -> str:
        """Return what a class is called: its number where no name is known."""
        if self.pairs is not None and number == self.pairs.classes:
            return "other"
        return self.class_names[number] if number < len(self.class_names) else str(number)

    def named(self, number: int) -> str:
        """Return number and name of a class, once where they are the same."""
        name = self.name(number)
        return name if name in (str(number), "other") else f"{number} {name}"


def iou(pairs: Pairs) -> NDArray[np.float64]:
    """Return intersection over union in percent [classes]; NaN where a class is in no mask, as for the mean."""
    right, true, predicted = pairs.by_class()
    union = np.where(true > 0, true + predicted - right, 0)
    return _percent(right, union)


def recall(pairs: Pairs) -> NDArray[np.float64]:
    """Return the percentage of each class that was taken for what it is [classes]; NaN where there is none of it."""
    right, true, _ = pairs.by_class()
    return _percent(right, true)


def _percent(part: Counts, whole: Counts) -> NDArray[np.float64]:
    found = np.full(len(part), np.nan)
    np.divide(100.0 * part, whole, out=found, where=whole > 0)
    return found


def same_as_recorded(evaluation: Evaluation) -> bool | None:
    """Whether all metrics are the recorded ones, to the bit; None where the run's table has none of them."""
    shared = {name: value for name, value in evaluation.metrics.items() if name in evaluation.recorded}
    if not shared:
        return None
    return all(
        value == evaluation.recorded[name] or (math.isnan(value) and math.isnan(evaluation.recorded[name]))
        for name, value in shared.items()
    )


def to_json(evaluation: Evaluation) -> dict[str, Any]:
    """Return everything in plain values; the whole matrix where there are at most ``MOST_IN_JSON`` classes."""
    found: dict[str, Any] = {
        "run": evaluation.run,
        "path": evaluation.place,
        "weights": evaluation.weights,
        "epoch": evaluation.epoch,
        "unit": evaluation.unit,
        "data": evaluation.data,
        evaluation.counted: evaluation.images,
        "metrics": dict(evaluation.metrics),
        "recorded": dict(evaluation.recorded),
        "same_as_recorded": same_as_recorded(evaluation),
    }
    pairs = evaluation.pairs
    if pairs is not None:
        right, true, _ = pairs.by_class()
        shares = iou(pairs) if evaluation.segmentation else recall(pairs)
        found["classes"] = [
            {
                "class": number,
                "name": evaluation.name(number),
                "pixels" if evaluation.segmentation else "images": int(true[number]),
                "right_percent": ratio_percent(int(right[number]), int(true[number])),
                **({"iou": float(shares[number])} if evaluation.segmentation else {}),
            }
            for number in range(pairs.classes)
        ]
        found["most_confused"] = [
            {"true": evaluation.name(true_class), "predicted": evaluation.name(predicted), "count": count}
            for true_class, predicted, count in pairs.most_confused(20)
        ]
        if pairs.classes <= MOST_IN_JSON:
            found["confusion"] = pairs.matrix().tolist()
    plain: dict[str, Any] = plain_json(found)
    return plain
