"""Where the runs of a sweep stand, from their files as these grow; only whole rows count, damage shows as a dash."""

from __future__ import annotations

import csv
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from neq_cli.errors import RunDirectoryError
from neq_cli.runs.store.paths import RunFiles
from neq_cli.runs.store.run import KNOWN_METRICS
from neq_cli.runs.store.untrusted import open_regular, parse_number, read_json
from neq_cli.text import printable

PENDING, RUNNING, FINISHED, FAILED, STOPPED = "pending", "running", "finished", "failed", "stopped"
ENDED = (FINISHED, FAILED, STOPPED)
_BLOCK = 2**18  # bytes read at a time
_LARGEST = 2**29
_EPOCHS_REMEMBERED = 10
_PASSED = "passed_epochs"


class SweptRun:
    """One run of a sweep: who it is, how it stands, and what the last whole row of its metrics.csv says.

    Epochs are passes over the training data, also of a run that has a row for every so many steps. Times are seconds of
    the caller's clock.
    """

    def __init__(self, name: str, labels: Sequence[str], path: Path, epochs: int) -> None:
        self.name = name
        self.labels = tuple(labels)
        self.path = path
        self.epochs = epochs  # planned
        self.state = PENDING
        self.reason = ""  # why it failed
        self.began = math.nan  # in this call; NaN where it was not trained in it
        self.ended = math.nan
        self.epochs_before = 0.0  # trained by earlier calls
        self.epochs_done = 0
        self.part_done = 0.0  # of the epoch after them, where rows tell it
        self.metric = ""  # the column of score, once known
        self.score = math.nan
        self.frozen_share = math.nan
        self._seconds: deque[float] = deque(maxlen=_EPOCHS_REMEMBERED)
        self._epoch_began = math.nan
        self._first_ended = self._first_seconds = math.nan  # of the first epoch of this call
        self._columns: list[str] = []
        self._rows = 0
        self._offset = 0
        self._broken = False

    def start(self, now: float) -> None:
        """Take note that its process has started."""
        self.look(now)
        self.state, self.began, self._epoch_began = RUNNING, now, now
        self.epochs_before = self.passed_epochs

    def end(self, state: str, reason: str, now: float) -> None:
        """Take note of how its process ended."""
        self.look(now)
        self.state, self.reason, self.ended = state, reason, now

    def look(self, now: float) -> None:
        """Read what has been added to metrics.csv since the last look."""
        if self._broken:
            return
        try:
            if not self._read(now):
                # Cut back and grown again since the last look: from the top, where it must be in order.
                self._forget()
                self._broken = not self._read(now)
        except (OSError, RunDirectoryError):
            self._broken = True  # `neq compare` and `neq inspect` say what is wrong with it

    def _read(self, now: float) -> bool:
        """Take in whole rows up to the end; False at what is not the row that comes next."""
        path = RunFiles(self.path).metrics
        if not path.exists():
            return True
        with open_regular(path, _LARGEST) as file:
            if file.seek(0, 2) < self._offset:
                self._forget()  # the run was taken back to its checkpoint
            while True:
                file.seek(self._offset)
                block = file.read(_BLOCK)
                whole = block[: block.rfind(b"\n") + 1]
                if not whole:
                    return len(block) < _BLOCK
                try:
                    for cells in csv.reader(whole.decode(errors="replace").split("\n")[:-1], strict=True):
                        self._take(path, cells, now)
                except (RunDirectoryError, LookupError, ValueError, csv.Error):
                    return False
                self._offset += len(whole)

    def _forget(self) -> None:
        self._columns, self._rows, self._offset, self.epochs_done, self.part_done = [], 0, 0, 0, 0.0
        self._seconds.clear()

    def _take(self, path: Path, cells: list[str], now: float) -> None:
        """Take in a row. ValueError, LookupError or RunDirectoryError where it is not the one that comes next."""
        if not self._columns:
            self._columns, self.metric = cells, _metric(self.path, cells)
            return
        row = dict(zip(self._columns, cells, strict=True))
        if row["epoch"] != str(self._rows + 1):
            raise ValueError(f"epoch {row['epoch']} after epoch {self._rows}")
        number = {key: float(parse_number(path, 0, key, row[key])) for key in self._needed()}
        passed = number.get(_PASSED, self.passed_epochs + 1)
        part = passed - self.passed_epochs
        if not 0 < part < math.inf:
            raise ValueError(f"{passed} epochs passed after {self.passed_epochs}")
        self._rows, self.epochs_done = self._rows + 1, int(passed)
        self.part_done = passed - self.epochs_done
        self._epoch_began = now
        self._seconds.append(number["epoch_seconds"] / part)
        if self.state == RUNNING and math.isnan(self._first_ended):
            self._first_ended, self._first_seconds = now, number["epoch_seconds"]
        if number["neurons"]:
            self.frozen_share = number["frozen"] / number["neurons"]
        score = number.get(self.metric, math.nan)
        self.score = score if math.isfinite(score) else self.score

    def _needed(self) -> tuple[str, ...]:
        passed = [_PASSED] if _PASSED in self._columns else []
        return ("epoch_seconds", "neurons", "frozen", *passed, *([self.metric] if self.metric else []))

    @property
    def passed_epochs(self) -> float:
        """Epochs that are trained, with the part of the last one."""
        return self.epochs_done + self.part_done

    @property
    def epochs_left(self) -> float:
        """Epochs that this sweep has yet to train; none of a run that has ended, however it did."""
        return 0 if self.state in ENDED else max(self.epochs - self.passed_epochs, 0)

    def seconds_left(self, now: float) -> float:
        """Seconds until it ends at its pace of late, NaN while that is not known."""
        usual = self.epoch_seconds
        if math.isnan(usual):
            return math.nan
        into = now - self._epoch_began if self.state == RUNNING else 0.0
        return max(self.epochs_left * usual - min(max(into, 0.0), usual), 0.0)

    @property
    def epoch_seconds(self) -> float:
        """What an epoch took in the mean, of late; NaN where not known."""
        return _mean(self._seconds)

    @property
    def starting_seconds(self) -> float:
        """What passed from the start of its process to that of its first epoch; NaN where not known."""
        return max(self._first_ended - self.began - self._first_seconds, 0.0)


