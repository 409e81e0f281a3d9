"""Runs that fail, on real processes: one clear line, a status that says why, and a checkpoint to go on from exactly."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from neq_cli.runs.store.writer import ELSEWHERE
from neq_cli.training.loop.checkpoint import load_state

Start = Callable[..., Any]
AtStep = Callable[[int, str], str]

PLAIN = ("checkpoint_minutes=0.0001", "epochs=3")
WORKERS = ("data.workers=2", "data.cache=none", "data.image_size=9")


def status(run: Path) -> tuple[str, str | None]:
    content = json.loads((run / "status.json").read_text())
    return content["state"], content["reason"]


def last(run: Path) -> Any:
    return load_state(run / "checkpoints" / "last.safetensors")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small file system")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mount: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def start(neq: Start, run: Path, before: str = "", *more: str) -> Any:
    return neq("train", "rich.yaml", *PLAIN, *more, "-o", run, "--resume", before=before)


def assert_failed(process: Any, run: Path, *said: str) -> None:
    """Assert that a run ended as failed, by one line with these words, and that nothing of it lives on."""
    assert process.wait() == 1, process.text
    assert "Traceback" not in process.text
    line = process.lines[-1]
    for words in said:
        assert words in line, process.text
    assert status(run) == ("failed", line)
    process.until_alone()


def fill(disk: Path, left: int) -> Path:
    """Leave so many bytes."""
    ballast = disk / "ballast"
    free = os.statvfs(disk)
    ballast.write_bytes(bytes(free.f_bavail * free.f_frsize - left))
    return ballast


def assert_survives_a_full_disk(neq: Start, same_run: Start, straight: Path, disk: Path, room: int) -> None:
    run = disk / "run"
    ballast = fill(disk, room)
    process = start(neq, run)
    assert process.wait() in (1, 2), f"{room} bytes: {process.text}"
    assert "Traceback" not in process.text
    assert "No space left on device" in process.lines[-1]
    assert str(run) in process.lines[-1]
    assert not list(run.rglob("*.partial"))
    if (run / "status.json").exists() and status(run)[0] != "running":
        assert status(run) == ("failed", process.lines[-1])
    process = start(neq, run)  # as full as before
    assert process.wait() in (1, 2)
    assert "Traceback" not in process.text
    for name in ("last", "previous", "best"):
        path = run / "checkpoints" / f"{name}.safetensors"
        assert not path.exists() or load_state(path)
    ballast.unlink()
    process = start(neq, run)
    assert process.wait() == 0, process.text
    same_run(straight, run, f"{room} bytes: {process.text}")
    shutil.rmtree(run)


def test_a_full_disk_loses_nothing(neq: Start, folder: Path, straight: Path, same_run: Start, disk: Path) -> None:
    for room in (24_000, 200_000):
        assert_survives_a_full_disk(neq, same_run, straight, disk, room)


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_point_loses_nothing(
    neq: Start, folder: Path, straight: Path, same_run: Start, disk: Path
) -> None:
    for room in range(0, 500_000, 8192):
        assert_survives_a_full_disk(neq, same_run, straight, disk, room)


def test_a_limit_on_file_sizes_is_one_line(neq: Start, folder: Path, straight: Path, same_run: Start) -> None:
    run = folder / "run"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))\n"
    assert_failed(start(neq, run, limit), run, "checkpoints/", "cannot be written: ", "File too large")
    assert start(neq, run).wait() == 0
    same_run(straight, run)


def test_a_folder_that_goes_in_mid_run(
    neq: Start, folder: Path, straight: Path, same_run: Start, at_step: AtStep
) -> None:
    run, aside = folder / "run", folder / "aside"
    move = f"os.rename({str(run / 'checkpoints')!r}, {str(aside)!r})"
    assert_failed(start(neq, run, at_step(20, move)), run, "checkpoints/", "cannot be written: No such file")
    aside.rename(run / "checkpoints")
    assert start(neq, run).wait() == 0
    same_run(straight, run)


# Without these rights root is refused what anybody is.
NO_RIGHTS_OF_ROOT = """
import ctypes
ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="drops the rights of root as Linux has them")
def test_a_folder_that_becomes_read_only(
    neq: Start, folder: Path, straight: Path, same_run: Start, at_step: AtStep
) -> None:
    run = folder / "run"
    deny = f"os.chmod({str(run / 'checkpoints')!r}, 0o500)"
    process = start(neq, run, NO_RIGHTS_OF_ROOT + at_step(20, deny))
    assert_failed(process, run, "checkpoints/", "cannot be written: Permission denied")
    (run / "checkpoints").chmod(0o700)
    run.chmod(0o500)
    process = start(neq, run, NO_RIGHTS_OF_ROOT)
    assert process.wait() == 2, process.text
    assert process.lines[-1] == f"{run}: cannot be written: Permission denied; {ELSEWHERE}"
    run.chmod(0o700)
    assert start(neq, run).wait() == 0
    same_run(straight, run)


