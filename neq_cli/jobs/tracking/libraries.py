"""The trackers' libraries, which neq does without until a run names one: imported there, or refused in one line."""

from __future__ import annotations

import importlib
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from neq_cli.errors import did_you_mean, one_line
from neq_cli.recipe import Problem, Recipe

_NEEDED = {
    "tensorboard": ("torch.utils.tensorboard", "tensorboard"),
    "wandb": ("wandb",),
    # A store in the run directory is SQLite, which mlflow-skinny does not bring the libraries of.
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
    "trackio": ("trackio",),
}
_OLDEST = {"wandb": "0.31"}
"""Before it, W&B kept all of a run offline in memory that a kill takes away."""
_QUIET = {
    # Whom a run is told to is the user's choice: no library reports of its use beside that.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
    # A server that is gone is given up after half a minute, not after a quarter of an hour in which nothing trains.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}


def imported(tracker: str) -> Any:
    """Return the library of a tracker; for TensorBoard, torch's writer. ImportError where it is missing or broken."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    with warnings.catch_warnings():  # its own affairs, such as what it calls deprecated
        warnings.simplefilter("ignore")
        library, *_ = [importlib.import_module(module) for module in _NEEDED[tracker]]
    found, oldest = str(getattr(library, "__version__", "")), _OLDEST.get(tracker, "")
    if _numbers(found) < _numbers(oldest):
        raise ImportError(f"it is version {found}, and {oldest} or newer is needed")
    return library


def missing(tracker: str) -> str | None:
    """Return why a tracker cannot be used here, with the mend; None where it can."""
    try:
        imported(tracker)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in {module.partition(".")[0] for module in _NEEDED[tracker]}:
            return f"'{tracker}' needs {error.name}; pip install 'neq[{tracker}]'"
        return _broken(tracker, error)
    except Exception as error:  # a version that this Python is too new or too old for
        return _broken(tracker, error)
    return None


def trackers_problem(trackers: Sequence[str]) -> str | None:
    """Return what is wrong with names of trackers that nobody has checked yet, or with their libraries; else None."""
    if isinstance(trackers, str):
        return f"{trackers!r} is not a list; write [{trackers!r}]"
    for tracker in trackers:
        if tracker not in _NEEDED:
            return f"{tracker!r} is no tracker{did_you_mean(str(tracker), _NEEDED) or '; known: ' + ', '.join(_NEEDED)}"
    return next((problem for problem in map(missing, trackers) if problem is not None), None)


def check_track(name: str, section: Any) -> Iterable[Problem]:
    """Yield a problem for each tracker of a recipe (``name`` "") whose library is not there."""
    if isinstance(section, Recipe):
        yield from _problems(section.track)


def _problems(trackers: Iterable[str]) -> Iterator[Problem]:
    for tracker in dict.fromkeys(trackers):
        if (problem := missing(tracker)) is not None:
            yield Problem("track", problem)


def _numbers(version: str) -> list[int]:
    """Return the numbers that a version begins with: [0, 31] for "0.31.1rc1"."""
    return [int(number) for number in re.findall(r"\d+", version)[:2]]


def _broken(tracker: str, error: Exception) -> str:
    mend = f"pip install --upgrade 'neq[{tracker}]'"
    return f"'{tracker}' needs {' and '.join(_NEEDED[tracker])}, which cannot be used ({one_line(error)}); {mend}"
