"""A run on two machines with a network between them, which is cut: namespaces of Linux's that a cable joins."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from nodes import RECIPE, Machine, agent_options, ended, how_it_ended, said_by, start, wait_for_rows

NEEDED = ("ip", "unshare", "nsenter", "mount", "hostname")
HOSTS = "127.0.0.1 localhost\n10.77.0.1 node1\n10.77.0.2 node2\n"

pytestmark = pytest.mark.slow


def within(machine: int) -> list[str]:
    """Return what runs a command on a machine, which a process stands for."""
    return ["nsenter", f"--target={machine}", "--net", "--uts", "--mount"]


def call(*command: object) -> None:
    """Run a command; where this machine does not let us, the test is skipped with what it says."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{command[0]}: {done.stderr.strip()}")


@pytest.fixture
def apart(tmp_path: Path) -> Iterator[list[int]]:
    """Two processes, each in network, names and mounts of its own; with them these end, and the cable too."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing or os.geteuid():
        pytest.skip(f"needs {', '.join(missing)}" if missing else "only root may make networks")
    hosts = tmp_path / "hosts"
    hosts.write_text(HOSTS)
    alone = ["unshare", "--net", "--uts", "--mount", "sleep", "900"]
    machines = [subprocess.Popen(alone, stderr=subprocess.DEVNULL) for _ in range(2)]
    try:
        deadline = time.monotonic() + 10
        while any(Path(f"/proc/{one.pid}/comm").read_text() != "sleep\n" for one in machines):
            if time.monotonic() > deadline or any(one.poll() for one in machines):
                pytest.skip("unshare: this machine makes no namespaces")
            time.sleep(0.05)
        first, second = (one.pid for one in machines)
        call("ip", "link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second)
        for number, one in enumerate((first, second), 1):
            call(*within(one), "hostname", f"node{number}")
            call(*within(one), "mount", "--bind", hosts, "/etc/hosts")
            call(*within(one), "ip", "address", "add", f"10.77.0.{number}/24", "dev", "cable")
            for device in ("lo", "cable"):
                call(*within(one), "ip", "link", "set", device, "up")
        yield [first, second]
    finally:
        for machine in machines:
            machine.kill()
            machine.wait()


def begin(folder: Path, run: str, apart: list[int]) -> list[Machine]:
    agent = agent_options(2, 1, "node1:29500")
    return [Machine(folder, number, run, agent, [*within(one), f"--wd={folder}"]) for number, one in enumerate(apart)]


def test_a_network_that_is_cut_ends_both_sides_within_a_minute_and_the_run_goes_on(
    tmp_path: Path, apart: list[int], same_run: Callable[..., None]
) -> None:
    (tmp_path / "small.yaml").write_text(RECIPE)
    straight = start(tmp_path, "straight")
    assert ended(straight, 240) == [0, 0], said_by(straight)
    machines = begin(tmp_path, "cut", apart)
    wait_for_rows(tmp_path / "cut", 3)
    call(*within(apart[1]), "ip", "link", "set", "cable", "down")
    deadline = time.monotonic() + 60
    while any(machine.agent.poll() is None and machine.processes() for machine in machines):
        assert time.monotonic() < deadline, said_by(machines)
        time.sleep(0.1)
    for machine in machines:  # an agent that has lost the other one's store waits for it, whatever its process did
        machine.end()
    assert how_it_ended(tmp_path / "cut") == (
        "failed", "lost process 1, which was killed, or whose machine is gone; --resume goes on",
    )  # fmt: skip
    assert "\nlost process 0, which was killed, or whose machine is gone; --resume goes on" in said_by(machines)
    call(*within(apart[1]), "ip", "link", "set", "cable", "up")
    machines = begin(tmp_path, "cut", apart)
    assert ended(machines, 240) == [0, 0], said_by(machines)
    same_run(tmp_path / "straight", tmp_path / "cut", said_by(machines))
