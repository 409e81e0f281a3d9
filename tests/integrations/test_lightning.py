"""Lightning's Trainer with the callback: rows held, observed when asked for, recorded, and resumed to the bit."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from frozen import Sets
from torch import Tensor, nn

from neq_cli import Freezer, NEq, read_run
from neq_cli.errors import FreezingError, RunDirectoryError
from neq_cli.freezing.backward.dispatch import Dispatch

pytest.importorskip("lightning.pytorch", reason="needs lightning; pip install 'neq[lightning]'")

import lightning.pytorch as pl
from integrations.lightning_trainings import (
    INPUTS,
    PROBE,
    TARGETS,
    Held,
    Net,
    Resumable,
    Shuffled,
    files_of,
    fit,
    same,
    trainer_of,
)
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import SIGTERMException

from neq_cli.integrations.lightning import NEqCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # Lightning's advice on workers, devices and logging
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

LOW = {"net.0.weight": 7, "net.0.bias": 7}  # rows below are frozen


@pytest.fixture(autouse=True)
def _by_rule() -> Iterator[None]:
    """Kernels by rule, as under Trainer(deterministic=True), whose setting outlives it: the same bits in every run."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_rows_are_held_under_accumulation_and_clipping(tmp_path: Path) -> None:
    """Against SGD, accumulation and clipping by their formulas, in a loop without Lightning and without a Freezer."""
    sets = Sets({"net.0": torch.arange(16) >= 7})
    callback = NEqCallback(PROBE, sets)
    module = Net()
    module.net[3].p = 0.0
    oracle = copy.deepcopy(module.net)
    fit(trainer_of(tmp_path, callback, accumulate_grad_batches=2, gradient_clip_val=0.05), module)

    velocity = {name: torch.zeros_like(one) for name, one in oracle.named_parameters()}
    started: dict[str, Tensor] = {}
    for epoch in range(3):
        sampler = Shuffled()
        sampler.set_epoch(epoch)
        orders = torch.tensor(list(sampler)).split(8)
        if epoch == 1:  # epoch 1 trains everything, then the lowest rows stand still
            started = {name: one.detach().clone() for name, one in oracle.named_parameters()}
        for several in (orders[:2], orders[2:4], orders[4:]):
            gradients = {name: torch.zeros_like(one) for name, one in oracle.named_parameters()}
            for order in several:
                # Lightning divides by the batches of a whole accumulation, at the epoch's end too.
                loss = nn.functional.cross_entropy(oracle(INPUTS[order]), TARGETS[order]) / 2
                for name, one in zip(gradients, torch.autograd.grad(loss, list(oracle.parameters())), strict=True):
                    gradients[name] += one
            held = {name: LOW[f"net.{name}"] if epoch and f"net.{name}" in LOW else 0 for name in gradients}
            for name, rows in held.items():
                gradients[name][:rows] = 0
            norm = torch.stack([one.pow(2).sum() for one in gradients.values()]).sum().sqrt()
            assert norm > 0.05, "nothing is clipped"
            for name, one in oracle.named_parameters():
                rows = held[name]
                change = gradients[name] * (0.05 / (norm + 1e-6)) + 1e-3 * one.detach()
                velocity[name][rows:] = 0.9 * velocity[name][rows:] + change[rows:]
                one.data[rows:] -= (0.1 if epoch < 2 else 0.05) * velocity[name][rows:]
    for name, one in module.net.named_parameters():
        expected = dict(oracle.named_parameters())[name]
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(module.net[0].weight[7:], started["0.weight"][7:])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 3},
        {"gradient_clip_val": 0.1},
        {"precision": "bf16-mixed"},
        {"precision": "64-true"},
        pytest.param({"precision": "16-mixed", "accelerator": "gpu"}, marks=pytest.mark.gpu),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_frozen_rows_are_bit_identical(tmp_path: Path, options: dict[str, Any], kind: Any) -> None:
    module = Net()
    module.configure_optimizers = lambda: kind(module.parameters(), lr=0.05, weight_decay=0.1)  # type: ignore[method-assign]
    callback = NEqCallback(PROBE, Sets(0.5))
    held = Held(callback)
    fit(trainer_of(tmp_path, held, callback, **options), module)
    assert held.compared > 100
    assert held.moved > 100
    assert [freezer.epoch for freezer in callback.freezers] == [3]


