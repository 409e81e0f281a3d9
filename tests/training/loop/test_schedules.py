"""Learning rates over epochs and steps, against closed formulas; and those that go by the tests."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rounding import apart
from torch import nn

from neq_cli.errors import RecipeValueError
from neq_cli.recipe import OptimizerSection, SchedulerSection
from neq_cli.training.loop.optimizers import build_optimizer
from neq_cli.training.loop.schedules import (
    Schedule,
    build_scheduler,
    scheduler_notes,
    scheduler_problems,
    steps_before_last_drop,
)


def optimizer(**values: Any) -> torch.optim.Optimizer:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3))
    return build_optimizer(OptimizerSection(**{"name": "sgd", **values}), network)


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
        ({"name": "plateau", "interval": "step"}, "scheduler.interval: ReduceLROnPlateau goes by tests; leave it out"),
        ({"name": "ReduceLROnPlateau", "mode": "max"}, "scheduler.mode: 'mode' of ReduceLROnPlateau"),
        ({"name": "onecycle"}, "scheduler.interval: OneCycleLR goes by optimiser steps; use interval: step"),
        ({"name": "CyclicLR"}, "scheduler.interval: CyclicLR goes by optimiser steps; use interval: step"),
        (
            {"name": "onecycle", "interval": "step", "warmup_epochs": 1},
            "scheduler.warmup_epochs: OneCycleLR rises by itself",
        ),
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
            {"name": "multistep", "milestones": [9.5], "interval": "step"},
            "scheduler.milestones: [9.5] is not a list of steps, such as [100, 150]",
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
    with pytest.raises(RecipeValueError) as built:
        build_scheduler(section, optimizer(lr=0.1), 10)
    assert str(built.value).startswith(message)
    assert "\n" not in str(built.value)
    if not message.startswith("scheduler.name"):
        key, problem = scheduler_problems(section, 10)[0]
        assert problem == built.value.reason
        # Before it is built, the argument is found without which it could be.
        assert key == ("scheduler.start_factor" if built.value.key == "scheduler" else built.value.key)


@pytest.mark.parametrize(
    ("values", "blamed", "message"),
    [
        # Which cannot be left out.
        ({"name": "step", "step_size": "x"}, "scheduler", "step cannot step with its arguments (TypeError: "),
        (
            {"name": "step", "step_size": 0, "warmup_epochs": 2},
            "scheduler",
            "step cannot step with its arguments (ZeroDivisionError: ",
        ),
        (
            {"name": "polynomial", "power": "x"},
            "scheduler.power",
            "polynomial cannot step with its arguments (TypeError: ",
        ),
    ],
)
def test_what_torch_would_find_out_while_training_is_found_before(
    values: dict[str, Any], blamed: str, message: str
) -> None:
    ((key, problem),) = scheduler_problems(SchedulerSection(**values), 10)
    assert key == blamed
    assert problem.startswith(message)


def test_milestones_past_the_end_are_noted() -> None:
    section = SchedulerSection(name="multistep", milestones=[3, 5, 9])
    assert scheduler_notes(section, 10) == ()
    assert scheduler_notes(section, 5) == ("scheduler.milestones: 5, 9 not reached in 5 epochs",)
    assert scheduler_problems(section, 5) == []


def rates_by_step(epochs: int, updates: int, base: float = 0.1, **values: Any) -> list[float]:
    """The learning rate of every optimiser step; a warning of torch's is an error."""
    torch_optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=base, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        schedule = Schedule(SchedulerSection(interval="step", **values), torch_optimizer, epochs, updates)
        seen = []
        for _ in range(epochs):
            for _ in range(updates):
                seen.append(torch_optimizer.param_groups[0]["lr"])
                torch_optimizer.step()
                schedule.after_step()
            schedule.after_pass()
    return seen


@pytest.mark.parametrize("warmup", [0, 1, 2])
@pytest.mark.parametrize(("values", "factor"), SCHEDULES, ids=[str(values) for values, _ in SCHEDULES])
def test_by_the_step_schedules_are_as_long_as_the_run_has_steps(
    values: dict[str, Any], factor: Callable[[int, int], float], warmup: int
) -> None:
    epochs, updates = 5, 4
    rises, rest = warmup * updates, (epochs - warmup) * updates
    rising = [0.1 * step / (rises + 1) for step in range(1, rises + 1)]
    following = [0.1 * factor(t, rest) for t in range(rest)]
    seen = rates_by_step(epochs, updates, warmup_epochs=warmup, **values)
    assert seen == pytest.approx(rising + following, abs=apart(2000))