@pytest.mark.skipif(sys.platform != "linux", reason="drops the rights of root as Linux has them")
@pytest.mark.parametrize(
    "command",
    [
        "train rich.yaml -o closed/new",
        "train rich.yaml -o closed/new --resume",
        "train rich.yaml epochs=4 -o closed/run --resume",
        "train rich.yaml epochs=4 -o locked/run --resume",
        "sweep rich.yaml seed=1,2 -o closed/sweep",
        "sweep rich.yaml seed=1,2 -o closed/empty",
        "sweep rich.yaml seed=1,2 -o locked/empty",
        "export closed/run -o closed/weights.safetensors",
        "export closed/run -o file/weights.safetensors",
        "export closed/run -o missing/weights.safetensors",
        "evaluate closed/run -o closed/confusion.png",
        "evaluate closed/run -o missing/confusion.svg",
        "evaluate barred/run",
        "report closed/run -o closed/report.html",
        "report closed/run --svg closed/empty",
        "report closed/run --png closed/figures",
        "init digits closed",
        "init digits closed/new",
        "init digits barred/new",
        "train rich.yaml -o barred/run --resume",
        "train barred/rich.yaml",
        "export barred/run -o weights.safetensors",
        "inspect barred/run",
        "sweep rich.yaml seed=1,2 -o barred/sweep",
    ],
)
def test_every_command_that_cannot_write_is_one_line_of_exit_code_2(
    neq: Start, folder: Path, straight: Path, command: str
) -> None:
    if command.startswith(("report", "evaluate")):
        pytest.importorskip("matplotlib")
    (folder / "file").write_text("")
    for name in ("closed", "locked"):
        shutil.copytree(straight, folder / name / "run")
        (folder / name / "empty").mkdir()
    # In "locked" the file of the lock may be written, but no other one put beside it.
    (folder / "locked" / "empty" / ".lock").write_text("")
    for part in ("neurons", "checkpoints", "."):
        (folder / "locked" / "run" / part).chmod(0o500 if part == "neurons" else 0o700)
    (folder / "barred").mkdir(0o000)
    for path in (*folder.glob("closed/run"), *folder.glob("*/empty"), folder / "closed"):
        path.chmod(0o500)
    process = neq(*command.split(), before=NO_RIGHTS_OF_ROOT)
    assert process.wait() == 2, process.text
    assert len(process.lines) == 1, process.text
    assert any(reason in process.text for reason in ("ermission denied", "Not a directory", "No such file"))
    assert "; " in process.text or "barred" in command  # the mend
    assert "finished epochs" not in process.text
    (folder / "barred").chmod(0o700)
    for path in folder.glob("**/"):
        path.chmod(0o700)


def test_a_run_directory_that_is_deleted_in_mid_run(neq: Start, folder: Path, at_step: AtStep) -> None:
    run = folder / "run"
    process = start(neq, run, at_step(20, f"shutil.rmtree({str(run)!r})"))
    assert process.wait() == 1, process.text
    assert "Traceback" not in process.text
    assert "cannot be written: No such file or directory" in process.lines[-1]
    assert not run.exists()


@pytest.mark.parametrize("step", [20, pytest.param(3, marks=pytest.mark.slow)])
def test_a_worker_that_is_killed_ends_the_run(
    neq: Start, folder: Path, same_run: Start, step: int, at_step: AtStep
) -> None:
    run = folder / "run"
    action = "import multiprocessing; os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)"
    process = start(neq, run, at_step(step, action), *WORKERS)
    assert_failed(process, run, "a process that loads images ended")
    assert start(neq, run, "", *WORKERS).wait() == 0
    process = start(neq, folder / "straight", "", *WORKERS)
    assert process.wait() == 0
    same_run(folder / "straight", run)


def test_memory_that_is_full_is_one_line(
    neq: Start, folder: Path, straight: Path, same_run: Start, at_step: AtStep
) -> None:
    run = folder / "run"
    process = start(neq, run, at_step(20, "torch.empty(2**50)"))
    assert_failed(process, run, "epoch 2: cpu is out of memory; lower batch_size")
    assert start(neq, run).wait() == 0
    same_run(straight, run)