def test_frozen_rows_are_bit_identical_while_a_scaler_skips_steps(tmp_path: Path) -> None:
    """On a CPU, where Lightning makes no scaler of its own for 16-mixed, but takes one."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**36, growth_interval=2)
    given = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    callback = NEqCallback(PROBE, Sets(0.5))
    held = Held(callback)
    fit(trainer_of(tmp_path, held, callback, plugins=[given], epochs=8), Net())
    assert scaler.get_scale() < 2.0**36, "no step was skipped"
    assert held.compared > 100
    assert held.moved > 100


def test_it_is_the_freezer_in_a_loop_of_ones_own(tmp_path: Path) -> None:
    callback = NEqCallback(PROBE, NEq(0.2), exclude=["net.1"])
    module = Net()
    mine = copy.deepcopy(module.net)
    fit(trainer_of(tmp_path, callback), module)

    optimizer = torch.optim.SGD(mine.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    freezer = Freezer(mine, optimizer, PROBE, NEq(0.2), exclude=["1"], dispatch=Dispatch(fixed=True))
    for epoch in range(3):
        sampler = Shuffled()
        sampler.set_epoch(epoch)
        mine.train()
        for number, order in enumerate(torch.tensor(list(sampler)).split(8)):
            torch.manual_seed(100 * epoch + number)
            optimizer.zero_grad()
            nn.functional.cross_entropy(mine(INPUTS[order]), TARGETS[order]).backward()
            optimizer.step()
        schedule.step()
        freezer.step()
    state, expected = callback.state_dict()["freezers"][0], freezer.state_dict()
    assert sum(int((~one["trainable"]).sum()) for one in expected["layers"].values()) > 0, "nothing froze"
    for name, layer in expected["layers"].items():
        assert same(state["layers"][f"net.{name}"], layer), name
    assert same(dict(module.net.state_dict()), dict(mine.state_dict()))


def test_an_interrupted_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    def run(name: str, epochs: int, checkpoint: Path | None = None) -> Any:
        callback = NEqCallback(PROBE, NEq(0.2), run_directory=tmp_path / name / "run", seed=3)
        trainer = trainer_of(tmp_path / name, callback, save=True, epochs=epochs)
        trainer.fit_loop.max_epochs = epochs
        fit(trainer, Net(), checkpoint=checkpoint)
        path = tmp_path / name / f"{epochs}.ckpt"
        trainer.save_checkpoint(path)  # once training has ended
        return torch.load(path, weights_only=True)  # nothing in it is pickled code

    straight = run("straight", 5)
    run("stopped", 2)
    last = tmp_path / "stopped" / "saved" / "epoch=1.ckpt"
    resumed = run("stopped", 5, last)
    assert straight["callbacks"]["NEqCallback"]["freezers"][0]["epoch"] == 5
    layers = straight["callbacks"]["NEqCallback"]["freezers"][0]["layers"]
    assert any(not bool(layer["trainable"].all()) for layer in layers.values()), "nothing froze"
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert same(resumed[part], straight[part]), part
    assert same(resumed["callbacks"]["NEqCallback"], straight["callbacks"]["NEqCallback"])
    assert files_of(tmp_path / "stopped" / "run") == files_of(tmp_path / "straight" / "run")


def test_rows_tell_steps_epochs_and_what_was_logged(tmp_path: Path) -> None:
    callback = NEqCallback(PROBE, NEq(0.2), run_directory=tmp_path / "run", metric="val_top1")
    module = Net()
    fit(trainer_of(tmp_path, callback, check_val_every_n_epoch=2, epochs=4), module)
    run = read_run(tmp_path / "run")
    assert str(run.status) == "finished"
    assert run.metrics["step"].tolist() == [5, 10, 15, 20]
    assert run.metrics["passed_epochs"].tolist() == [1, 2, 3, 4]
    assert run.unit == "epoch"
    assert run.metrics["lr"].tolist() == [0.1, 0.1, 0.05, 0.05]
    assert not np.isnan(run.metrics["train_loss"]).any()
    assert np.isnan(run.metrics["val_top1"]).tolist() == [True, False, True, False]
    module.eval()
    right = (module(INPUTS).argmax(1) == TARGETS).double().mean()
    assert run.metrics["val_top1"][3] == pytest.approx(100 * float(right), rel=1e-5)


def test_without_a_sanity_check_a_metric_named_beforehand_is_a_column(tmp_path: Path) -> None:
    callback = NEqCallback(PROBE, NEq(0.2), every=2, run_directory=tmp_path / "run", metric="val_loss")
    fit(trainer_of(tmp_path, callback, epochs=2, num_sanity_val_steps=0), Net())
    run = read_run(tmp_path / "run")
    assert run.metrics["step"].tolist() == [2, 4, 6, 8, 10]
    np.testing.assert_allclose(run.metrics["passed_epochs"], [0.4, 0.8, 1.2, 1.6, 2.0])
    assert run.unit == "observation"
    assert "val_top1" not in run.metrics
    assert np.isnan(run.metrics["val_loss"]).tolist() == [True, True, False, True, True]


@pytest.mark.parametrize(("given", "sanity", "expected"), [(None, 2, "val_top1"), (None, 0, "train_loss")])
def test_what_a_run_is_judged_by(tmp_path: Path, given: str | None, sanity: int, expected: str) -> None:
    callback = NEqCallback(PROBE, NEq(0.2), run_directory=tmp_path / "run", metric=given)
    fit(trainer_of(tmp_path, callback, epochs=1, num_sanity_val_steps=sanity), Net())
    status = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert expected in json.dumps(status), status


@pytest.mark.parametrize("saved", [7, 8])
def test_a_run_is_gone_on_with_from_within_an_epoch(tmp_path: Path, saved: int) -> None:
    def run(name: str, steps: int, checkpoint: Path | None = None) -> Any:
        callback = NEqCallback(PROBE, NEq(0.2), every=4, run_directory=tmp_path / name / "run")
        saving = ModelCheckpoint(tmp_path / name, save_top_k=-1, filename="{step}", every_n_train_steps=1)
        options = {"enable_checkpointing": True, "max_steps": steps}
        trainer = trainer_of(tmp_path / name, callback, saving, epochs=-1, **options)
        # Of a mean over the epoch, Lightning saves nothing within it.
        trainer.fit(Net(of_epochs=False), Resumable(), ckpt_path=checkpoint)
        return torch.load(tmp_path / name / f"step={steps}.ckpt", weights_only=True)

    straight = run("straight", 17)
    run("stopped", 9)
    resumed = run("stopped", 17, tmp_path / "stopped" / f"step={saved}.ckpt")
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert same(resumed[part], straight[part]), part
    assert same(resumed["callbacks"]["NEqCallback"], straight["callbacks"]["NEqCallback"])
    assert files_of(tmp_path / "stopped" / "run") == files_of(tmp_path / "straight" / "run")


class TwoOptimizers(Net):
    """Steps by hand, with an optimiser for the first layers and one for the last, which skips every other batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        first, last = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        first.zero_grad()
        last.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(first, 0.1, "norm")
        first.step()
        if batch_idx % 2 == 0:
            last.step()

    def configure_optimizers(self) -> Any:
        first = torch.optim.AdamW(self.net[:3].parameters(), lr=0.01)
        return [first, torch.optim.SGD(self.net[4].parameters(), lr=0.1)]


