"""How the processes that are started together find each other in a store that earlier ones may have used."""

from __future__ import annotations

import hashlib
import secrets
import time
from typing import TYPE_CHECKING

from neq_cli.errors import TrainingError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

_COMING = 600.0
"""Seconds in which all processes must have started."""


def met(store: Store, rank: int, count: int) -> str:
    """Return a name that these processes and no others share; TrainingError where some do not come.

    torchrun's store outlives a restart, and what the processes before left there, such as their addresses, must not be
    taken for that of these. So each leaves a word of its own, the first one lists them, and the list that all find
    their own word in is theirs.
    """
    own, deadline, seen = secrets.token_hex(8), time.monotonic() + _COMING, ""
    words = [f"neq/here/{number}" for number in range(count)]
    store.set(words[rank], own)
    while time.monotonic() < deadline:
        if rank == 0:
            present = [store.get(word).decode() if store.check([word]) else "-" for word in words]
            store.set("neq/all", " ".join(present))
        listed = store.get("neq/all").decode() if store.check(["neq/all"]) else ""
        if len(listed.split()) == count and listed.split()[rank] == own:
            key = "neq/" + hashlib.sha256(listed.encode()).hexdigest()
            if store.add(key, int(key != seen)) == count:
                return key
            seen = key
        time.sleep(0.02)
    raise TrainingError(f"{count} processes were to come, and some did not; start all of them with torchrun")
