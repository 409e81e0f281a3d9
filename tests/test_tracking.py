"""`neq train` and `neq sweep` with trackers: killed, stopped, gone on with, two at once; what was told can be read."""

from __future__ import annotations

import csv
import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tracked import wandb_files, wandb_history

from neq_cli.jobs.tracking.libraries import missing

Start = Callable[..., Any]
pytest.importorskip("tensorboard", reason="tensorboard is not installed")
FEW = ("epochs=4", "track=[tensorboard]", "checkpoint_minutes=10")


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def scalars(run: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: Any = EventAccumulator(str(run / "tracking/tensorboard"), size_guidance={"scalars": 0})
    return [(each.step, each.value) for each in found.Reload().Scalars(name)]


def assert_told(run: Path) -> None:
    """All rows of the run are in TensorBoard, each once, those that were trained again with their last numbers."""
    table = rows(run)
    for name in ("train_loss", "test_top1", "frozen", "epoch_seconds"):
        expected = [(int(row["epoch"]), float(row[name] or math.nan)) for row in table]
        found = scalars(run, name)
        assert [step for step, _ in found] == [epoch for epoch, _ in expected], name
        assert [value for _, value in found] == pytest.approx([value for _, value in expected]), name


def ran(process: Any, code: int = 0) -> Any:
    assert process.wait(240) == code, process.text
    return process


def test_killed_and_gone_on_with(neq: Start, folder: Path, at_step: Callable[[int, str], str]) -> None:
    """Killed with -9 within the third epoch: two are told; the run that went on has all four."""
    run = folder / "run"
    kill = at_step(35, "os.kill(os.getpid(), signal.SIGKILL)")
    ran(neq("train", "rich.yaml", *FEW, "-o", run, before=kill), -signal.SIGKILL)
    assert [step for step, _ in scalars(run, "train_loss")] == [1, 2]
    ran(neq("train", "rich.yaml", *FEW, "-o", run, "--resume"))
    assert_told(run)
    assert len(rows(run)) == 4
    ran(neq("inspect", run))


def test_killed_after_an_epoch_that_no_checkpoint_has(neq: Start, folder: Path) -> None:
    """The row of the second epoch is written and told, its checkpoint is not: it is trained, and told, again."""
    run = folder / "run"
    before = """
import os, signal
from neq_cli.jobs.follower import Follower

save, told = Follower._save, []


def saves(self, **options):
    if self.trainer.epoch == 2:
        self.tracking.show(told[-1])
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, **options)


write = Follower._write_epoch
Follower._write_epoch = lambda self, record: (told.append(record), write(self, record))
Follower._save = saves
"""
    ran(neq("train", "rich.yaml", *FEW, "-o", run, before=before), -signal.SIGKILL)
    assert [step for step, _ in scalars(run, "train_loss")] == [1, 2]
    ran(neq("train", "rich.yaml", *FEW, "-o", run, "--resume"))
    assert_told(run)


def test_what_wandb_was_told_more_than_a_second_ago_survives_a_kill(
    neq: Start, folder: Path, at_step: Callable[[int, str], str]
) -> None:
    if (problem := missing("wandb")) is not None:
        pytest.skip(problem)
    run = folder / "run"
    kill = at_step(35, "time.sleep(3); os.kill(os.getpid(), signal.SIGKILL)")
    offline = {"WANDB_MODE": "offline"}
    arguments = ("train", "rich.yaml", "epochs=3", "track=[wandb]", "checkpoint_minutes=10", "-o", run)
    ran(neq(*arguments, before=kill, environment=offline), -signal.SIGKILL)
    assert [row["epoch"] for row in wandb_history(wandb_files(run)[-1])] == [1, 2]
    ran(neq(*arguments, "--resume", environment=offline))
    assert [row["epoch"] for row in wandb_history(wandb_files(run)[-1])] == [1, 2, 3]


def test_stopped_by_sigterm(neq: Start, folder: Path, at_step: Callable[[int, str], str]) -> None:
    run = folder / "run"
    stop = at_step(20, "os.kill(os.getpid(), signal.SIGTERM)")
    ran(neq("train", "rich.yaml", *FEW, "-o", run, before=stop), 143)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: Any = EventAccumulator(str(run / "tracking/tensorboard"), size_guidance={"tensors": 0})
    states = [each.tensor_proto.string_val[0].decode() for each in found.Reload().Tensors("state/text_summary")]
    assert states == ["running", "interrupted SIGTERM"]
    ran(neq("train", "rich.yaml", *FEW, "-o", run, "--resume"))
    assert_told(run)


def test_track_may_change_and_changes_nothing_else(
    neq: Start, folder: Path, at_step: Callable[[int, str], str], same_run: Callable[..., None]
) -> None:
    """A run that is tracked from its third epoch on has the files of one that never was, and is told whole."""
    plain, run = folder / "plain", folder / "run"
    ran(neq("train", "rich.yaml", "epochs=4", "-o", plain))
    stop = at_step(40, "os.kill(os.getpid(), signal.SIGTERM)")
    ran(neq("train", "rich.yaml", "epochs=4", "-o", run, before=stop), 143)
    ran(neq("train", "rich.yaml", "epochs=4", "track=[tensorboard]", "-o", run, "--resume"))
    assert_told(run)
    for name in ("layers.csv", "weights.safetensors", "neurons/epoch_0004.safetensors"):
        assert (run / name).read_bytes() == (plain / name).read_bytes(), name
    both = ran(neq("compare", run, plain, "--json"))
    (configuration,) = json.loads(both.result)["rows"]
    assert len(configuration["runs"]) == 2


READ_ONLY = """
from neq_cli.jobs.tracking import teller


def refuse(folder):
    raise PermissionError(13, "Permission denied", str(folder))


teller.check_writable = refuse
"""


def test_a_folder_that_cannot_be_written_costs_a_line(neq: Start, folder: Path) -> None:
    run = folder / "run"
    ran(neq("train", "rich.yaml", "epochs=2", "-o", run))
    process = ran(neq("train", "rich.yaml", "epochs=3", "track=[tensorboard]", "-o", run, "--resume", before=READ_ONLY))
    (line,) = [line for line in process.lines if line.startswith("warning: ")]
    assert line == f"warning: track: nothing is told to tensorboard: {run / 'tracking'}: Permission denied"
    assert line.removeprefix("warning: ") in json.loads((run / "environment.json").read_text())["notes"]
    assert len(rows(run)) == 3


def test_a_sweep_and_its_runs_at_once(neq: Start, folder: Path) -> None:
    ran(neq("sweep", "rich.yaml", "epochs=2", "track=[tensorboard]", "seed=1,2", "--jobs", 2, "--progress", "plain"))
    runs = sorted(path.parent for path in folder.rglob("metrics.csv"))
    assert len(runs) == 2
    for run in runs:
        assert_told(run)
    ids = [json.loads((run / "tracking/ids.json").read_text())["tensorboard"]["id"] for run in runs]
    assert ids[0] != ids[1]
