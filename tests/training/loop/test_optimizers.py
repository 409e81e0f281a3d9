"""Optimisers, parameter groups and schedules against closed formulas."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rounding import apart
from torch import nn

from neq_cli.errors import NeqError
from neq_cli.recipe import OptimizerSection, SchedulerSection
from neq_cli.training.loop.optimizers import (
    OPTIMIZERS,
    build_optimizer,
    build_scheduler,
    optimizer_problems,
    scheduler_notes,
    scheduler_problems,
)


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3))


def optimizer(name: str = "sgd", model: nn.Module | None = None, **values: Any) -> torch.optim.Optimizer:
    return build_optimizer(OptimizerSection(name=name, **values), model or network())


@pytest.mark.parametrize(
    "name", ["sgd", "SGD", "Adam", "adamw", "RMSprop", "nadam", "radam", "adagrad", "rprop", "asgd"]
)
def test_torchs_optimisers_by_name_in_any_case(name: str) -> None:
    built = optimizer(name)
    assert type(built).__name__.lower() == name.lower()
    assert len(built.param_groups) == 1
    assert len(built.param_groups[0]["params"]) == 6


def test_arguments_are_passed_and_defaults_are_torchs() -> None:
    built = optimizer("adam", lr=0.25, betas=[0.8, 0.9], weight_decay=5e-4, eps=None).param_groups[0]
    assert (built["lr"], built["betas"], built["weight_decay"], built["eps"]) == (0.25, (0.8, 0.9), 5e-4, 1e-8)
    assert optimizer("adam").param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("sgdd", {}, "optimizer.name: no torch optimiser 'sgdd'; did you mean 'sgd'?"),
        ("zzz", {}, "optimizer.name: no torch optimiser 'zzz'; use sgd, adam, adamw or another of torch.optim"),
        (
            "optimizer",
            {},
            "optimizer.name: no torch optimiser 'optimizer'; use sgd, adam, adamw or another of torch.optim",
        ),
        (
            "LBFGS",
            {},
            "optimizer.name: LBFGS cannot freeze neurons (its update mixes all parameters); use sgd, adamw or",
        ),
        ("muon", {}, "optimizer.name: Muon cannot freeze neurons ("),
        ("adafactor", {}, "optimizer.name: Adafactor cannot freeze neurons ("),
        ("sparseadam", {}, "optimizer.name: SparseAdam cannot freeze neurons ("),
        ("sgd", {"momentun": 0.9}, "optimizer.momentun: unknown argument 'momentun' of SGD; did you mean 'momentum'?"),
        ("sgd", {"params": []}, "optimizer.params: 'params' of SGD is set by neq; remove it"),
        ("sgd", {"nesterov": True}, "optimizer: sgd refuses its arguments (ValueError: Nesterov momentum requires"),
        ("adam", {"betas": [0.9, 1.5]}, "optimizer: adam refuses its arguments (ValueError: Invalid beta parameter"),
        (
            "rprop",
            {"groups": [{"parameters": ["*"], "weight_decay": 0.1}]},
            "optimizer.groups.0.weight_decay: Rprop has no weight_decay; remove it",
        ),
    ],
)
def test_what_is_wrong_is_told_when_checked_and_when_built(name: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(NeqError) as built:
        optimizer(name, **values)
    assert str(built.value).startswith(message)
    assert "\n" not in str(built.value)
    section = OptimizerSection(name=name, **values)
    if message.startswith("optimizer.name"):
        with pytest.raises(NeqError) as checked:
            optimizer_problems(section)
        assert str(checked.value) == str(built.value)
    else:
        assert [f"{key}: {problem}" for key, problem in optimizer_problems(section)] == [str(built.value)]


def test_every_class_of_torch_optim_is_known() -> None:
    assert {"sgd", "adam", "adamw", "lbfgs", "rmsprop", "adamax", "nadam"} <= set(OPTIMIZERS)


def named(model: nn.Module, parameters: list[nn.Parameter]) -> set[str]:
    return {name for name, parameter in model.named_parameters() if any(parameter is other for other in parameters)}


def test_groups_take_their_parameters_and_the_rest_comes_first() -> None:
    model = network()
    groups = [
        {"parameters": ["3.*"], "lr": 0.5},
        {"parameters": ["*.bias", "1.weight"], "weight_decay": 0.0},
        {"parameters": ["3.weight"], "lr": 9.0},  # all taken already
    ]
    built = optimizer(model=model, lr=0.1, weight_decay=0.01, groups=groups).param_groups
    assert [named(model, group["params"]) for group in built] == [
        {"0.weight"},
        {"3.weight", "3.bias"},
        {"0.bias", "1.weight", "1.bias"},
    ]
    assert [(group["lr"], group["weight_decay"]) for group in built] == [(0.1, 0.01), (0.5, 0.01), (0.1, 0.0)]


def test_a_glob_without_a_parameter_is_told() -> None:
    with pytest.raises(NeqError) as raised:
        optimizer(groups=[{"parameters": ["*"]}, {"parameters": ["3.weigth"]}])
    assert str(raised.value) == (
        "optimizer.groups.1.parameters: no trained parameter matches '3.weigth'; did you mean '3.weight'?"
    )


def test_only_what_requires_gradients_is_optimised() -> None:
    model = network()
    model[0].requires_grad_(False)  # type: ignore[operator]
    assert named(model, optimizer(model=model).param_groups[0]["params"]) == {
        "1.weight",
        "1.bias",
        "3.weight",
        "3.bias",
    }
    with pytest.raises(NeqError, match=r"no trained parameter matches '0\.\*'; names are such as '1.weight'"):
        optimizer(model=model, groups=[{"parameters": ["0.*"]}])
    model.requires_grad_(False)
    with pytest.raises(NeqError, match=r"^model: no parameter requires gradients"):
        optimizer(model=model)


def test_a_decay_that_counts_steps_on_the_cpu_is_refused_in_a_graph() -> None:
    decaying = OptimizerSection(name="adagrad", lr=0.1, lr_decay=0.1)
    assert build_optimizer(decaying, nn.Linear(2, 2)).defaults["lr_decay"] == 0.1
    with pytest.raises(NeqError, match=r"^optimizer.lr_decay: is lost in a CUDA graph"):
        build_optimizer(decaying, nn.Linear(2, 2), capturable=True)


def rates(epochs: int, base: float = 0.1, **values: Any) -> list[float]:
    """The learning rate each epoch starts with; a warning of torch's is an error."""
    torch_optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=base)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        scheduler = build_scheduler(SchedulerSection(**values), torch_optimizer, epochs)
        seen = []
        for _ in range(epochs):
            seen.append(torch_optimizer.param_groups[0]["lr"])
            torch_optimizer.step()
            if scheduler is not None:
                scheduler.step()
    return seen


