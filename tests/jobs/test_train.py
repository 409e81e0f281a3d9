"""Runs in their directories: what they leave when they end well, badly or not at all."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor

from neq_cli.errors import NeqError, RecipeError, RunDirectoryError, Terminated, TrainingError
from neq_cli.events import EpochRecord, Record
from neq_cli.freezing import Observation
from neq_cli.jobs import follower, time_shares
from neq_cli.jobs import train as running
from neq_cli.jobs.resume import read_checkpoint
from neq_cli.recipe.load import LoadedRecipe, load_recipe
from neq_cli.runs.store.run import read_run
from neq_cli.runs.store.writer import RunWriter
from neq_cli.runs.views.live.progress import Silent
from neq_cli.signals import Watch
from neq_cli.training.loop.checkpoint import load_state, read_weights, save_state
from neq_cli.training.machine import limits
from neq_cli.training.machine.energy import measured
from neq_cli.training.machine.energy.meter import Meter

SMALL = """
model: {name: resnet8, kwargs: {num_classes: 10, in_channels: 1, width: 4}}
data: {name: digits, workers: 0, probe_size: 1000}
epochs: 3
batch_size: 64
optimizer: {name: sgd, lr: 0.1}
policy: {kind: neq, epsilon: 0.05}
device: cpu
"""


def load(folder: Path, *overrides: str) -> LoadedRecipe:
    path = folder / "small.yaml"
    path.write_text(SMALL)
    return load_recipe(str(path), overrides)


def status(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "status.json").read_text())
    return content


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    return running.train(load(folder, "ema=0.9", "eval_every=2"), folder / "run", Silent())


def test_a_finished_run_is_complete(finished: Path) -> None:
    files = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    assert files == {
        "recipe.yaml", "environment.json", "metrics.csv", "layers.csv", "status.json", "weights.safetensors",
        "dispatch.json", ".lock",
        *(f"neurons/epoch_{epoch:04d}.safetensors" for epoch in (1, 2, 3)),
        *(f"checkpoints/{name}.safetensors" for name in ("last", "previous", "best")),
    }  # fmt: skip
    assert (status(finished)["state"], status(finished)["reason"]) == ("finished", None)
    written = load_recipe(str(finished / "recipe.yaml")).recipe
    assert written.channels_last in (True, False)  # what auto came to, so that training from it gives the same run
    chosen = f"channels_last={str(written.channels_last).lower()}"
    found = ["data.channels=1", "data.mean=[0.3058]", "data.std=[0.3764]"]  # what digits are normalised by
    assert written == load(finished.parent, "ema=0.9", "eval_every=2", chosen, *found).recipe


def test_columns_agree_with_the_neuron_files(finished: Path) -> None:
    metrics, layers = rows(finished / "metrics.csv"), rows(finished / "layers.csv")
    previous: dict[str, Any] = {}
    frozen = []
    for row in metrics:
        neurons = load_file(finished / "neurons" / f"epoch_{int(row['epoch']):04d}.safetensors")
        trained = {name: mask for name, mask in neurons.items() if name.endswith("/trained")}
        counts = {name.removesuffix("/trained"): int((~mask).sum()) for name, mask in trained.items()}
        assert int(row["frozen"]) == sum(counts.values())
        assert int(row["neurons"]) == sum(map(len, trained.values()))
        own = [layer for layer in layers if layer["epoch"] == row["epoch"]]
        assert {layer["layer"]: int(layer["frozen"]) for layer in own} == counts
        assert float(row["flops_paper"]) == pytest.approx(sum(float(layer["flops_paper"]) for layer in own))
        dense = {layer["layer"]: float(layer["flops_paper"]) for layer in layers if layer["epoch"] == "1"}
        for layer in own:
            share = 1 - counts[layer["layer"]] / int(layer["neurons"])
            assert float(layer["flops_paper"]) == pytest.approx(share * dense[layer["layer"]])
        for name, mask in previous.items():
            assert (trained[f"{name}/trained"] == mask).all()
        names = [name.removesuffix("/trained") for name in trained]
        previous = {name: neurons[f"{name}/trainable"] for name in names}
        frozen.append(int(row["frozen"]))
    assert frozen[0] == 0
    assert max(frozen) > 0


def test_epochs_without_a_test_have_empty_cells(finished: Path) -> None:
    assert [row["test_top1"] == "" for row in rows(finished / "metrics.csv")] == [True, False, False]


def test_checkpoints_are_of_the_epochs_they_name(finished: Path) -> None:
    last, previous, best = (
        load_state(finished / "checkpoints" / f"{name}.safetensors") for name in ("last", "previous", "best")
    )
    assert (last["epoch"], previous["epoch"]) == (3, 2)
    scores = {int(row["epoch"]): float(row["test_top1"]) for row in rows(finished / "metrics.csv") if row["test_top1"]}
    assert scores[best["epoch"]] == max(scores.values())
    weights, averaged = read_weights(finished / "weights.safetensors"), last["averaged"]
    assert all(torch.equal(tensor, averaged[f"module.{name}"]) for name, tensor in weights.items())


def test_a_matched_run_retrains_without_the_run_it_matched(finished: Path, tmp_path: Path) -> None:
    changes = ("policy.kind=stochastic", f"policy.p=match:{finished}")
    run = running.train(load(tmp_path, *changes), tmp_path / "matched", Silent())
    target = sum(float(row["flops_paper"]) for row in rows(finished / "metrics.csv")) / 3
    spent = sum(float(row["flops_paper"]) for row in rows(run / "metrics.csv")) / 3
    assert spent == pytest.approx(target, rel=0.1)
    about = json.loads((run / "environment.json").read_text())
    assert about["matched_flops"] == pytest.approx(target)
    assert f"{100 * (spent / target - 1):+.2f}% beside" in "".join(about["notes"])
    resolved = (run / "recipe.yaml").read_text()
    gone = tmp_path / "again.yaml"
    gone.write_text(resolved.replace(str(finished), "/nowhere/at/all"))
    again = running.train(load_recipe(str(gone)), tmp_path / "again", Silent())
    first, second = read_weights(run / "weights.safetensors"), read_weights(again / "weights.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = load(tmp_path, *changes, "model.kwargs.width=2")
    with pytest.raises(RecipeError, match="match a run of the same model"):
        running.train(other, tmp_path / "other", Silent())
    missing = load(tmp_path, "policy.kind=stochastic", f"policy.p=match:{tmp_path}/missing")
    with pytest.raises(RecipeError, match=r"^command line: policy\.p=match:.*: no such run directory"):
        running.train(missing, tmp_path / "missing-run", Silent())
    assert not (tmp_path / "other").exists()
    assert not (tmp_path / "missing-run").exists()


def test_a_run_that_fails_keeps_its_epochs(tmp_path: Path) -> None:
    # Epoch 2's first step makes the weights huge, its second loss is not a number.
    loaded = load(tmp_path, "scheduler={name: multistep, milestones: [1], gamma: 1e+38}")
    with pytest.raises(TrainingError) as raised:
        running.train(loaded, tmp_path / "run", Silent())
    assert str(raised.value).startswith("epoch 2, step 2: ")
    assert status(tmp_path / "run")["state"] == "failed"
    assert status(tmp_path / "run")["reason"] == str(raised.value)
    assert read_run(tmp_path / "run").epochs == 1
    assert load_state(tmp_path / "run" / "checkpoints" / "last.safetensors")["epoch"] == 1
    assert not (tmp_path / "run" / "weights.safetensors").exists()


class AfterOneEpoch(Silent):
    """Does something when the first epoch has ended."""

    def __init__(self, signal_number: int) -> None:
        self.signal_number = signal_number

    def show(self, record: Record) -> None:
        if isinstance(record, EpochRecord):
            os.kill(os.getpid(), self.signal_number)


@pytest.mark.parametrize(
    ("number", "error", "reason"),
    [(signal.SIGTERM, Terminated, "SIGTERM"), (signal.SIGINT, Terminated, "SIGINT")],
)
def test_a_signal_ends_a_run_and_is_noted(tmp_path: Path, number: int, error: type[BaseException], reason: str) -> None:
    assert threading.current_thread() is threading.main_thread()
    watch = Watch()  # as the command line has it
    watch.start()
    try:
        with pytest.raises(error):
            running.train(load(tmp_path), tmp_path / "run", AfterOneEpoch(number))
    finally:
        watch.stop(for_good=False)
    assert (status(tmp_path / "run")["state"], status(tmp_path / "run")["reason"]) == ("interrupted", reason)
    assert read_run(tmp_path / "run").epochs == 1


class Odd:
    """A policy that keeps or answers what it should not."""

    def __init__(self, answers: str = "nothing", keeps: str = "nothing") -> None:
        self.answers, self.keeps = answers, keeps

    def choose(self, observations: Mapping[str, Observation], epoch: int) -> Mapping[str, Tensor]:
        return {"no.such.layer": torch.ones(1, dtype=torch.bool)} if self.answers == "a wrong layer" else {}

    def state_dict(self) -> dict[str, Any]:
        return {"seen": {1, 2}} if self.keeps == "a set" else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("answers: a wrong layer", "epoch 1: policy Odd: chose for a layer 'no.such.layer'"),
        ("keeps: a set", "checkpoint: freezer/policy/seen: a set cannot be stored"),
    ],
)
def test_a_policy_that_errs_while_training_is_one_line_and_code_1(tmp_path: Path, fault: str, message: str) -> None:
    changes = ("policy.kind=entrypoint", f"policy.entrypoint={__name__}:Odd", f"policy.kwargs={{{fault}}}")
    with pytest.raises(NeqError) as raised:
        running.train(load(tmp_path, *changes), tmp_path / "run", Silent())
    assert str(raised.value).startswith(message)
    assert raised.value.exit_code == 1
    assert status(tmp_path / "run")["state"] == "failed"


def test_a_taken_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("precious")
    with pytest.raises(RunDirectoryError, match="already exists"):
        running.train(load(tmp_path), tmp_path / "run", Silent())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine"]


def test_a_run_with_an_entrypoint_trains_again_from_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = tmp_path / "origin"
    origin.mkdir()
    (origin / "my_own_network.py").write_text(
        "from torch import nn\n"
        "def make(num_classes): return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, num_classes))\n"
    )
    (origin / "mine.yaml").write_text(
        "model: {entrypoint: 'my_own_network:make'}\ndata: {name: digits, probe_size: 1400}\nepochs: 1\n"
        "batch_size: 38\noptimizer: {lr: 0.1}\n"
    )
    monkeypatch.syspath_prepend(origin)
    running.train(load_recipe(str(origin / "mine.yaml")), tmp_path / "run", Silent())
    assert (tmp_path / "run" / "my_own_network.py").read_bytes() == (origin / "my_own_network.py").read_bytes()
    again = running.train(load_recipe(str(tmp_path / "run" / "recipe.yaml")), tmp_path / "again", Silent())
    first, second = read_weights(tmp_path / "run" / "weights.safetensors"), read_weights(again / "weights.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def joule_a_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that takes a joule whenever somebody looks."""
    monkeypatch.setattr(measured, "rapl_meter", lambda folder: Meter("cpu", "RAPL by hand", lambda: 1.0))


