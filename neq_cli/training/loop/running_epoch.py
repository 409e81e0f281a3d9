"""An epoch that is half trained: what it has come to in this process, before and after interruptions; its clock.

An epoch is what lies between two observations: a pass over the training data, or ``probe_every`` optimiser steps.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from torch import Tensor

from neq_cli.freezing import Freezer
from neq_cli.training.loop.step import TrainingStep

_NUMBERS = ("epoch", "steps", "updates", "images", "pass_steps", "pass_images", "bytes_sent")
_FLOATS = ("train_seconds", "seconds", "bookkeeping_seconds", "data_seconds", "joules", "lr", "last_lr")


@dataclass
class RunningEpoch:
    """What a half-trained epoch has come to, in this process and, where an epoch was interrupted, before it."""

    epoch: int
    totals: Tensor  # the task's, of this process
    steps: int = 0  # batches
    updates: int = 0  # optimiser steps
    images: int = 0  # over all processes
    pass_steps: int = 0  # those of the pass over the training data that runs, which may have begun earlier
    pass_images: int = 0
    train_seconds: float = 0.0
    seconds: float = 0.0
    bookkeeping_seconds: float = 0.0
    data_seconds: float = 0.0  # spent in waiting for batches
    bytes_sent: int = 0
    joules: float = 0.0  # of all processes; NaN where not all of it was measured
    lr: float = math.nan  # the one it started with
    last_lr: float = math.nan  # that of its last step

    def add(self, images: int, *, update: bool) -> None:
        """Take note of one more batch, of ``images`` over all processes, and whether the optimiser stepped."""
        self.steps, self.images = self.steps + 1, self.images + images
        self.pass_steps, self.pass_images = self.pass_steps + 1, self.pass_images + images
        self.updates += update

    def next(self, totals: Tensor) -> RunningEpoch:
        """Return the epoch after this one, within the same pass."""
        return RunningEpoch(self.epoch + 1, totals, pass_steps=self.pass_steps, pass_images=self.pass_images)

    def to_plain(self) -> dict[str, float | int]:
        """Return what is a plain number, the same in all processes."""
        return {key: getattr(self, key) for key in (*_NUMBERS, *_FLOATS)}


class Clock:
    """Adds to an epoch what training took and sent since it was read last, pauses left out."""

    def __init__(self, so_far: RunningEpoch, step: TrainingStep, freezer: Freezer) -> None:
        self.so_far, self.step, self.freezer = so_far, step, freezer
        self.sent, self.kept = step.bytes_sent, freezer.bookkeeping_seconds
        self.start()

    def start(self) -> None:
        """Begin to count; what has passed since the last ``read`` is left out."""
        self.started = time.perf_counter()

    def read(self) -> None:
        """Add what has passed, and go on counting."""
        now, sent, kept = time.perf_counter(), self.step.bytes_sent, self.freezer.bookkeeping_seconds
        self.so_far.train_seconds += now - self.started
        self.so_far.bytes_sent += sent - self.sent
        self.so_far.bookkeeping_seconds += kept - self.kept
        self.started, self.sent, self.kept = now, sent, kept