def test_each_optimizer_has_a_freezer(tmp_path: Path) -> None:
    callback = NEqCallback(PROBE, Sets(0.5), every=3, run_directory=tmp_path / "run")
    held = Held(callback)
    # Before the callback in the Trainer's list: rows are compared before the sets change.
    fit(trainer_of(tmp_path, held, callback, epochs=3), TwoOptimizers())
    first, last = callback.freezers
    assert (list(first.layers), list(last.layers)) == (["net.0", "net.2"], ["net.4"])
    # Batches make 2 and 1 steps by turns: 2, 3, 5, 6, 8; 10, 11, 13, ... and some pass a multiple of 3 by.
    runs = [read_run(tmp_path / "run" / f"optimizer_{number}") for number in (0, 1)]
    assert [run.metrics["lr"][0] for run in runs] == [0.01, 0.1]
    assert [run.metrics["step"].tolist() for run in runs] == [[3, 6, 10, 13, 16, 18, 21, 24]] * 2
    assert runs[0].metrics["frozen"].max() > 0
    assert runs[1].metrics["frozen"].max() == 0  # the output layer


def test_averaged_weights_beside_it_change_nothing(tmp_path: Path) -> None:
    averaging = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging", reason="Lightning 2.6 has it")

    class Weights(Callback):
        def __init__(self) -> None:
            self.seen: list[dict[str, Tensor]] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.seen.append({name: one.detach().clone() for name, one in pl_module.named_parameters()})

    plain, beside = Weights(), Weights()
    callbacks = [NEqCallback(PROBE, NEq(0.2)) for _ in range(2)]
    fit(trainer_of(tmp_path / "plain", callbacks[0], plain), Net())
    module = Net()
    ema = averaging.EMAWeightAveraging(decay=0.5)
    fit(trainer_of(tmp_path / "beside", ema, callbacks[1], beside), module)
    assert same(plain.seen, beside.seen)
    assert same(callbacks[0].state_dict(), callbacks[1].state_dict())
    average = beside.seen[0]
    for weights in beside.seen[1:]:
        average = {name: 0.5 * average[name] + 0.5 * one for name, one in weights.items()}
    for name, one in module.named_parameters():
        torch.testing.assert_close(one.detach(), average[name])


