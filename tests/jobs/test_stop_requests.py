"""Signals to real processes that train: what they save, say and leave, and that the run goes on exactly from there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neq_cli.training.loop.checkpoint import load_state

Start = Callable[..., Any]
AtStep = Callable[[int, str], str]

# The run as it is when nobody interrupts it: 2 epochs of 15 steps, an update every second step and after the last.
PLAIN = ("checkpoint_minutes=15", "epochs=2")

IN_THE_PROBE = """
import os, signal
from neq_cli.freezing import Freezer

step = Freezer.step


def probed(self):
    os.kill(os.getpid(), signal.SIGINT)
    return step(self)


Freezer.step = probed
"""

IN_A_CHECKPOINT = """
import os, signal
from neq_cli.training.loop import checkpoint

save_state, done = checkpoint.save_state, 0


def interrupted(*arguments):
    global done
    done += 1
    if done == {number}:
        for number in {signals}:
            os.kill(os.getpid(), number)
    save_state(*arguments)
    if done == {number}:
        for number in {signals_after}:
            os.kill(os.getpid(), number)


checkpoint.save_state = interrupted
"""


def send(number: int) -> str:
    return f"os.kill(os.getpid(), {int(number)})"


def slow(*cases: Any) -> list[Any]:
    """Cases for the slow run only."""
    plain = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*values, marks=pytest.mark.slow) for values in plain]


def status(run: Path) -> tuple[str, str | None]:
    content = json.loads((run / "status.json").read_text())
    return content["state"], content["reason"]


def reached(run: Path) -> tuple[int, int]:
    """Whole epochs, and steps of the next."""
    state = load_state(run / "checkpoints" / "last.safetensors")
    return state["epoch"], state["so_far"]["steps"] if state["so_far"] is not None else 0


def start(neq: Start, before: str = "", *more: str) -> Any:
    return neq("train", "rich.yaml", *PLAIN, *more, "-o", "run", before=before)


def resume(neq: Start, *more: str) -> Any:
    process = neq("train", "rich.yaml", *PLAIN, *more, "-o", "run", "--resume")
    assert process.wait() == 0, process.text
    return process


@pytest.mark.parametrize(
    ("number", "code", "last_line"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "ended by SIGTERM"),
        (signal.SIGUSR1, 143, "ended by SIGUSR1"),
    ],
)
def test_a_signal_saves_the_very_update(
    neq: Start, folder: Path, straight: Path, same_run: Start, number: int, code: int, last_line: str, at_step: AtStep
) -> None:
    process = start(neq, at_step(5, send(number)))
    assert process.wait() == code
    name = signal.Signals(number).name
    assert process.lines[-1].startswith(last_line)
    assert f"{name}: saving epoch 1, step 6" in process.text
    assert "Traceback" not in process.text
    assert status(folder / "run") == ("interrupted", name)
    assert reached(folder / "run") == (0, 6)
    assert "after epoch 0, 6 steps into the next" in resume(neq).text
    same_run(straight, folder / "run")


@pytest.mark.parametrize("step", [15, 16, 30, *slow(14, 29)])
def test_at_the_edges_of_an_epoch_too(
    neq: Start, folder: Path, straight: Path, same_run: Start, step: int, at_step: AtStep
) -> None:
    process = start(neq, at_step(step, send(signal.SIGTERM)))
    code = process.wait()
    expected = {14: (0, 14), 15: (0, 15), 16: (1, 2), 29: (1, 14), 30: (1, 15)}[step]
    assert (code, reached(folder / "run")) == (143, expected), process.text
    assert status(folder / "run") == ("interrupted", "SIGTERM")
    resume(neq)
    same_run(straight, folder / "run", process.text)


def test_a_signal_in_the_probe_ends_the_epoch_first(neq: Start, folder: Path, straight: Path, same_run: Start) -> None:
    process = start(neq, IN_THE_PROBE)
    assert process.wait() == 130, process.text
    assert reached(folder / "run") == (1, 0)
    resume(neq)
    same_run(straight, folder / "run")


def test_a_signal_while_a_checkpoint_is_written_waits_for_it(
    neq: Start, folder: Path, straight: Path, same_run: Start
) -> None:
    before = IN_A_CHECKPOINT.format(number=2, signals=[int(signal.SIGTERM)], signals_after=[])
    process = start(neq, before)  # the first is the best one
    assert process.wait() == 143, process.text
    assert reached(folder / "run") == (1, 0)
    resume(neq)
    same_run(straight, folder / "run")


@pytest.mark.parametrize(
    ("number", "after"), [(2, False), (2, True), (4, False), *slow((1, False), (1, True), (4, True))]
)
def test_a_second_interrupt_within_a_checkpoint_leaves_the_one_before(
    neq: Start, folder: Path, straight: Path, same_run: Start, number: int, after: bool
) -> None:
    twice = [int(signal.SIGINT)] * 2
    before = IN_A_CHECKPOINT.format(number=number, signals=[] if after else twice, signals_after=twice if after else [])
    process = start(neq, before)
    assert process.wait() == 130, process.text
    assert "Traceback" not in process.text
    assert status(folder / "run") == ("interrupted", "SIGINT")
    assert not list((folder / "run").rglob("*.partial"))
    resume(neq)
    same_run(straight, folder / "run", process.text)


def test_a_second_interrupt_leaves_at_once(
    neq: Start, folder: Path, straight: Path, same_run: Start, at_step: AtStep
) -> None:
    process = start(neq, at_step(20, "open('asleep', 'w').close(); time.sleep(600)"))
    process.until(lambda: (folder / "asleep").exists())
    process.kill(signal.SIGINT)
    assert not process.ended(0.2)
    process.kill(signal.SIGINT)
    assert process.wait(10) == 130
    assert process.lines[-1].startswith("interrupted")
    assert status(folder / "run") == ("interrupted", "SIGINT")
    assert reached(folder / "run") == (1, 0)
    resume(neq)
    same_run(straight, folder / "run")


def test_ctrl_c_in_a_terminal_hits_the_workers_too(neq: Start, folder: Path, same_run: Start) -> None:
    workers = ("data.workers=2", "data.cache=none", "data.image_size=9", "epochs=300")
    run = folder / "run"
    process = start(neq, "", *workers)
    process.until(lambda: (run / "checkpoints" / "last.safetensors").exists())
    assert len(process.descendants()) >= 2
    process.kill(signal.SIGINT, group=True)
    assert process.wait() == 130, process.text
    assert [line for line in process.lines if "Traceback" in line or "Error" in line] == []
    assert process.lines[-1].startswith("interrupted")
    process.until_alone()
    more = (*workers, f"epochs={reached(run)[0] + 1}")
    resume(neq, *more)
    process = neq("train", "rich.yaml", *PLAIN, *more, "-o", "straight")
    assert process.wait() == 0
    same_run(folder / "straight", run)


@pytest.mark.parametrize("seconds", [0.0, *slow(*(number * 0.004 for number in range(1, 30)))])
def test_ctrl_c_while_workers_start_is_one_line(neq: Start, folder: Path, seconds: float) -> None:
    process = start(neq, "", "data.workers=2", "data.cache=none", "data.image_size=9", "epochs=300")
    process.until(lambda: len(process.descendants()) >= 1)
    time.sleep(seconds)
    process.kill(signal.SIGINT, group=True)
    assert process.wait() == 130, process.text
    assert [line for line in process.lines if "Traceback" in line or "Error" in line] == []
    process.until_alone()


def test_a_signal_that_nohup_ignores_stays_ignored(
    neq: Start, folder: Path, straight: Path, same_run: Start, at_step: AtStep
) -> None:
    ignored = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    process = start(neq, ignored + at_step(5, send(signal.SIGINT)))
    assert process.wait() == 0, process.text
    same_run(straight, folder / "run")


WHILE_IT_BEGINS = """
import os, signal
from neq_cli.{module} import {owner}

