"""How processes at once share a machine: threads of the CPU by number, CUDA devices by turns; nothing is pinned."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence


def cores() -> int:
    """Return the CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cuda_devices(environment: Mapping[str, str]) -> list[str]:
    """Return the names by which CUDA_VISIBLE_DEVICES calls the devices there are; none is initialised."""
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(index) for index in range(count)]


def shared_environment(
    slot: int, jobs: int, device: str, environment: Mapping[str, str], cpus: int, gpus: Sequence[str]
) -> dict[str, str]:
    """Return what to change in ``environment`` for the process in ``slot`` of ``jobs`` at once.

    ``device`` is the recipe's. What the user has set stays, and so does a device with a number.
    """
    changes: dict[str, str] = {}
    if jobs > 1 and not environment.get("OMP_NUM_THREADS"):
        changes["OMP_NUM_THREADS"] = str(max(1, cpus // jobs))
    if jobs > 1 and len(gpus) > 1 and device in ("auto", "cuda"):
        changes["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    return changes
