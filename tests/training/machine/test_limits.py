"""How many cores may be used, by files written here as Linux writes them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from neq_cli.training.machine.limits import usable_cores


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture(autouse=True)
def bound_to_eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)


def test_those_that_the_process_is_bound_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable_cores(tmp_path) == 8
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert usable_cores(tmp_path) == 5
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores(tmp_path) == 1


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"pod": "max 100000"}, 8),
        ({"pod": "250000 100000"}, 3),  # two and a half
        ({"pod/job": "max 100000", "pod": "400000 100000"}, 4),
        ({"pod/job": "100000 100000", "pod": "400000 100000"}, 1),
        ({"pod": "10000 100000"}, 1),
        ({"pod": "1600000 100000"}, 8),
        ({"other": "100000 100000"}, 8),
        ({"pod": "what"}, 8),
    ],
)
def test_the_tightest_quota_counts(tmp_path: Path, limits: dict[str, str], expected: int) -> None:
    files = {f"sys/fs/cgroup/{group}/cpu.max": f"{limit}\n" for group, limit in limits.items()}
    assert usable_cores(write(tmp_path, {"proc/self/cgroup": "0::/pod/job\n", **files})) == expected


@pytest.mark.parametrize(("quota", "expected"), [("200000", 2), ("-1", 8)])
def test_the_older_interface(tmp_path: Path, quota: str, expected: int) -> None:
    files = {
        "proc/self/cgroup": "5:memory:/m\n4:cpu,cpuacct:/job\n",
        "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": quota,
        "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000",
    }
    assert usable_cores(write(tmp_path, files)) == expected
