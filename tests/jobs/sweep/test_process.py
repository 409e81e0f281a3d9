"""One process: its log, why it ended in one line, and its share of the machine against arithmetic by hand."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from neq_cli.errors import RunDirectoryError, TrainingError
from neq_cli.jobs.sweep import process as job_module
from neq_cli.jobs.sweep.process import Job, cores, cuda_devices, shared_environment, train_command
from neq_cli.runs.views.live.sweep_state import SweptRun


def job(folder: Path, script: str, **changes: str) -> Job:
    run = SweptRun("seed=1", ["1"], folder / "run", 2)
    return Job(run, 0, ["sh", "-c", script], folder / "log", changes)


def ended(one: Job, seconds: float = 20) -> int:
    end = time.monotonic() + seconds
    while (code := one.poll()) is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    return code


def test_a_run_is_trained_by_neq_train() -> None:
    command = train_command("small.yaml", ["seed=1"], Path("here/runs/seed=1"))
    assert command[:3] == [sys.executable, "-m", "neq_cli.jobs.sweep.child"]
    assert " ".join(command[3:]) == "train small.yaml seed=1 -o here/runs/seed=1 --resume --progress plain"


def test_both_streams_go_to_the_log_which_later_attempts_continue(tmp_path: Path) -> None:
    first = job(tmp_path, "echo out; echo $WORD >&2; exit 3", WORD="hello")
    assert ended(first) == 3
    assert first.failure() == "hello"
    first.close()
    second = job(tmp_path, "exit 4")
    assert ended(second) == 4
    assert second.failure() == "exit code 4"  # and not what the first one said last
    second.close()
    assert (tmp_path / "log").read_text() == "out\nhello\n"


def test_the_reason_is_that_of_status_json_where_this_process_wrote_it(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    status = tmp_path / "run" / "status.json"
    one = job(tmp_path, f'echo last words; echo "{{\\"state\\": \\"failed\\", \\"reason\\": \\"a\\u001b[31mb\\", '
              f'\\"pid\\": $$}}" > {status}; exit 1')  # fmt: skip
    assert ended(one) == 1
    assert one.failure() == "a\N{REPLACEMENT CHARACTER}[31mb"
    status.write_text(json.dumps({"state": "failed", "reason": "of another time", "pid": 1}))
    assert one.failure() == "last words"
    status.write_text("{")
    assert one.failure() == "last words"
    one.close()


def test_words_on_the_way_out_cannot_escape(tmp_path: Path) -> None:
    one = job(tmp_path, r"printf 'a\n\033[2Jbad \342\200\256 end\n\n'; exit 1")
    ended(one)
    assert one.failure() == "\N{REPLACEMENT CHARACTER}[2Jbad \N{REPLACEMENT CHARACTER} end"
    one.close()


def test_a_killed_process_is_said_to_be(tmp_path: Path) -> None:
    one = job(tmp_path, "kill -9 $$")
    assert ended(one) == -signal.SIGKILL
    assert one.failure() == "killed by SIGKILL; the next call goes on with it"
    one.close()


def test_a_log_is_kept_short_and_keeps_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_module, "LARGEST_LOG", 2000)
    monkeypatch.setattr(job_module, "_KEPT", 500)
    script = "i=0; while [ $i -lt 300 ]; do i=$((i+1)); echo line $i of many; done; touch half; read x; echo the end"
    one = Job(SweptRun("a", [], tmp_path, 1), 0, ["sh", "-c", f"cd {tmp_path}; {script}"], tmp_path / "log", {})
    while not (tmp_path / "half").exists():
        time.sleep(0.01)
    one.poll()
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[0] == "(earlier lines are removed)"
    assert lines[-1] == "line 300 of many"
    assert 20 < len(lines) < 40
    assert lines[1:] == [f"line {number} of many" for number in range(302 - len(lines), 301)]
    one._process.stdin.close()  # type: ignore[union-attr]
    ended(one)
    assert (tmp_path / "log").read_text().endswith("line 300 of many\nthe end\n")
    os.close(one._log)


def test_what_cannot_be_started_is_one_line(tmp_path: Path) -> None:
    run = SweptRun("seed=1", ["1"], tmp_path / "run", 2)
    with pytest.raises(TrainingError, match=r"^seed=1: its process cannot be started: .*; call again to go on$"):
        Job(run, 0, [str(tmp_path / "nothing")], tmp_path / "log", {})
    (tmp_path / "away").symlink_to(tmp_path / "precious")
    with pytest.raises(RunDirectoryError, match="a link, where neq writes"):
        Job(run, 0, ["true"], tmp_path / "away", {})
    assert not (tmp_path / "precious").exists()
    with pytest.raises(TrainingError, match="cannot be started"):
        Job(run, 0, ["true"], tmp_path / "no" / "such" / "folder", {})


def test_it_has_a_session_of_its_own(tmp_path: Path) -> None:
    one = job(tmp_path, "read x; exit 0")
    assert os.getsid(one._process.pid) == one._process.pid != os.getsid(0)
    one.send("SIGTERM")
    assert ended(one) == -signal.SIGTERM
    one.close()


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