former = {owner}.{name}


def interrupted(*arguments, **options):
    os.kill(os.getpid(), {number})
    return former(*arguments, **options)


{owner}.{name} = interrupted
"""


@pytest.mark.parametrize(
    ("module", "owner", "name", "number", "code"),
    [
        ("recipe", "load", "load_recipe", signal.SIGUSR1, 143),
        ("training", "session", "load_data", signal.SIGINT, 130),
        ("training", "session", "build_model", signal.SIGTERM, 143),
        ("training.machine", "device", "environment", signal.SIGINT, 130),
    ],
)
def test_a_signal_before_the_first_step_is_one_line_and_no_damage(
    neq: Start, folder: Path, module: str, owner: str, name: str, number: int, code: int, at_step: AtStep
) -> None:
    before = WHILE_IT_BEGINS.format(module=module, owner=owner, name=name, number=int(number))
    process = start(neq, before)
    assert process.wait() == code
    assert len(process.lines) == 1, process.text
    assert not (folder / "run").exists()
    # Also of a run that goes on.
    process = start(neq, at_step(5, send(signal.SIGTERM)))
    assert process.wait() == 143
    process = neq("train", "rich.yaml", *PLAIN, "-o", "run", "--resume", before=before)
    assert process.wait() == code
    assert len(process.lines) == 1, process.text
    assert reached(folder / "run") == (0, 6)
    assert status(folder / "run") == ("interrupted", "SIGTERM")


def catches(process: int, number: int) -> bool:
    """Whether a process has said what is to happen upon a signal, as Linux tells of it."""
    fields = dict(line.split(":\t", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return bool(int(fields.get("SigCgt", "0"), 16) >> (number - 1) & 1)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
@pytest.mark.parametrize("seconds", [0, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0, 2.5, 3.0])
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGHUP, 143)],
)
def test_a_signal_while_torch_is_imported_is_one_line(folder: Path, seconds: float, number: int, code: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "neq_cli", "train", "rich.yaml", "-o", "run", "epochs=1000"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        end = time.monotonic() + 30
        while not catches(process.pid, signal.SIGUSR1) and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(seconds)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, said
    assert "Traceback" not in said
    assert "ignored" not in said
    assert said.splitlines()[-1].startswith(("interrupted", "ended by SIG"))
