"""A run on two machines, each an agent of torchrun of its own on this one, whose processes and agents are killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import neq_cli

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(neq_cli.__file__).parent.parent)}
RECIPE = """
model: {name: resnet8, kwargs: {num_classes: 10, in_channels: 1, width: 4}}
data: {name: digits, workers: 0, probe_size: 50, augment: crop}
epochs: 12
batch_size: 30
optimizer: {name: sgd, lr: 0.1, momentum: 0.9}
policy: {kind: neq, epsilon: 0.02}
checkpoint_minutes: 0.0005
deterministic: true
channels_last: false
device: cpu
"""
MACHINES = 2

pytestmark = pytest.mark.slow


class Machine:
    """An agent with one process that trains; what both say goes to one file."""

    def __init__(self, folder: Path, number: int, port: int, run: str, restarts: int) -> None:
        self.said = folder / f"{run}-{number}.txt"
        agent = ["--nnodes", str(MACHINES), "--nproc-per-node=1", "--rdzv-backend=c10d", f"--max-restarts={restarts}"]
        agent += [f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=run"]
        recipe = ["-m", "neq_cli", "train", "small.yaml", "-o", run, "--resume", "--progress", "plain"]
        with self.said.open("a") as file:
            self.agent = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *agent, *recipe],
                cwd=folder,
                stdout=file,
                stderr=file,
                env=ENVIRONMENT,
                start_new_session=True,
            )

    def process(self) -> int:
        """Return the process that trains."""
        children = Path(f"/proc/{self.agent.pid}/task/{self.agent.pid}/children").read_text().split()
        (found,) = [int(child) for child in children if "neq_cli" in Path(f"/proc/{child}/cmdline").read_text()]
        return found

    def end(self) -> None:
        """Leave nothing of it behind."""
        if self.agent.poll() is None:
            os.killpg(self.agent.pid, signal.SIGKILL)
        self.agent.wait()


def start(folder: Path, run: str, restarts: int = 0) -> list[Machine]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [Machine(folder, number, port, run, restarts) for number in range(MACHINES)]


def ended(machines: list[Machine], seconds: float) -> list[int]:
    """Return the agents' exit codes; whoever has not ended by then is killed, and fails the test."""
    deadline = time.monotonic() + seconds
    try:
        return [machine.agent.wait(max(0.1, deadline - time.monotonic())) for machine in machines]
    finally:
        for machine in machines:
            machine.end()


def wait_for_rows(run: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while not (run / "metrics.csv").exists() or (run / "metrics.csv").read_text().count("\n") <= count:
        assert time.monotonic() < deadline, "no rows"
        time.sleep(0.05)


def last_of(machines: list[Machine]) -> Machine:
    """Return the machine whose process is number 1; which one it is, the agents settle among themselves."""
    for machine in machines:
        environment = Path(f"/proc/{machine.process()}/environ").read_bytes().split(b"\0")
        if b"RANK=1" in environment:
            return machine
    raise AssertionError("no process 1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that nobody disturbs."""
    if not Path("/proc/self/task").exists():
        pytest.skip("finds processes by /proc")
    folder = tmp_path_factory.mktemp("nodes")
    (folder / "small.yaml").write_text(RECIPE)
    machines = start(folder, "straight")
    assert ended(machines, 240) == [0, 0], [machine.said.read_text() for machine in machines]
    return folder


@pytest.mark.parametrize("lost", ["process", "agent", "machine", "asked"])
def test_what_is_lost_ends_all_within_a_minute_and_is_gone_on_with(
    folder: Path, same_run: Callable[..., None], lost: str
) -> None:
    run = folder / lost
    machines = start(folder, lost)
    wait_for_rows(run, 3)
    machine = last_of(machines)
    process = machine.process()
    if lost == "asked":
        machine.agent.terminate()
    if lost in ("agent", "machine"):
        machine.agent.kill()
    if lost in ("process", "machine"):
        os.kill(process, signal.SIGKILL)
    assert 0 not in ended(machines, 60)
    status = json.loads((run / "status.json").read_text())
    if lost in ("process", "machine"):
        reason = "lost process 1, which was killed, or whose machine is gone; --resume goes on"
        assert (status["state"], status["reason"]) == ("failed", reason)
    else:  # torchrun's agents send SIGTERM to the processes of one that is asked to end, or is lost alone
        assert (status["state"], status["reason"]) == ("interrupted", "SIGTERM")
    machines = start(folder, lost)
    said = [machine.said.read_text() for machine in machines]
    assert ended(machines, 240) == [0, 0], said
    same_run(folder / "straight", run, str(said))


def test_agents_that_may_restart_go_on_by_themselves(folder: Path, same_run: Callable[..., None]) -> None:
    machines = start(folder, "restarted", restarts=2)
    wait_for_rows(folder / "restarted", 3)
    os.kill(last_of(machines).process(), signal.SIGKILL)
    assert ended(machines, 240) == [0, 0], [machine.said.read_text() for machine in machines]
    same_run(folder / "straight", folder / "restarted")
