"""How long the epoch and the run will still take, from finished epochs and the current one's speed."""

from __future__ import annotations

import math
from collections import deque

from neq_cli.events import StepProgress
from neq_cli.text import MISSING

EPOCHS_REMEMBERED = 10  # covers slow first epochs soon, and the usual eval_every


class Pace:
    """Times are seconds of one clock, the caller's."""

    def __init__(self, now: float) -> None:
        self.epoch_began = now
        self.usual: deque[float] = deque(maxlen=EPOCHS_REMEMBERED)
        self._train_share = 1.0  # of an epoch's seconds, test and probe take the rest
        self._begin(now)

    def _begin(self, now: float) -> None:
        self.epoch_began = now
        self._phase = "train"
        self._phase_began = now
        self._train_seconds = math.nan
        self._projected = math.nan  # what the whole epoch takes at the current speed
        self._confidence = 0.0

    def step(self, progress: StepProgress, now: float) -> None:
        """Take in where the epoch stands."""
        if progress.phase != self._phase:
            if self._phase == "train":
                self._train_seconds = now - self.epoch_began
            self._phase, self._phase_began = progress.phase, now
        if progress.step < 1 or progress.steps < 1:
            return
        done = min(1.0, progress.step / progress.steps)
        phase_left = (now - self._phase_began) * (1 / done - 1)
        if progress.phase == "train":
            self._projected = (now - self.epoch_began + phase_left) / self._train_share
            self._confidence = done
        elif not self.usual:
            self._projected = now - self.epoch_began + phase_left

    def end_epoch(self, seconds: float, now: float) -> None:
        """Take in a finished epoch; ``seconds`` include test and probe."""
        if math.isfinite(seconds) and seconds > 0:
            self.usual.append(seconds)
            if self._train_seconds > 0:
                # Both by this clock: records may be replayed faster than they were made.
                self._train_share = self._train_seconds / (now - self.epoch_began)
        self._begin(now)

    def epoch_total(self) -> float:
        """Seconds of the current epoch, NaN while nothing is known; the further it is, the more its speed counts."""
        if not self.usual:
            return self._projected
        usual = sum(self.usual) / len(self.usual)
        if math.isnan(self._projected):
            return usual
        return usual + (self._projected - usual) * self._confidence

    def epoch_left(self, now: float) -> float:
        """Seconds until the current epoch ends, NaN while nothing is known."""
        left = self.epoch_total() - (now - self.epoch_began)
        return 0.0 if left < 0 else left  # NaN stays NaN

    def run_left(self, now: float, epochs_after: int) -> float:
        """Seconds until the run ends, with ``epochs_after`` the current epoch."""
        return self.epoch_left(now) + max(epochs_after, 0) * self.epoch_total()


def clock(seconds: float) -> str:
    """``0:07``, ``12:05``, ``1:23:45``, ``3 d 04:12``: short, and steady while it counts down."""
    if not math.isfinite(seconds):
        return MISSING
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours >= 48:
        return f"{hours // 24} d {hours % 24:02d}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
