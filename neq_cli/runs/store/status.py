"""What status.json and environment.json say of a run that goes on after it ended; plain values in, plain values out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

_MOST_ENTRIES = 100
_MOST_CHARACTERS = 2**18  # readers refuse an environment.json of more than 2**20 bytes
_OF_EACH_START = ("device", "argv", "notes")  # told by every entry, or kept elsewhere


def resumed_status(old: Mapping[str, Any], running: Mapping[str, Any]) -> dict[str, Any]:
    """Return the status of a run that is ``running`` again, with the time of its first start where ``old`` tells it."""
    return {**running, "started": old["started"]} if parse_time(old.get("started")) else dict(running)


def resumed_environment(old: Mapping[str, Any], new: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``old`` with ``entry`` added to its list "resumed", with what is ``new`` and with what differs from old.

    ``changed`` in the entry holds the values of ``new`` that ``old`` has otherwise, of a mapping those that differ.
    The list keeps its last hundred entries, fewer where they are long.
    """
    changed = {}
    for key, value in new.items():
        difference = _difference(old.get(key), value)
        if key not in _OF_EACH_START and difference not in (None, {}):
            changed[key] = difference
    whole = {**entry, "device": new.get("device"), "argv": new.get("argv"), "changed": changed}
    before = old.get("resumed")
    entries = [*(before if isinstance(before, list) else []), whole][-_MOST_ENTRIES:]
    while len(entries) > 1 and len(json.dumps(entries, indent=2, default=str)) > _MOST_CHARACTERS:
        entries.pop(0)
    return {**old, "resumed": entries}


def parse_time(text: object) -> datetime | None:
    """Return the time that neq wrote as ``text``, None where it is no such text."""
    try:
        time = datetime.fromisoformat(text) if isinstance(text, str) else None
    except ValueError:
        return None
    return time if time is not None and time.tzinfo is not None else None


def _difference(old: object, new: object) -> object:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return {key: value for key, value in new.items() if key not in old or old[key] != value}
    return None if old == new else new
