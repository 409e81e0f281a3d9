"""Optimisers and learning rate schedules by their torch names; schedules step once per epoch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from neq_cli.errors import RecipeValueError, did_you_mean, one_line
from neq_cli.freezing.rows.optimizers import MIXING_OPTIMIZERS
from neq_cli.recipe import OptimizerSection, ParameterGroup, SchedulerSection
from neq_cli.recipe.entrypoints import accepted_arguments, check_kwargs
from neq_cli.training.loop import fused

OPTIMIZERS: Mapping[str, type[Optimizer]] = {
    name.lower(): kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, Optimizer) and kind is not Optimizer
}
_SCHEDULERS: Mapping[str, type[Any]] = {
    name.lower(): kind for name, kind in vars(lr_scheduler).items() if name in lr_scheduler.__all__
}
# Short names beside the classes' own: "cosine", and "step" for StepLR as well as "steplr".
_SHORT = {"cosine": "cosineannealinglr", "cosine_warm_restarts": "cosineannealingwarmrestarts"} | {
    name.removesuffix("lr"): name for name in _SCHEDULERS if name.endswith("lr") and name != "constantlr"
}
_REFUSED_SCHEDULERS = {
    "ReduceLROnPlateau": "it waits for a metric; use multistep or cosine",
    "OneCycleLR": "it steps once per batch, and schedules here once per epoch; use cosine with warmup_epochs",
    "CyclicLR": "it steps once per batch, and schedules here once per epoch; use CosineAnnealingWarmRestarts",
    "LambdaLR": "it needs a Python function; use polynomial, multistep or exponential",
    "MultiplicativeLR": "it needs a Python function; use polynomial, multistep or exponential",
    "SequentialLR": "it needs other schedulers; use warmup_epochs",
    "ChainedScheduler": "it needs other schedulers; use warmup_epochs",
    "LRScheduler": "it is the base of all others; use constant",
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
    parameter = nn.Parameter(torch.zeros(2, 2))
    parameter.grad = torch.ones(2, 2)
    try:
        optimizer = _make(kind, section, [{"params": [parameter]}])
        for _ in range(2):  # momentum has a part from the second step on
            optimizer.step()
    except RecipeValueError as error:
        return [(error.key, error.reason)]
    except TypeError as error:  # others, such as capturable=true, may be for another device
        return [("optimizer", f"{section.name} cannot step with its arguments ({one_line(error)})")]
    return []


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
    optimizer = _make(kind, section, groups, **chosen)
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


def _make(
    kind: Callable[..., Optimizer], section: OptimizerSection, groups: list[dict[str, Any]], **chosen: Any
) -> Optimizer:
    try:
        return kind(groups, **_arguments(section), **chosen)
    except Exception as error:
        raise RecipeValueError("optimizer", f"{section.name} refuses its arguments ({one_line(error)})") from error


def find_scheduler(name: str) -> type[Any] | None:
    """Return the torch.optim.lr_scheduler class called ``name``, None for "constant"; RecipeValueError where none."""
    lowered = name.lower()
    if lowered == "constant":
        return None
    kind = _SCHEDULERS.get(_SHORT.get(lowered, lowered))
    if kind is None:
        hint = did_you_mean(lowered, ["constant", *_SHORT, *_SCHEDULERS]) or "; use constant, multistep, cosine or step"
        raise RecipeValueError("scheduler.name", f"no torch scheduler '{name}'{hint}")
    if kind.__name__ in _REFUSED_SCHEDULERS:
        raise RecipeValueError(
            "scheduler.name", f"{kind.__name__} cannot be used: {_REFUSED_SCHEDULERS[kind.__name__]}"
        )
    return kind


def scheduler_problems(section: SchedulerSection, epochs: int) -> list[tuple[str, str]]:
    """Return (key, problem) pairs of a schedule, tried on an optimiser of its own; [] where it fits."""
    kind = find_scheduler(section.name)
    problems = [
        (f"scheduler.{argument}", problem) for argument, problem in _scheduler_kwargs_problems(kind, section, epochs)
    ]
    if problems:
        return problems
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    try:
        scheduler = build_scheduler(section, optimizer, epochs)
        for _ in range(section.warmup_epochs + 2 if scheduler is not None else 0):
            optimizer.step()
            cast(LRScheduler, scheduler).step()
    except RecipeValueError as error:
        return [(error.key, error.reason)]
    except Exception as error:  # torch looks at most arguments only now
        return [("scheduler", f"{section.name} cannot step with its arguments ({one_line(error)})")]
    return []


def scheduler_notes(section: SchedulerSection, epochs: int) -> tuple[str, ...]:
    """Return what is allowed but may not be meant: milestones that the run never reaches."""
    late = [milestone for milestone in section.kwargs.get("milestones", []) if milestone >= epochs]
    if not late:
        return ()
    listed = ", ".join(map(str, late))
    return (f"scheduler.milestones: {listed} not reached in {epochs} epochs",)


def last_drop(section: SchedulerSection, epochs: int) -> int:
    """Return the last of ``epochs`` epochs that begins with a lower learning rate than the one before; 1 where none."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_scheduler(section, optimizer, epochs)
    found, rate = 1, float(optimizer.param_groups[0]["lr"])
    for epoch in range(2, epochs + 1) if scheduler is not None else ():
        optimizer.step()
        cast(LRScheduler, scheduler).step()
        before, rate = rate, float(optimizer.param_groups[0]["lr"])
        found = epoch if rate < before else found
    return found


