"""Threads and devices for processes at once, against arithmetic by hand; what the user has set stays."""

from __future__ import annotations

import pytest

from neq_cli.jobs.sweep.sharing import cores, cuda_devices, shared_environment


@pytest.mark.parametrize(("jobs", "threads"), [(2, "8"), (3, "5"), (16, "1"), (40, "1")])
def test_cores_are_shared_out(jobs: int, threads: str) -> None:
    assert shared_environment(0, jobs, "cpu", {}, 16, []) == {"OMP_NUM_THREADS": threads}


def test_one_process_alone_has_what_torch_takes() -> None:
    assert shared_environment(0, 1, "auto", {}, 16, ["0", "1"]) == {}


def test_what_the_user_has_set_stays() -> None:
    assert shared_environment(0, 4, "cpu", {"OMP_NUM_THREADS": "3"}, 16, []) == {}


def test_processes_take_devices_by_turns() -> None:
    changes = [shared_environment(slot, 5, "auto", {"OMP_NUM_THREADS": "1"}, 16, ["4", "7"]) for slot in range(5)]
    assert [change["CUDA_VISIBLE_DEVICES"] for change in changes] == ["4", "7", "4", "7", "4"]
    assert shared_environment(1, 2, "cuda", {}, 4, ["0"]) == {"OMP_NUM_THREADS": "2"}
    for device in ("cuda:1", "cpu", "mps"):
        assert "CUDA_VISIBLE_DEVICES" not in shared_environment(1, 2, device, {}, 4, ["0", "1"])


def test_devices_keep_the_names_the_user_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert cuda_devices({}) == ["0", "1"]
    assert cuda_devices({"CUDA_VISIBLE_DEVICES": "5, GPU-abc"}) == ["5", "GPU-abc"]
    assert cuda_devices({"CUDA_VISIBLE_DEVICES": "5,6,99"}) == ["5", "6"]  # torch stops at the first it does not find
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert cuda_devices({"CUDA_VISIBLE_DEVICES": "-1"}) == []


@pytest.mark.gpu
def test_there_is_a_device_where_torch_has_one() -> None:
    assert cuda_devices({})


def test_there_is_a_core() -> None:
    assert cores() >= 1
