"""Sweeps by submitit's local executor, for real: preempted, killed and left, they end as runs never interrupted do."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sweeps import at_step_3, status

pytest.importorskip("submitit")

from neq_cli.errors import RunDirectoryError, Terminated, TrainingError
from neq_cli.jobs.sweep.cluster.run import refuse_jobs
from neq_cli.jobs.sweep.plan import plan_sweep

Start = Callable[..., Any]


def test_a_preempted_job_is_queued_again_and_ends_as_if_it_had_not_been(
    submitted: Start, folder: Path, straight: Path, same_run: Start
) -> None:
    """The warning reaches the run's own process too, as it does where SLURM sends it to all of a job's."""
    warn = "[os.kill(process, signal.SIGUSR2) for process in (os.getpid(), parent)]; time.sleep(0.5)"
    told = submitted("seed=1,2", first=at_step_3(warn, "'seed=1' in sys.argv", once=True))
    assert told.lines[0].startswith("2 jobs submitted: ")
    assert [line.split()[-1] for line in told.with_word("queued again")] == ["seed=1"]
    assert [line.split()[1] for line in told.with_word("started")].count("seed=1") == 2
    assert len(told.with_word("finished")) == 2
    log = (folder / "here" / "logs" / "seed=1.log").read_text()
    assert "ended by SIGTERM" in log
    for run in ("seed=1", "seed=2"):
        same_run(straight / run, folder / "here" / "runs" / run)
    assert submitted("seed=1,2").lines == []


def test_a_job_that_is_killed_is_failed_and_the_next_call_goes_on(
    submitted: Start, folder: Path, straight: Path, same_run: Start
) -> None:
    """Killed with its process, whose run then saves and ends; or the run alone, as where memory is full."""
    run = folder / "here" / "runs" / "seed=1"
    with pytest.raises(TrainingError) as caught:
        submitted("seed=1", first=at_step_3("os.kill(parent, signal.SIGKILL); time.sleep(0.5)", once=True))
    assert str(caught.value).startswith("seed=1: job ")
    assert "has ended without it, " in str(caught.value)
    end = time.monotonic() + 20
    while status(run)[0] == "running" and time.monotonic() < end:
        time.sleep(0.05)
    assert status(run) == ("interrupted", "SIGTERM")

    (folder / "was-here").unlink()
    with pytest.raises(TrainingError, match=r"^seed=1: killed by SIGKILL; the next call goes on with it\n"):
        submitted("seed=1", first=at_step_3("os.kill(os.getpid(), signal.SIGKILL)", once=True))
    told = submitted("seed=1")
    assert len(told.with_word("finished")) == 1
    same_run(straight / "seed=1", run)


def test_a_run_that_fails_says_why_and_does_not_stop_the_others(submitted: Start, folder: Path) -> None:
    with pytest.raises(TrainingError) as caught:
        submitted("optimizer.lr=1e30,0.1", "epochs=1")
    runs = folder / "here" / "runs"
    assert status(runs / "optimizer.lr=0.1") == ("finished", None)
    state, reason = status(runs / "optimizer.lr=1e+30")
    assert state == "failed"
    lines = str(caught.value).splitlines()
    assert lines == [f"optimizer.lr=1e+30: {reason}", "1 of 2 runs failed; logs in here/logs"]


def test_one_may_leave_and_come_back_and_no_run_is_started_twice(
    submitted: Start, folder: Path, straight: Path, same_run: Start
) -> None:
    """Ctrl-C leaves the job; the same call follows it, a local sweep is refused, more values are jobs of their own."""
    wait = "\n        while not os.path.exists('go-on'): time.sleep(0.05)"

    def leave(line: str) -> None:
        if line.startswith("started"):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Terminated) as caught:
        submitted("seed=1", first=at_step_3(wait, once=True), then=leave)
    jobs = json.loads((folder / "here" / "jobs.json").read_text())["jobs"]
    job = jobs["seed=1"]
    assert caught.value.signal == "SIGINT"
    assert str(caught.value) == f"1 job goes on; the same command shows it again, scancel {job} ends it"

    with pytest.raises(RunDirectoryError) as refused:
        refuse_jobs(plan_sweep("small.yaml", ["seed=1"], Path("here")))
    assert str(refused.value) == (
        f"here: submitted to local: seed=1 is job {job}; look on with --launcher slurm, or end them with "
        f"scancel {job}, or, if they are gone, remove here/jobs.json"
    )

    def go_on(line: str) -> None:
        if line.startswith("started"):
            (folder / "go-on").touch()

    told = submitted("seed=1,2", then=go_on)
    assert told.lines[0] == f"1 job submitted before: {job}"
    assert told.lines[1].startswith("1 job submitted: ")
    after = json.loads((folder / "here" / "jobs.json").read_text())
    assert after["jobs"]["seed=1"] == job != after["jobs"]["seed=2"]
    assert not after["submitting"]
    for run in ("seed=1", "seed=2"):
        same_run(straight / run, folder / "here" / "runs" / run)
    log = (folder / "here" / "logs" / "seed=1.log").read_text()
    assert log.count("epoch 1/2") == 1  # it was trained once, without a break
    refuse_jobs(plan_sweep("small.yaml", ["seed=1,2"], Path("here")))


def test_two_calls_may_look_on_at_once(submitted: Start, folder: Path) -> None:
    wait = "\n        while not os.path.exists('go-on'): time.sleep(0.05)"
    second: list[Any] = []
    thread = threading.Thread(target=lambda: second.append(submitted("seed=1")))

    def look_on_too(line: str) -> None:
        if line.startswith("started"):
            thread.start()
            time.sleep(1.5)
            (folder / "go-on").touch()

    first = submitted("seed=1", first=at_step_3(wait, once=True), then=look_on_too)
    thread.join(60)
    assert len(first.with_word("finished")) == len(second[0].with_word("finished")) == 1
    assert second[0].lines[0].startswith("1 job submitted before: ")


def test_a_run_that_matches_another_is_submitted_after_it(submitted: Start, folder: Path) -> None:
    told = submitted("policy={kind: stochastic, p: match},{kind: neq, epsilon: 0.05}", "epochs=1")
    words = [line.split()[0] for line in told.lines]
    assert words == ["1", "started", "finished", "1", "started", "finished"]
    assert "kind-neq" in told.lines[1]
    assert "kind-stochastic" in told.lines[4]


def test_a_call_that_was_killed_while_it_submitted_is_said_to_be(submitted: Start, folder: Path) -> None:
    (folder / "here").mkdir()
    (folder / "here" / "sweep.json").write_text(json.dumps({"schema": 1, "recipe": "small", "axes": {}, "runs": {}}))
    record = {"schema": 1, "cluster": "local", "jobs": {}, "submitting": True}
    (folder / "here" / "jobs.json").write_text(json.dumps(record))
    for start in (lambda: submitted("seed=1"), lambda: refuse_jobs(plan_sweep("small.yaml", ["seed=1"], Path("here")))):
        with pytest.raises(
            RunDirectoryError, match=r"^here: a call was killed while it submitted jobs; look for its jobs"
        ):
            start()
    record = {"schema": 1, "cluster": "slurm", "jobs": {"seed=1": "1; rm"}, "submitting": False}
    (folder / "here" / "jobs.json").write_text(json.dumps(record))
    with pytest.raises(RunDirectoryError, match=r"jobs\.json: .*jobs: not a mapping of names to ids of jobs"):
        submitted("seed=1")


def test_mistakes_on_the_command_line_are_one_line(neq: Start, folder: Path) -> None:
    for given, said in (
        (("--slurm", "partition=gpu"), "--slurm: only of use with --launcher slurm; give that too, or leave it out"),
        (
            ("--launcher", "slurm", "--slurm", "time=soon"),
            "--slurm time=soon: not a time as SLURM has it, such as 30 (minutes), 04:00:00 or 1-12",
        ),
    ):
        process = neq("sweep", "small.yaml", "seed=1", "-o", "here", *given)
        assert process.wait(60) == 2
        assert process.lines == [said]
    assert not (folder / "here").exists()
