"""The batch scripts of the recipes' page, run as SLURM would: warned, queued again, left alone once they are done."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from nodes import ENVIRONMENT, RECIPE, ended, free_port, how_it_ended, said_by, start, wait_for_rows

PAGE = Path(__file__).parent.parent / "recipes" / "README.md"
HANDLED = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
STAND_INS = {
    "torchrun": '#!/bin/sh\nexec {python} -m torch.distributed.run "$@"\n',
    "scontrol": '#!/bin/sh\nif [ "$1" = requeue ]; then echo "$2" >> requeued; else echo localhost; fi\n',
    # A task on every machine, to which signals are passed on; SLURM signals the tasks themselves, which `tasks` tells.
    "srun": """#!{python}
import os, signal, subprocess, sys
tasks = [subprocess.Popen(sys.argv[1:], start_new_session=True) for _ in range(int(os.environ["SLURM_JOB_NUM_NODES"]))]
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: [task.send_signal(number) for task in tasks])
open("tasks", "w").write(" ".join(str(task.pid) for task in tasks))
sys.exit(max(abs(task.wait()) for task in tasks))
""",
}
pytestmark = pytest.mark.slow


def scripts() -> list[str]:
    """Return the page's scripts: on several machines, and on one."""
    found = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(found) == 2
    return found


class Cluster:
    """Runs a batch script, and does to it what its `#SBATCH` lines ask for; ``given`` is added to the command."""

    def __init__(self, folder: Path, script: str, given: str = "") -> None:
        self.folder, self.run = folder, folder / "runs" / "job"
        several = "--nodes=4" in script
        here = {"--nproc-per-node=8": "--nproc-per-node=1" if several else "--nproc-per-node=2"}
        here["resnet32-cifar10 batch_size=25"] = f"small.yaml {given} --progress plain"
        if several:
            here |= {"--nodes=4": "--nodes=2", "--nnodes=4": "--nnodes=2", ":29500": f":{free_port()}"}
        for theirs, ours in here.items():
            assert theirs in script
            script = script.replace(theirs, ours)
        self.script = script
        (folder / "job.sh").write_text(script)
        (folder / "bin").mkdir()
        for name, content in STAND_INS.items():
            (folder / "bin" / name).write_text(content.replace("{python}", sys.executable))
            (folder / "bin" / name).chmod(0o755)
        job = {"SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "job", "SLURM_JOB_NODELIST": "here[1-2]"}
        job |= {"SLURM_JOB_NUM_NODES": "2" if several else "1", "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
        self.environment = {**ENVIRONMENT, **job}

    def begin(self) -> subprocess.Popen[bytes]:
        with (self.folder / "said").open("a") as said:
            return subprocess.Popen(
                ["bash", "job.sh"], cwd=self.folder, stdout=said, stderr=said, env=self.environment,
                start_new_session=True,
            )  # fmt: skip

    def warn(self, batch: subprocess.Popen[bytes]) -> None:
        """Signal the batch script where it asks for that, else what `srun` started."""
        asked = re.search(r"--signal=(B:)?(\w+)@", self.script)
        assert asked is not None
        number = getattr(signal, f"SIG{asked[2]}")
        told = [batch.pid] if asked[1] else [int(task) for task in (self.folder / "tasks").read_text().split()]
        for process in told:
            os.kill(process, number)

    def wait(self, batch: subprocess.Popen[bytes], seconds: float) -> int:
        try:
            return batch.wait(seconds)
        finally:
            if batch.poll() is None:
                os.killpg(batch.pid, signal.SIGKILL)

    @property
    def requeued(self) -> int:
        """How often it was queued again."""
        path = self.folder / "requeued"
        return path.read_text().count("17\n") if path.exists() else 0

    @property
    def said(self) -> str:
        return (self.folder / "said").read_text()


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    (folder / "small.yaml").write_text(RECIPE)
    machines = start(folder, "straight", count=1, processes=2)
    assert ended(machines, 240) == [0], said_by(machines)
    return folder / "straight"


@pytest.mark.parametrize(("number", "warned_by"), [(0, "SIGTERM"), (0, "SIGUSR1"), (1, "SIGTERM")])
def test_a_job_that_is_warned_saves_and_is_queued_again_until_its_run_has_ended(
    straight: Path, tmp_path: Path, same_run: Callable[..., None], number: int, warned_by: str
) -> None:
    (tmp_path / "small.yaml").write_text(RECIPE)
    script = scripts()[number]
    if warned_by == "SIGUSR1":  # as the page says that it may be
        assert HANDLED in PAGE.read_text()
        script = script.replace("--signal=TERM@", "--signal=USR1@").replace("torchrun ", f"torchrun {HANDLED} ")
    cluster = Cluster(tmp_path, script)
    batch = cluster.begin()
    wait_for_rows(cluster.run, 3)
    cluster.warn(batch)
    assert cluster.wait(batch, 120) != 0
    assert how_it_ended(cluster.run) == ("interrupted", warned_by), cluster.said
    assert cluster.requeued == 1
    assert cluster.wait(cluster.begin(), 240) == 0, cluster.said
    assert cluster.requeued == 1
    same_run(straight, cluster.run, cluster.said)


@pytest.mark.parametrize("number", [0, 1])
def test_a_job_whose_run_fails_by_itself_is_not_queued_again(tmp_path: Path, number: int) -> None:
    (tmp_path / "small.yaml").write_text(RECIPE)
    cluster = Cluster(tmp_path, scripts()[number].replace("--max-restarts=3", ""), "optimizer.lr=-1")
    assert cluster.wait(cluster.begin(), 120) != 0
    assert "optimizer.lr" in cluster.said
    assert cluster.requeued == 0
