"""The run directory as it is written, begun or gone on with; reading is in run.py, names in paths.py."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from neq_cli.events import EpochRecord, RunStarted
from neq_cli.runs.store.disk import PARTIAL, atomic_write, check_own, check_writable, sync_folder, writing
from neq_cli.runs.store.epochs import EpochFiles
from neq_cli.runs.store.lock import Lock, acquire
from neq_cli.runs.store.paths import (
    RunFiles,
    cannot_be_made,
    check_available,
    check_resumable,
)
from neq_cli.runs.store.status import resumed_environment, resumed_status
from neq_cli.runs.store.untrusted import read_json

ELSEWHERE = "make it writable, or go on with a copy of it, by -o"


class RunWriter:
    """Streams a run into its directory so that a kill at any moment leaves files that can be read and gone on with.

    One process at a time has it, until ``close``, or until the process ends. An epoch counts as present once its row
    of metrics.csv is complete; that row is written last. Floats are written as ``repr``, so that they round-trip; NaN,
    which also stands for what was not measured in that epoch, as an empty cell. Failures of the disk raise
    TrainingError, one line.
    """

    def __init__(self, path: Path, lock: Lock) -> None:
        """Use ``RunWriter.create`` or ``RunWriter.reopen``."""
        self.files = RunFiles(path)
        self._lock = lock
        self._environment: dict[str, Any] = {}
        self._status: dict[str, Any] = {}
        self._epochs = EpochFiles(self.files)

    @classmethod
    def create(cls, path: Path, recipe_yaml: str, environment: Mapping[str, Any]) -> RunWriter:
        """Make the directory ``path`` (missing or empty until now) with recipe, environment and status.

        ``environment`` is anything JSON can hold. Keys that readers know: those of ``write_started``, and ``data``, a
        mapping that tells the data's content, such as its numbers of images; runs where it differs are not compared.
        Raises RunDirectoryError where the directory is taken or cannot be made.
        """
        check_available(path)
        writer = cls._locked(path)
        try:
            check_available(path)  # once more, for another process may have been there in between
            writer._begin(recipe_yaml, environment)
        except OSError as error:
            writer.close()
            raise cannot_be_made(path, error) from error
        except BaseException:
            writer.close()
            raise
        return writer

    @classmethod
    def reopen(cls, path: Path) -> RunWriter:
        """Lock the run directory ``path`` to go on with its run, and write nothing yet: ``rewind`` comes next.

        It is made where it is missing. Raises RunDirectoryError where another process trains it, and those of
        ``check_resumable``.
        """
        check_resumable(path)
        writer = cls._locked(path)
        try:
            check_resumable(path)
        except BaseException:
            writer.close()
            raise
        return writer

    @classmethod
    def _locked(cls, path: Path) -> RunWriter:
        files = RunFiles(path)
        try:
            if not path.exists():
                path.mkdir(parents=True, exist_ok=True)
                sync_folder(path.parent)
        except OSError as error:
            raise cannot_be_made(path, error) from error
        return cls(path, acquire(files.lock, files.status))

    def close(self) -> None:
        """Let others have the directory; nothing may be written any more."""
        self._lock.release()

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def note(self) -> str | None:
        """What the user should know of the lock: that the file system has none."""
        return self._lock.note

    @property
    def is_new(self) -> bool:
        """Whether the run has yet to begin: it has no recipe."""
        return not self.files.recipe.exists()

    def check_writable(self) -> None:
        """Raise RunDirectoryError where the run cannot go on in its folders, before anything slow is begun."""
        for folder in (self.files.root, *self.files.folders):
            if folder.exists():
                with writing(folder, ELSEWHERE):
                    check_writable(folder)

    def rewind(self, epoch: int, recipe_yaml: str | None, environment: Mapping[str, Any]) -> None:
        """Go on after ``epoch`` finished epochs, 0 to start anew in place: what is of later epochs is removed.

        ``recipe_yaml`` None keeps the recipe; a run that ``is_new`` needs one. The environment's keys stay as they
        were; what differs now goes into its list "resumed". Killed at any moment, this can be done again. Raises
        RunDirectoryError, and changes nothing, where a file does not reach to ``epoch``.
        """
        if self.is_new:
            if epoch or recipe_yaml is None:
                raise ValueError(f"{self.path}: a run that has yet to begin has a recipe, and no epoch {epoch}")
            with writing(self.path, ELSEWHERE):
                self._begin(recipe_yaml, environment)
            return
        beginnings = self._epochs.beginnings(epoch)
        now, host = _now(), socket.gethostname()
        old_status = read_json(self.files.status) if self.files.status.exists() else {}
        old_environment = read_json(self.files.environment) if self.files.environment.exists() else environment
        self._status = resumed_status(old_status, {**_running(), "started": now})
        self._environment = resumed_environment(old_environment, environment, {"at": now, "epoch": epoch, "host": host})
        with writing(self.path, ELSEWHERE):
            self._write_beginning(recipe_yaml)
            self._epochs.cut_back(epoch, beginnings)

    def _begin(self, recipe_yaml: str, environment: Mapping[str, Any]) -> None:
        self._environment, self._status = dict(environment), _running()
        self._write_beginning(recipe_yaml)

    def _write_beginning(self, recipe_yaml: str | None) -> None:
        """Write what stands before the first epoch; a directory with a recipe is complete. OSError."""
        files = self.files
        for folder in files.folders:
            folder.mkdir(exist_ok=True)
        for folder in (files.root, *files.folders):
            for partial in folder.glob(PARTIAL):
                partial.unlink()
        atomic_write(files.status, _json(self._status))
        atomic_write(files.environment, _json(self._environment))
        if recipe_yaml is not None and not _holds(files.recipe, recipe_yaml.encode()):
            atomic_write(files.recipe, recipe_yaml.encode())

    def write_source(self, name: str, content: bytes) -> None:
        """Keep a Python file that the recipe's entrypoints name beside the recipe, so that it can be trained again."""
        path = self.files.root / Path(name).name
        check_own(path)
        with writing(path):
            atomic_write(path, content)

    def write_dispatch(self, dispatch: Mapping[str, Any]) -> None:
        """Replace the table of kernel choices, anything JSON can hold."""
        with writing(self.files.dispatch):
            atomic_write(self.files.dispatch, _json(dispatch))

    @property
    def epoch(self) -> int:
        """The last finished epoch, 0 for none."""
        return self._epochs.epoch

    @property
    def ended(self) -> tuple[str, str]:
        """How the run has ended, state and reason as status.json has them; "running" while it has not."""
        return str(self._status["state"]), str(self._status["reason"] or "")

    @property
    def path(self) -> Path:
        return self.files.root

    @property
    def weights_path(self) -> Path:
        return self.files.weights

    def checkpoint_path(self, name: str) -> Path:
        return self.files.checkpoint(name)

    def write_started(self, record: RunStarted) -> None:
        """Add to environment.json what the run says of itself: its name, policy, device, metric, rows and notes.

        Where the run goes on, what it said first stays, but the number of rows planned; and new notes are added.
        """
        notes = self._environment.get("notes", ())
        said = {
            "recipe_name": record.recipe_name,
            "description": record.description,
            "policy": record.policy,
            "device": record.device,
            "metric": record.metric,
            "metric_better": "lower" if record.lower_is_better else "higher",
            "unit": record.unit,
            **({"rows_planned": record.epochs} if record.epochs > 0 else {}),
            "notes": [*notes, *(note for note in record.notes if note not in notes)],
        }
        anew = ("notes", "rows_planned")
        kept = {key: value for key, value in self._environment.items() if self._epochs.resumed and key not in anew}
        self._environment.update({**said, **kept})
        with writing(self.files.environment):
            atomic_write(self.files.environment, _json(self._environment))

    def write_note(self, note: str) -> None:
        """Add a note to those in environment.json, once."""
        notes = self._environment.get("notes", [])
        if note not in notes:
            self._environment["notes"] = [*notes, note]
            with writing(self.files.environment):
                atomic_write(self.files.environment, _json(self._environment))

    def write_epoch(self, record: EpochRecord) -> None:
        """Add a finished epoch: see ``EpochFiles.add``."""
        self._epochs.add(record, str(self._environment.get("policy", "")))

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


def _running() -> dict[str, Any]:
    process, host = os.getpid(), socket.gethostname()
    return {"state": "running", "reason": None, "pid": process, "host": host, "started": _now(), "ended": None}


def _holds(path: Path, content: bytes) -> bool:
    return path.exists() and path.stat().st_size == len(content) and path.read_bytes() == content


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, default=str) + "\n").encode()
