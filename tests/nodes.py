"""What tests of several machines have in common: agents of torchrun, each with the processes of one of them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

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
TRAINED = ["-m", "neq_cli", "train", "small.yaml", "--resume", "--progress", "plain", "-o"]


class Machine:
    """An agent with processes that train; what all of them say goes to one file.

    ``within`` is a command that runs another one there, ``given`` are further options of torchrun.
    """

    def __init__(self, folder: Path, number: int, run: str, agent: Sequence[str], within: Sequence[str] = ()) -> None:
        self.said = folder / f"{run}-{number}.txt"
        with self.said.open("a") as file:
            self.agent = subprocess.Popen(
                [*within, sys.executable, "-m", "torch.distributed.run", *agent, *TRAINED, run],
                cwd=folder,
                stdout=file,
                stderr=file,
                env=ENVIRONMENT,
                start_new_session=True,
            )

    def processes(self) -> list[int]:
        """Return the processes that train."""
        children = Path(f"/proc/{self.agent.pid}/task/{self.agent.pid}/children").read_text().split()
        return [int(child) for child in children if "neq_cli" in Path(f"/proc/{child}/cmdline").read_text()]

    def end(self) -> None:
        """Leave nothing of it behind."""
        if self.agent.poll() is None:
            os.killpg(self.agent.pid, signal.SIGKILL)
        self.agent.wait()


def agent_options(count: int, processes: int, endpoint: str, *given: str) -> list[str]:
    """Return torchrun's options on each of ``count`` machines with so many ``processes``, that meet at ``endpoint``."""
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-id=run"]
    return [f"--nnodes={count}", f"--nproc-per-node={processes}", *meeting, *given]


def free_port() -> int:
    """Return a port that nobody has at present."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port: int = free.getsockname()[1]
    return port


def start(folder: Path, run: str, *given: str, count: int = 2, processes: int = 1) -> list[Machine]:
    """Start ``count`` machines on this one, of which the first keeps torchrun's store."""
    port = free_port()
    agent = agent_options(count, processes, f"localhost:{port}", *given)
    machines = [Machine(folder, 0, run, agent)]
    deadline = time.monotonic() + 120
    while count > 1 and not _listens(port):
        assert time.monotonic() < deadline, said_by(machines)
        time.sleep(0.05)
    return machines + [Machine(folder, number, run, agent) for number in range(1, count)]


def _listens(port: int) -> bool:
    """Whether somebody on this machine takes connections there."""
    tables = [Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6") if Path(f"/proc/net/{name}").exists()]
    return any(re.search(rf":{port:04X} \S+ 0A ", table) for table in tables)


def ended(machines: list[Machine], seconds: float) -> list[int]:
    """Return the agents' exit codes; whoever has not ended by then is killed, and fails the test."""
    deadline = time.monotonic() + seconds
    try:
        return [machine.agent.wait(max(0.1, deadline - time.monotonic())) for machine in machines]
    finally:
        for machine in machines:
            machine.end()


def wait_for_rows(run: Path, count: int) -> None:
    """Wait until ``run`` has more than ``count`` epochs."""
    deadline = time.monotonic() + 120
    while not (run / "metrics.csv").exists() or (run / "metrics.csv").read_text().count("\n") <= count:
        assert time.monotonic() < deadline, "no rows"
        time.sleep(0.05)


def how_it_ended(run: Path) -> tuple[str, str]:
    """Return state and reason of a run."""
    status = json.loads((run / "status.json").read_text())
    return status["state"], status["reason"]


def said_by(machines: list[Machine]) -> str:
    """Return what all of them said."""
    return "\n".join(machine.said.read_text() for machine in machines)
