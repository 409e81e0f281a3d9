"""Observations by optimiser steps, against a loop written out by hand; epochs of other lengths than a pass."""

from __future__ import annotations

import math
import time
from itertools import islice
from typing import Any

import pytest
import torch
from timings import TIMINGS
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from neq_cli import Freezer, NEq
from neq_cli.errors import TrainingError
from neq_cli.events import EpochRecord, Pause
from neq_cli.freezing.backward.dispatch import Dispatch
from neq_cli.recipe import Recipe
from neq_cli.training.loop.course import Course
from neq_cli.training.loop.trainer import SAVE, Trainer
from neq_cli.training.session import prepare

BATCHES = 5  # of a pass: 45 images less 4 of the probe, 8 at a time


def noise() -> tuple[TensorDataset, TensorDataset]:
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(57, 1, 4, 4, generator=generator)
    labels = torch.randint(0, 3, (57,), generator=generator)
    labels[-1] = labels[0] = 2
    return TensorDataset(images[:45], labels[:45]), TensorDataset(images[45:], labels[45:])


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )


def make_trainer(**changes: Any) -> Trainer:
    values = {
        "model": {"entrypoint": f"{__name__}:network"},
        "data": {"entrypoint": f"{__name__}:noise", "probe_size": 4, "workers": 0},
        "epochs": 3,
        "batch_size": 8,
        "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
        "scheduler": {"name": "multistep", "milestones": [1], "gamma": 0.5},
        "policy": {"kind": "neq", "epsilon": 0.05},
        "deterministic": True,
        "channels_last": False,
        "device": "cpu",
    }
    return prepare(Recipe.model_validate(values | changes), "test").trainer


def records_of(trainer: Trainer) -> list[EpochRecord]:
    return [record for record in trainer.run() if isinstance(record, EpochRecord)]


def untimed(record: EpochRecord) -> dict[str, str]:
    return {key: str(value) for key, value in record.metrics.items() if key not in TIMINGS}


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def assert_same(first: Trainer, second: Trainer) -> None:
    for name, tensor in weights_of(first).items():
        assert torch.equal(weights_of(second)[name], tensor), name


@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_observed_at_the_end_of_every_pass_by_steps_it_is_the_run_by_epochs(accumulation: int) -> None:
    by_epochs = make_trainer(gradient_accumulation=accumulation)
    by_steps = make_trainer(gradient_accumulation=accumulation, probe_every=math.ceil(BATCHES / accumulation))
    expected, found = records_of(by_epochs), records_of(by_steps)
    assert_same(by_epochs, by_steps)
    updates = math.ceil(BATCHES / accumulation)
    for number, (one, other) in enumerate(zip(expected, found, strict=True), 1):
        assert untimed(other) == {**untimed(one), "step": str(number * updates), "passed_epochs": str(float(number))}
        for layer, same in zip(one.layers, other.layers, strict=True):
            assert (layer.velocity == same.velocity).all() or math.isnan(layer.velocity[0])
            assert (layer.trainable == same.trainable).all()


def by_hand(trainer: Trainer, every: int) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """A loop of one's own over the same batches, with a Freezer that looks every so many steps and at the end."""
    model, loaders, optimizer = trainer.model, trainer.loaders, trainer.optimizer
    trainer.freezer.detach()
    freezer = Freezer(model, optimizer, list(loaders.probe), NEq(0.05, 0.5), dispatch=Dispatch(fixed=True))
    sets, step = [], 0
    for number in (1, 2, 3):
        loaders.start_epoch(number)
        for images, labels in loaders.train:
            functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step == number * BATCHES and number == 1:
                optimizer.param_groups[0]["lr"] = 0.05
            if step % every == 0 or step == 3 * BATCHES:
                sets.append({name: seen.trainable for name, seen in freezer.step().items()})
    return sets, weights_of(trainer)


@pytest.mark.parametrize("every", [1, 2, 4, 7, 15, 99])
def test_sets_and_weights_are_those_of_a_loop_that_counts_steps(every: int) -> None:
    trainer = make_trainer(probe_every=every)
    records = records_of(trainer)
    sets, weights = by_hand(make_trainer(probe_every=every), every)
    assert [{layer.name: layer.trainable.tolist() for layer in record.layers} for record in records] == [
        {name: trainable.tolist() for name, trainable in one.items()} for one in sets
    ]
    for name, tensor in weights_of(trainer).items():
        assert torch.equal(weights[name], tensor), name
    steps = [*range(every, 15, every), 15]
    assert [record.metrics["step"] for record in records] == steps
    assert [record.metrics["passed_epochs"] for record in records] == [pytest.approx(step / BATCHES) for step in steps]
    assert [record.epoch for record in records] == list(range(1, trainer.planned + 1))
    assert len(records) == trainer.course.observations
    # The rate falls after the first pass; a row has the one that its steps began with.
    began = [0, *steps[:-1]]
    assert [record.metrics["lr"] for record in records] == [0.1 if start < BATCHES else 0.05 for start in began]
    assert any(0 < record.metrics["frozen"] < record.metrics["neurons"] for record in records) or every > 4


