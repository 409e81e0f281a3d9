"""Searches as real processes: what they train, skip and go on with, and their front against metrics.csv."""

from __future__ import annotations

import csv
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from sweeps import at_step_3, status
from sweeps import done as ended_as_it_should

pytest.importorskip("optuna")

Start = Callable[..., Any]

SPACE = ("policy.epsilon=1e-3..10", "policy.mu=0..0.5", "optimizer.momentum=0,0.9")
SEARCH = (*SPACE, "--sampler", "optuna", "--trials")

done = partial(ended_as_it_should, seconds=200)


def once_in_trial_1(action: str) -> str:
    """Return the code that does ``action`` within trial 1, the first time that it is trained."""
    return at_step_3(f"{action}; time.sleep(0.5)", "'trial-0001' in ' '.join(sys.argv)", once=True)


def came_to(run: Path) -> tuple[float, float]:
    """Return mean executed FLOPs and the last top-1 accuracy."""
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return sum(float(row["flops_executed"]) for row in rows) / len(rows), float(rows[-1]["test_top1"])


def chosen(run: Path) -> tuple[float, float, float]:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    return recipe["policy"]["epsilon"], recipe["policy"]["mu"], recipe["optimizer"]["momentum"]


@pytest.fixture(scope="module")
def straight(neq_in: Start, small: str, forked: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The runs of a search of four trials that nothing interrupted, and what the process said."""
    place = tmp_path_factory.mktemp("straight")
    (place / "small.yaml").write_text(small)
    process = neq_in(place, "sweep", "small.yaml", *SEARCH, 4, "-o", "here", before=forked)
    done(process)
    return place / "here" / "runs", process


def test_it_trains_so_many_trials_within_the_ranges_and_prints_their_front(straight: tuple[Path, Any]) -> None:
    runs, process = straight
    names = [f"trial-{number:04}" for number in range(4)]
    assert sorted(path.name for path in runs.iterdir()) == names
    for name in names:
        epsilon, mu, momentum = chosen(runs / name)
        assert 1e-3 <= epsilon <= 10
        assert 0 <= mu <= 0.5
        assert momentum in (0, 0.9)
    assert len({chosen(runs / name) for name in names}) == 4
    points = {name: came_to(runs / name) for name in names}
    best = [
        name
        for name, (cost, metric) in points.items()
        if not any(other != (cost, metric) and other[0] <= cost and other[1] >= metric for other in points.values())
    ]
    title, head, *table, place = process.result.splitlines()
    assert title == f"{len(best)} of 4 runs on the front of top1 (higher is better) against executed FLOPs"
    assert head.split() == ["run", "policy.epsilon", "policy.mu", "optimizer.momentum", "top1", "executed", "FLOPs"]
    assert [row.split()[0] for row in table] == sorted(best, key=lambda name: points[name][0])
    for row in table:
        name, *labels, metric, flops = row.split()
        assert list(map(float, labels)) == pytest.approx(chosen(runs / name), rel=1e-3)
        assert float(metric) == pytest.approx(points[name][1], abs=0.006)
        assert float(flops[:-1]) * {"K": 1e3, "M": 1e6}[flops[-1]] == pytest.approx(points[name][0], rel=0.01)
    assert place == "here/runs"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_and_extended_it_trains_what_it_would_have_at_once(
    sweep: Start, folder: Path, straight: tuple[Path, Any], same_run: Start, number: int
) -> None:
    """The search is killed, or asked to stop, in its second trial; then asked for two more."""
    process = sweep(*SEARCH, 2, "-o", "here", first=once_in_trial_1(f"os.kill(parent, {int(number)})"))
    assert process.wait(120) == (-number if number == signal.SIGKILL else 143)
    runs = folder / "here" / "runs"
    end = time.monotonic() + 20
    while status(runs / "trial-0001")[0] == "running" and time.monotonic() < end:
        time.sleep(0.05)
    assert status(runs / "trial-0001")[0] == "interrupted"
    lines = done(sweep(*SEARCH, 4, "-o", "here"))
    assert lines[0] == "sweep of small: 4 runs, 1 finished already, 1 at once, in here"
    for name in sorted(path.name for path in straight[0].iterdir()):
        same_run(straight[0] / name, runs / name)
    written = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    again = sweep(*SEARCH, 3, "-o", "here")
    assert "4 runs, 4 finished already" in done(again)[0]
    assert again.result == straight[1].result
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*")} == written


def test_a_killed_run_is_retried_and_one_that_failed_by_itself_is_not(sweep: Start, folder: Path) -> None:
    kill = once_in_trial_1("os.kill(os.getpid(), signal.SIGKILL)")
    axes = ("policy.epsilon=1e-3..10", "epochs=1", "--sampler", "optuna", "--trials", 2, "-o", "here", "--jobs", 2)
    process = sweep(*axes, first=kill)
    assert done(process, code=1)[-2] == "trial-0001: killed by SIGKILL; the next call goes on with it"
    assert process.result.startswith("1 of 1 run on the front of top1 ")
    runs = folder / "here" / "runs"
    before = (runs / "trial-0001" / "recipe.yaml").read_text()
    lines = done(sweep(*axes))
    assert "1 finished already" in lines[0]
    assert (runs / "trial-0001" / "recipe.yaml").read_text() == before
    assert status(runs / "trial-0001")[0] == "finished"

    axes = ("optimizer.lr=1e29..1e30", "epochs=1", "--sampler", "optuna", "--trials", 1, "-o", "fails")
    process = sweep(*axes)
    lines = done(process, code=1)
    assert lines[-1] == "1 of 1 run failed; logs in fails/logs"
    assert process.result == ""
    assert done(sweep(*axes), code=1)[1:] == [
        "trial-0000: failed in an earlier call", "1 of 1 run failed; logs in fails/logs",
    ]  # fmt: skip


def test_another_search_in_the_same_folder_is_refused(sweep: Start, folder: Path) -> None:
    axes = ("--sampler", "optuna", "--trials", 1, "-o", "here")
    done(sweep("batch_size=32..64", "epochs=1", *axes))
    size = yaml.safe_load((folder / "here" / "runs" / "trial-0000" / "recipe.yaml").read_text())["batch_size"]
    assert isinstance(size, int)
    assert 32 <= size <= 64
    lines = done(sweep("batch_size=32..65", "epochs=1", *axes), code=2)
    assert len(lines) == 1
    assert lines[0].startswith("here/search.journal: a search among other values, ")
    assert "batch_size=32..64" in lines[0]
    (folder / "here" / "search.journal").write_text("{\n\n")
    lines = done(sweep("batch_size=32..64", "epochs=1", *axes), code=2)
    assert len(lines) == 1
    assert lines[0].startswith("here/search.journal: no search to go on with: ")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            (*SPACE, "--sampler", "optuna"),
            "neq sweep: --sampler optuna and --trials N go together; give both, or neither for a grid",
        ),
        (
            (*SPACE, "--trials", "3"),
            "neq sweep: --sampler optuna and --trials N go together; give both, or neither for a grid",
        ),
        (
            (*SEARCH, "3", "--launcher", "slurm"),
            "--launcher slurm: not for a search, whose runs wait for what came of others; leave it out",
        ),
    ],
)
def test_a_mistake_is_one_line(neq: Start, folder: Path, given: tuple[str, ...], said: str) -> None:
    process = neq("sweep", "small.yaml", "-o", "here", *given)
    assert done(process, code=2) == [said]
    assert not (folder / "here").exists()


def test_every_end_is_checked_before_anything_is_trained_and_a_dry_run_writes_nothing(neq: Start, folder: Path) -> None:
    axes = ("policy.mu=0..1.5", "policy.scope=neuron,leyer", "--sampler", "optuna", "--trials", "3", "-o", "here")
    lines = done(neq("sweep", "small.yaml", *axes), code=2)
    assert len(lines) == 2
    assert lines[0].startswith("command line: policy.mu=1.5: ")
    assert lines[1].startswith("command line: policy.scope=leyer: ")
    process = neq("sweep", "small.yaml", *SEARCH, "3", "--dry-run")
    done(process)
    assert process.result.splitlines() == [
        "3 trials of small",
        "policy.epsilon  0.001..10.0 by the logarithm",
        "policy.mu  0.0..0.5",
        "optimizer.momentum  0,0.9",
        "would write sweeps/small/search-optimizer.momentum,policy.epsilon,policy.mu",
    ]
    assert not (folder / "sweeps").exists()