def _mean(values: Iterable[float]) -> float:
    """Return the mean of what is known, NaN where nothing is."""
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


def _metric(run: Path, columns: Sequence[str]) -> str:
    """Return the column that says how good the model is, an empty text where none is known."""
    try:
        named = read_json(RunFiles(run).environment).get("metric")
    except RunDirectoryError:
        named = None
    # As ``Run.metric`` has it.
    return next((column for column in (named, *KNOWN_METRICS) if isinstance(column, str) and column in columns), "")


@dataclass
class SweepState:
    """A whole sweep, ready to be shown."""

    title: str  # the recipe's name
    folder: Path
    keys: tuple[str, ...]  # what the labels of a run are values of
    jobs: int  # processes at once, at most
    runs: Sequence[SweptRun]
    began: float
    ended: float | None = None
    message: str = ""
    _skipped: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        self._skipped = frozenset(run.name for run in self.runs if run.state == FINISHED)

    def count(self, *states: str) -> int:
        return sum(run.state in states for run in self.runs)

    @property
    def skipped(self) -> int:
        """Runs that were finished before this sweep began."""
        return len(self._skipped)

    @property
    def share(self) -> float:
        """The share of all epochs that is trained."""
        planned = sum(run.epochs for run in self.runs)
        return sum(min(run.passed_epochs, run.epochs) for run in self.runs) / planned if planned else 1.0

    def seconds_left(self, now: float) -> float:
        """Seconds until all runs have ended, at the pace of those that are trained; NaN while there is none."""
        start = _mean([run.starting_seconds for run in self.runs])
        epoch = _mean([run.epoch_seconds for run in self.runs])
        left = []
        for run in self.runs:
            if run.epochs_left:
                own = run.seconds_left(now) if run.state == RUNNING else math.nan
                left.append(own if math.isfinite(own) else start + run.epochs_left * epoch)
        if not left:
            return 0.0
        # As long as work is shared out well; never less than the longest run.
        return max(sum(left) / max(min(self.jobs, len(left)), 1), max(left))


def failure_reason(run: Path, process: int) -> str:
    """Return what status.json gives as the reason, an empty text unless ``process`` wrote that it failed."""
    try:
        status = read_json(RunFiles(run).status)
    except RunDirectoryError:
        return ""
    if status.get("pid") != process or status.get("state") != FAILED:
        return ""
    return printable(status.get("reason") or "", 500)


def is_finished(run: Path) -> bool:
    """Return whether status.json says that the run is finished. RunDirectoryError where it is damaged."""
    status = RunFiles(run).status
    return status.exists() and read_json(status).get("state") == FINISHED