@pytest.mark.usefixtures("joule_a_reading")
def test_energy_may_be_left_out_on_resume_and_taken_up_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    running.train(load(tmp_path, "energy=true", "grams_per_kwh=3600000", "epochs=1"), run, Silent())
    running.train(load(tmp_path, "epochs=2"), run, Silent(), resume=True)
    running.train(load(tmp_path, "energy=true", "epochs=3"), run, Silent(), resume=True)
    # A reading each at the beginning and at the end of a row; a joule is a gram here.
    cells = [(row["joules"], row["co2_grams"]) for row in rows(run / "metrics.csv")]
    assert cells == [("1.0", "1.0"), ("", ""), ("1.0", "")]
    environment = json.loads((run / "environment.json").read_text())
    assert environment["energy"] == {"gpu": "not used", "cpu": "RAPL by hand", "grams_per_kwh": 3.6e6}


@pytest.mark.usefixtures("joule_a_reading")
@pytest.mark.parametrize(
    ("begun", "wanted", "key"),
    [([], ["energy=true"], "energy=true"), (["energy=true"], ["energy=true", "grams_per_kwh=56"], "grams_per_kwh=56")],
)
def test_energy_that_its_table_has_no_column_for_is_refused(
    tmp_path: Path, begun: list[str], wanted: list[str], key: str
) -> None:
    run = tmp_path / "run"
    running.train(load(tmp_path, *begun, "epochs=1"), run, Silent())
    before = (run / "metrics.csv").read_bytes()
    said = f"{key}: {run} was begun without it, and its table keeps its columns; leave it out, or train anew"
    with pytest.raises(RecipeError, match=re.escape(said)):
        running.train(load(tmp_path, *wanted, "epochs=2"), run, Silent(), resume=True)
    assert (run / "metrics.csv").read_bytes() == before