def test_losses_of_a_row_are_those_of_its_own_steps() -> None:
    whole, halves = (
        make_trainer(epochs=2, policy={"kind": "baseline"}),
        make_trainer(epochs=2, policy={"kind": "baseline"}, probe_every=1),
    )
    expected, found = records_of(whole), records_of(halves)
    assert len(found) == 2 * BATCHES
    for number, record in enumerate(expected):
        rows = found[number * BATCHES : (number + 1) * BATCHES]
        mean = sum(float(row.metrics["train_loss"]) for row in rows) / BATCHES
        assert record.metrics["train_loss"] == pytest.approx(mean, rel=1e-5)
        # Tests follow observations, and so the last of a pass is that of the pass.
        assert record.metrics["test_loss"] == rows[-1].metrics["test_loss"]


def test_tests_follow_every_so_many_observations_and_the_last() -> None:
    records = records_of(make_trainer(probe_every=4, eval_every=3))
    assert [math.isfinite(record.metrics["test_loss"]) for record in records] == [False, False, True, True]


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation": 2}, {"ema": 0.5}], ids=["plain", "groups", "ema"])
@pytest.mark.parametrize("every", [2, 3, 4])
def test_from_wherever_it_pauses_a_run_goes_on_to_the_bit(every: int, changes: dict[str, Any]) -> None:
    straight = make_trainer(probe_every=every, **changes)
    straight.wish = lambda: SAVE
    records = [record for record in straight.run() if isinstance(record, Pause | EpochRecord)]
    expected = [untimed(record) for record in records if isinstance(record, EpochRecord)]
    assert len(records) > len(expected) + 2
    for stop in range(1, len(records)):
        trainer = make_trainer(probe_every=every, **changes)
        trainer.wish = lambda: SAVE
        told = (record for record in trainer.run() if isinstance(record, Pause | EpochRecord))
        rows = [untimed(record) for record in islice(told, stop) if isinstance(record, EpochRecord)]
        resumed = make_trainer(probe_every=every, **changes)
        resumed.load_state_dict(trainer.state_dict())
        assert resumed.planned == straight.course.observations
        rows += [untimed(record) for record in records_of(resumed)]
        assert rows == expected, stop
        assert_same(straight, resumed)


@pytest.mark.parametrize(("stop", "last"), [(1, 5), (2, 6), (3, 7), (4, 8)])
def test_rest_counts_observations_and_those_before_the_last_drop_do_not(stop: int, last: int) -> None:
    # All is frozen from observation 2 on. The rate falls after 2 passes, within the fifth observation's two steps, of
    # which the first is at the old one.
    trainer = make_trainer(
        policy={"kind": "neq", "epsilon": 1e9},
        probe_every=2,
        stop_when_frozen=stop,
        epochs=9,
        scheduler={"name": "multistep", "milestones": [2]},
    )
    records = records_of(trainer)
    began_after_drop = [number for number in range(1, 30) if 2 * (number - 1) >= 2 * BATCHES]
    assert [record.epoch for record in records] == list(range(1, began_after_drop[stop - 1] + 1))
    assert last == began_after_drop[stop - 1] - 1 or trainer.passes < 9
    assert math.isfinite(records[-1].metrics["test_loss"])


def test_a_run_by_steps_is_counted_before_it_begins() -> None:
    # 3 passes of 5 batches, 2 at a time: 3 optimiser steps each, the last of one batch.
    course = Course.of(Recipe.model_validate(make_trainer().recipe.model_dump() | {"gradient_accumulation": 2}), 5)
    assert (course.updates, course.observations) == (3, 3)
    for every, observations in [(1, 9), (2, 5), (3, 3), (4, 3), (8, 2), (9, 1), (10, 1)]:
        assert Course(3, 3, every).observations == observations
    assert [Course(3, 3, 2).begun_before(updates) for updates in (0, 1, 2, 3, 6, 9)] == [0, 1, 1, 2, 3, 5]


def test_a_front_by_schedule_goes_by_observations() -> None:
    schedule = {"kind": "front", "start": 0.5, "level": 1.0}
    by_epochs = records_of(make_trainer(epochs=6, policy=schedule))
    by_steps = records_of(make_trainer(epochs=3, policy=schedule, probe_every=3))  # 15 steps: 5 observations
    assert [record.metrics["frozen"] for record in by_epochs][:3] == [0, 0, 0]
    assert [record.metrics["frozen"] for record in by_steps][:2] == [0, 0]
    assert by_steps[-1].metrics["frozen"] > 0


