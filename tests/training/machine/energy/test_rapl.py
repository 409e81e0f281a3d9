"""RAPL against trees as the kernel makes them: what counts, what begins anew, and why there may be nothing to read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from neq_cli.training.machine.energy.meter import Unmeasured
from neq_cli.training.machine.energy.rapl import rapl_meter

MICRO = 1_000_000


class Tree:
    """A folder like /sys/class/powercap; counts are in joules."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def domain(self, path: str, name: str, joules: float, largest: float | None = 1000) -> None:
        place = self.folder / path
        place.mkdir()
        (place / "name").write_text(f"{name}\n")
        if largest is not None:
            (place / "max_energy_range_uj").write_text(f"{int(largest * MICRO)}\n")
        self.set(path, joules)

    def set(self, path: str, joules: float) -> None:
        (self.folder / path / "energy_uj").write_text(f"{int(joules * MICRO)}\n")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Two sockets with memory of their own, and all the domains that must not be added to them."""
    tree = Tree(tmp_path)
    (tmp_path / "intel-rapl").mkdir()  # the control type, which is no domain
    tree.domain("intel-rapl:0", "package-0", 900)
    tree.domain("intel-rapl:0:0", "core", 500)
    tree.domain("intel-rapl:0:1", "dram", 10, largest=50)
    tree.domain("intel-rapl:1", "package-1", 100)
    tree.domain("intel-rapl:1:0", "dram", 20, largest=50)
    tree.domain("intel-rapl:2", "psys", 7000)
    tree.domain("intel-rapl-mmio:0", "package-0", 900)
    return tree


def test_packages_and_their_memory_are_added_up(tree: Tree) -> None:
    meter = rapl_meter(tree.folder)
    assert meter.source == "cpu"
    assert meter.how.startswith("RAPL package-0, package-0 dram, package-1, package-1 dram, ")
    assert meter.joules() == 0
    for path, joules in (("0", 930), ("0:0", 520), ("0:1", 12), ("1", 105.5), ("1:0", 20.25), ("2", 9000)):
        tree.set(f"intel-rapl:{path}", joules)
    tree.set("intel-rapl-mmio:0", 930)
    assert meter.joules() == pytest.approx(30 + 2 + 5.5 + 0.25)


def test_every_domain_begins_anew_after_its_own_largest(tree: Tree) -> None:
    meter = rapl_meter(tree.folder)
    tree.set("intel-rapl:0", 100)  # 900 to 1000, and to 100
    tree.set("intel-rapl:0:1", 5)  # 10 to 50, and to 5
    assert meter.joules() == pytest.approx(200 + 45)
    tree.set("intel-rapl:0", 150)
    assert meter.joules() == pytest.approx(200 + 45 + 50)


def test_without_its_largest_a_domain_counts_until_it_falls(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    tree.domain("intel-rapl:0", "package-0", 900, largest=None)
    meter = rapl_meter(tmp_path)
    tree.set("intel-rapl:0", 950)
    assert meter.joules() == pytest.approx(50)
    tree.set("intel-rapl:0", 10)
    with pytest.raises(ValueError, match="fell from 950 to 10"):
        meter.joules()


def test_where_there_is_no_package_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(Unmeasured, match=r"no RAPL package in .*, as in most virtual machines"):
        rapl_meter(tmp_path / "missing")
    Tree(tmp_path).domain("intel-rapl:0", "psys", 1)
    with pytest.raises(Unmeasured, match="no RAPL package"):
        rapl_meter(tmp_path)


def test_counters_for_root_alone_are_told_as_such(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = tree.folder / "intel-rapl:1" / "energy_uj"
    closed.chmod(0)
    if os.access(closed, os.R_OK):  # root reads all the same
        read = Path.read_text

        def read_text(path: Path, *arguments: str, **named: str) -> str:
            if path == closed:
                raise PermissionError(13, "Permission denied", str(path))
            return read(path, *arguments, **named)

        monkeypatch.setattr(Path, "read_text", read_text)
    # The other socket alone would not be the processors' energy.
    with pytest.raises(Unmeasured, match=r"root alone here \(.*intel-rapl:1/energy_uj: permission denied\)"):
        rapl_meter(tree.folder)


def test_what_is_no_counter_is_told(tree: Tree) -> None:
    (tree.folder / "intel-rapl:0" / "energy_uj").write_text("nothing")
    with pytest.raises(Unmeasured, match="RAPL cannot be read"):
        rapl_meter(tree.folder)
