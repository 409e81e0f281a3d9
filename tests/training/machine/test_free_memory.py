"""What is free, read from files written here as Linux writes them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from neq_cli.training.machine.limits import free_memory, free_ram

MEMINFO = "MemTotal:       16000 kB\nMemFree:         1000 kB\nMemAvailable:    9000 kB\n"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def group(limit: int | str, used: int, dropped: int, *, version: int) -> dict[str, str]:
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    names = ("memory.max", "memory.current", "inactive_file") if version == 2 else names
    return {names[0]: f"{limit}\n", names[1]: f"{used}\n", "memory.stat": f"anon 7\n{names[2]} {dropped}\n"}


def under(folder: str, files: dict[str, str]) -> dict[str, str]:
    return {f"{folder}/{name}": text for name, text in files.items()}


def test_file_caches_count_as_free(tmp_path: Path) -> None:
    assert free_ram(write(tmp_path, {})) == 9000 * 1024


@pytest.mark.parametrize(
    ("version", "line", "top"),
    [(2, "0::/slurm/job/step", "sys/fs/cgroup"), (1, "4:cpu,memory:/slurm/job/step", "sys/fs/cgroup/memory")],
)
def test_the_tightest_group_around_the_process_counts(tmp_path: Path, version: int, line: str, top: str) -> None:
    files = {
        "proc/self/cgroup": f"9:name=systemd:/x\n{line}\n",
        **under(f"{top}/slurm/job/step", group("max" if version == 2 else 2**63 - 4096, 5, 0, version=version)),
        **under(f"{top}/slurm/job", group(5_000_000, 3_000_000, 500_000, version=version)),
        **under(f"{top}/slurm", group(8_000_000, 3_000_000, 0, version=version)),
        **under(f"{top}/slurm/other", group(10, 3, 0, version=version)),
    }
    assert free_ram(write(tmp_path, files)) == 5_000_000 - 3_000_000 + 500_000


def test_a_container_that_sees_its_own_group_as_the_top(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/docker/abc\n", **under("sys/fs/cgroup", group(4000, 1000, 0, version=2))}
    assert free_ram(write(tmp_path, files)) == 3000
    assert free_ram(write(tmp_path, {"sys/fs/cgroup/memory.current": "9000"})) == 0


def test_without_linuxs_files_the_system_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {"SC_PAGE_SIZE": 4096, "SC_AVPHYS_PAGES": 10, "SC_PHYS_PAGES": 50}

    def sysconf(name: str) -> int:
        if name not in pages:
            raise ValueError("unrecognized configuration name")
        return pages[name]

    monkeypatch.setattr(os, "sysconf", sysconf)
    assert free_ram(tmp_path) == 40960
    del pages["SC_AVPHYS_PAGES"]  # as on macOS
    assert free_ram(tmp_path) == 25 * 4096


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="macOS tells less")
def test_this_machine_tells() -> None:
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < (free_memory(torch.device("cpu")) or 0) <= physical
    assert free_memory(torch.device("meta")) is None