def test_a_loss_that_is_not_finite_names_the_observation() -> None:
    trainer = make_trainer(probe_every=2, optimizer={"name": "sgd", "lr": 1e30})
    with pytest.raises(TrainingError, match=r"^observation \d, step \d: "):
        records_of(trainer)


COSINE = {"name": "cosine", "interval": "step", "warmup_epochs": 1}


@pytest.mark.parametrize("every", ["epoch", 4])
def test_rows_have_the_first_and_the_last_learning_rate_of_their_steps(every: Any) -> None:
    rates = [0.1 * (step + 1) / 6 for step in range(5)]
    rates += [0.1 * (1 + math.cos(math.pi * step / 10)) / 2 for step in range(10)]
    records = records_of(make_trainer(scheduler=COSINE, probe_every=every))
    ends = [5, 10, 15] if every == "epoch" else [4, 8, 12, 15]
    starts = [0, *ends[:-1]]
    assert [record.metrics["lr"] for record in records] == pytest.approx([rates[start] for start in starts])
    assert [record.metrics["lr_last"] for record in records] == pytest.approx([rates[end - 1] for end in ends])
    assert list(records[0].metrics).index("lr_last") == list(records[0].metrics).index("lr") + 1


def test_accumulated_batches_are_one_step_of_a_schedule() -> None:
    records = records_of(make_trainer(scheduler=COSINE, gradient_accumulation=2))  # 3 optimiser steps a pass
    assert records[0].metrics["lr_last"] == pytest.approx(0.1 * 3 / 4)
    assert records[1].metrics["lr"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    "scheduler",
    [COSINE, {"name": "onecycle", "interval": "step"}, {"name": "plateau", "patience": 0, "warmup_epochs": 1}],
    ids=lambda scheduler: scheduler["name"],
)
@pytest.mark.parametrize("every", ["epoch", 4])
def test_from_wherever_it_pauses_a_schedule_goes_on_to_the_bit(scheduler: dict[str, Any], every: Any) -> None:
    changes = {"scheduler": scheduler, "probe_every": every, "optimizer": {"name": "sgd", "lr": 0.3, "momentum": 0.9}}
    straight = make_trainer(**changes)
    straight.wish = lambda: SAVE
    records = [record for record in straight.run() if isinstance(record, Pause | EpochRecord)]
    expected = [untimed(record) for record in records if isinstance(record, EpochRecord)]
    for stop in range(1, len(records)):
        trainer = make_trainer(**changes)
        trainer.wish = lambda: SAVE
        told = (record for record in trainer.run() if isinstance(record, Pause | EpochRecord))
        rows = [untimed(record) for record in islice(told, stop) if isinstance(record, EpochRecord)]
        resumed = make_trainer(**changes)
        resumed.load_state_dict(trainer.state_dict())
        rows += [untimed(record) for record in records_of(resumed)]
        assert rows == expected, stop
        assert_same(straight, resumed)


def test_a_plateau_goes_by_the_metric_that_is_tested() -> None:
    trainer = make_trainer(
        epochs=6,
        eval_every=2,
        scheduler={"name": "plateau", "patience": 0, "factor": 0.5, "threshold": 10.0},  # better: elevenfold
    )
    records = records_of(trainer)
    assert [record.metrics["lr"] for record in records] == pytest.approx([0.1] * 4 + [0.05] * 2)
    assert records[1].metrics["test_top1"] > 0


class Slow(TensorDataset):
    """Takes its time for every image."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        time.sleep(SLEEP)
        return super().__getitem__(index)


SLEEP = 0.004


def slow() -> tuple[TensorDataset, TensorDataset]:
    train, test = noise()
    return Slow(*train.tensors), test


def test_a_row_tells_how_long_its_steps_waited_for_data() -> None:
    data = {"entrypoint": f"{__name__}:slow", "probe_size": 4, "workers": 0, "cache": "none"}
    for record, steps in zip(records_of(make_trainer(data=data, epochs=2)), (BATCHES - 1, BATCHES), strict=True):
        # The run's very first batch, for which all else is got ready, is not counted.
        assert steps * 8 * SLEEP <= record.metrics["data_wait_seconds"] < record.metrics["epoch_seconds"]
    quick = records_of(make_trainer(data={**data, "cache": "memory"}, epochs=2))[1].metrics["data_wait_seconds"]
    assert quick < BATCHES * 8 * SLEEP