def test_what_an_earlier_neq_saved_within_a_row_has_joules_that_nobody_knows(tmp_path: Path) -> None:
    with RunWriter.create(tmp_path / "run", "seed: 1\n", {}) as writer:
        so_far = {"epoch": 1, "steps": 3, "images": 12}
        save_state({"epoch": 0, "so_far": so_far, "processes": [{}]}, writer.checkpoint_path("last"))
        state, problems, _ = read_checkpoint(writer)
    assert problems == []
    assert state is not None
    assert math.isnan(state["so_far"]["joules"])


def test_a_meter_that_fails_is_a_note_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    joules = iter([0.0, 5.0])  # and then it is gone
    monkeypatch.setattr(measured, "rapl_meter", lambda folder: Meter("cpu", "RAPL by hand", lambda: next(joules)))
    run = running.train(load(tmp_path, "energy=true", "epochs=3"), tmp_path / "run", Silent())
    assert [row["joules"] for row in rows(run / "metrics.csv")] == ["5.0", "", ""]
    assert status(run)["state"] == "finished"
    notes = json.loads((run / "environment.json").read_text())["notes"]
    failed = "energy: RAPL by hand failed (StopIteration) in epoch 2"
    assert len([note for note in notes if note.startswith(failed)]) == 1


def test_a_run_in_which_nothing_learns_any_more_ends_and_says_so(tmp_path: Path) -> None:
    loaded = load(tmp_path, "policy.epsilon=1e9", "stop_when_frozen=1")
    run = running.train(loaded, tmp_path / "run", Silent())
    assert [row["epoch"] for row in rows(run / "metrics.csv")] == ["1", "2"]
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    note = "stop_when_frozen: all that may freeze has stood still for 1 epoch; ended after epoch 2 of 3"
    assert json.loads((run / "environment.json").read_text())["notes"].count(note) == 1
    running.train(loaded, run, Silent(), resume=True)  # there is nothing left to be done
    assert json.loads((run / "environment.json").read_text())["notes"].count(note) == 1
    assert [row["epoch"] for row in rows(run / "metrics.csv")] == ["1", "2"]
    running.train(load(tmp_path, "policy.epsilon=1e9"), run, Silent(), resume=True)  # asked for all epochs after all
    assert [row["epoch"] for row in rows(run / "metrics.csv")] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("more", "mend"),
    [
        ((), "lower data.probe_size"),
        (("probe_every=4",), "raise probe_every, or lower data.probe_size"),
    ],
)
def test_a_run_that_probes_or_waits_much_says_so_with_a_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...], mend: str
) -> None:
    monkeypatch.setattr(time_shares, "_LEAST_SECONDS", 0.0)
    monkeypatch.setattr(follower, "MUCH_PROBING", 1e-9)
    monkeypatch.setattr(follower, "MUCH_WAITING", 1e-9)
    monkeypatch.setattr(limits, "usable_cores", lambda: 64)
    run = running.train(load(tmp_path, "data.cache=none", *more), tmp_path / "run", Silent())
    notes = read_run(run).environment["notes"]
    probing, waiting = (next(note for note in notes if note.startswith(said)) for said in ("probing", "waiting for"))
    assert re.fullmatch(rf"probing took \d+ % of the time so far; {mend}", probing)
    assert re.fullmatch(r"waiting for data took \d+ % .*; raise data.workers \(64 cores here\)", waiting)


class Closings(Silent):
    """Keeps the last lines, and what came before them."""

    def __init__(self) -> None:
        self.closings: list[str] = []

    def closing(self, text: str) -> None:
        self.closings.append(text)


@pytest.mark.parametrize("path_told", [False, True])
def test_the_last_lines_say_how_it_ended_and_why_nothing_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path_told: bool
) -> None:
    monkeypatch.setattr(running, "nothing_saved", lambda run: f"for a reason of {run.path.name}")
    shown, path = Closings(), tmp_path / "run"
    running.train(load(tmp_path, "epochs=1"), path, shown, path_told=path_told)
    top1 = float(rows(path / "metrics.csv")[-1]["test_top1"])
    finished = f"finished: 1 epoch, test_top1 {top1:.2f}" + ("" if path_told else f": {path}")
    assert shown.closings == [finished, "nothing saved: for a reason of run"]
