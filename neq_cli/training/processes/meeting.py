"""How processes started together find each other, in a store that earlier ones may have used, and without a sound."""

from __future__ import annotations

import hashlib
import os
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
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


@contextmanager
def without_stdout() -> Iterator[None]:
    """Drop what a library prints on stdout below Python: gloo, in torch 2.9, whom it met. Stdout is for results."""
    if sys.stdout is None:  # closed from the start
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(kept, 1)
            os.close(kept)
