"""Sweeps whose runs are forked from a process that has torch: starting Python for each would take seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SMALL = """
model: {name: resnet8, kwargs: {num_classes: 10, in_channels: 1, width: 4}}
data: {name: digits, workers: 0, probe_size: 1000}
epochs: 2
batch_size: 64
optimizer: {name: sgd, lr: 0.1}
policy: {kind: neq, epsilon: 0.05}
channels_last: false
deterministic: true
device: cpu
"""

# Takes the place of subprocess.Popen in the process that sweeps. What a run does first is the code in `first`, which
# sees the arguments of its `neq` as `arguments`.
FORKED = """
import os, signal, sys, threading, traceback
import neq_cli.jobs.sweep.process as job

first = {first!r}


class Forked:
    def __init__(self, command, stdin, stdout, stderr, env, start_new_session):
        assert stdin == job.PIPE and start_new_session
        reader, writer = os.pipe()
        self.returncode, self.pid = None, os.fork()
        if not self.pid:
            self.become(list(command), reader, stdout, stderr, env)
        os.close(reader)
        self.stdin = os.fdopen(writer, "wb")

    def become(self, command, reader, stdout, stderr, env):
        code = 1
        try:
            os.setsid()
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            for descriptor, opened in ((0, reader), (1, stdout), (2, stderr)):
                os.dup2(opened, descriptor)
            os.closerange(3, 64)
            os.environ.clear()
            os.environ.update(env)
            at = command.index("train")
            sys.argv = ["neq", *command[at:]]
            exec(first, {{"arguments": command[at:]}})
            from neq_cli.jobs.sweep.child import main
            main()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def poll(self):
        if self.returncode is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)


job.Popen = Forked
"""


@pytest.fixture(scope="session")
def small() -> str:
    """The recipe small.yaml."""
    return SMALL


@pytest.fixture(scope="session")
def forked() -> str:
    """What a process that sweeps runs first, so that its runs are forked from it."""
    return FORKED.format(first="")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the recipe small.yaml."""
    (tmp_path / "small.yaml").write_text(SMALL)
    return tmp_path


@pytest.fixture
def sweep(neq: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    """Start `neq sweep small.yaml` in the test's folder; every run begins with the code ``first``."""

    def start(*arguments: object, first: str = "") -> Any:
        return neq("sweep", "small.yaml", *arguments, before=FORKED.format(first=first))

    return start


@pytest.fixture(scope="module")
def straight(neq_in: Callable[..., Any], small: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs seed=1 and seed=2, each trained by `neq train` without a break."""
    place = tmp_path_factory.mktemp("straight")
    (place / "small.yaml").write_text(small)
    for seed in (1, 2):
        process = neq_in(place, "train", "small.yaml", f"seed={seed}", "-o", place / f"seed={seed}")
        assert process.wait(120) == 0, process.text
    return place