def test_stochastic_weight_averaging_beside_it(tmp_path: Path) -> None:
    """Lightning trains an epoch more then, without steps, for the statistics of batch norms."""
    swa = pl.callbacks.StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2, annealing_epochs=1)
    callback = NEqCallback(PROBE, Sets(0.5), run_directory=tmp_path / "run")
    held = Held(callback)
    module = Net()

    class Weights(Callback):
        seen: ClassVar[list[dict[str, Tensor]]] = []

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            self.seen.append({name: one.detach().clone() for name, one in pl_module.named_parameters()})

    fit(trainer_of(tmp_path, Weights(), held, callback, swa, epochs=4), module)
    for name, one in module.named_parameters():  # averaged at the beginnings of epochs 2, 3 and 4
        torch.testing.assert_close(one.detach(), sum(weights[name] for weights in Weights.seen[1:4]) / 3)
    run = read_run(tmp_path / "run")
    assert run.metrics["epoch"].tolist() == [1, 2, 3, 4, 5]
    assert run.metrics["lr"][-1] == 0.05
    assert held.compared > 100


def test_a_failed_start_keeps_the_state_that_was_loaded(tmp_path: Path) -> None:
    fit(trainer_of(tmp_path, callback := NEqCallback(PROBE, Sets(0.5)), save=True), Net())
    saved = callback.state_dict()
    broken = NEqCallback([torch.ones(2, 7)], Sets(0.5))
    with pytest.raises(FreezingError, match="the module fails on it"):
        fit(trainer_of(tmp_path, broken, epochs=4), Net(), checkpoint=tmp_path / "saved" / "epoch=2.ckpt")
    assert same(broken.state_dict(), saved)