def _scheduler_kwargs_problems(kind: type[Any] | None, section: SchedulerSection, epochs: int) -> list[tuple[str, str]]:
    if kind is None:
        return [(argument, f"unknown argument '{argument}' of constant") for argument in section.kwargs]
    follow = {section.length_argument: epochs} if section.length_argument is not None else {}
    return check_kwargs(kind, {**follow, **section.kwargs}, supplied=["optimizer", "last_epoch"])


def build_scheduler(section: SchedulerSection, optimizer: Optimizer, epochs: int) -> LRScheduler | None:
    """Build the schedule, to be stepped after every epoch; None where the learning rate never changes.

    During ``warmup_epochs`` = W epochs the rate rises linearly: epoch e of them has e / (W + 1) of it, the first one
    after them all of it. The schedule proper then begins; ``milestones`` stay epochs of the run, and lengths that the
    recipe does not give (T_max, total_iters) are the epochs left. Raises RecipeValueError.
    """
    kind = find_scheduler(section.name)
    for argument, problem in _scheduler_kwargs_problems(kind, section, epochs):
        raise RecipeValueError(f"scheduler.{argument}", problem)
    warmup = section.warmup_epochs
    try:
        # Made one after the other: each sets the optimiser to its own first rate.
        rising = lr_scheduler.LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup) if warmup else None
        if kind is None:
            return rising
        following: LRScheduler = kind(optimizer, **_scheduler_kwargs(kind, section, epochs))
        if rising is None:
            return following
        return lr_scheduler.SequentialLR(optimizer, [rising, following], milestones=[warmup])
    except RecipeValueError:
        raise
    except Exception as error:
        raise RecipeValueError("scheduler", f"{section.name} refuses its arguments ({one_line(error)})") from error


def _scheduler_kwargs(kind: type[Any], section: SchedulerSection, epochs: int) -> dict[str, Any]:
    kwargs = section.kwargs
    if section.length_argument is not None:  # what is left after the warm-up
        kwargs.setdefault(section.length_argument, max(1, epochs - section.warmup_epochs))
    if "milestones" in kwargs:
        milestones = kwargs["milestones"]
        if not isinstance(milestones, list) or not all(type(epoch) is int for epoch in milestones):
            raise RecipeValueError(
                "scheduler.milestones", f"{milestones!r} is not a list of epochs, such as [100, 150]"
            )
        early = [epoch for epoch in milestones if epoch <= section.warmup_epochs]
        if early:
            raise RecipeValueError(
                "scheduler.milestones", f"{early[0]} is not after the {section.warmup_epochs} warm-up epochs"
            )
        kwargs["milestones"] = [epoch - section.warmup_epochs for epoch in milestones]
    return kwargs
