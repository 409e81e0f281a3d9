"""What the bench finds of one arm, step by step, and what it comes to beside the plain step."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from neq_cli.training.bench.frozen_sets import Arm
from neq_cli.training.bench.timed_step import PARTS
from neq_cli.training.machine.paired_ratio import PairedRatio, paired_ratio


@dataclass(frozen=True)
class LayerUse:
    """How a layer computed its gradients; ``kernel`` "none": no weight gradient at all."""

    name: str
    kind: str
    neurons: int
    frozen: int
    kernel: str | None
    rows_computed: int
    reason: str


@dataclass(eq=False)
class Subject:
    """An arm and what was measured of it; no arm: the plain dense step, without a Freezer.

    ``visits`` are the steps of each round, in seconds by part. ``flops_ratio``: multiply-adds of forward and
    back-propagation as executed, over those with nothing frozen. ``beside``: the plain steps measured just before and
    after.
    """

    arm: Arm | None
    visits: list[list[dict[str, float]]] = field(default_factory=list)
    saved_for_backward: int = 0
    peak_memory: int | None = None
    flops_ratio: float = 1.0
    layers: tuple[LayerUse, ...] = ()
    beside: tuple[Subject, ...] = ()

    @property
    def label(self) -> str:
        """What is measured, in words."""
        return "plain dense" if self.arm is None else self.arm.label

    @property
    def steps(self) -> list[dict[str, float]]:
        """The steps of all rounds."""
        return [step for visit in self.visits for step in visit]

    def times(self) -> dict[str, Any]:
        """Return medians over the steps, in milliseconds, and the quartiles of the whole step."""
        whole = [1e3 * sum(step.values()) for step in self.steps]
        first, median, third = statistics.quantiles(whole, n=4, method="inclusive") if whole[1:] else whole * 3
        parts = {f"{part}_ms": 1e3 * statistics.median(step[part] for step in self.steps) for part in PARTS}
        return {"step_ms": median, "step_ms_quartiles": [first, third], **parts}


@dataclass(frozen=True)
class Measurement:
    """One backward mode with one frozen set. Times are medians in milliseconds, ratios are to the plain dense step.

    ``dense_step_ms`` is that of the plain steps measured just before and after, for what else a machine does comes and
    goes. ``time_ratio`` is the median of the rounds' ratios, each of the medians of that round;
    ``time_ratio_interval`` holds it as often as ``time_ratio_confidence`` says, see ``paired_ratio``: None both where
    there is one round.
    ``saved_for_backward_bytes`` leave the model's own tensors out; ``peak_memory_bytes`` are known on CUDA only.
    """

    frozen_fraction: float
    backward: str
    order: str
    frozen: int
    step_ms: float
    step_ms_quartiles: list[float]
    dense_step_ms: float
    time_ratio: float
    time_ratio_interval: list[float] | None
    time_ratio_confidence: float | None
    flops_ratio: float
    saved_for_backward_bytes: int
    dense_saved_for_backward_bytes: int
    forward_ms: float
    backward_ms: float
    optimizer_ms: float
    row_keeping_ms: float
    peak_memory_bytes: int | None
    dense_peak_memory_bytes: int | None
    layers: tuple[LayerUse, ...]


def together(subjects: Iterable[Subject]) -> Subject:
    """Return the plain step of all ``subjects``, which are plain ones."""
    plain = list(subjects)
    peaks = [one.peak_memory for one in plain if one.peak_memory is not None]
    return Subject(
        arm=None,
        visits=[
            [step for visit in visits for step in visit] for visits in zip(*(one.visits for one in plain), strict=True)
        ],
        saved_for_backward=max(one.saved_for_backward for one in plain),
        peak_memory=max(peaks, default=None),
    )


def measurements(subject: Subject, plain: Subject) -> list[Measurement]:
    """Return what was measured of ``subject``, once for each order that comes to its sets."""
    assert subject.arm is not None
    beside = together(subject.beside)
    ratio = ratio_of(subject, beside)
    several = len(subject.visits) > 1
    return [
        Measurement(
            frozen_fraction=subject.arm.fraction,
            backward=subject.arm.mode,
            order=order,
            frozen=sum(layer.frozen for layer in subject.layers),
            dense_step_ms=beside.times()["step_ms"],
            time_ratio=ratio.median,
            time_ratio_interval=[ratio.low, ratio.high] if several else None,
            time_ratio_confidence=ratio.confidence if several else None,
            flops_ratio=subject.flops_ratio,
            saved_for_backward_bytes=subject.saved_for_backward,
            dense_saved_for_backward_bytes=plain.saved_for_backward,
            peak_memory_bytes=subject.peak_memory,
            dense_peak_memory_bytes=plain.peak_memory,
            layers=subject.layers,
            **subject.times(),
        )
        for order in subject.arm.orders
    ]


def ratio_of(subject: Subject, plain: Subject) -> PairedRatio:
    """Return how a step of ``subject`` compares with one of ``plain``, which was measured in the same rounds.

    A round's ratio is that of its medians: its steps follow each other, and share what else the machine does.
    """
    pairs = zip(subject.visits, plain.visits, strict=True)
    return paired_ratio([_middle(own) / _middle(others) for own, others in pairs])


def _middle(visit: Iterable[dict[str, float]]) -> float:
    return statistics.median(sum(step.values()) for step in visit)
