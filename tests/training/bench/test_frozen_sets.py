"""Which neurons the bench freezes, and that they are frozen while an arm is in force, and only then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from neq_cli.freezing.anatomy import Anatomy, anatomy_of
from neq_cli.freezing.backward.dispatch import Dispatch
from neq_cli.recipe import Recipe
from neq_cli.training.bench.frozen_sets import Arm, Rig, front_sets, kernels, make_arms, random_sets
from neq_cli.training.bench.noise import find_data
from neq_cli.training.bench.options import BenchOptions
from neq_cli.training.bench.timed_step import TimedStep

CPU = torch.device("cpu")


def anatomy() -> Anatomy:
    """Layers of 4, 4, 6 and 3 neurons, of which the last may not freeze."""
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(96, 3)
    )
    return anatomy_of(model, torch.zeros(1, 1, 8, 8))


def counts(sets: dict[str, torch.Tensor]) -> dict[str, int]:
    return {name: int((~trainable).sum()) for name, trainable in sets.items()}


def test_at_random_every_layer_gives_its_share() -> None:
    found = random_sets(anatomy(), 0.5, seed=1)
    assert counts(found) == {"0": 2, "1": 2, "3": 3, "5": 0}
    assert counts(random_sets(anatomy(), 0.9, seed=1)) == {"0": 3, "1": 3, "3": 5, "5": 0}
    assert counts(random_sets(anatomy(), 1.0, seed=1)) == {"0": 4, "1": 4, "3": 6, "5": 0}
    assert all(torch.equal(found[name], again) for name, again in random_sets(anatomy(), 0.5, seed=1).items())
    seeds = [random_sets(anatomy(), 0.5, seed)["3"] for seed in range(8)]
    assert any(not torch.equal(seeds[0], other) for other in seeds)


def test_a_larger_share_freezes_the_same_neurons_and_more() -> None:
    few, many = random_sets(anatomy(), 0.5, seed=3), random_sets(anatomy(), 0.9, seed=3)
    assert all(not bool(many[name][~few[name]].any()) for name in few)


@pytest.mark.parametrize(
    ("fraction", "frozen"),
    [
        (0.0, [0, 0, 0, 0]),
        (0.25, [3, 0, 0, 0]),  # int(0.25 * 14) of the 14 neurons that may freeze
        (0.5, [4, 3, 0, 0]),
        (0.9, [4, 4, 4, 0]),
        (1.0, [4, 4, 6, 0]),
    ],
)
def test_from_the_front_whole_layers_freeze_first(fraction: float, frozen: list[int]) -> None:
    sets = front_sets(anatomy(), fraction, seed=1)
    assert list(counts(sets).values()) == frozen
    # Of the layer that freezes in part, the first neurons.
    assert all(not bool(sets[name][:count].any()) for name, count in counts(sets).items())


def test_a_shared_weight_trains_if_either_layer_says_so() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight, second.bias = first.weight, first.bias
    tied = anatomy_of(nn.Sequential(first, nn.Linear(4, 4), second, nn.Linear(4, 2)), torch.zeros(1, 4))
    assert [sorted(tie) for tie in tied.neurons.ties] == [["0", "2"]]
    assert counts(front_sets(tied, 0.5, seed=1)) == {"0": 0, "1": 2, "2": 0, "3": 0}
    drawn = random_sets(tied, 0.5, seed=1)
    assert torch.equal(drawn["0"], drawn["2"])


def test_orders_that_come_to_the_same_sets_are_one_arm() -> None:
    arms = make_arms(anatomy(), BenchOptions(fractions=(0.0, 0.5, 1.0)), seed=1)
    assert [(arm.mode, arm.orders, arm.fraction) for arm in arms] == [
        (mode, orders, fraction)
        for mode in ("exact", "truncated")
        for orders, fraction in [(("random", "front"), 0.0), (("random",), 0.5), (("random", "front"), 1.0),
                                 (("front",), 0.5)]
    ]  # fmt: skip
    assert arms[0].label == "exact random and front 0"


def recipe(**changes: Any) -> Recipe:
    values = {
        "model": {"name": "resnet8", "kwargs": {"num_classes": 10, "in_channels": 1, "width": 4}},
        "data": {"name": "digits", "workers": 0},
        "epochs": 1,
        "batch_size": 8,
        "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
        "device": "cpu",
    }
    return Recipe.model_validate(values | changes)


def rig(mode: Any, **changes: Any) -> Rig:
    chosen = recipe(**changes)
    return Rig(CPU, lambda: TimedStep(chosen, CPU, find_data(chosen)[0]), mode, Dispatch(fixed=True))


def half(of: Rig) -> Arm:
    assert of.freezer is not None
    return Arm("exact", 0.5, ("random",), random_sets(of.freezer.anatomy, 0.5, seed=1))


def test_an_arm_is_in_force_for_its_visit_and_nothing_is_frozen_after() -> None:
    sliced = rig("exact", optimizer={"name": "sgd", "lr": 1e5, "momentum": 0.9})
    freezer, arm = sliced.freezer, half(sliced)
    assert freezer is not None
    weight = sliced.step.model.get_parameter("conv1.weight")
    before = weight.detach().clone()
    with sliced.in_force(arm):
        assert all(torch.equal(freezer.trainable[name], arm.trainable[name]) for name in arm.trainable)
        sliced.step.run()
        moved = (weight != before).flatten(1).any(1)
        assert torch.equal(moved, arm.trainable["conv1"])
        assert freezer.kernels().keys() == {name for name, trains in arm.trainable.items() if not trains.all()}
    assert all(bool(trainable.all()) for trainable in freezer.trainable.values())
    sliced.step.run()
    assert bool((weight != before).flatten(1).any(1).all())


def test_the_plain_step_is_plain() -> None:
    plain, sliced = rig(None), rig("exact")
    assert plain.freezer is None
    optimizer = plain.step.optimizer
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    with plain.in_force(None), sliced.in_force(half(sliced)):
        kinds = [{type(module) for module in one.step.model.modules()} for one in (plain, sliced)]
        assert kinds[0] >= {nn.Conv2d, nn.BatchNorm2d, nn.Linear}
        assert not kinds[1] <= kinds[0]


def test_row_keeping_is_told_from_the_optimizer() -> None:
    plain, sliced = rig(None), rig("exact")
    assert [part for part, _ in plain.step.run().marks[1:]] == ["forward", "backward", "optimizer"]
    with sliced.in_force(half(sliced)):
        freezer = sliced.freezer
        assert freezer is not None
        before = freezer.hold.keeper.seconds
        watch = sliced.step.run()
        around = freezer.hold.keeper.seconds - before
    keeping = ["optimizer", "row_keeping", "optimizer", "row_keeping", "optimizer"]
    assert [part for part, _ in watch.marks[1:]] == ["forward", "backward", *keeping]
    assert watch.read()["row_keeping"] >= around > 0


def test_every_layer_has_its_kernel_and_the_reason() -> None:
    sliced = rig("exact")
    assert sliced.freezer is not None
    with sliced.in_force(half(sliced)):
        sliced.step.run()
        used = kernels(sliced.freezer)
    assert list(used) == list(sliced.freezer.layers)
    assert (used["fc"].kernel, used["fc"].rows_computed) == ("dense", 10)
    assert used["fc"].reason == "never frozen (output layer)"
    assert used["bn1"].reason.startswith("normalisation")
    assert used["conv1"].reason == "by rule"
    assert {use.reason for use in kernels(sliced.freezer).values()} == {
        "all neurons train", "never frozen (output layer)"
    }  # fmt: skip
    dense = rig("dense")
    assert dense.freezer is not None
    with dense.in_force(half(dense)):
        assert kernels(dense.freezer)["conv1"].reason == "backward: dense computes everything"
