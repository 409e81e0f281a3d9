"""A run directory from any training loop: read like any other, gone on with exactly, or refused in one line."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from frozen import Sets
from torch import Tensor, nn

from neq_cli import Baseline, Freezer, NEq, Recorder, Stochastic, read_run
from neq_cli.errors import FreezingError, RecipeError, RunDirectoryError
from neq_cli.freezing import Policy
from neq_cli.jobs.prepare import load
from neq_cli.runs.compare.comparison import compare_runs
from neq_cli.runs.compare.configurations import model_and_data
from neq_cli.training.machine.energy import measured
from neq_cli.training.machine.energy.meter import Meter


class Loop:
    """A training loop of somebody's own, which saves all that it needs to go on."""

    def __init__(self, policy: Policy | None = None, seed: int = 1) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.inputs, self.targets = torch.randn(32, 4), torch.randint(0, 3, (32,))
        self.freezer = Freezer(self.model, self.optimizer, [self.inputs[:8]], policy or NEq(0.05))

    def train(self) -> dict[str, float]:
        """Train an epoch, and return what it came to."""
        loss = torch.zeros(())
        for _ in range(3):
            self.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.model(self.inputs), self.targets)
            loss.backward()
            self.optimizer.step()
        self.freezer.step()
        right = (self.model(self.inputs).argmax(1) == self.targets).float().mean()
        return {"lr": 0.1, "train_loss": loss.item(), "test_top1": 100 * float(right)}

    def state(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "freezer": self.freezer}
        found: dict[str, Any] = {name: part.state_dict() for name, part in parts.items()}  # type: ignore[attr-defined]
        return torch.load(_saved(found), weights_only=True)  # type: ignore[no-any-return]

    def load(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.freezer.load_state_dict(state["freezer"])


def _saved(state: Any) -> Any:
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def record(loop: Loop, path: Path, last: int, **options: Any) -> list[dict[str, Any]]:
    """Train and record up to the ``last`` epoch; return the states after each."""
    options = {"name": "mine", "metric": "test_top1", "seed": 1, **options}
    states = []
    with Recorder(loop.freezer, path, **options) as recorder:
        while loop.freezer.epoch < last:
            recorder.epoch(**loop.train())
            states.append(loop.state())
    return states


def files_of(path: Path) -> dict[str, Any]:
    """Return all that a run holds but its times."""
    run = read_run(path)
    metrics = {name: column for name, column in run.metrics.items() if not name.endswith("_seconds")}
    neurons = {file.name: file.read_bytes() for file in sorted((path / "neurons").iterdir())}
    return {"metrics": metrics, "layers": (path / "layers.csv").read_text(), "neurons": neurons, "recipe": run.recipe}


def assert_same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert found["metrics"].keys() == expected["metrics"].keys()
    for name, column in expected["metrics"].items():
        np.testing.assert_array_equal(found["metrics"][name], column, err_msg=name)
    for part in ("layers", "neurons", "recipe"):
        assert found[part] == expected[part], part


def test_what_is_recorded_is_what_the_freezer_saw(tmp_path: Path) -> None:
    frozen = torch.arange(16) < 5
    loop = Loop(Sets({"0": ~frozen}))
    trained: list[Tensor] = []
    phi: list[Tensor] = []
    flops: list[float] = []
    with Recorder(loop.freezer, tmp_path / "run", name="mine", metric="test_top1") as recorder:
        for _ in range(3):
            trained.append(loop.freezer.trainable["0"].clone())
            flops.append(loop.freezer.flops().paper)
            told = loop.train()
            phi.append(loop.freezer.dynamics["0"].phi)
            recorder.epoch(**told)
    run = read_run(tmp_path / "run")
    assert str(run.status) == "finished"
    assert list(run.metrics)[:4] == ["epoch", "lr", "train_loss", "test_top1"]
    assert run.metrics["epoch"].tolist() == [1, 2, 3]
    assert run.metrics["flops_paper"].tolist() == flops
    assert run.metrics["frozen"].tolist() == [0, 5, 5]
    assert np.isnan(run.metrics["images_per_second"]).all()
    for epoch in (1, 2, 3):
        neurons = run.neurons(epoch)["0"]
        np.testing.assert_array_equal(neurons["trained"], trained[epoch - 1].numpy())
        np.testing.assert_array_equal(neurons["phi"], phi[epoch - 1].float().numpy())
        np.testing.assert_array_equal(neurons["trainable"], ~frozen.numpy())
    assert (run.metrics["probe_seconds"] > 0).all()
    assert (run.metrics["epoch_seconds"] >= run.metrics["probe_seconds"]).all()


@pytest.mark.parametrize("saved", [0, 1, 3])
@pytest.mark.parametrize("reached", [3, 4])
def test_a_run_that_is_gone_on_with_is_the_uninterrupted_one(tmp_path: Path, saved: int, reached: int) -> None:
    """Killed after ``reached`` recorded epochs, with a checkpoint of the loop's own of ``saved`` epochs."""
    record(Loop(), tmp_path / "straight", 5, epochs=5)
    loop = Loop()
    start = loop.state()
    states = [start, *record(loop, tmp_path / "run", reached, epochs=5)]
    again = Loop(seed=7)
    again.inputs, again.targets = loop.inputs, loop.targets
    again.freezer.probe_loader = [loop.inputs[:8]]
    again.load(states[saved])
    record(again, tmp_path / "run", 5, epochs=5, resume=True)
    assert_same(files_of(tmp_path / "run"), files_of(tmp_path / "straight"))


@pytest.fixture
def joule_a_reading(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A processor that takes a joule whenever somebody looks; returns which of its meters were closed."""
    closed: list[str] = []

    def meter(folder: Path) -> Meter:
        return Meter("cpu", "RAPL by hand", lambda: 1.0, close=lambda: closed.append("cpu"))

    monkeypatch.setattr(measured, "rapl_meter", meter)
    return closed


def test_energy_of_every_epoch_is_recorded_where_it_is_asked_for(tmp_path: Path, joule_a_reading: list[str]) -> None:
    record(Loop(), tmp_path / "run", 2, energy=True, grams_per_kwh=7.2e6)
    run = read_run(tmp_path / "run")
    assert list(run.metrics)[-2:] == ["joules", "co2_grams"]
    # A reading ends each epoch, and is the beginning of the next; two grams a joule.
    assert (run.metrics["joules"].tolist(), run.metrics["co2_grams"].tolist()) == ([1, 1], [2, 2])
    assert run.environment["energy"] == {"gpu": "not used", "cpu": "RAPL by hand", "grams_per_kwh": 7.2e6}
    assert any(note.startswith("energy: cpu: RAPL by hand; of whole") for note in run.environment["notes"])
    assert joule_a_reading == ["cpu"]
    record(Loop(), tmp_path / "without", 1)
    assert "joules" not in read_run(tmp_path / "without").metrics
    loop = Loop()
    with (
        Recorder(loop.freezer, tmp_path / "taken", name="mine", metric="test_top1") as recorder,
        pytest.raises(FreezingError, match=r"joules: is what the Recorder tells itself"),
    ):
        recorder.epoch(**loop.train(), joules=1.0)


@pytest.mark.usefixtures("joule_a_reading")
def test_recorded_energy_may_end_on_resume_and_not_begin(tmp_path: Path) -> None:
    loop = Loop()
    record(loop, tmp_path / "run", 1, energy=True)
    record(loop, tmp_path / "run", 2, resume=True)
    assert [str(value) for value in read_run(tmp_path / "run").metrics["joules"]] == ["1.0", "nan"]
    with pytest.raises(FreezingError, match=r"^Recorder: grams_per_kwh: .*run was begun without it"):
        record(loop, tmp_path / "run", 3, energy=True, grams_per_kwh=1, resume=True)
    other = Loop()
    record(other, tmp_path / "without", 1)
    with pytest.raises(FreezingError, match=r"^Recorder: energy: .*without was begun without it"):
        record(other, tmp_path / "without", 2, energy=True, resume=True)


OF_TWO = """
import os, sys
import torch
from torch import distributed, nn
import neq_cli.training.machine.energy.measured as measured
from neq_cli import Freezer, NEq, Recorder
from neq_cli.training.machine.energy.meter import Meter

measured.rapl_meter = lambda folder: Meter("cpu", "RAPL by hand", lambda: 1.0)
measured.card_of = lambda device: "GPU-" + os.environ["RANK"]
measured.nvml_meter = lambda card: Meter("gpu", "NVML by hand", lambda: {"GPU-0": 10.0, "GPU-1": 200.0}[card])
distributed.init_process_group("gloo", init_method="env://")
torch.manual_seed(1)
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
freezer = Freezer(model, optimizer, [torch.randn(8, 4)], NEq(0.05), process_group=distributed.group.WORLD)
with Recorder(freezer, "run", name="mine", metric="test_top1", energy=True) as recorder:
    for _ in range(2):
        freezer.step()
        recorder.epoch(test_top1=1.0)
distributed.destroy_process_group()
sys.exit(0)
"""


def test_of_two_processes_their_sum_is_recorded(neq: Callable[..., Any], tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    both = [neq(before=OF_TWO, environment={**world, "RANK": rank}) for rank in "01"]
    for process in both:
        assert process.wait() == 0, process.text
    run = read_run(tmp_path / "run")
    assert run.metrics["joules"].tolist() == [1 + 10 + 200] * 2
    assert run.environment["energy"] == {"gpu": "2 x NVML by hand", "cpu": "RAPL by hand"}


def test_where_nothing_measures_energy_a_recorder_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "DOMAINS", tmp_path)
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    with pytest.raises(FreezingError, match=r"^Recorder: energy: nothing here measures it: no RAPL .*; pip install"):
        record(Loop(), tmp_path / "run", 1, energy=True)
    assert not (tmp_path / "run").exists()


def test_seeds_are_one_configuration_and_settings_tell_others_apart(tmp_path: Path) -> None:
    for seed in (1, 2):
        record(Loop(NEq(0.05), seed), tmp_path / f"neq{seed}", 3, seed=seed, settings={"lr": 0.1})
        record(Loop(Baseline(), seed), tmp_path / f"base{seed}", 3, seed=seed, settings={"lr": 0.1})
    record(Loop(Stochastic(0.5), 1), tmp_path / "half", 3, settings={"lr": 0.1})
    record(Loop(NEq(0.05), 1), tmp_path / "other", 3, settings={"lr": 0.1, "nested": {"width": [1, 2]}})
    runs = [read_run(path) for path in sorted(tmp_path.iterdir())]
    comparison = compare_runs(runs)
    assert [len(row.runs) for row in comparison.rows if row.is_baseline] == [2]
    assert sorted(len(row.runs) for row in comparison.rows) == [1, 1, 2, 2]
    approaches = {row.approach for row in comparison.rows}
    assert any(approach.startswith("Stochastic p=0.5") for approach in approaches)
    assert model_and_data(runs[0]) == "Sequential"


def _raise_in(recorder: Recorder, error: BaseException) -> None:
    with recorder:
        raise error


def test_how_a_loop_ended_is_told(tmp_path: Path) -> None:
    for error, state in ((KeyboardInterrupt(), "interrupted: SIGINT"), (ValueError("no luck"), "failed")):
        loop = Loop()
        path = tmp_path / state.partition(":")[0]
        recorder = Recorder(loop.freezer, path, name="mine", metric="test_top1")
        recorder.epoch(**loop.train())
        with pytest.raises(type(error)):
            _raise_in(recorder, error)
        assert str(read_run(path).status).startswith(state)
    loop = Loop()
    recorder = Recorder(loop.freezer, tmp_path / "closed", name="mine", metric="test_top1")
    recorder.epoch(**loop.train())
    recorder.note("from a notebook")
    recorder.close()
    assert str(read_run(tmp_path / "closed").status) == "finished"
    assert "from a notebook" in json.loads((tmp_path / "closed" / "environment.json").read_text())["notes"]


def test_a_recorded_recipe_is_not_trained(tmp_path: Path) -> None:
    record(Loop(), tmp_path / "run", 1)
    with pytest.raises(RecipeError, match="was recorded from a training loop that neq does not know; run that loop"):
        load(str(tmp_path / "run" / "recipe.yaml"))


MISTAKES: dict[str, tuple[Callable[[Recorder, Loop], Any], str]] = {
    "twice": (
        lambda recorder, loop: [recorder.epoch(**loop.train()), recorder.epoch(lr=0.1, train_loss=1.0, test_top1=1.0)],
        "1 epoch is recorded and the Freezer has seen 1; call it once after every freezer.step",
    ),
    "before the first": (lambda recorder, loop: recorder.epoch(test_top1=1.0), "0 epochs are recorded"),
    "skipped": (lambda recorder, loop: [loop.train(), recorder.epoch(**loop.train())], "the Freezer has seen 2"),
    "no metric": (
        lambda recorder, loop: [loop.train(), recorder.epoch(test_top=1.0)],
        "no column 'test_top1', which the run is judged by; did you mean 'test_top'",
    ),
    "its own": (lambda recorder, loop: recorder.epoch(**loop.train(), frozen=3), "frozen: is what the Recorder tells"),
    "flops": (lambda recorder, loop: recorder.epoch(**loop.train(), flops_all=3), "flops_all: is what the Recorder"),
    "text": (lambda recorder, loop: recorder.epoch(**{**loop.train(), "lr": "high"}), "lr: is a str; give a number"),
    "several": (
        lambda recorder, loop: recorder.epoch(**{**loop.train(), "lr": torch.ones(2)}),
        "lr: is a Tensor; give a number",
    ),
    "new": (
        lambda recorder, loop: [recorder.epoch(**loop.train()), recorder.epoch(**loop.train(), extra=1.0)],
        "extra: is new in epoch 2; give it from the first epoch on",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_an_epoch_are_one_line(tmp_path: Path, name: str) -> None:
    act, message = MISTAKES[name]
    loop = Loop()
    with (
        pytest.raises(FreezingError, match=r"^Recorder\.epoch: ") as caught,
        Recorder(loop.freezer, tmp_path / "run", name="mine", metric="test_top1") as recorder,
    ):
        act(recorder, loop)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mistakes_in_a_directory_are_one_line(tmp_path: Path) -> None:
    loop = Loop()
    with pytest.raises(FreezingError, match="progress 'plain' tells how long the rest will take; give epochs too"):
        Recorder(loop.freezer, tmp_path / "run", name="mine", metric="test_top1", progress="plain")
    with pytest.raises(FreezingError, match=r"Recorder: settings.net\[1\]: is a Linear; give numbers, text, lists"):
        Recorder(loop.freezer, tmp_path / "run", name="m", metric="a", settings={"net": [1, nn.Linear(1, 1)]})
    assert not (tmp_path / "run").exists()
    record(loop, tmp_path / "run", 2)
    with pytest.raises(FreezingError, match="has seen 2 epochs recorded nowhere; make the Recorder before"):
        Recorder(loop.freezer, tmp_path / "late", name="mine", metric="test_top1")
    with pytest.raises(FreezingError, match="nothing is recorded there, and the Freezer has seen 2 epochs"):
        Recorder(loop.freezer, tmp_path / "elsewhere", name="mine", metric="test_top1", resume=True)
    with pytest.raises(RunDirectoryError, match="run"):
        Recorder(Loop().freezer, tmp_path / "run", name="mine", metric="test_top1")
    loop.train()
    with pytest.raises(RunDirectoryError, match="whole rows of 2 epochs, but the checkpoint is of epoch 3"):
        Recorder(loop.freezer, tmp_path / "run", name="mine", metric="test_top1", resume=True)
    with (
        Recorder(Loop().freezer, tmp_path / "held", name="mine", metric="test_top1"),
        pytest.raises(RunDirectoryError, match="held"),
    ):
        Recorder(Loop().freezer, tmp_path / "held", name="mine", metric="test_top1", resume=True)


def test_a_run_that_is_begun_anew_in_place_is_of_the_same_settings(tmp_path: Path) -> None:
    """Of what is recorded there no epoch is kept, but the recipe and the metric are."""
    given: dict[str, Any] = {"name": "mine", "metric": "test_top1", "seed": 1, "settings": {"lr": 0.1}}
    loop = Loop()
    with Recorder(loop.freezer, tmp_path / "run", **given) as recorder:
        recorder.epoch(**loop.train())
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    for key, other in {"name": "other", "metric": "test_top5", "seed": 2, "settings": {"lr": 0.2}}.items():
        with pytest.raises(FreezingError, match=f"of which no epoch is kept, had another {key}; record in another"):
            Recorder(Loop().freezer, tmp_path / "run", **{**given, key: other}, resume=True)
        assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()} == before
    Recorder(Loop().freezer, tmp_path / "run", **given, epochs=3, resume=True).close()  # how long is no setting
    assert not (tmp_path / "run" / "metrics.csv").read_text()
    assert not list((tmp_path / "run" / "neurons").iterdir())


def test_what_is_left_out_is_empty_and_progress_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loop = Loop()
    with Recorder(
        loop.freezer, tmp_path / "run", name="mine", metric="test_mae", lower_is_better=True, epochs=2, progress="plain"
    ) as recorder:
        recorder.epoch(**loop.train(), test_mae=3.0)
        loop.train()
        recorder.epoch(test_mae=torch.tensor(2.0))
    run = read_run(tmp_path / "run")
    assert run.lower_is_better
    assert run.metrics["test_mae"].tolist() == [3.0, 2.0]
    assert np.isnan(run.metrics["train_loss"]).tolist() == [False, True]
    shown = capsys.readouterr().err
    assert "mine: Sequential, neq epsilon=0.05" in shown
    assert "epoch 2/2  loss –  mae" in shown
