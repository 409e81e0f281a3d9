"""Writes a run's checkpoints: one file each, and beside it, where processes divide the model, a file of each one."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neq_cli.errors import RunDirectoryError
from neq_cli.runs.store.disk import atomic_write, sync_folder, writing
from neq_cli.runs.store.paths import CHECKPOINTS
from neq_cli.runs.store.writer import RunWriter
from neq_cli.text import printable

if TYPE_CHECKING:
    from neq_cli.training.loop.shards import Shards
    from neq_cli.training.loop.trainer import Trainer
    from neq_cli.training.processes.joined import Processes


def save(trainer: Trainer, writer: RunWriter | None, *, best: bool) -> None:
    """Write the last checkpoint, and the best one where this is it; the last before becomes the previous one.

    All processes call it together; ``writer`` is None in all but the first. A checkpoint is there once its own file is:
    with that one step the next is whole, and up to then the one before.
    """
    state: Mapping[str, Any] = trainer.state_dict()  # which all processes take part in
    shards: Shards | None = None
    if trainer.divided is not None:
        state, shards = _write_shards(state, trainer.processes, writer)
    if writer is None:
        return
    with trainer.processes.undisturbed():
        _write(state, shards, writer, best=best)
        if writer.files.shards:
            _remove_shards(writer)


def _write_shards(
    state: Mapping[str, Any], processes: Processes, writer: RunWriter | None
) -> tuple[Mapping[str, Any], Shards | None]:
    """Write what is divided of ``state``, each process its part; returns the rest, and where the parts are."""
    from neq_cli.training.loop.shard_storage import write_shards
    from neq_cli.training.loop.shards import Shards, taken_apart

    folder = Path(processes.shared(str(writer.files.next_shards().absolute()) if writer is not None else ""))
    rest, tensors = taken_apart(state, Shards(folder, {}))
    files = write_shards(tensors, folder)
    if writer is None:
        return rest, None
    with writing(folder):
        sync_folder(folder)
        sync_folder(folder.parent)
    return rest, Shards(folder, files)


def _write(state: Mapping[str, Any], shards: Shards | None, writer: RunWriter, *, best: bool) -> None:
    from neq_cli.training.loop.checkpoint import save_state

    last, previous = writer.checkpoint_path("last"), writer.checkpoint_path("previous")

    def write_and_move_on(partial: Path) -> None:
        save_state(state, partial, shards)
        if last.exists():
            last.replace(previous)

    if best:
        path = writer.checkpoint_path("best")
        with writing(path):
            atomic_write(path, lambda partial: save_state(state, partial, shards))
    with writing(last):
        atomic_write(last, write_and_move_on)


def _remove_shards(writer: RunWriter) -> None:
    """Remove the shards of no checkpoint: of those that were replaced, and of those that a kill left unfinished."""
    from neq_cli.training.loop.checkpoint import shards_of

    checkpoints = [path for name in CHECKPOINTS if (path := writer.checkpoint_path(name)).exists()]
    try:
        kept = {folder.name for path in checkpoints if (folder := shards_of(path)) is not None}
    except RunDirectoryError:  # one is damaged: which shards are its own is not known
        return
    for folder in writer.files.shards:
        if folder.name not in kept:
            with writing(folder):
                shutil.rmtree(folder)


def check_reached(processes: Processes, writer: RunWriter | None) -> None:
    """Raise RunDirectoryError in a process that cannot write its part of checkpoints into the run directory."""
    folder = Path(processes.shared(str(writer.files.checkpoints_folder.absolute()) if writer is not None else ""))
    if not folder.is_dir():
        raise RunDirectoryError(
            f"{printable(folder)}: not there for process {processes.rank}, and with parallel: fsdp every process "
            "writes its part of a checkpoint; choose a place that all machines see, by -o"
        )
