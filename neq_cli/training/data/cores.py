"""How many cores this process may use: those it is bound to, and no more than a container's or job's quota."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

from neq_cli.training.data.cache import group_folders

_ROOT = Path("/")


def usable_cores(root: Path = _ROOT) -> int:
    """Return the number of cores, at least 1. ``root`` is where Linux's files are looked for."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min((bound, *_quotas(root))))


def _quotas(root: Path) -> Iterator[int]:
    """Yield what each control group above this process allows, in version 1 and 2 of their interface."""
    for folder, second in group_folders(root, "cpu"):
        try:
            if second:
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if int(quota) > 0:
                yield math.ceil(int(quota) / int(period))
        except (OSError, ValueError, ZeroDivisionError):  # not there, or "max": no limit
            continue
