"""A run takes over the kernel choices that earlier runs timed on the same machine, so that nothing is timed twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neq_cli.errors import RunDirectoryError
from neq_cli.runs.store.paths import RunFiles, is_hidden, recipe_folder
from neq_cli.runs.store.untrusted import damaged, read_json
from neq_cli.text import counted, printable

if TYPE_CHECKING:
    from neq_cli.freezing.backward.dispatch import KernelChoice
    from neq_cli.recipe.load import LoadedRecipe
    from neq_cli.training.processes.joined import Processes

_MOST_RUNS = 16
"""The newest that are looked at."""


@dataclass(frozen=True)
class Earlier:
    """Choices by the kind of call, and what the user should know of where they come from."""

    choices: Mapping[str, KernelChoice] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def choices_beside(loaded: LoadedRecipe, path: Path | None, processes: Processes) -> Earlier:
    """Return what the runs beside the one at ``path`` have timed, where that one is going to time anything."""
    from neq_cli.training.machine.device import machine, resolve_device

    if loaded.recipe.deterministic or loaded.recipe.backward == "dense":
        return Earlier()
    device = resolve_device(loaded.recipe.device, processes.local_rank if processes.count > 1 else None)
    own = None if path is None else path.absolute()
    folder = recipe_folder(loaded.name) if own is None else own.parent
    return earlier_choices(folder, machine(device, processes.count), own)


def earlier_choices(folder: Path, machine: Mapping[str, Any], own: Path | None = None) -> Earlier:
    """Return what the runs in ``folder`` have timed on ``machine``, as ``training.device.machine`` describes it.

    ``own`` is a run that goes on, and is left out. The newest run counts where several have timed the same. What is
    damaged is left out, and a note names it.
    """
    choices: dict[str, KernelChoice] = {}
    notes: list[str] = []
    used: list[Path] = []
    for files in _newest(folder, own):
        try:
            found = _timed_on(files, machine)
        except RunDirectoryError as error:
            notes.append(f"kernels: not taken over: {error}")
            continue
        if found:
            used.append(files.root)
            choices = {**found, **choices}
    if used:
        runs = f"{printable(used[0])}" + (f" and {len(used) - 1} more" if len(used) > 1 else "")
        kinds = counted(len(choices), "kind")
        said = f"kernels: of earlier runs on this machine, where they timed the same ({kinds}; {runs})"
        notes.insert(0, said)
    return Earlier(choices, tuple(notes))


def _newest(folder: Path, own: Path | None) -> list[RunFiles]:
    try:
        runs = [RunFiles(path) for path in folder.iterdir() if not is_hidden(path) and path != own]
        dated = [(files.dispatch.stat().st_mtime, files) for files in runs if files.dispatch.is_file()]
    except OSError:  # there is none, or none may be read
        return []
    return [files for _, files in sorted(dated, key=lambda pair: pair[0], reverse=True)[:_MOST_RUNS]]


def _timed_on(files: RunFiles, machine: Mapping[str, Any]) -> dict[str, KernelChoice]:
    if not files.environment.exists():
        return {}
    for about in _descriptions(files):
        if any(about.get(key) != value for key, value in machine.items()):
            return {}
    from neq_cli.freezing.backward.dispatch import read_choice

    written = read_json(files.dispatch).get("choices", {})
    try:
        choices = {kind: read_choice(choice) for kind, choice in written.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise damaged(files.dispatch, "choices: not a table of kernels") from error
    # A choice by rule has no timings: nothing was measured.
    return {kind: choice for kind, choice in choices.items() if choice.kernel in choice.milliseconds}


def _descriptions(files: RunFiles) -> Iterator[Mapping[str, Any]]:
    """Yield what a run says of the machines that it was begun and gone on with."""
    about = read_json(files.environment)
    packages = _mapping(about.get("packages"))
    yield {**about, **packages}
    resumed = about.get("resumed")
    for entry in map(_mapping, resumed if isinstance(resumed, list) else ()):
        changed = _mapping(entry.get("changed"))
        yield {**about, **packages, **changed, **_mapping(changed.get("packages")), "device": entry.get("device")}


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
