"""Freed memory kept for the next step: exported, documented, and seen in the page faults of a process of its own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import neq_cli

ROOT = Path(__file__).parents[1]
# What a training does with activations: 32 MB are written to and freed, again and again.
FAULTS = """
import resource
import neq_cli

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        bytearray(b"x") * (32 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults(), neq_cli.keep_freed_memory(), faults(), faults())
"""


def run(**changes: str) -> list[str]:
    own = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")
    environment = {name: value for name, value in os.environ.items() if name not in own}
    environment |= {"PYTHONPATH": str(ROOT), **changes}
    done = subprocess.run([sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")


def test_it_is_exported_and_documented() -> None:
    assert "keep_freed_memory" in neq_cli.__all__
    assert "neq_cli.keep_freed_memory()" in (ROOT / "README.md").read_text()
    assert neq_cli.keep_freed_memory.__doc__


@glibc
def test_page_faults_are_gone() -> None:
    before, kept, _, after = run()
    assert kept == "True"
    # At least one for every 2 MB and round where pages are huge, one for every 4 kB where not; then none.
    assert int(before) >= 10 * 16
    assert int(after) * 10 < int(before)


@glibc
def test_thresholds_that_the_user_set_are_left_alone() -> None:
    before, kept, _, after = run(MALLOC_MMAP_THRESHOLD_="65536")
    assert kept == "False"
    assert int(after) * 2 > int(before)


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda *_: ("", ""))
    assert neq_cli.keep_freed_memory() is False