@pytest.mark.parametrize("place", ["full_at_call = 1", "full_at_call = 2", "full_at_batch = 24"])
@pytest.mark.parametrize("command", ["train", "bench"])
def test_memory_that_is_full_before_the_first_step_is_named_too(
    neq: Start, folder: Path, command: str, place: str
) -> None:
    """In the first forward pass ever, in the one after it, and where the memory formats are timed on whole batches."""
    (folder / "full.py").write_text(FULL.format(place=place))
    run = ["-o", "run"] if command == "train" else []
    changes = ["model.entrypoint=full:make", "channels_last=auto", "deterministic=false", "gradient_accumulation=1"]
    process = neq(command, "rich.yaml", *changes, *run)
    assert process.wait() == 1, process.text
    where = "before epoch 1" if command == "train" else "neq bench"
    assert process.lines == [f"{where}: cpu is out of memory; lower batch_size"]
    assert not (folder / "run").exists()


FULL = """
import torch
from nets import make as stock

{place}
calls = 0


def fill(module, inputs):
    global calls
    calls += 1
    if calls == globals().get("full_at_call") or len(inputs[0]) == globals().get("full_at_batch"):
        torch.empty(2**50)


def make(num_classes=10):
    model = stock(num_classes)
    model.register_forward_pre_hook(fill)
    return model
"""


def finite(state: Any) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in state["model"].values() if tensor.is_floating_point())


DIVERGES = "scheduler={name: multistep, milestones: [1], gamma: 1e+38}"


def test_a_loss_that_is_no_number_fails_again_when_resumed(neq: Start, folder: Path) -> None:
    run = folder / "run"
    assert_failed(start(neq, run, "", DIVERGES), run, "epoch 2, step ", "not a finite number any more")
    first = status(run)
    assert finite(last(run))
    process = neq("train", "rich.yaml", *PLAIN, DIVERGES, "optimizer.lr=0.01", "-o", run, "--resume")
    assert process.wait() == 2
    assert "optimizer.lr=0.01: 0.01, but " in process.lines[-1]
    assert status(run) == first
    assert_failed(start(neq, run, "", DIVERGES), run, "not a finite number any more")


@pytest.mark.parametrize("step", [4, 15, 45])
def test_no_checkpoint_has_weights_that_are_no_numbers(neq: Start, folder: Path, step: int, at_step: AtStep) -> None:
    run = folder / "run"
    spoil = "next(self.model.parameters()).data.fill_(float('nan'))"
    process = start(neq, run, at_step(step, spoil), "ema=null")
    assert_failed(process, run, "epoch ", "finite")
    for name in ("last", "previous", "best"):
        path = run / "checkpoints" / f"{name}.safetensors"
        assert not path.exists() or finite(load_state(path))
    for row in (run / "metrics.csv").read_text().splitlines()[1:] if (run / "metrics.csv").exists() else ():
        assert all(cell and math.isfinite(float(cell)) for cell in row.split(","))


OWN = """
import torch


class Policy:
    mu = 0.5

    def __init__(self):
        self.calls = 0

    def choose(self, observations, epoch):
        self.calls += 1
        if BROKEN and epoch == 2:
            raise ZeroDivisionError("of my own")
        return {name: one.velocity.abs() > 0.1 for name, one in observations.items()}

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]
"""


def test_a_policy_of_ones_own_that_fails_can_be_mended_and_gone_on_with(
    neq: Start, folder: Path, same_run: Start
) -> None:
    policy = "policy={kind: entrypoint, entrypoint: 'own:Policy'}"
    (folder / "own.py").write_text("BROKEN = True\n" + OWN)
    run = folder / "run"
    process = start(neq, run, "", policy)
    assert process.wait() == 1
    assert f"{folder}/own.py:15: ZeroDivisionError: of my own" in process.lines[-1]
    assert "Traceback" not in process.text
    assert status(run)[0] == "failed"
    assert "ZeroDivisionError: of my own" in str(status(run)[1])
    (folder / "own.py").write_text("BROKEN = False\n" + OWN)
    assert start(neq, run, "", policy).wait() == 0
    assert start(neq, folder / "straight", "", policy).wait() == 0
    assert last(run)["freezer"]["policy"] == {"calls": 3}
    same_run(folder / "straight", run)


def test_a_model_of_ones_own_that_fails_in_mid_run(
    neq: Start, folder: Path, straight: Path, same_run: Start, at_step: AtStep
) -> None:
    run = folder / "run"
    fail = "raise KeyError('of the model')"
    process = start(neq, run, at_step(20, fail), *WORKERS)
    assert process.wait() == 1
    assert "KeyError: 'of the model'" in process.lines[-1]
    assert "Traceback" not in process.text
    assert status(run) == ("failed", "KeyError: 'of the model'")
    process.until_alone()