def test_one_cycle_rises_to_the_optimisers_rate_and_falls_to_the_end_of_the_run() -> None:
    seen = rates_by_step(5, 4, name="onecycle", pct_start=0.3, anneal_strategy="linear")
    # From a 25th up over 0.3 * 20 - 1 = 5 steps, then down to a 250,000th over the 14 that are left.
    rising = [0.004 + 0.096 * step / 5 for step in range(5)]
    falling = [0.1 - (0.1 - 4e-7) * step / 14 for step in range(15)]
    assert seen == pytest.approx(rising + falling, abs=apart(1000))


def test_one_cycle_keeps_the_rates_of_groups_apart_and_moves_momentum_against_them() -> None:
    built = optimizer(lr=0.1, momentum=0.9, groups=[{"parameters": ["3.*"], "lr": 0.4}])
    schedule = Schedule(SchedulerSection(name="onecycle", interval="step", pct_start=0.5), built, 1, 10)
    seen = []
    for _ in range(10):
        seen.append([(group["lr"], group["momentum"]) for group in built.param_groups])
        built.step()
        schedule.after_step()
    assert all(second[0] == pytest.approx(4 * first[0]) for first, second in seen)
    peak = max(range(10), key=lambda step: seen[step][0][0])
    assert seen[peak][0] == pytest.approx((0.1, 0.85))
    assert seen[0][0] == pytest.approx((0.004, 0.95))


def test_past_its_end_one_cycle_keeps_its_last_rate() -> None:
    seen = rates_by_step(3, 5, name="onecycle", total_steps=10)
    assert len(set(seen[10:])) == 1
    assert seen[-1] == pytest.approx(min(seen))


@pytest.mark.parametrize("lower", [False, True])
def test_a_plateau_is_where_the_metric_has_not_been_better_for_longer_than_its_patience(lower: bool) -> None:
    built = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    section = SchedulerSection(name="plateau", patience=1, factor=0.5)
    schedule = Schedule(section, built, 9, lower_is_better=lower)
    scores = [50.0, 60.0, math.nan, 60.0, 55.0, 70.0, math.nan, 69.0, 68.0]  # worse twice in a row at the 5th and 9th
    seen = []
    for score in scores:
        built.step()
        schedule.after_step()
        schedule.after_test(100 - score if lower else score)
        schedule.after_pass()
        seen.append(built.param_groups[0]["lr"])
    assert seen == pytest.approx([0.1] * 4 + [0.05] * 4 + [0.025])


def test_before_a_plateau_the_rate_may_rise() -> None:
    built = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = Schedule(SchedulerSection(name="plateau", patience=0, warmup_epochs=3), built, 9)
    seen = []
    for score in [9.0, 8.0, 7.0, 6.0, 5.0]:  # worse and worse, which counts once the rate is risen, from a first on
        seen.append(built.param_groups[0]["lr"])
        built.step()
        schedule.after_test(score)
        schedule.after_pass()
    assert [*seen, built.param_groups[0]["lr"]] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.01])


def test_a_warning_of_a_first_update_that_fp16_skips_is_not_the_users() -> None:
    built = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = Schedule(SchedulerSection(name="cosine", interval="step"), built, 2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule.after_step()
    assert built.param_groups[0]["lr"] < 0.1


@pytest.mark.parametrize(
    ("values", "steps"),
    [
        ({"name": "constant"}, 0),
        ({"name": "multistep", "milestones": [2, 3]}, 12),
        ({"name": "multistep", "milestones": [2, 3], "interval": "step"}, 3),
        ({"name": "cosine"}, 16),  # the rate of the fifth epoch is lower than the fourth's
        ({"name": "cosine", "interval": "step"}, 19),
        ({"name": "constant", "warmup_epochs": 2}, 0),
    ],
)
def test_the_last_drop_of_the_rate_by_epochs_and_by_steps(values: dict[str, Any], steps: int) -> None:
    assert steps_before_last_drop(SchedulerSection(**values), 5, 4) == steps