# A schedule, and the factor on the learning rate in its epoch t, counted from 0 where it begins; n epochs are its own.
SCHEDULES: list[tuple[dict[str, Any], Callable[[int, int], float]]] = [
    ({"name": "constant"}, lambda t, n: 1),
    ({"name": "cosine"}, lambda t, n: (1 + math.cos(math.pi * t / n)) / 2),
    ({"name": "cosine", "T_max": 4, "eta_min": 0.02}, lambda t, n: 0.2 + 0.8 * (1 + math.cos(math.pi * t / 4)) / 2),
    ({"name": "step", "step_size": 3, "gamma": 0.5}, lambda t, n: 0.5 ** (t // 3)),
    ({"name": "exponential", "gamma": 0.9}, lambda t, n: 0.9**t),
    ({"name": "polynomial", "power": 2.0}, lambda t, n: (1 - t / n) ** 2),
    ({"name": "polynomial", "total_iters": 4}, lambda t, n: max(0.0, 1 - t / 4)),
    ({"name": "linear", "start_factor": 1.0, "end_factor": 0.1}, lambda t, n: 1 - 0.9 * t / n),
    ({"name": "CosineAnnealingWarmRestarts", "T_0": 3}, lambda t, n: (1 + math.cos(math.pi * (t % 3) / 3)) / 2),
    ({"name": "ConstantLR", "factor": 0.5, "total_iters": 2}, lambda t, n: 0.5 if t < 2 else 1),
]


@pytest.mark.parametrize("warmup", [0, 1, 3])
@pytest.mark.parametrize(("values", "factor"), SCHEDULES, ids=[str(values) for values, _ in SCHEDULES])
def test_schedules_follow_their_formulas(
    values: dict[str, Any], factor: Callable[[int, int], float], warmup: int
) -> None:
    epochs = 10
    rising = [0.1 * epoch / (warmup + 1) for epoch in range(1, warmup + 1)]
    # Torch goes from one epoch's rate to the next: ten epochs, each rounded a hundred times at most.
    following = [0.1 * factor(t, epochs - warmup) for t in range(epochs - warmup)]
    assert rates(epochs, warmup_epochs=warmup, **values) == pytest.approx(rising + following, abs=apart(1000))


def test_milestones_are_epochs_of_the_run_with_and_without_warm_up() -> None:
    plain = rates(8, name="multistep", milestones=[4, 6], gamma=0.1)
    assert plain == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.001] * 2)
    warmed = rates(8, name="multistep", milestones=[4, 6], gamma=0.1, warmup_epochs=3)
    assert warmed == pytest.approx([0.025, 0.05, 0.075, 0.1] + [0.01] * 2 + [0.001] * 2)


def test_the_papers_schedule() -> None:
    seen = rates(250, name="multistep", milestones=[100, 150], gamma=0.1)
    assert seen == pytest.approx([0.1] * 100 + [0.01] * 50 + [0.001] * 100)


def test_a_warm_up_longer_than_the_run_is_cut_off() -> None:
    assert rates(2, name="cosine", warmup_epochs=3) == pytest.approx([0.025, 0.05])


