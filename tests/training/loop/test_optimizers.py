"""Optimisers, parameter groups and schedules against closed formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from neq_cli.errors import NeqError, RecipeValueError
from neq_cli.recipe import OptimizerSection
from neq_cli.training.loop.optimizers import (
    OPTIMIZERS,
    build_optimizer,
    optimizer_problems,
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
    with pytest.raises(RecipeValueError) as built:
        optimizer(name, **values)
    assert str(built.value).startswith(message)
    assert "\n" not in str(built.value)
    section = OptimizerSection(name=name, **values)
    if message.startswith("optimizer.name"):
        with pytest.raises(NeqError) as checked:
            optimizer_problems(section)
        assert str(checked.value) == str(built.value)
    else:
        ((key, problem),) = optimizer_problems(section)
        assert problem == built.value.reason
        # Before it is built, the argument is found without which it could be.
        (argument,) = values
        assert key == (f"optimizer.{argument}" if built.value.key == "optimizer" else built.value.key)


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


def test_an_optimiser_that_could_not_step_is_found_before() -> None:
    ((key, problem),) = optimizer_problems(OptimizerSection(name="sgd", momentum=0.9, dampening="x"))
    assert key == "optimizer"
    assert problem.startswith("sgd cannot step with its arguments (TypeError: ")
