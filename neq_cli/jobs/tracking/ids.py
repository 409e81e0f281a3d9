"""What a run directory keeps of its trackers, tracking/ids.json: under which id each has the run, and what it was told.

Ids alone, never addresses: a directory that somebody else wrote must not say where anything is sent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from neq_cli.runs.store.disk import atomic_write
from neq_cli.runs.store.untrusted import damaged, read_json

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class Kept:
    """One tracker's ``identity`` of the run, and the last ``epoch`` that it was told."""

    identity: str
    epoch: int = 0


def read_ids(path: Path) -> dict[str, Kept]:
    """Return what is kept of each tracker by its name, {} where nothing is yet. RunDirectoryError."""
    if not path.exists():
        return {}
    found = {}
    for tracker, entry in read_json(path).items():
        identity = entry.get("id") if isinstance(entry, dict) else None
        epoch = entry.get("epoch") if isinstance(entry, dict) else None
        if not isinstance(identity, str) or not _ID.fullmatch(identity):
            raise damaged(path, f"{tracker!r}: no id")
        if type(epoch) is not int or not 0 <= epoch < 2**48:
            raise damaged(path, f"{tracker!r}: no epoch")
        found[tracker] = Kept(identity, epoch)
    return found


def write_ids(path: Path, kept: Mapping[str, Kept]) -> None:
    """Replace what is kept. OSError."""
    entries = {tracker: {"id": each.identity, "epoch": each.epoch} for tracker, each in kept.items()}
    atomic_write(path, (json.dumps(entries, indent=2) + "\n").encode())
