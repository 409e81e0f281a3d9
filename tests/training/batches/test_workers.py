"""Worker processes: their deaths are one line, at once and nowhere else; signals to all leave them; none outlives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from neq_cli.errors import TrainingError
from neq_cli.training.batches import workers as module
from neq_cli.training.batches.workers import Batches, in_batches

ROOT = Path(__file__).parents[3]
KILLED = (
    "a process that loads images ended (killed, perhaps for memory); "
    "lower data.workers or batch_size, or use data.cache=none"
)


class Reported(Dataset[Any]):
    """Images whose labels are the process that read them; each takes ``seconds``."""

    def __init__(self, size: int = 400, seconds: float = 0.01, error: Exception | None = None) -> None:
        self.size = size
        self.seconds = seconds
        self.error = error

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        time.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        return torch.full((3, 2, 2), float(index)), os.getpid()


def is_running(pid: int) -> bool:
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return done.stdout.strip()[:1] not in ("", "Z")


def wait_until_gone(pids: set[int], seconds: float = 4) -> None:
    """torch's workers look for their parent every 5 seconds, and wait as long for each other."""
    end = time.monotonic() + seconds
    while any(map(is_running, pids)):
        assert time.monotonic() < end
        time.sleep(0.02)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("waiting", [True, False])
@pytest.mark.parametrize("persistent", [True, False])
def test_a_killed_worker_is_one_line_when_the_next_batch_is_asked_for(persistent: bool, waiting: bool) -> None:
    pids: set[int] = set()
    told: list[float] = []

    def read() -> None:
        for number, (_, labels) in enumerate(in_batches(Reported(), 2, 2, 0, persistent_workers=persistent)):
            pids.update(labels.tolist())
            if number == 5 and waiting:
                threading.Timer(0.1, kill, [min(pids)]).start()
            elif number == 5:
                kill(min(pids))
                time.sleep(0.3)  # the signal of its death interrupts this; a file could be half written
            if number == 5:
                told.append(time.monotonic())

    with pytest.raises(TrainingError) as raised:
        read()
    assert str(raised.value) == KILLED
    assert len(pids) == 2
    assert len(told) == 1
    assert time.monotonic() - told[0] < 4
    wait_until_gone(pids)
    # Nothing is left behind that would disturb others.
    assert len(list(in_batches(Reported(8, 0), 2, 2, 0))) == 4


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's"),
            "shared memory is full for the processes that load images; ",
        ),
        (
            RuntimeError("unable to write to file </torch_7_1>: No space left on device (28)"),
            "shared memory is full for the processes that load images; ",
        ),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), KILLED),
        (ConnectionResetError(104, "Connection reset by peer"), KILLED),
        (EOFError(), KILLED),
        (RuntimeError("received 0 items of ancdata"), "too many files are open for the processes that load images; "),
        (OSError(24, "Too many open files"), "too many files are open for the processes that load images; "),
        (OSError(12, "Cannot allocate memory"), "not enough memory for the processes that load images; "),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "not enough memory for the processes"),
    ],
)
def test_what_torch_and_the_system_say_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, line: str
) -> None:
    def failing(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(Batches, "_awaited", failing)
    with pytest.raises(TrainingError) as raised:
        list(in_batches(Reported(), 2, 2, 0))
    assert str(raised.value).startswith(line)
    assert "\n" not in str(raised.value)
    with pytest.raises(type(error)):  # no worker, no such reason
        list(in_batches(Reported(), 2, 0, 0))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_of_the_programs_stays_what_it_is(workers: int) -> None:
    with pytest.raises(RuntimeError, match="shapes differ") as raised:
        list(in_batches(Reported(error=RuntimeError("shapes differ")), 2, workers, 0))
    assert len(list(in_batches(Reported(8, 0), 2, 1, 0))) == 4  # while the workers are still held by the error
    del raised


PROGRAM = """
import signal, sys, time
sys.path.insert(0, {tests!r})
from test_workers import Reported
from neq_cli.training.batches.workers import in_batches
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: print("signal", int(number), flush=True))
pids, reading = set(), {reading}
for number, (_, labels) in enumerate(in_batches(Reported(10_000), 2, 2, 0)):
    pids |= set(labels.tolist())
    if number == 5:
        print(*pids, flush=True)
    if number >= 5 and not reading:
        time.sleep(60)
    if number % 20 == 0:
        print("on", flush=True)
"""


def started(reading: bool) -> tuple[subprocess.Popen[str], set[int]]:
    """A program with two workers in a process group of its own, and their ids."""
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(tests=str(Path(__file__).parent), reading=reading)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert program.stdout is not None
    assert program.stdout.readline() == "on\n"
    return program, set(map(int, program.stdout.readline().split()))


def test_signals_to_the_whole_group_leave_workers_reading() -> None:
    program, pids = started(reading=True)
    try:
        assert program.stdout is not None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.killpg(program.pid, number)
            while (line := program.stdout.readline()) != f"signal {int(number)}\n":
                assert line == "on\n"
        assert [program.stdout.readline() for _ in range(3)] == ["on\n"] * 3
        assert len(pids) == 2
        assert all(map(is_running, pids))
    finally:
        kill(program.pid)
        program.wait()
    wait_until_gone(pids)


def test_idle_workers_end_when_the_program_is_killed() -> None:
    program, pids = started(reading=False)
    time.sleep(0.3)
    assert [is_running(pid) for pid in pids] == [True, True]
    kill(program.pid)
    program.wait()
    wait_until_gone(pids)


def test_a_stuck_worker_does_not_keep_the_program_from_ending() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_workers import Reported\n"
        "from neq_cli.training.batches.workers import in_batches\n"
        "import signal, time\n"
        "signal.alarm(2); signal.signal(signal.SIGALRM, lambda *_: sys.exit(3))\n"
        "try:\n"
        "    next(iter(in_batches(Reported(seconds=1000), 2, 2, 0)))\n"
        "finally:\n"
        "    print(time.monotonic())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, timeout=60, check=False, capture_output=True, text=True
    )
    assert done.returncode == 3
    assert time.monotonic() - float(done.stdout) < 8  # torch waits 5 seconds for each


def test_a_program_that_is_forked_does_not_end_the_workers() -> None:
    loaded = in_batches(Reported(20, 0), 2, 1, 0)
    list(loaded)
    assert len(module._started) >= 1
    child = os.fork()
    if child == 0:
        module._end_all()
        os._exit(len(module._started))
    assert os.waitpid(child, 0)[1] == 0
    assert len(list(loaded)) == 10


@pytest.mark.filterwarnings("error:.*worker processes in total")
def test_more_workers_than_cpus_are_the_recipes_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    batches = in_batches(torch.arange(6), 2, 3, 1, collate_fn=torch.stack)  # type: ignore[arg-type]
    assert torch.cat(list(batches)).tolist() == list(range(6))


@pytest.mark.parametrize(
    ("error", "in_thread", "shown"),
    [
        (ConnectionResetError("hung up"), True, False),
        (EOFError(), True, False),
        (ConnectionResetError("hung up"), False, True),
        (ValueError("a mistake"), True, True),
    ],
)
def test_a_worker_says_nothing_of_a_main_process_that_hung_up(
    error: Exception, in_thread: bool, shown: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """While it hands a batch over, in the thread that does, because another worker has died."""

    def say() -> None:
        module._say_unless_left(type(error), error, None)

    if in_thread:
        thread = threading.Thread(target=say)
        thread.start()
        thread.join()
    else:
        say()
    assert (type(error).__name__ in capsys.readouterr().err) is shown
