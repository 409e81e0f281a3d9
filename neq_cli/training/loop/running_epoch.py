"""An epoch that is half trained: what it has come to in this process, before and after interruptions; its clock."""

from __future__ import annotations

import time
from dataclasses import dataclass

from torch import Tensor

from neq_cli.freezing import Freezer
from neq_cli.training.loop.step import TrainingStep

PLAIN = ("epoch", "steps", "images", "train_seconds", "seconds", "bookkeeping_seconds", "bytes_sent")
"""The fields that are plain numbers, the same in all processes."""


@dataclass
class RunningEpoch:
    """What a half-trained epoch has come to, in this process and, where an epoch was interrupted, before it."""

    epoch: int
    totals: Tensor  # the task's, of this process
    steps: int = 0
    images: int = 0  # over all processes
    train_seconds: float = 0.0
    seconds: float = 0.0
    bookkeeping_seconds: float = 0.0
    bytes_sent: int = 0


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
