"""Which runs lie in a folder, however deep: told by the names of their files alone, links followed once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from neq_cli.errors import RunDirectoryError
from neq_cli.runs.store.paths import RunFiles
from neq_cli.text import printable

MOST_FOLDERS = 100_000
"""Folders that are looked into; there are fewer around any runs, but not on a whole disk."""
_DEEPEST = 20
_OF_A_RUN = 2
"""How many of the files that tell a run must be there: one may be missing, and others have a status.json too."""


@dataclass(frozen=True)
class Found:
    """The runs in a folder, sorted, and the folders in it that could not be looked into, each with the reason."""

    runs: tuple[Path, ...]
    unread: tuple[str, ...] = ()


def is_run(path: Path) -> bool:
    """Whether ``path`` is the folder of a run, which may be damaged."""
    try:
        return path.is_dir() and _tells_run({inside.name for inside in path.iterdir()})
    except OSError:
        return False


def find_runs(folder: Path) -> Found:
    """Return the runs in ``folder``, however deep, or itself; RunDirectoryError where it cannot be looked into.

    Each run is told once, by its place where there is one, not by a link to it. What a run holds is not looked into,
    nor what begins with a dot.
    """
    runs: list[Path] = []
    unread: list[str] = []
    seen: set[tuple[int, int]] = set()
    # Links last, so that a run is called by where it lies: "runs/digits/latest" may lead to another one of these.
    waiting: list[tuple[Path, int]] = [(folder, 0)]
    links: list[tuple[Path, int]] = []
    while waiting or links:
        path, depth = waiting.pop() if waiting else links.pop()
        try:
            state = path.stat()
            if (state.st_dev, state.st_ino) in seen:
                continue
            seen.add((state.st_dev, state.st_ino))
            with os.scandir(path) as entries:
                inside = list(entries)
            folders = [entry for entry in inside if not entry.name.startswith(".") and entry.is_dir()]
        except OSError as error:
            what = "no such folder" if isinstance(error, FileNotFoundError) else printable(error.strerror or error)
            said = f"{printable(path)}: cannot be looked into: {what}"
            if path == folder:
                raise RunDirectoryError(said) from error
            unread.append(said)
            continue
        if _tells_run({entry.name for entry in inside}):
            runs.append(path)
        elif depth < _DEEPEST:
            for entry in folders:
                (links if entry.is_symlink() else waiting).append((path / entry.name, depth + 1))
        if len(seen) + len(waiting) > MOST_FOLDERS:
            what = f"more than {MOST_FOLDERS} folders in it; give one that is nearer to the runs"
            raise RunDirectoryError(f"{printable(folder)}: {what}")
    return Found(tuple(sorted(runs)), tuple(sorted(unread)))


def runs_of_folder(path: Path) -> tuple[Path, ...]:
    """Return the runs below a folder that is no run itself; none where there are none, or it cannot be looked into."""
    try:
        return () if is_run(path) or not path.is_dir() else find_runs(path).runs
    except (OSError, RunDirectoryError):  # reading it as a run says what is wrong with it
        return ()


def listed(paths: Sequence[Path], limit: int = 5) -> str:
    """Return paths for a line: so many, and how many more there are."""
    return ", ".join(_shortly(paths, limit))


def _shortly(paths: Sequence[Path], limit: int) -> Iterator[str]:
    yield from (printable(path) for path in paths[:limit])
    if len(paths) > limit:
        yield f"and {len(paths) - limit} more"


def _tells_run(names: set[str]) -> bool:
    files = RunFiles(Path())
    telling = {file.name for file in (files.recipe, files.environment, files.status, files.metrics)}
    return len(names & telling) >= _OF_A_RUN
