"""A run on two machines, each an agent of torchrun of its own on this one, whose processes and agents get signals."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from nodes import RECIPE, Machine, ended, how_it_ended, said_by, start, wait_for_rows

HANDLED = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"

pytestmark = pytest.mark.slow


def last_of(machines: list[Machine]) -> Machine:
    """Return the machine whose process is number 1; which one it is, the agents settle among themselves."""
    for machine in machines:
        environment = Path(f"/proc/{machine.processes()[0]}/environ").read_bytes().split(b"\0")
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
    assert ended(machines, 240) == [0, 0], said_by(machines)
    return folder


@pytest.mark.parametrize("lost", ["process", "agent", "machine", "asked"])
def test_what_is_lost_ends_all_within_a_minute_and_is_gone_on_with(
    folder: Path, same_run: Callable[..., None], lost: str
) -> None:
    run = folder / lost
    machines = start(folder, lost)
    wait_for_rows(run, 3)
    machine = last_of(machines)
    (process,) = machine.processes()
    if lost == "asked":
        machine.agent.terminate()
    if lost == "agent":  # the one without which the other cannot go on; without the other it would for a while
        machines[0].agent.kill()
    if lost == "machine":
        machine.agent.kill()
    if lost in ("process", "machine"):
        os.kill(process, signal.SIGKILL)
    assert 0 not in ended(machines, 60)
    if lost in ("process", "machine"):
        reason = "lost process 1, which was killed, or whose machine is gone; --resume goes on"
        assert how_it_ended(run) == ("failed", reason)
    else:  # torchrun's agents send SIGTERM to the processes of one that is asked to end, or is lost alone
        assert how_it_ended(run) == ("interrupted", "SIGTERM")
    machines = start(folder, lost)
    assert ended(machines, 240) == [0, 0], said_by(machines)
    same_run(folder / "straight", run, said_by(machines))


@pytest.mark.parametrize(("count", "signalled"), [(1, "agents"), (1, "everyone"), (2, "agents"), (2, "everyone")])
def test_sigusr1_saves_and_ends_on_one_and_two_machines(
    folder: Path, same_run: Callable[..., None], count: int, signalled: str
) -> None:
    """SLURM's `--signal=USR1@60` is for srun's tasks, which are the agents, or for all that they started too."""
    name = f"{signalled}-of-{count}"
    together = {"count": count, "processes": 2 // count}  # two processes either way, as in the straight run
    machines = start(folder, name, HANDLED, **together)
    wait_for_rows(folder / name, 3)
    processes = [process for machine in machines for process in machine.processes()]
    assert len(processes) == 2
    for process in [machine.agent.pid for machine in machines] + (processes if signalled == "everyone" else []):
        os.kill(process, signal.SIGUSR1)
    assert 0 not in ended(machines, 60)
    assert how_it_ended(folder / name) == ("interrupted", "SIGUSR1"), said_by(machines)
    assert f"--resume -o {name} goes on" in said_by(machines)
    machines = start(folder, name, HANDLED, **together)
    assert ended(machines, 240) == [0] * count, said_by(machines)
    same_run(folder / "straight", folder / name, said_by(machines))


def test_agents_that_may_restart_go_on_by_themselves(folder: Path, same_run: Callable[..., None]) -> None:
    machines = start(folder, "restarted", "--max-restarts=2")
    wait_for_rows(folder / "restarted", 3)
    os.kill(last_of(machines).processes()[0], signal.SIGKILL)
    assert ended(machines, 240) == [0, 0], said_by(machines)
    same_run(folder / "straight", folder / "restarted")
