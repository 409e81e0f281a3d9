"""Optimisers by their torch names, and which parameters have which of their settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from neq_cli.errors import RecipeValueError, did_you_mean, one_line
from neq_cli.freezing.rows.optimizers import MIXING_OPTIMIZERS
from neq_cli.recipe import OptimizerSection, ParameterGroup
from neq_cli.recipe.entrypoints import accepted_arguments, check_kwargs
from neq_cli.training.blame import blamed
from neq_cli.training.loop import fused

OPTIMIZERS: Mapping[str, type[Optimizer]] = {
    name.lower(): kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, Optimizer) and kind is not Optimizer
}


def find_optimizer(name: str) -> type[Optimizer]:
    """Return the torch.optim class called ``name`` in any case; RecipeValueError where it is unknown or mixes rows."""
    kind = OPTIMIZERS.get(name.lower())
    if kind is None:
        hint = did_you_mean(name.lower(), OPTIMIZERS) or "; use sgd, adam, adamw or another of torch.optim"
        raise RecipeValueError("optimizer.name", f"no torch optimiser '{name}'{hint}")
    if kind.__name__ in MIXING_OPTIMIZERS:
        reason = MIXING_OPTIMIZERS[kind.__name__]
        raise RecipeValueError(
            "optimizer.name", f"{kind.__name__} cannot freeze neurons ({reason}); use sgd, adamw or rmsprop"
        )
    return kind


def optimizer_problems(section: OptimizerSection) -> list[tuple[str, str]]:
    """Return (key, problem) pairs of the optimiser's arguments, tried on a parameter of its own; [] where they fit."""
    kind = find_optimizer(section.name)
    problems = list(_argument_problems(kind, section))
    if problems:
        return problems
    refusal = _refusal(kind, section)
    if refusal is None or refusal.key != "optimizer":
        return [] if refusal is None else [(refusal.key, refusal.reason)]

    def fails_without(argument: str) -> bool:
        return _refusal(kind, section.model_copy(update={argument: None})) is not None

    return [(blamed("optimizer", ["lr", *section.kwargs], fails_without), refusal.reason)]


def _refusal(kind: type[Optimizer], section: OptimizerSection) -> RecipeValueError | None:
    """Return why the optimiser does not take its arguments, or cannot step with them; None where it can."""
    parameter = nn.Parameter(torch.zeros(2, 2))
    parameter.grad = torch.ones(2, 2)
    try:
        optimizer = make_optimizer(kind, section, [{"params": [parameter]}])
        for _ in range(2):  # momentum has a part from the second step on
            optimizer.step()
    except RecipeValueError as error:
        return error
    except TypeError as error:  # others, such as capturable=true, may be for another device
        return RecipeValueError("optimizer", f"{section.name} cannot step with its arguments ({one_line(error)})")
    return None


def _argument_problems(kind: type[Optimizer], section: OptimizerSection) -> Iterator[tuple[str, str]]:
    for argument, problem in check_kwargs(kind, section.kwargs, supplied=["params"]):
        yield f"optimizer.{argument}", problem
    accepted = accepted_arguments(kind)[0]
    for number, group in enumerate(section.groups):
        for setting in set(_settings(group)) - accepted:  # torch would keep it and ignore it
            yield f"optimizer.groups.{number}.{setting}", f"{kind.__name__} has no {setting}; remove it"


def _settings(group: ParameterGroup) -> dict[str, Any]:
    return group.model_dump(exclude={"parameters"}, exclude_none=True)


def build_optimizer(section: OptimizerSection, model: nn.Module, *, capturable: bool = False) -> Optimizer:
    """Build the optimiser over the parameters that require gradients; those of ``section.groups`` come after the rest.

    A parameter belongs to the first group with a glob that matches its name. Torch's fused kernels are used where they
    fit and the recipe says neither ``fused`` nor ``foreach``; so build it once the model is where it trains.
    ``capturable``: its steps are to be captured in a CUDA graph. Raises RecipeValueError for unknown names and
    arguments, for what a graph would lose, for a glob that matches no parameter, and where there is nothing to train.
    """
    kind = find_optimizer(section.name)
    for key, problem in _argument_problems(kind, section):
        raise RecipeValueError(key, problem)
    groups = parameter_groups(section.groups, model)
    if not groups:
        raise RecipeValueError("model", "no parameter requires gradients; there is nothing to train")
    parameters = [parameter for group in groups for parameter in group["params"]]
    # Fused kernels refuse sparse gradients.
    sparse = any(getattr(module, "sparse", False) is True for module in model.modules())
    chosen = {"fused": True} if not sparse and fused.fits(kind, _arguments(section), parameters) else {}
    if capturable and "capturable" in accepted_arguments(kind)[0] and "capturable" not in section.kwargs:
        chosen["capturable"] = True
    optimizer = make_optimizer(kind, section, groups, **chosen)
    if capturable and "capturable" not in optimizer.defaults and optimizer.defaults.get("lr_decay"):
        # Adagrad counts its steps on the CPU: every replay would decay as the captured step did.
        raise RecipeValueError("optimizer.lr_decay", "is lost in a CUDA graph; leave it out, or set cuda_graph: false")
    if optimizer.defaults.get("fused"):
        fused.complete(optimizer)
    return optimizer


def parameter_groups(groups: list[ParameterGroup], model: nn.Module) -> list[dict[str, Any]]:
    """Return the parameters that require gradients as torch takes them: those in no group first, empty groups left out.

    Parameters shared under several names count once, under their first.
    """
    remaining = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    names = list(remaining)
    result: list[dict[str, Any]] = []
    for number, group in enumerate(groups):
        for glob in group.parameters:
            if not any(fnmatchcase(name, glob) for name in names):
                hint = did_you_mean(glob, names) or f"; names are such as '{next(iter(names), '')}'"
                raise RecipeValueError(
                    f"optimizer.groups.{number}.parameters", f"no trained parameter matches '{glob}'{hint}"
                )
        chosen = [name for name in remaining if any(fnmatchcase(name, glob) for glob in group.parameters)]
        result.append({"params": [remaining.pop(name) for name in chosen], **_settings(group)})
    return [group for group in [{"params": list(remaining.values())}, *result] if group["params"]]


def _arguments(section: OptimizerSection) -> dict[str, Any]:
    # YAML has lists where torch has tuples, such as Adam's betas.
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in section.kwargs.items()}
    return arguments if section.lr is None else {**arguments, "lr": section.lr}


def make_optimizer(
    kind: Callable[..., Optimizer], section: OptimizerSection, groups: list[dict[str, Any]], **chosen: Any
) -> Optimizer:
    """Return a ``kind`` with the arguments of ``section`` and ``chosen`` ones. RecipeValueError where it refuses."""
    try:
        return kind(groups, **_arguments(section), **chosen)
    except Exception as error:
        raise RecipeValueError("optimizer", f"{section.name} refuses its arguments ({one_line(error)})") from error