def test_groups_keep_their_own_rates() -> None:
    built = optimizer(lr=0.1, groups=[{"parameters": ["3.*"], "lr": 0.4}])
    scheduler = build_scheduler(SchedulerSection(name="step", step_size=1, gamma=0.5), built, 3)
    assert scheduler is not None
    built.step()
    scheduler.step()
    assert [group["lr"] for group in built.param_groups] == pytest.approx([0.05, 0.2])


def test_constant_without_warm_up_is_no_schedule() -> None:
    assert build_scheduler(SchedulerSection(), optimizer(), 5) is None


@pytest.mark.parametrize("warmup", [0, 2])
def test_a_schedule_goes_on_from_its_state(warmup: int) -> None:
    section = SchedulerSection(name="cosine", warmup_epochs=warmup)

    def made() -> tuple[torch.optim.Optimizer, Any]:
        built = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
        return built, build_scheduler(section, built, 8)

    def advance(built: torch.optim.Optimizer, scheduler: Any, epochs: int) -> list[float]:
        seen = []
        for _ in range(epochs):
            built.step()
            scheduler.step()
            seen.append(built.param_groups[0]["lr"])
        return seen

    straight = advance(*made(), 7)
    first, resumed = made(), made()
    advance(*first, 3)
    resumed[0].load_state_dict(first[0].state_dict())
    resumed[1].load_state_dict(first[1].state_dict())
    assert advance(*resumed, 4) == straight[3:]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "cosin"}, "scheduler.name: no torch scheduler 'cosin'; did you mean 'cosine'?"),
        ({"name": "zzz"}, "scheduler.name: no torch scheduler 'zzz'; use constant, multistep, cosine or step"),
        ({"name": "ReduceLROnPlateau"}, "scheduler.name: ReduceLROnPlateau cannot be used: it waits for a metric"),
        ({"name": "onecycle"}, "scheduler.name: OneCycleLR cannot be used: it steps once per batch"),
        ({"name": "CyclicLR"}, "scheduler.name: CyclicLR cannot be used: it steps once per batch"),
        ({"name": "lambda"}, "scheduler.name: LambdaLR cannot be used: it needs a Python function"),
        ({"name": "sequential"}, "scheduler.name: SequentialLR cannot be used: it needs other schedulers"),
        ({"name": "step", "step_sise": 1}, "scheduler.step_sise: unknown argument 'step_sise' of StepLR; did you mean"),
        ({"name": "exponential"}, "scheduler.gamma: ExponentialLR needs the argument 'gamma'"),
        ({"name": "constant", "gamma": 1}, "scheduler.gamma: unknown argument 'gamma' of constant"),
        ({"name": "multistep", "milestones": 3}, "scheduler.milestones: 3 is not a list of epochs, such as [100, 150]"),
        ({"name": "multistep", "milestones": ["a"]}, "scheduler.milestones: ['a'] is not a list of epochs"),
        (
            {"name": "multistep", "milestones": [2, 9], "warmup_epochs": 2},
            "scheduler.milestones: 2 is not after the 2 warm-up epochs",
        ),
        (
            {"name": "cosine", "eta_min": "x", "T_max": None, "last_epoch": 3},
            "scheduler.last_epoch: 'last_epoch' of Cos",
        ),
        ({"name": "linear", "start_factor": 2.0}, "scheduler: linear refuses its arguments (ValueError: Starting mult"),
    ],
)
def test_schedules_that_cannot_be(values: dict[str, Any], message: str) -> None:
    section = SchedulerSection(**values)
    with pytest.raises(NeqError) as built:
        build_scheduler(section, optimizer(lr=0.1), 10)
    assert str(built.value).startswith(message)
    assert "\n" not in str(built.value)
    if not message.startswith("scheduler.name"):
        assert f"{scheduler_problems(section, 10)[0][0]}: {scheduler_problems(section, 10)[0][1]}" == str(built.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "step", "step_size": "x"}, "step cannot step with its arguments (TypeError: "),
        (
            {"name": "step", "step_size": 0, "warmup_epochs": 2},
            "step cannot step with its arguments (ZeroDivisionError: ",
        ),
        ({"name": "polynomial", "power": "x"}, "polynomial cannot step with its arguments (TypeError: "),
    ],
)
def test_what_torch_would_find_out_while_training_is_found_before(values: dict[str, Any], message: str) -> None:
    ((key, problem),) = scheduler_problems(SchedulerSection(**values), 10)
    assert key == "scheduler"
    assert problem.startswith(message)


def test_an_optimiser_that_could_not_step_is_found_before() -> None:
    ((key, problem),) = optimizer_problems(OptimizerSection(name="sgd", momentum=0.9, dampening="x"))
    assert key == "optimizer"
    assert problem.startswith("sgd cannot step with its arguments (TypeError: ")


def test_milestones_past_the_end_are_noted() -> None:
    section = SchedulerSection(name="multistep", milestones=[3, 5, 9])
    assert scheduler_notes(section, 10) == ()
    assert scheduler_notes(section, 5) == ("scheduler.milestones: 5, 9 not reached in 5 epochs",)
    assert scheduler_problems(section, 5) == []
