"""Runs told to trackers beside their run directory: TensorBoard, W&B, MLflow, trackio; weights are never uploaded.

The run directory stays what a run is. A tracker is told of it: once how it begins (``TrackedRun``), each finished epoch
(``EpochNumbers``), and how it ended (``Ended``). What one has missed is told later, out of the run directory. One that
fails costs a line and never the training: ``teller.py``, the only one that knows all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from neq_cli.jobs.tracking.numbers import EpochNumbers


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told when a run begins or goes on."""

    path: Path  # the run directory
    folder: Path  # of this tracker in it, for what it keeps there; not made yet
    project: str  # runs of a recipe lie together: its name, in letters that are good for file names
    metric: str  # the column that tells how good the model is
    recipe: Mapping[str, Any]  # plain values, every default written out
    recipe_yaml: str
    notes: tuple[str, ...]
    epoch: int  # finished epochs that it goes on after; later ones were taken back
    identity: str  # the run's at this tracker: made up, or what was kept where it ``is_known``
    is_known: bool  # the tracker has been told of this run before
    told: int  # the last epoch that it was told
    say: Callable[[str], None]  # takes a line that the user should see, which is noted in the run directory too

    @property
    def name(self) -> str:
        """What people call the run: the name of its directory."""
        return self.path.resolve().name


@dataclass(frozen=True)
class Ended:
    """How a run ended, as status.json says it, and what can be shown of it then."""

    state: str  # "finished", "interrupted" or "failed"
    reason: str
    epoch: int  # the last finished one
    pictures: Mapping[str, bytes]  # PNG files by name; those of a report, of a finished run alone


class Tracker(Protocol):
    """One tracker and one run of it. Any exception of its own means that it fails, and is told no more."""

    identity: str
    """Under which it finds the run again; kept in the run directory once ``begin`` has returned."""

    def begin(self, run: TrackedRun) -> int:
        """Begin the run, or go on with it, and return up to which epoch it has rows that stay.

        Those after that are told next, also where they were finished before.
        """

    def epoch(self, numbers: EpochNumbers) -> None:
        """Take in a finished epoch; once it returns, killing the process loses at most what the class says."""

    def end(self, ended: Ended) -> None:
        """Close the run."""
