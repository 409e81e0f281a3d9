"""The arrays that SLURM is given, and what follows, against what stands in for its commands; no SLURM was there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("submitit")

from neq_cli.errors import NeqError, TrainingError
from neq_cli.jobs.sweep.cluster.jobs import check_cluster

Start = Callable[..., Any]


@pytest.fixture
def books(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the stand-ins keep their books; they are first in PATH."""
    place = tmp_path_factory.mktemp("slurm")
    script = place / "stand_in.py"
    shutil.copy(Path(__file__).with_name("stand_in.py"), script)
    for name in ("sbatch", "srun", "sacct", "scontrol", "scancel"):
        code = f"import sys; sys.path.insert(0, {str(place)!r}); import stand_in; stand_in.{name}(*sys.argv[1:])"
        (place / name).write_text(f"#!{sys.executable} -IS\n{code}\n")
        (place / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(place), prepend=os.pathsep)
    return place


def script(books: Path, job: str = "1000") -> list[str]:
    text = (books / f"{job}.sh").read_text()
    return [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]


def test_one_array_with_the_options_given_whose_preempted_job_goes_on(
    submitted: Start, folder: Path, books: Path
) -> None:
    """The first job is warned at its third step, saves and is queued again; two run at once."""
    warn = (
        "import os, signal, sys, time\n"
        "from neq_cli.training.loop.step import TrainingStep\n"
        "train, done = TrainingStep.train, 0\n"
        "def and_then(self, *arguments, **options):\n"
        "    global done\n"
        "    loss = train(self, *arguments, **options)\n"
        "    done += 1\n"
        "    if done == 3 and 'seed=1' in sys.argv and not os.path.exists('was-here'):\n"
        "        open('was-here', 'w').close()\n"
        "        os.kill(os.getppid(), signal.SIGUSR2)\n"
        "        time.sleep(0.5)\n"
        "    return loss\n"
        "TrainingStep.train = and_then\n"
    )
    options = {"partition": "gpu", "gres": "gpu:1", "exclusive": True}
    told = submitted("seed=1,2,3", "epochs=1", cluster="slurm", jobs=2, first=warn, minutes=90, others=options)
    assert told.lines[0] == "3 jobs submitted: 1000"
    assert len(told.with_word("finished")) == 3
    assert [line.split()[-1] for line in told.with_word("queued again")] == ["seed=1"]
    assert "ended by SIGTERM" in (folder / "here" / "logs" / "seed=1.log").read_text()
    found = script(books)
    given = {"array=0-2%2", "partition=gpu", "gres=gpu:1", "exclusive", "time=90", "requeue", "signal=USR2@90"}
    assert given <= set(found)
    assert "job-name=neq-small" in found
    assert (books / "1000.most").read_text() == "2"
    jobs = json.loads((folder / "here" / "jobs.json").read_text())
    assert jobs["jobs"] == {f"seed={seed}": f"1000_{seed - 1}" for seed in (1, 2, 3)}
    assert [json.loads((folder / "here" / "runs" / f"seed={seed}" / "status.json").read_text())["state"]
            for seed in (1, 2, 3)] == ["finished"] * 3  # fmt: skip
    # Nothing but one pass over the data each: what was interrupted went on where it was.
    assert all(len((folder / "here" / "runs" / f"seed={seed}" / "metrics.csv").read_text().splitlines()) == 2
               for seed in (1, 2, 3))  # fmt: skip


def test_a_cancelled_job_saves_and_is_not_queued_again(submitted: Start, folder: Path, books: Path) -> None:
    slow = (
        "import time\n"
        "from neq_cli.training.loop.step import TrainingStep\n"
        "train = TrainingStep.train\n"
        "def slowly(self, *arguments, **options):\n"
        "    time.sleep(0.2)\n"
        "    return train(self, *arguments, **options)\n"
        "TrainingStep.train = slowly\n"
    )

    def cancel(line: str) -> None:
        if line.startswith("started"):
            subprocess.run(["scancel", "1000"], check=True)

    with pytest.raises(TrainingError) as caught:
        submitted("seed=1", cluster="slurm", first=slow, then=cancel)
    assert str(caught.value).splitlines()[0] == (
        "seed=1: job 1000 has ended without it, CANCELLED; the next call goes on with it"
    )
    run = folder / "here" / "runs" / "seed=1"
    end = time.monotonic() + 20
    status = json.loads((run / "status.json").read_text())
    while status["state"] == "running" and time.monotonic() < end:
        time.sleep(0.05)
        status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("interrupted", "SIGTERM")
    assert not list(books.glob("*.requeue"))
    assert [path.stem for path in books.glob("*.sh")] == ["1000"]


def test_what_sbatch_refuses_is_one_line_and_nothing_is_taken_for_submitted(
    submitted: Start, folder: Path, books: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    refusal = "sbatch: error: invalid partition specified: gpus\nsbatch: error: Batch job submission failed"
    (books / "sbatch").write_text(f"#!/bin/sh\nprintf '%s\\n' '{refusal}' >&2\nexit 1\n")
    with pytest.raises(TrainingError) as caught:
        submitted("seed=1,2", cluster="slurm", others={"partition": "gpus"})
    assert str(caught.value) == (
        "slurm took no jobs: sbatch: error: invalid partition specified: gpus; sbatch: error: Batch job submission "
        "failed; see --slurm"
    )
    assert capfd.readouterr() == ("", "")
    record = json.loads((folder / "here" / "jobs.json").read_text())
    assert (record["jobs"], record["submitting"]) == ({}, False)


def test_without_slurm_or_submitit_it_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NeqError) as caught:
        check_cluster("slurm")
    assert str(caught.value) == ("--launcher slurm: no sbatch here; call it on a machine from which SLURM takes jobs")
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(NeqError) as caught:
        check_cluster("slurm")
    assert re.fullmatch(r"--launcher slurm needs submitit \(.*\); pip install 'neq\[slurm\]'", str(caught.value))
