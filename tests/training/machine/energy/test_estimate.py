"""codecarbon's estimate, for real where it is installed: quiet, without a network and without a file of its own."""

from __future__ import annotations

import socket
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest

from neq_cli.training.machine.energy.estimate import estimating_meter
from neq_cli.training.machine.energy.meter import EnergyError


def test_a_missing_library_says_what_else_there_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    with pytest.raises(
        EnergyError, match=r"nothing here measures it: no RAPL; pip install 'neq\[codecarbon\]'"
    ) as said:
        estimating_meter("no RAPL")
    assert "\n" not in str(said.value)


def test_it_estimates_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("codecarbon")

    def refuse(*arguments: object) -> None:
        raise AssertionError(f"connects to {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CODECARBON_SAVE_TO_FILE", "true")
    monkeypatch.setenv("CODECARBON_EMISSIONS_ENDPOINT", "http://127.0.0.1:9/")
    threads = threading.active_count()
    meter = estimating_meter("nothing")
    assert meter.how.startswith("an estimate by codecarbon ")
    assert threading.active_count() == threads  # nothing is looked at before training begins
    seen = [meter.joules()]
    for _ in range(2):
        time.sleep(1.2)
        seen.append(meter.joules())
    meter.close()
    # Of a machine that does anything at all; no two seconds of it take a hundred kilowatts.
    assert all(0.1 < after - before < 1e5 for before, after in pairwise(seen))
    assert threading.active_count() == threads
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_where_it_does_not_work_that_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    codecarbon = pytest.importorskip("codecarbon")

    def broken(**arguments: object) -> None:
        raise RuntimeError("no such luck\nand more")

    monkeypatch.setattr(codecarbon, "OfflineEmissionsTracker", broken)
    with pytest.raises(EnergyError, match=r"does not work here \(RuntimeError: no such luck\); set it to false"):
        estimating_meter("nothing")
