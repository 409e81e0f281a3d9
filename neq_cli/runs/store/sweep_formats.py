"""formats.json in the folder of a sweep: which memory format its runs train in, by what decides it; first come counts.

Where the file system has no locks, runs that begin at once may all choose; those that end later find what was written.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from neq_cli.errors import RunDirectoryError
from neq_cli.runs.store.disk import atomic_write, check_own, writing
from neq_cli.runs.store.lock import Lock, LockTaken, acquire
from neq_cli.runs.store.sweep_folder import SweepFiles
from neq_cli.runs.store.untrusted import damaged, read_json
from neq_cli.text import plain_json, printable

SCHEMA = 1
_POLL_SECONDS = 0.1
_LONGEST_NOTE = 500
Choice = tuple[bool, str]


def sweep_of(run: Path) -> SweepFiles | None:
    """Return the files of the sweep that the run directory ``run`` belongs to; None where it belongs to none."""
    root = run.absolute().parent.parent
    files = SweepFiles(root)
    return files if files.runs == run.absolute().parent and files.record.is_file() else None


def agreed_format(
    files: SweepFiles, run: str, about: Mapping[str, Any], choose: Callable[[], Choice]
) -> tuple[bool, str]:
    """Return whether the sweep's runs that agree in ``about`` train in channels_last, and how that was found out.

    The first to ask chooses by ``choose`` and is named ``run``; others wait for it meanwhile. RunDirectoryError where
    the file is damaged, or the disk refuses.
    """
    about = plain_json(dict(about))
    while True:
        if (known := _read(files, about)) is not None:
            return known
        try:
            lock = acquire(files.formats_lock, files.record)
        except LockTaken:
            time.sleep(_POLL_SECONDS)  # its holder is choosing; the lock ends with the process
            continue
        return _chosen_first(files, run, about, choose, lock)


def _chosen_first(
    files: SweepFiles, run: str, about: Mapping[str, Any], choose: Callable[[], Choice], lock: Lock
) -> Choice:
    try:
        if (known := _read(files, about)) is not None:  # written between the look and the lock
            return known
        channels_last, how = choose()
        note = f"{how}; found by the run {printable(run, 200)}, for all of its sweep"
        if (known := _read(files, about)) is not None:  # there are no locks, and another was quicker
            return known
        entries = [*_entries(files), {"about": about, "channels_last": channels_last, "note": note}]
        content = json.dumps({"schema": SCHEMA, "formats": entries}, indent=2) + "\n"
        with writing(files.root, "choose another with -o"):
            atomic_write(files.formats, content.encode())
        return channels_last, note
    finally:
        lock.release()


def _read(files: SweepFiles, about: Mapping[str, Any]) -> Choice | None:
    found = next((entry for entry in _entries(files) if entry["about"] == about), None)
    return None if found is None else (found["channels_last"], printable(found["note"], _LONGEST_NOTE))


def _entries(files: SweepFiles) -> list[dict[str, Any]]:
    path = files.formats
    try:
        check_own(path)
        if not path.exists():
            return []
    except OSError as error:
        raise RunDirectoryError(f"{printable(path)}: cannot be read: {printable(error.strerror or error)}") from error
    content = read_json(path)
    if content.get("schema") != SCHEMA:
        raise damaged(path, f"schema: not {SCHEMA}")
    entries = content.get("formats")
    if not isinstance(entries, list) or not all(map(_is_entry, entries)):
        raise damaged(path, "formats: not a list of what was chosen for what")
    return entries


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, dict):
        return False
    about, channels_last, note = (entry.get(key) for key in ("about", "channels_last", "note"))
    return isinstance(about, dict) and isinstance(channels_last, bool) and isinstance(note, str)