def test_a_fit_without_a_checkpoint_starts_anew(tmp_path: Path) -> None:
    callback = NEqCallback(PROBE, NEq(0.2))
    states = []
    for name in ("first", "second"):
        fit(trainer_of(tmp_path / name, callback), Net())
        states.append(callback.state_dict())
        callback.on_exception(None, None, ValueError("after training has ended"))  # changes nothing more
    assert same(*states)
    assert len(callback.freezers) == 1


def test_a_metric_that_nobody_logs_is_a_note(tmp_path: Path) -> None:
    fit(trainer_of(tmp_path, NEqCallback(PROBE, run_directory=tmp_path / "run", metric="val_top"), epochs=1), Net())
    notes = json.loads((tmp_path / "run" / "environment.json").read_text())["notes"]
    assert any(note.startswith("metric: 'val_top', which the run is judged by, was not logged") for note in notes)


class NoForward(Net):
    forward = pl.LightningModule.forward
    validation_step = pl.LightningModule.validation_step


class NoOptimizer(Net):
    def configure_optimizers(self) -> Any:
        return None


def test_arguments_are_checked_at_once() -> None:
    mistakes: list[tuple[Callable[[], Any], str]] = [
        (lambda: NEqCallback(), "probe: is missing; give held-out batches"),
        (lambda: NEqCallback(INPUTS), "probe: is a Tensor; give batches"),
        (lambda: NEqCallback(8), "probe: is a int; give batches"),
        # What jsonargparse leaves of a class_path that it cannot import.
        (
            lambda: NEqCallback({"class_path": "project.HeldOut"}),
            r"probe: is a dict; .*a class_path that can be imported",
        ),
        (lambda: NEqCallback("project.held_out"), "probe: is a str; .*a class_path that can be imported"),
        (lambda: NEqCallback(iter(PROBE)), "probe: can be read only once"),
        *(
            (lambda every=every: NEqCallback(PROBE, every=every), "every: .* is neither")
            for every in (0, -1, 1.5, True, "step")
        ),
        (lambda: NEqCallback(PROBE, exclud=[]), "exclud: unknown option; did you mean 'exclude'"),
    ]
    for make, message in mistakes:
        with pytest.raises(FreezingError, match=f"^NEqCallback: {message}") as found:
            make()
        assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("make", "module", "message"),
    [
        (lambda: [NEqCallback([torch.ones(2, 7)])], Net, r"RuntimeError: mat1 and mat2 .*2x7 .*give call="),
        (
            lambda: [NEqCallback(PROBE)],
            NoForward,
            "NotImplementedError: .*missing the required .forward. function.*give call=",
        ),
        (lambda: [NEqCallback([])], Net, "^NEqCallback: probe: yields no batch"),
        (
            lambda: [NEqCallback([{"rows": INPUTS}])],
            Net,
            "^NEqCallback: probe: a mapping with the keys rows cannot be passed.*or give NEqCallback.*call=",
        ),
        (lambda: [NEqCallback(lambda trainer: INPUTS)], Net, "probe: is a Tensor; give batches"),
        (lambda: [NEqCallback(lambda trainer: iter(PROBE))], Net, "probe: can be read only once"),
        (
            lambda: [NEqCallback(lambda trainer: trainer.datamodule.held_out)],
            Net,
            "probe: the function fails on the Trainer .AttributeError: 'NoneType' object has no attribute 'held_out'",
        ),
        (lambda: [NEqCallback(PROBE, backward="exac")], Net, "did you mean 'exact'"),  # type: ignore[arg-type]
        (lambda: [NEqCallback(PROBE)], NoOptimizer, "returns no optimiser"),
    ],
)
def test_what_cannot_work_is_told_before_training(tmp_path: Path, make: Any, module: Any, message: str) -> None:
    trainer = trainer_of(tmp_path, *make())
    with pytest.raises(FreezingError, match=message) as found:
        fit(trainer, module())
    assert trainer.global_step == 0
    assert "\n" not in str(found.value)


