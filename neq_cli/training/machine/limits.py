"""The cores and the memory that are there for this process, within what a container or a cluster's job allows.

By hand: ``psutil`` tells what the whole machine has, and nothing of control groups.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch

_ROOT = Path("/")


def usable_cores(root: Path = _ROOT) -> int:
    """Return the number of cores, at least 1. ``root`` is where Linux's files are looked for."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min((bound, *_quotas(root))))


def _quotas(root: Path) -> Iterator[int]:
    """Yield what each control group above this process allows, in version 1 and 2 of their interface."""
    for folder, second in _group_folders(root, "cpu"):
        try:
            if second:
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if int(quota) > 0:
                yield math.ceil(int(quota) / int(period))
        except (OSError, ValueError, ZeroDivisionError):  # not there, or "max": no limit
            continue


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that are free on ``device``; None where it does not tell."""
    if device.type == "cpu":
        return free_ram()
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return None


def free_ram(root: Path = _ROOT) -> int:
    """Return the bytes of RAM that are free, file caches that can be dropped included.

    Linux tells, for the machine and for the control groups that confine a container or a cluster's job. Elsewhere it is
    what no process has taken or, as macOS does not tell that either, half of what there is. ``root`` is where Linux's
    files are looked for.
    """
    return min((_of_the_machine(root), *_left_by_groups(root)))


def _of_the_machine(root: Path) -> int:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        page = os.sysconf("SC_PAGE_SIZE")
    try:
        return page * os.sysconf("SC_AVPHYS_PAGES")
    except ValueError:
        return page * os.sysconf("SC_PHYS_PAGES") // 2


def _left_by_groups(root: Path) -> Iterator[int]:
    """Yield what each control group above this process has left, in version 1 and 2 of their interface."""
    for folder, second in _group_folders(root, "memory"):
        if second:
            yield from _left(folder, "memory.max", "memory.current", "inactive_file")
        else:
            yield from _left(folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _group_folders(root: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """Yield the folder of each control group above this process, and whether its interface is version 2."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup"
        top = top / controller if controllers else top
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                yield folder, not controllers


def _left(group: Path, limit: str, used: str, dropped: str) -> Iterator[int]:
    try:
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        left = int((group / limit).read_text()) - int((group / used).read_text())
    except (OSError, ValueError):  # not there, or "max": no limit
        return
    yield max(0, left + int(statistics.get(dropped, 0)))
