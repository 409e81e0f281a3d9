"""Where everything lies in the folder of a sweep, and sweep.json, which says what its runs are; reads no run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from neq_cli.errors import RunDirectoryError
from neq_cli.runs.store.disk import atomic_write, check_own, sync_folder, writing
from neq_cli.runs.store.lock import Lock, acquire
from neq_cli.runs.store.paths import is_hidden, recipe_folder
from neq_cli.runs.store.untrusted import damaged, read_json
from neq_cli.text import printable

SCHEMA = 1
MOST_RUNS = 2000  # of all calls together, so that sweep.json stays below what is read


@dataclass(frozen=True)
class SweepFiles:
    """Where everything lies in the sweep directory ``root``."""

    root: Path

    @property
    def record(self) -> Path:
        return self.root / "sweep.json"

    @property
    def lock(self) -> Path:
        return self.root / ".lock"

    @property
    def runs(self) -> Path:
        """The parent of the run directories, with nothing else in it: ``neq compare RUNS/*`` takes them all."""
        return self.root / "runs"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def jobs(self) -> Path:
        """What a cluster's jobs are started from, and what became of them."""
        return self.root / "jobs"

    @property
    def study(self) -> Path:
        """What a search has chosen and what came of it, line by line; optuna's."""
        return self.root / "search.journal"

    @property
    def formats(self) -> Path:
        """Which memory format the runs train in, where that was timed."""
        return self.root / "formats.json"

    @property
    def formats_lock(self) -> Path:
        """Held by the run that times it."""
        return self.root / ".formats.lock"

    @property
    def jobs_record(self) -> Path:
        return self.root / "jobs.json"

    def run(self, name: str) -> Path:
        return self.runs / name

    def log(self, name: str) -> Path:
        """What the processes of a run said, one attempt after the other."""
        return self.logs / f"{name}.log"

    def outcome(self, name: str) -> Path:
        """Why the last job of a run failed, where it did and could say so."""
        return self.jobs / f"{name}.json"


@dataclass(frozen=True)
class SweepRecord:
    """What sweep.json says: the recipe, the axes as given last, and the changes of every run of every call."""

    recipe: str
    axes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    runs: Mapping[str, Sequence[str]] = field(default_factory=dict)


def default_sweep_directory(recipe_name: str, grid_name: str, root: Path = Path("sweeps")) -> Path:
    """Return ``sweeps/<recipe-name>/<keys of the grid>``: the same command finds the same folder again."""
    return recipe_folder(recipe_name, root) / grid_name


def read_sweep(root: Path) -> SweepRecord | None:
    """Return what sweep.json in ``root`` says, None where there is no such folder, or nothing in it.

    RunDirectoryError where the folder is something else, or would have neq write outside of it.
    """
    files = SweepFiles(root)
    try:
        if root.is_symlink() and not root.exists():
            raise RunDirectoryError(f"{printable(root)}: a link that leads nowhere; choose another with -o")
        if not root.exists():
            return None
        if not root.is_dir():
            raise RunDirectoryError(f"{printable(root)}: a file, not a folder; choose another with -o")
        for folder in (files.runs, files.logs):
            check_own(folder, folder=True)
        for file in (files.record, files.lock):
            check_own(file)
        if files.record.exists():
            return _read_record(files.record)
        # Before sweep.json there is nothing but the lock, which is hidden, also where a kill came in between.
        if not all(map(is_hidden, root.iterdir())):
            what = f"no {files.record.name}, but other files"
            raise RunDirectoryError(f"{printable(root)}: {what}: not a sweep to go on with; choose another with -o")
    except OSError as error:
        raise RunDirectoryError(f"{printable(root)}: cannot be read: {printable(error.strerror or error)}") from error
    return None


def open_sweep(root: Path, record: SweepRecord) -> Lock:
    """Make the folder, or take one that is there, for this process alone, and write sweep.json.

    Runs of earlier calls stay in the record. RunDirectoryError where another sweep runs there, or of another recipe.
    """
    files = SweepFiles(root)
    check_sweep(root, record.recipe)
    try:
        if not root.exists():
            root.mkdir(parents=True, exist_ok=True)
            sync_folder(root.parent)
    except OSError as error:
        reason = printable(error.strerror or error)
        raise RunDirectoryError(f"{printable(root)}: cannot be made: {reason}; choose another with -o") from error
    lock = acquire(files.lock, files.record)
    try:
        before = check_sweep(root, record.recipe)
        runs = {**(before.runs if before is not None else {}), **record.runs}
        if len(runs) > MOST_RUNS:
            raise RunDirectoryError(f"{printable(root)}: more than {MOST_RUNS} runs; choose another folder with -o")
        content = {"schema": SCHEMA, "recipe": record.recipe, "axes": record.axes, "runs": runs}
        with writing(root, "choose another with -o"):
            atomic_write(files.record, (json.dumps(content, indent=2) + "\n").encode())
            for folder in (files.runs, files.logs):
                folder.mkdir(exist_ok=True)
    except BaseException:
        lock.release()
        raise
    return lock


def check_sweep(root: Path, recipe: str) -> SweepRecord | None:
    """Return what ``read_sweep`` does; RunDirectoryError where the folder is another recipe's."""
    found = read_sweep(root)
    if found is not None and found.recipe != recipe:
        other = printable(found.recipe, 80)
        raise RunDirectoryError(f"{printable(root)}: a sweep of {other}, not of {recipe}; choose another with -o")
    return found


def _read_record(path: Path) -> SweepRecord:
    content = read_json(path)
    if content.get("schema") != SCHEMA:
        raise damaged(path, f"schema: not {SCHEMA}")
    recipe, axes, runs = (content.get(key) for key in ("recipe", "axes", "runs"))
    if not isinstance(recipe, str):
        raise damaged(path, "recipe: not text")
    for name, mapping in (("axes", axes), ("runs", runs)):
        if not isinstance(mapping, dict) or not all(_is_texts(texts) for texts in mapping.values()):
            raise damaged(path, f"{name}: not a mapping of names to lists of texts")
    assert isinstance(axes, dict)
    assert isinstance(runs, dict)
    return SweepRecord(recipe, axes, runs)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)
