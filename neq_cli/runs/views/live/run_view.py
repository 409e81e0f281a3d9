"""What the events of a run have said so far, ready to be shown, and how long it will still take."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from neq_cli.events import Compiling, EpochRecord, LayerState, Preparing, RunResumed, RunStarted, StepProgress
from neq_cli.text import MISSING, printable

# |velocity| is at most about 4, and float32 phi next to 1 resolves 6e-8.
VELOCITY_DECADES = (-7, 0)
BINS_PER_DECADE = 32


@dataclass(frozen=True)
class LayerCounts:
    """One layer, or several together; ``frozen`` is the set chosen for the coming epoch."""

    name: str
    neurons: int
    frozen: int
    observed: int  # neurons whose velocity is known
    velocity_sum: float  # of |velocity| over those

    @property
    def velocity(self) -> float:
        """Mean |velocity|, NaN where none is known."""
        return self.velocity_sum / self.observed if self.observed else math.nan


class RunView:
    """Follows a run by its records; ``now`` is the caller's clock in seconds."""

    def __init__(self, started: RunStarted, now: float) -> None:
        self.started = started
        self.position: StepProgress | None = None  # of the running epoch
        self.columns: dict[str, list[float]] = {}  # metrics.csv so far
        self.layers = tuple(LayerCounts(printable(name), n, 0, 0, 0.0) for name, n in started.layers.items())
        self.frozen_known = True  # false in a resumed run whose files cannot be read, until its first epoch ends
        self.froze = 0
        self.thawed = 0
        self.epsilon = started.epsilon
        self.velocity_bins = velocity_bins(np.zeros(0, dtype=np.float32))
        self.below_epsilon = math.nan  # share of observed neurons
        self.compiling: Compiling | None = None  # what steps wait for
        self.message = ""  # the latest
        self.preparing: Preparing | None = None  # since the last step
        self.began = now
        self.ended: float | None = None  # when the last frame was due
        self.completed = False  # nothing is left to train, though epochs may be
        self.pace = Pace(now)

    def show(self, record: RunResumed | Preparing | StepProgress | EpochRecord | Compiling, now: float) -> None:
        """Take in the next record."""
        if isinstance(record, Compiling):
            self.compiling = None if record.ended else record
            return
        self.preparing = record if isinstance(record, Preparing) else None
        if isinstance(record, Preparing):
            return
        if isinstance(record, StepProgress):
            self.position = record
            self.pace.step(record, now)
        elif isinstance(record, RunResumed):
            for epoch in record.epochs:
                self._take_columns(epoch)
            self._take_layers(record.epochs[-1])
        else:
            self._take_columns(record)
            self._take_layers(record)
            self.position = None
            self.pace.end_epoch(self.last("epoch_seconds"), now)

    def _take_columns(self, record: EpochRecord) -> None:
        for key, value in record.metrics.items():
            self.columns.setdefault(key, []).append(float(value))

    def _take_layers(self, record: EpochRecord) -> None:
        self.frozen_known = bool(record.layers)
        if not record.layers:
            return
        velocities = [observed_velocity(layer) for layer in record.layers]
        self.layers = tuple(map(_counts, record.layers, velocities))
        self.froze = sum(int((layer.trained & ~layer.trainable).sum()) for layer in record.layers)
        self.thawed = sum(int((~layer.trained & layer.trainable).sum()) for layer in record.layers)
        everything = np.concatenate(velocities) if velocities else np.zeros(0, dtype=np.float32)
        self.velocity_bins = velocity_bins(everything)
        if self.epsilon is not None and len(everything):
            self.below_epsilon = float((everything < self.epsilon).mean())

    @property
    def epochs_done(self) -> int:
        """Number of the last finished epoch, 0 before the first."""
        epochs = self.columns.get("epoch")
        return int(epochs[-1]) if epochs else 0

    @property
    def epoch(self) -> int:
        """The epoch that runs, or comes next."""
        return self.position.epoch if self.position else self.epochs_done + 1

    @property
    def finished(self) -> bool:
        """Whether the last epoch is over, or the run came to its end before."""
        return self.completed or self.epochs_done >= self.started.epochs

    @property
    def total(self) -> LayerCounts:
        """All layers together."""
        return together("", self.layers)

    def last(self, column: str) -> float:
        """The latest value of a column of metrics.csv, NaN where there is none."""
        values = self.columns.get(column)
        return values[-1] if values else math.nan

    def best(self, column: str, *, lowest: bool = False) -> tuple[float, int]:
        """The best value of a column and its epoch; NaN and 0 where nothing was measured."""
        pairs = zip(self.columns.get(column, ()), self.columns.get("epoch", ()), strict=False)
        known = [(value, int(epoch)) for value, epoch in pairs if math.isfinite(value)]
        if not known:
            return math.nan, 0
        # The earliest of equals, as a checkpoint called best would be.
        return min(known, key=lambda pair: pair[0] if lowest else -pair[0])


def together(name: str, layers: tuple[LayerCounts, ...]) -> LayerCounts:
    """Several layers as one, under ``name``."""
    return LayerCounts(
        name,
        sum(layer.neurons for layer in layers),
        sum(layer.frozen for layer in layers),
        sum(layer.observed for layer in layers),
        sum(layer.velocity_sum for layer in layers),
    )


def observed_velocity(layer: LayerState) -> NDArray[np.float32]:
    """|velocity| of the neurons that have one: a layer the probe does not reach has a phi of NaN."""
    return np.abs(layer.velocity[np.isfinite(layer.phi) & np.isfinite(layer.velocity)])


def _counts(layer: LayerState, velocity: NDArray[np.float32]) -> LayerCounts:
    frozen = int((~layer.trainable).sum())
    return LayerCounts(
        printable(layer.name), layer.neurons, frozen, len(velocity), float(velocity.sum(dtype=np.float64))
    )


def velocity_bins(velocity: NDArray[np.float32]) -> NDArray[np.int64]:
    """Count |velocity| in logarithmic bins; what lies outside the decades shown counts in the nearest bin."""
    low, high = VELOCITY_DECADES
    bins = (high - low) * BINS_PER_DECADE
    exponents = np.log10(np.maximum(velocity, 10.0**low))
    indices = np.clip(((exponents - low) * BINS_PER_DECADE).astype(np.int64), 0, bins - 1)
    return np.bincount(indices, minlength=bins).astype(np.int64)


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
