"""The run directory as it is written, and the only place that knows its file names; reading is in run_reader.py."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from neq_cli.errors import RunDirectoryError
from neq_cli.records import EpochRecord, RunStarted
from neq_cli.runs.disk import atomic_write as atomic_write
from neq_cli.runs.disk import writing as writing
from neq_cli.runs.formatting import printable
from neq_cli.runs.serialisation import LAYER_COLUMNS, cell, layer_row, neurons_file

STATES = ("running", "finished", "interrupted", "failed")
CHECKPOINTS = ("last", "previous", "best")


@dataclass(frozen=True)
class RunFiles:
    """Where everything lies in the run directory ``root``."""

    root: Path

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def environment(self) -> Path:
        return self.root / "environment.json"

    @property
    def status(self) -> Path:
        return self.root / "status.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.csv"

    @property
    def layers(self) -> Path:
        return self.root / "layers.csv"

    @property
    def dispatch(self) -> Path:
        """Which kernel computes which gradients."""
        return self.root / "dispatch.json"

    @property
    def weights(self) -> Path:
        """The final plain state_dict."""
        return self.root / "weights.safetensors"

    @property
    def neurons_folder(self) -> Path:
        return self.root / "neurons"

    @property
    def checkpoints_folder(self) -> Path:
        return self.root / "checkpoints"

    def neurons(self, epoch: int) -> Path:
        return self.neurons_folder / f"epoch_{epoch:04d}.safetensors"

    def checkpoint(self, name: str) -> Path:
        """``name`` is one of ``CHECKPOINTS``."""
        if name not in CHECKPOINTS:
            raise ValueError(f"checkpoint {name!r}: not one of {', '.join(CHECKPOINTS)}")
        return self.checkpoints_folder / f"{name}.safetensors"


def default_run_directory(recipe_name: str, seed: int, now: datetime) -> Path:
    """Return ``runs/<recipe-name>/<YYYYmmdd-HHMMSS>-s<seed>``, with ``-2``, ``-3``... added where that is taken."""
    folder = Path("runs") / (re.sub(r"[^\w.+-]+", "-", recipe_name).strip(".-") or "recipe")
    stem = f"{now:%Y%m%d-%H%M%S}-s{seed}"
    path, count = folder / stem, 1
    while path.exists():
        count += 1
        path = folder / f"{stem}-{count}"
    return path


def check_available(path: Path) -> None:
    """Raise RunDirectoryError where ``path`` cannot become a run directory, before anything slow is begun."""
    try:
        if path.is_symlink() and not path.exists():
            raise RunDirectoryError(f"{printable(path)}: a link that leads nowhere; choose another with -o")
        if not path.exists():
            return
        if not path.is_dir():
            raise RunDirectoryError(f"{printable(path)}: a file, not a folder; choose another with -o")
        if any(path.iterdir()):
            raise RunDirectoryError(f"{printable(path)}: already exists and is not empty; choose another with -o")
    except OSError as error:
        raise _cannot_be_made(path, error) from error


class RunWriter:
    """Streams a run into its directory so that a kill at any moment leaves files that can be read.

    An epoch counts as present once its row of metrics.csv is complete; that row is written last. Floats are written
    as ``repr``, so that they round-trip; NaN, which also stands for what was not measured in that epoch, as an empty
    cell. Failures of the disk raise TrainingError, one line.
    """

    def __init__(self, path: Path, environment: Mapping[str, Any], status: Mapping[str, Any]) -> None:
        """Use ``RunWriter.create``; this neither looks at the disk nor writes to it."""
        self.files = RunFiles(path)
        self._environment = dict(environment)
        self._status = dict(status)
        self._columns: tuple[str, ...] = ()
        self._epoch = 0

    @classmethod
    def create(cls, path: Path, recipe_yaml: str, environment: Mapping[str, Any]) -> RunWriter:
        """Make the directory ``path`` (missing or empty until now) with recipe, environment and status.

        ``environment`` is anything JSON can hold. Keys that readers know: those of ``write_started``, and ``data``, a
        mapping that tells the data's content, such as its numbers of images; runs where it differs are not compared.
        Raises RunDirectoryError where the directory is taken or cannot be made.
        """
        check_available(path)
        status = {
            "state": "running",
            "reason": None,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": _now(),
            "ended": None,
        }
        writer = cls(path, environment, status)
        try:
            path.mkdir(parents=True, exist_ok=True)
            # Exclusive, so that of two processes that found the folder empty only one goes on.
            writer.files.neurons_folder.mkdir()
            writer.files.checkpoints_folder.mkdir()
            atomic_write(writer.files.environment, _json(writer._environment))
            atomic_write(writer.files.recipe, recipe_yaml.encode())
            atomic_write(writer.files.status, _json(writer._status))
        except OSError as error:
            raise _cannot_be_made(path, error) from error
        return writer

    def write_source(self, name: str, content: bytes) -> None:
        """Keep a Python file that the recipe's entrypoints name beside the recipe, so that it can be trained again."""
        path = self.files.root / Path(name).name
        with writing(path):
            atomic_write(path, content)

    def write_dispatch(self, dispatch: Mapping[str, Any]) -> None:
        """Replace the table of kernel choices, anything JSON can hold."""
        with writing(self.files.dispatch):
            atomic_write(self.files.dispatch, _json(dispatch))

    @property
    def path(self) -> Path:
        return self.files.root

    @property
    def weights_path(self) -> Path:
        return self.files.weights

    def checkpoint_path(self, name: str) -> Path:
        return self.files.checkpoint(name)

    def write_started(self, record: RunStarted) -> None:
        """Add to environment.json what the run says of itself: its name, policy, device, metric and notes."""
        self._environment.update(
            recipe_name=record.recipe_name,
            description=record.description,
            policy=record.policy,
            device=record.device,
            metric=record.metric,
            notes=[*self._environment.get("notes", ()), *record.notes],
        )
        with writing(self.files.environment):
            atomic_write(self.files.environment, _json(self._environment))

    def write_epoch(self, record: EpochRecord) -> None:
        """Add a finished epoch. ValueError unless epochs come in order from 1 and keep the first one's columns."""
        metrics = {"epoch": record.epoch, **record.metrics}
        columns = self._columns or tuple(metrics)
        if record.epoch != self._epoch + 1 or metrics["epoch"] != record.epoch:
            raise ValueError(f"epoch {record.epoch} ({metrics['epoch']} in its metrics) after epoch {self._epoch}")
        if set(metrics) != set(columns):
            raise ValueError(f"epoch {record.epoch}: columns {sorted(set(metrics) ^ set(columns))} come or go")
        policy = str(self._environment.get("policy", ""))
        with writing(self.files.neurons(record.epoch)):
            atomic_write(self.files.neurons(record.epoch), neurons_file(record, policy))
        with writing(self.files.layers):
            rows = [layer_row(record.epoch, layer) for layer in record.layers]
            _append(self.files.layers, rows if self._columns else [LAYER_COLUMNS, *rows])
        with writing(self.files.metrics):
            row = [cell(metrics[column]) for column in columns]
            _append(self.files.metrics, [row] if self._columns else [columns, row])
        self._columns, self._epoch = columns, record.epoch

    def finish(self) -> None:
        """Mark the run finished."""
        self._end("finished", None)

    def interrupted(self, reason: str) -> None:
        """Mark the run interrupted, by a signal or a person."""
        self._end("interrupted", reason)

    def failed(self, reason: str) -> None:
        """Mark the run failed. On a full disk this raises TrainingError too: show the first error, not this one."""
        self._end("failed", reason)

    def _end(self, state: str, reason: str | None) -> None:
        self._status.update(state=state, reason=reason, ended=_now())
        with writing(self.files.status):
            atomic_write(self.files.status, _json(self._status))


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, default=str) + "\n").encode()


def _cannot_be_made(path: Path, error: OSError) -> RunDirectoryError:
    if isinstance(error, FileExistsError):
        return RunDirectoryError(f"{printable(path)}: taken by another run, or a file; choose another with -o")
    reason = printable(error.strerror or str(error))
    return RunDirectoryError(f"{printable(path)}: cannot be made: {reason}; choose another with -o")


def _append(path: Path, rows: Sequence[Sequence[str]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    with path.open("ab") as file:
        file.write(text.getvalue().encode())
        file.flush()
        os.fsync(file.fileno())
