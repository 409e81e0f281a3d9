"""Where everything lies in a run directory, the only place that knows its file names; and which folders may be one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from neq_cli.errors import RunDirectoryError
from neq_cli.runs.store.disk import check_own
from neq_cli.text import printable

STATES = ("running", "finished", "interrupted", "failed")
CHECKPOINTS = ("last", "previous", "best")
_SHARDS = re.compile(r"shards_([0-9]{1,12})")
_NEURONS = re.compile(r"epoch_([0-9]{4,9})\.safetensors")


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
    def lock(self) -> Path:
        """Locked by the one process that trains; stays when it ends."""
        return self.root / ".lock"

    @property
    def neurons_folder(self) -> Path:
        return self.root / "neurons"

    @property
    def checkpoints_folder(self) -> Path:
        return self.root / "checkpoints"

    @property
    def tracking_folder(self) -> Path:
        """What trackers keep of the run, each in a folder of its name; there only where a run has any."""
        return self.root / "tracking"

    @property
    def tracking_ids(self) -> Path:
        """Under which id each tracker has the run."""
        return self.tracking_folder / "ids.json"

    def neurons(self, epoch: int) -> Path:
        return self.neurons_folder / f"epoch_{epoch:04d}.safetensors"

    def neurons_after(self, epoch: int) -> Iterator[Path]:
        """Yield the neuron files there are of later epochs than ``epoch``. OSError."""
        for path in self.neurons_folder.iterdir():
            match = _NEURONS.fullmatch(path.name)
            if match and int(match[1]) > epoch:
                yield path

    def checkpoint(self, name: str) -> Path:
        """``name`` is one of ``CHECKPOINTS``."""
        if name not in CHECKPOINTS:
            raise ValueError(f"checkpoint {name!r}: not one of {', '.join(CHECKPOINTS)}")
        return self.checkpoints_folder / f"{name}.safetensors"

    @property
    def shards(self) -> list[Path]:
        """The folders, in their order, with the parts of checkpoints that are divided over processes. OSError."""
        there = self.checkpoints_folder.iterdir() if self.checkpoints_folder.is_dir() else ()
        found = {int(match[1]): path for path in there if (match := _SHARDS.fullmatch(path.name))}
        return [path for _, path in sorted(found.items())]

    def next_shards(self) -> Path:
        """Return the folder for the next such parts, which is not there yet. OSError."""
        last = next((int(path.name.partition("_")[2]) for path in reversed(self.shards)), 0)
        return self.checkpoints_folder / f"shards_{last + 1:06d}"

    @property
    def folders(self) -> tuple[Path, ...]:
        return (self.neurons_folder, self.checkpoints_folder)

    @property
    def begun(self) -> tuple[Path, ...]:
        """What there is before recipe.yaml, which is written last when a run begins."""
        return (self.lock, self.status, self.environment, *self.folders)

    @property
    def files(self) -> Iterator[Path]:
        """What neq writes or may have written. OSError."""
        yield from (self.recipe, self.environment, self.status, self.metrics, self.layers, self.dispatch)
        yield from (self.weights, self.lock, self.tracking_ids, *self.root.glob("*.py"))
        for folder in (*self.folders, *self.shards):
            if folder.exists():
                yield from folder.glob("*.safetensors")


def is_hidden(path: Path) -> bool:
    """Whether the name begins with a dot: the lock, what a killed write leaves, and what file managers put anywhere."""
    return path.name.startswith(".")


def recipe_folder(recipe_name: str, root: Path = Path("runs")) -> Path:
    """Return where the runs of a recipe lie unless the user says otherwise."""
    return root / (re.sub(r"[^\w.+-]+", "-", recipe_name).strip(".-") or "recipe")


def default_run_directory(recipe_name: str, seed: int, now: datetime) -> Path:
    """Return ``runs/<recipe-name>/<YYYYmmdd-HHMMSS>-s<seed>``, with ``-2``, ``-3``... added where that is taken."""
    folder = recipe_folder(recipe_name)
    stem = f"{now:%Y%m%d-%H%M%S}-s{seed}"
    path, count = folder / stem, 1
    while path.exists():
        count += 1
        path = folder / f"{stem}-{count}"
    return path


def check_available(path: Path) -> None:
    """Raise RunDirectoryError where ``path`` cannot become a run directory, before anything slow is begun."""
    try:
        if _is_folder(path) and not all(map(is_hidden, path.iterdir())):  # the lock is hidden too
            raise RunDirectoryError(f"{printable(path)}: already exists and is not empty; choose another with -o")
    except OSError as error:
        raise cannot_be_made(path, error) from error


def check_resumable(path: Path) -> None:
    """Raise RunDirectoryError where ``path`` holds what is no run, or would have neq write outside the run directory.

    A run that was killed before its recipe was written, an empty folder and a missing one may all be begun here.
    """
    files = RunFiles(path)
    try:
        if not _is_folder(path):
            return
        for folder in (*files.folders, files.tracking_folder, *files.shards):
            check_own(folder, folder=True)
        for file in files.files:
            check_own(file)
        if not files.recipe.exists() and not _is_begun(files):
            what = f"no {files.recipe.name}, but other files"
            raise RunDirectoryError(f"{printable(path)}: {what}: not a run to go on with; choose another with -o")
    except OSError as error:
        raise RunDirectoryError(f"{printable(path)}: cannot be read: {printable(error.strerror or error)}") from error


def _is_folder(path: Path) -> bool:
    if path.is_symlink() and not path.exists():
        raise RunDirectoryError(f"{printable(path)}: a link that leads nowhere; choose another with -o")
    if path.exists() and not path.is_dir():
        raise RunDirectoryError(f"{printable(path)}: a file, not a folder; choose another with -o")
    return path.exists()


def _is_begun(files: RunFiles) -> bool:
    """Return whether all there is may come from a run that was killed as it began."""
    entries = [
        *files.root.iterdir(),
        *(entry for folder in files.folders if folder.exists() for entry in folder.iterdir()),
    ]
    return all(entry in files.begun or is_hidden(entry) for entry in entries)


def cannot_be_made(path: Path, error: OSError) -> RunDirectoryError:
    """Return the error for a run directory that the disk refuses."""
    if isinstance(error, FileExistsError):
        return RunDirectoryError(f"{printable(path)}: taken by another run, or a file; choose another with -o")
    reason = printable(error.strerror or str(error))
    return RunDirectoryError(f"{printable(path)}: cannot be made: {reason}; choose another with -o")