def test_two_callbacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `NEqCallback`"):
        trainer_of(tmp_path, NEqCallback(PROBE), NEqCallback(PROBE))
    trainer = trainer_of(tmp_path, NEqCallback(PROBE))
    trainer.callbacks.append(NEqCallback(PROBE))  # type: ignore[attr-defined]
    with pytest.raises(FreezingError, match="the Trainer has two"):
        fit(trainer, Net())


def test_parameters_in_pieces_are_refused(tmp_path: Path) -> None:
    from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

    trainer = trainer_of(tmp_path, callback := NEqCallback(PROBE))
    # The others need what is not installed, and are told by their names.
    others = [type(name, (), {})() for name in ("DeepSpeedStrategy", "XLAStrategy", "SingleDeviceXLAStrategy")]
    for strategy in (FSDPStrategy(), ModelParallelStrategy(), *others):
        trainer._accelerator_connector.strategy = strategy
        with pytest.raises(FreezingError, match=f"{type(strategy).__name__} keeps .*; use 'ddp' or one device"):
            callback.setup(trainer, Net(), "fit")


class NoLuck(Callback):
    """Breaks training off in the second epoch."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            raise ValueError("no luck")


def test_a_run_directory_is_not_written_twice(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, NEqCallback(PROBE, run_directory=tmp_path / "run"), epochs=1)
    fit(trainer, Net())
    before = files_of(tmp_path / "run")
    for begin_anew in (False, True):
        own = NEqCallback(PROBE, run_directory=tmp_path / "run", begin_anew=begin_anew)
        again = trainer_of(tmp_path, own, epochs=1)
        with pytest.raises(RunDirectoryError) as found:
            fit(again, Net())
        assert str(found.value) == (
            f"{tmp_path / 'run'}: a run is there already (finished); trainer.fit(ckpt_path=...) goes on with it; else "
            "give another run_directory"
        )
        assert again.global_step == 0
        assert files_of(tmp_path / "run") == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    own = NEqCallback(PROBE, run_directory=tmp_path / "other", begin_anew=True)
    with pytest.raises(RunDirectoryError, match=r"other: already exists and is not empty; give another run_directory$"):
        fit(trainer_of(tmp_path, own, epochs=1), Net())


def test_a_run_that_ended_before_its_first_checkpoint_is_begun_anew_where_that_is_asked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no luck"):
        fit(trainer_of(tmp_path, NEqCallback(PROBE, NEq(0.2), run_directory=tmp_path / "run"), NoLuck()), Net())
    before = (tmp_path / "run" / "metrics.csv").read_bytes()
    again = trainer_of(tmp_path, NEqCallback(PROBE, NEq(0.2), run_directory=tmp_path / "run"))
    with pytest.raises(RunDirectoryError, match=r"there already \(failed\); .*begin_anew=True where it was"):
        fit(again, Net())
    # What its files keep would not be true of another configuration.
    other = NEqCallback(PROBE, NEq(0.1), run_directory=tmp_path / "run", begin_anew=True)
    with pytest.raises(FreezingError, match="had another policy; record in another directory"):
        fit(trainer_of(tmp_path, other), Net())
    other = NEqCallback(PROBE, NEq(0.2), run_directory=tmp_path / "run", begin_anew=True, metric="train_loss")
    with pytest.raises(FreezingError, match="had another metric; record in another directory"):
        fit(trainer_of(tmp_path, other), Net())
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == before
    fit(trainer_of(tmp_path, NEqCallback(PROBE, NEq(0.2), run_directory=tmp_path / "run", begin_anew=True)), Net())
    fit(trainer_of(tmp_path, NEqCallback(PROBE, NEq(0.2), run_directory=tmp_path / "straight")), Net())
    assert files_of(tmp_path / "run") == files_of(tmp_path / "straight")


def test_a_checkpoint_that_was_saved_without_it_is_refused_or_trained_from(tmp_path: Path) -> None:
    plain, checkpoint = trainer_of(tmp_path, epochs=1), tmp_path / "plain.ckpt"
    fit(plain, Net())
    plain.save_checkpoint(checkpoint)
    own = NEqCallback(PROBE, NEq(0.2), run_directory=tmp_path / "run")
    with pytest.raises(FreezingError, match=r"was saved without it, .*begin_anew=True"):
        fit(trainer_of(tmp_path, own), Net(), checkpoint=checkpoint)
    assert not (tmp_path / "run").exists()

    own = NEqCallback(PROBE, NEq(0.2), run_directory=tmp_path / "run", begin_anew=True)
    fit(trainer_of(tmp_path, own, epochs=3), Net(), checkpoint=checkpoint)
    run = read_run(tmp_path / "run")
    assert run.metrics["passed_epochs"].tolist() == [2, 3]
    assert [note for note in run.environment["notes"] if "no state of neq" in note]

    failed = NEqCallback(PROBE, NEq(0.2), run_directory=tmp_path / "failed")
    with pytest.raises(ValueError, match="no luck"):
        fit(trainer_of(tmp_path, failed, NoLuck()), Net())
    own = NEqCallback(PROBE, NEq(0.2), run_directory=tmp_path / "failed", begin_anew=True)
    with pytest.raises(RunDirectoryError, match=r"there already \(failed\)"):  # whose rows the checkpoint does not have
        fit(trainer_of(tmp_path, own), Net(), checkpoint=checkpoint)


def test_how_training_ended_is_told_and_everything_is_put_back(tmp_path: Path) -> None:
    class Fails(Net):
        error: BaseException = ValueError("no luck")

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.current_epoch == 2:
                raise self.error
            return super().training_step(batch, batch_idx)

    ends = {
        "failed": ValueError("no luck"),
        "interrupted: SIGINT": KeyboardInterrupt(),
        "interrupted: SIGTERM": SIGTERMException(),
    }
    for status, error in ends.items():
        module = Fails()
        module.error = error
        handler = signal.getsignal(signal.SIGINT)
        path = tmp_path / type(error).__name__
        callback = NEqCallback(PROBE, Sets(0.5), run_directory=path)
        with pytest.raises((ValueError, SystemExit)):
            fit(trainer_of(tmp_path, callback, epochs=4), module)
        signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored
        assert str(read_run(path).status).startswith(status)
        assert [type(layer) for layer in module.net] == [type(layer) for layer in Net().net]
        assert callback.state_dict()["freezers"][0]["epoch"] == 2


def test_where_lightning_is_missing_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from neq_cli.integrations.lightning_package import callback_class

    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"^neq_cli.integrations.lightning needs .*pip install 'neq\[lightning\]'$"):
        callback_class()


def test_the_callback_is_of_the_package_that_the_program_uses(tmp_path: Path) -> None:
    pytest.importorskip("pytorch_lightning", reason="needs pytorch_lightning, another name of lightning")
    code = """
import sys
import pytorch_lightning as pl
import torch
from neq_cli.integrations.lightning import NEqCallback
class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    def forward(self, inputs):
        return self.net(inputs)
    def training_step(self, batch, batch_idx):
        return self(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
callback = NEqCallback([torch.ones(2, 4)])
quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False)
trainer = pl.Trainer(max_epochs=2, accelerator="cpu", callbacks=[callback], **quiet)
trainer.fit(Net(), torch.utils.data.DataLoader(torch.ones(4, 4), 2))
assert isinstance(callback, pl.Callback) and "lightning" not in sys.modules
print("epochs seen:", callback.freezers[0].epoch)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "epochs seen: 2", done.stderr
