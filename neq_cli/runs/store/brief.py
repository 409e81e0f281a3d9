"""A run in a line: its status, how far it is, its score and when it began; reads the files for that and no others.

recipe.yaml is read only where environment.json does not tell how long a run is to be: parsing it takes most of the time
that a list of thousands of runs would.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from neq_cli.errors import RunDirectoryError
from neq_cli.events import EPOCH, OBSERVATION
from neq_cli.runs.store.folders import listed, runs_of_folder
from neq_cli.runs.store.paths import RunFiles
from neq_cli.runs.store.run import KNOWN_METRICS, RunStatus, read_status
from neq_cli.runs.store.status import parse_time
from neq_cli.runs.store.tables import read_columns
from neq_cli.runs.store.untrusted import Number, read_json, read_yaml
from neq_cli.text import counted, printable

DAMAGED = "damaged"


@dataclass(frozen=True)
class Brief:
    """A run in short. ``status`` has the state DAMAGED, and the reason, where its files cannot be read."""

    path: Path
    status: RunStatus
    began: datetime  # of a run that does not tell, when its folder was last changed
    recipe: str = ""
    epochs: int = 0  # finished ones, or observations, as ``unit`` says
    planned: int | None = None
    unit: str = EPOCH
    metric: str | None = None
    last: Number = math.nan  # the last score that was measured
    best: Number = math.nan

    @property
    def order(self) -> tuple[float, int, str]:
        """Of two runs that of the later one is the larger."""
        return _order(self.path, self.began)


def read_brief(path: Path) -> Brief:
    """Return the run at ``path`` in short; what is wrong with it stands in its status."""
    files = RunFiles(path)
    began = _began(files)
    try:
        return _read(files, began)
    except (RunDirectoryError, OSError) as error:
        return Brief(path, RunStatus(DAMAGED, printable(error)), began)


def newest(path: Path) -> tuple[Path, str]:
    """Return ``path``, or of a folder of runs the one begun last that has a finished epoch, and a line that says so.

    The line is empty where ``path`` is no folder of runs. RunDirectoryError where no run in it has a finished epoch.
    """
    runs = runs_of_folder(path)
    if not runs:
        return path, ""
    passed: list[Path] = []
    for run in _newest_first(runs):
        if _is_readable(run):
            later = f"; without a finished epoch, or damaged, and newer: {listed(passed)}" if passed else ""
            return run, f"{printable(path)}: {printable(run)} is the newest of {counted(len(runs), 'run')} in it{later}"
        passed.append(run)
    brief = read_brief(passed[0])
    what = f"none of the {counted(len(runs), 'run')} in it has a finished epoch"
    raise RunDirectoryError(f"{printable(path)}: {what}; the newest is {printable(brief.path)} ({brief.status})")


def _newest_first(runs: Iterable[Path]) -> list[Path]:
    return sorted(runs, key=lambda run: _order(run, _began(RunFiles(run))), reverse=True)


def _order(path: Path, began: datetime) -> tuple[float, int, str]:
    # Two that began in the same second are called ...-s1 and ...-s1-2, ..., ...-s1-10.
    return began.timestamp(), len(path.name), str(path)


def _is_readable(run: Path) -> bool:
    brief = read_brief(run)
    return brief.status.state != DAMAGED and brief.epochs > 0


def _began(files: RunFiles) -> datetime:
    try:
        told = parse_time(read_json(files.status).get("started"))
    except RunDirectoryError:
        told = None
    if told is not None:
        return told
    try:
        return datetime.fromtimestamp(files.root.stat().st_mtime, tz=timezone.utc)
    except OSError:
        return datetime.fromtimestamp(0, tz=timezone.utc)


def _read(files: RunFiles, began: datetime) -> Brief:
    status = read_status(files.status)  # before the metrics, so that a run told as finished is read whole
    if files.metrics.exists() and not files.recipe.exists():  # else it was killed as it began
        raise RunDirectoryError(f"{printable(files.recipe)}: missing; the run directory is incomplete, copy it again")
    environment = read_json(files.environment) if files.environment.exists() else {}
    named = environment.get("metric")
    metrics = [*([named] if isinstance(named, str) else []), *KNOWN_METRICS]
    columns = read_columns(files.metrics, metrics) if files.metrics.exists() else {}
    metric = next((name for name in metrics if name in columns), None)
    measured = [score for score in columns[metric] if not math.isnan(score)] if metric is not None else []
    best = min if environment.get("metric_better") == "lower" else max
    name = environment.get("recipe_name")
    return Brief(
        path=files.root,
        status=status,
        began=began,
        recipe=printable(name if isinstance(name, str) and name else files.root.resolve().parent.name),
        epochs=len(columns.get("epoch", ())),
        planned=_planned(environment, files),
        unit=OBSERVATION if environment.get("unit") == OBSERVATION else EPOCH,
        metric=None if metric is None else printable(metric),
        last=measured[-1] if measured else math.nan,
        best=best(measured) if measured else math.nan,
    )


def _planned(environment: Mapping[str, Any], files: RunFiles) -> int | None:
    told = environment.get("rows_planned")
    if told is None and files.recipe.exists():
        told = read_yaml(files.recipe).get("epochs")
    return told if isinstance(told, int) and not isinstance(told, bool) and told > 0 else None
