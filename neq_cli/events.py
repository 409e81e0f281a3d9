"""What a training run says as it goes: plain values and NumPy arrays, so that readers and screens need no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

EPOCH, OBSERVATION = "epoch", "observation"
"""What a run's records, and the rows of its files, are of: a pass over the data, or some number of optimiser steps."""
ENERGY_COLUMNS = ("joules", "co2_grams")
"""Of metrics.csv, where a run measures its energy; the second where it is told what a kilowatt-hour emits."""
UNUSED = "not used"
"""What environment.json says, under energy, of a source that does not take part in the run."""


@dataclass(frozen=True)
class RunStarted:
    """First record of a run, before any step."""

    recipe_name: str
    description: str  # the model and the data in a few words: "resnet32 on CIFAR10"
    policy: str  # "neq epsilon=0.001 mu=0.5"
    device: str  # "cpu (2 threads)", "cuda (NVIDIA H100 80GB HBM3)"
    epochs: int  # planned; observations where the unit is that
    steps_per_epoch: int  # or from one observation to the next
    metric: str  # the column that tells how good the model is: "test_top1", "test_miou"
    layers: Mapping[str, int]  # neurons of every observed layer, in forward order
    notes: tuple[str, ...]  # what is trained outside neurons, what runs dense and why; also logged in the run directory
    epsilon: float | None = None  # the |velocity| below which the policy freezes; None where it goes by something else
    lower_is_better: bool = False  # of the metric
    counted: str = "img"  # what the speed counts, in a few letters: "img", "items"
    unit: str = EPOCH  # or OBSERVATION: what "epoch" in this record and those that follow counts


@dataclass(frozen=True)
class Preparing:
    """What a run is busy with where no step can be counted; sent a few times a second at most."""

    what: str  # "reading images"
    done: int = 0
    total: int = 0  # 0 where it cannot be counted

    @property
    def text(self) -> str:
        """The record in a few words: "reading images: 31,000 of 49,950, 62 %"."""
        if not self.total:
            return self.what
        return f"{self.what}: {self.done:,} of {self.total:,}, {100 * self.done // self.total} %"


@dataclass(frozen=True)
class StepProgress:
    """Where the current epoch (or observation) stands; sent a few times a second or an epoch, never once per step."""

    epoch: int  # from 1
    step: int  # steps done in this epoch
    steps: int
    phase: str  # "load", "train", "test" or "probe"
    images_per_second: float
    train_loss: float  # running mean of this epoch, NaN where not known yet


@dataclass(frozen=True)
class LayerState:
    """One layer after an epoch. Arrays are [neurons]."""

    name: str  # state_dict prefix
    kind: str  # "Conv2d", "Linear", "BatchNorm2d", ...
    phi: NDArray[np.float32]
    delta_phi: NDArray[np.float32]
    velocity: NDArray[np.float32]
    trained: NDArray[np.bool_]  # the set in force during the epoch
    trainable: NDArray[np.bool_]  # the set chosen for the next epoch
    flops_paper: float  # one sample's back-propagation during the epoch, multiply-adds
    flops_executed: float

    @property
    def neurons(self) -> int:
        return len(self.trained)

    @property
    def frozen(self) -> int:
        """Neurons that were not updated during the epoch."""
        return int(len(self.trained) - self.trained.sum())


@dataclass(frozen=True)
class EpochRecord:
    """One finished epoch (or observation): ``metrics`` is the row of metrics.csv, keys in column order."""

    epoch: int
    metrics: Mapping[str, float | int]
    layers: tuple[LayerState, ...]


@dataclass(frozen=True)
class RunResumed:
    """Follows ``RunStarted`` where earlier calls have trained epochs; of their layers the last one's alone are kept."""

    epochs: tuple[EpochRecord, ...]


@dataclass(frozen=True)
class Compiling:
    """The network is being compiled; told every second, from another thread, while steps wait for it."""

    seconds: float  # so far
    ended: bool = False


@dataclass(frozen=True)
class Pause:
    """Between two updates, where all that the run depends on can be saved; told to what saves, not to displays."""

    epoch: int
    step: int
    stop: bool  # somebody asked the run to end here


Record = RunStarted | RunResumed | Preparing | StepProgress | EpochRecord | Compiling
