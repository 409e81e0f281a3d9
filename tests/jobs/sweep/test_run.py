"""Sweeps as real processes: what they train, skip and resume, and what signals, kills and failures leave."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from sweeps import at_step_3, done, status

from neq_cli.jobs.sweep.grid import parse_grid

Start = Callable[..., Any]


def interrupt_twice(process: Any, number: int = signal.SIGINT, code: int = 130) -> None:
    process.kill(number)
    said = f"{signal.Signals(number).name}: 1 running, which save and end"
    assert process.until(lambda: said in process.text)
    time.sleep(0 if number == signal.SIGINT else 1.1)  # what comes sooner is taken for a launcher's copy
    process.kill(number)
    assert process.wait(20) == code, process.text


def test_a_sweep_trains_what_train_would_and_then_only_what_is_new(
    sweep: Start, folder: Path, straight: Path, same_run: Start
) -> None:
    process = sweep("seed=1,2", "--jobs", 2)
    lines = done(process)
    runs = folder / "sweeps" / "small" / "seed" / "runs"
    assert process.result == "sweeps/small/seed/runs\n"
    assert lines[0] == "sweep of small: 2 runs, 2 at once, in sweeps/small/seed"
    assert sorted(lines[1:3]) == ["started      seed=1", "started      seed=2"]
    assert [line.split()[:2] for line in sorted(lines[3:5])] == [["finished", "seed=1"], ["finished", "seed=2"]]
    assert lines[5:] == ["compare them: neq compare sweeps/small/seed/runs/*"]
    assert sorted(path.name for path in runs.iterdir()) == ["seed=1", "seed=2"]
    for name in ("seed=1", "seed=2"):
        same_run(straight / name, runs / name)
        assert "epoch 2/2" in (folder / "sweeps" / "small" / "seed" / "logs" / f"{name}.log").read_text()

    written = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    lines = done(sweep("seed=1,2"))
    assert lines[0] == "sweep of small: 2 runs, 2 finished already, 1 at once, in sweeps/small/seed"
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*")} == written
    assert len(lines) == 2

    lines = done(sweep("seed=1,2,3", first="assert 'seed=3' in arguments"))
    assert lines[1] == "started      seed=3"
    assert {path: path.stat().st_mtime_ns for path in written if path != runs} | written == written
    record = json.loads((runs.parent / "sweep.json").read_text())
    assert record["axes"] == {"seed": ["1", "2", "3"]}
    assert record["runs"] == {f"seed={seed}": [f"seed={seed}"] for seed in (1, 2, 3)}


def test_all_runs_train_in_the_memory_format_that_one_of_them_found(sweep: Start, folder: Path) -> None:
    grid = ("seed=1,2,3", "channels_last=auto", "deterministic=false", "epochs=1", "-o", "here")
    done(sweep(*grid[:1], *grid[1:], "--jobs", 3))
    (found,) = json.loads((folder / "here" / "formats.json").read_text())["formats"]
    assert found["about"]["model"]["name"] == "resnet8"
    assert (found["about"]["device"], found["about"]["precision"]) == ("cpu", "fp32")

    def formats() -> list[tuple[bool, str]]:
        runs = sorted((folder / "here" / "runs").iterdir())
        recipes = [yaml.safe_load((run / "recipe.yaml").read_text()) for run in runs]
        notes = [json.loads((run / "environment.json").read_text())["notes"] for run in runs]
        told = [[note for note in each if note.startswith("channels_last: ")] for each in notes]
        assert all(len(each) == 1 for each in told)
        return [(each["channels_last"], note[0]) for each, note in zip(recipes, told, strict=True)]

    chosen = found["channels_last"]
    assert formats() == [(chosen, f"channels_last: auto, {str(chosen).lower()} ({found['note']})")] * 3
    # What a later call adds agrees too, with what is written: the other format than the one that was found.
    entry = {**found, "channels_last": not chosen, "note": "as written"}
    (folder / "here" / "formats.json").write_text(json.dumps({"schema": 1, "formats": [entry]}))
    done(sweep("seed=4", *grid[1:]))
    assert formats()[-1] == (not chosen, f"channels_last: auto, {str(not chosen).lower()} (as written)")


def test_one_that_fails_does_not_stop_the_others(sweep: Start, folder: Path) -> None:
    lines = done(sweep("optimizer.lr=1e30,0.1", "-o", "here"), code=1)
    runs = folder / "here" / "runs"
    assert status(runs / "optimizer.lr=0.1") == ("finished", None)
    state, reason = status(runs / "optimizer.lr=1e+30")
    assert state == "failed"
    assert f"failed       optimizer.lr=1e+30: {reason}" in lines
    assert lines[-2:] == [f"optimizer.lr=1e+30: {reason}", "1 of 2 runs failed; logs in here/logs"]


def test_a_run_that_matches_another_waits_for_it(sweep: Start, folder: Path) -> None:
    axes = ("policy={kind: stochastic, p: match},{kind: neq, epsilon: 0.05}", "-o", "here", "--jobs", 2)
    stochastic, neq = (point.name for point in parse_grid(axes[:1]).points)
    lines = done(sweep(*axes, first="assert 'kind: neq' not in str(arguments), 'not today'"), code=1)
    failed = f"{stochastic}: not trained: {neq}, which it matches, failed"
    assert [line.split()[:2] for line in lines[1:3]] == [["started", neq], ["failed", f"{neq}:"]]
    assert f"failed       {failed}" in lines
    assert not (folder / "here" / "runs" / stochastic).exists()

    lines = done(sweep(*axes))
    assert [line.split()[:2] for line in lines[1:5]] == [
        ["started", neq], ["finished", neq], ["started", stochastic], ["finished", stochastic],
    ]  # fmt: skip
    recipe = (folder / "here" / "runs" / stochastic / "recipe.yaml").read_text()
    assert f"p: match:here/runs/{neq}" in recipe
    (folder / "here").rename(folder / "there")
    assert "2 finished already" in done(sweep(*axes[:1], "-o", folder / "there"))[0]


@pytest.mark.parametrize(
    ("number", "code", "last"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "ended by SIGTERM")],
)
def test_a_signal_has_all_runs_save_and_the_next_call_goes_on_exactly(
    sweep: Start, folder: Path, straight: Path, same_run: Start, number: int, code: int, last: str
) -> None:
    # Both wait for the other, so that both are in the midst of an epoch.
    meet = (
        "open(f'at-{os.getpid()}', 'w').close()\n"
        "        while len([name for name in os.listdir() if name.startswith('at-')]) < 2: time.sleep(0.01)\n"
        f"        os.kill(parent, {int(number)}) if 'seed=1' in sys.argv else None\n"
        "        time.sleep(0.5)"
    )
    lines = done(sweep("seed=1,2", "-o", "here", "--jobs", 2, first=at_step_3(meet)), code=code)
    name = signal.Signals(number).name
    assert lines[-1] == last
    assert f"{name}: 2 running, which save and end" in lines
    assert lines[-2] == "saved; the same command goes on from here"
    for run in ("seed=1", "seed=2"):
        assert status(folder / "here" / "runs" / run) == ("interrupted", name)
    done(sweep("seed=1,2", "-o", "here", "--jobs", 2))
    for run in ("seed=1", "seed=2"):
        same_run(straight / run, folder / "here" / "runs" / run)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_leaves_at_once(sweep: Start, folder: Path, number: int, code: int) -> None:
    process = sweep("seed=1,2", "-o", "here", first=at_step_3("open('hangs', 'w').close(); time.sleep(60)"))
    assert process.until((folder / "hangs").exists)
    began = time.monotonic()
    interrupt_twice(process, number, code)
    assert time.monotonic() - began < 10
    run = folder / "here" / "runs" / "seed=1"
    end = time.monotonic() + 20
    while status(run)[0] == "running" and time.monotonic() < end:
        time.sleep(0.05)
    assert status(run) == ("interrupted", "SIGINT")
    assert not (folder / "here" / "runs" / "seed=2").exists()


def test_a_killed_sweep_takes_its_runs_with_it_saved(
    sweep: Start, folder: Path, straight: Path, same_run: Start
) -> None:
    kill = "os.kill(parent, signal.SIGKILL); time.sleep(0.5)"
    process = sweep("seed=1", "-o", "here", first=at_step_3(kill))
    assert process.wait(120) == -signal.SIGKILL
    run = folder / "here" / "runs" / "seed=1"
    end = time.monotonic() + 20
    while status(run)[0] == "running" and time.monotonic() < end:
        time.sleep(0.05)
    assert status(run) == ("interrupted", "SIGTERM")
    done(sweep("seed=1", "-o", "here"))
    same_run(straight / "seed=1", run)


def test_a_killed_run_is_failed_and_resumed_by_the_next_call(
    sweep: Start, folder: Path, straight: Path, same_run: Start
) -> None:
    kill = at_step_3("os.kill(os.getpid(), signal.SIGKILL)", "'seed=1' in sys.argv")
    lines = done(sweep("seed=1,2", "-o", "here", "--jobs", 2, first=kill), code=1)
    assert lines[-2] == "seed=1: killed by SIGKILL; the next call goes on with it"
    lines = done(sweep("seed=1,2", "-o", "here"))
    assert "1 finished already" in lines[0]
    for run in ("seed=1", "seed=2"):
        same_run(straight / run, folder / "here" / "runs" / run)


def test_a_second_sweep_at_once_is_refused(sweep: Start, folder: Path) -> None:
    process = sweep("seed=1", "-o", "here", first=at_step_3("open('holds', 'w').close(); time.sleep(60)"))
    assert process.until((folder / "holds").exists)
    lines = done(sweep("seed=1,2", "-o", "here"), code=2)
    assert len(lines) == 1
    assert lines[0].startswith(f"here: being trained by process {process.process} on host ")
    interrupt_twice(process)


def test_a_run_that_train_holds_fails_alone(sweep: Start, neq: Start, folder: Path) -> None:
    hold = at_step_3("open('holds', 'w').close(); time.sleep(60)")
    other = neq("train", "small.yaml", "seed=1", "-o", "here/runs/seed=1", before=hold)
    # Its folder is there before there is a sweep.
    assert other.until((folder / "holds").exists)
    (folder / "here" / "sweep.json").write_text(json.dumps({"schema": 1, "recipe": "small", "axes": {}, "runs": {}}))
    lines = done(sweep("seed=1,2", "-o", "here"), code=1)
    assert lines[-2].startswith(f"seed=1: here/runs/seed=1: being trained by process {other.process} on host ")
    assert status(folder / "here" / "runs" / "seed=2")[0] == "finished"
    other.kill(signal.SIGKILL)
    other.wait(20)


def test_a_run_that_ended_at_rest_is_finished_until_it_is_asked_for_more(
    sweep: Start, neq: Start, folder: Path
) -> None:
    """With an epsilon that all is below, everything is frozen after two epochs, and the third is the first at rest."""
    at_rest = ("policy.epsilon=1000", "epochs=6", "stop_when_frozen=1")
    done(sweep("seed=1", *at_rest, "-o", "here"))
    run = folder / "here" / "runs" / "seed=1"
    ended = len((run / "metrics.csv").read_text().splitlines()) - 1
    assert ended < 6
    assert status(run)[0] == "finished"
    assert "1 finished already" in done(sweep("seed=1", *at_rest, "-o", "here"))[0]
    process = neq("train", "small.yaml", "seed=1", *at_rest, "-o", run, "--resume")
    assert process.wait(60) == 0
    assert f"{ended} epochs, test_top1 " in process.text
    assert " of 6, ended by stop_when_frozen=1; stop_when_frozen=null would extend it" in process.text
    process = neq("train", "small.yaml", "seed=1", *at_rest[:2], "stop_when_frozen=null", "-o", run, "--resume")
    assert process.wait(60) == 0
    assert len((run / "metrics.csv").read_text().splitlines()) == 7


def test_other_values_of_what_all_share_are_another_sweep_and_in_one_folder_refused(sweep: Start, folder: Path) -> None:
    here = folder / "here"
    done(sweep("seed=1", "epochs=1", "-o", "here"))
    lines = done(sweep("seed=1,2", "epochs=1", "optimizer.lr=0.2", "-o", "here"), code=2)
    assert lines == [
        "seed=1: command line: optimizer.lr=0.2: 0.2, but here/runs/seed=1 was begun with 0.1; leave it, or give "
        "another folder with -o"
    ]
    assert "more epochs" not in "".join(done(sweep("seed=1", "epochs=2", "-o", "here")))
    # The first command asks for what is there; a longer run that was stopped is neither.
    assert "1 finished already" in done(sweep("seed=1", "epochs=1", "-o", "here"))[0]
    path = here / "runs" / "seed=1" / "status.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "state": "interrupted"}))
    lines = done(sweep("seed=1", "epochs=1", "-o", "here"), code=2)
    assert lines == [
        "seed=1: command line: epochs=1: 1, but epoch 2 of here/runs/seed=1 is trained, on the way to 2; give at least "
        "2, or give another folder with -o"
    ]


def test_runs_are_processes_of_their_own(neq: Start, folder: Path) -> None:
    process = neq("sweep", "small.yaml", "epochs=1", "-o", "here")
    done(process)
    assert process.result == "here/runs\n"
    run = folder / "here" / "runs" / "run"
    assert status(run)[0] == "finished"
    assert json.loads((run / "status.json").read_text())["pid"] != process.process
    argv = json.loads((run / "environment.json").read_text())["argv"]
    assert argv[-7:] == ["small.yaml", "epochs=1", "-o", "here/runs/run", "--resume", "--progress", "plain"]


def test_a_dry_run_writes_nothing_and_lists_every_run(neq: Start, folder: Path) -> None:
    process = neq("sweep", "small.yaml", "policy.epsilon=0.1,0.2", "--dry-run")
    done(process)
    assert process.result.splitlines() == [
        "policy.epsilon=0.1  to train, 2 epochs",
        "policy.epsilon=0.2  to train, 2 epochs",
        "would write sweeps/small/policy.epsilon",
    ]
    assert not (folder / "sweeps").exists()
