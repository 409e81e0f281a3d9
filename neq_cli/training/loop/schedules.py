"""Learning rates over a run, by their torch names: they change after epochs, after optimiser steps or by the tests."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LinearLR, LRScheduler, OneCycleLR, ReduceLROnPlateau, SequentialLR

from neq_cli.errors import RecipeValueError, did_you_mean, one_line
from neq_cli.recipe import SchedulerSection
from neq_cli.recipe.entrypoints import check_kwargs
from neq_cli.text import counted
from neq_cli.training.blame import blamed

_SCHEDULERS: Mapping[str, type[Any]] = {
    name.lower(): kind for name, kind in vars(lr_scheduler).items() if name in lr_scheduler.__all__
}
# Short names beside the classes' own: "cosine", and "step" for StepLR as well as "steplr".
_SHORT = {
    "cosine": "cosineannealinglr",
    "cosine_warm_restarts": "cosineannealingwarmrestarts",
    "plateau": "reducelronplateau",
} | {name.removesuffix("lr"): name for name in _SCHEDULERS if name.endswith("lr") and name != "constantlr"}
REFUSED_SCHEDULERS = {
    "LambdaLR": "it needs a Python function; use polynomial, multistep or exponential",
    "MultiplicativeLR": "it needs a Python function; use polynomial, multistep or exponential",
    "SequentialLR": "it needs other schedulers; use warmup_epochs",
    "ChainedScheduler": "it needs other schedulers; use warmup_epochs",
    "LRScheduler": "it is the base of all others; use constant",
}
_BY_STEP = ("OneCycleLR", "CyclicLR")


class Schedule:
    """A run's learning rate. The loop tells it what it has done; it knows after which of that the rate changes."""

    def __init__(
        self,
        section: SchedulerSection,
        optimizer: Optimizer,
        epochs: int,
        updates: int = 1,
        *,
        lower_is_better: bool = False,
    ) -> None:
        """See ``build_scheduler``; ``lower_is_better`` is of the metric that tests measure."""
        self.interval = section.interval
        self.scheduler = build_scheduler(section, optimizer, epochs, updates, lower_is_better=lower_is_better)
        self._rising: LinearLR | None = None
        if isinstance(self.scheduler, ReduceLROnPlateau) and section.warmup_epochs:
            self._rising = _rise(optimizer, section.warmup_epochs)

    def after_step(self) -> None:
        """Take note that the optimiser has stepped."""
        if self.interval == "step":
            self._step()

    def after_pass(self) -> None:
        """Take note that all training data have been passed over."""
        if self._rising is not None:
            self._rising.step()
        elif self.interval == "epoch" and not isinstance(self.scheduler, ReduceLROnPlateau):
            self._step()

    def after_test(self, score: float) -> None:
        """Take note of the metric; NaN, which was not measured, tells nothing."""
        rises = self._rising is not None and self._rising.last_epoch < self._rising.total_iters
        if isinstance(self.scheduler, ReduceLROnPlateau) and not rises and not math.isnan(score):
            self.scheduler.step(score)

    def _step(self) -> None:
        scheduler = self.scheduler
        if scheduler is None or (
            isinstance(scheduler, OneCycleLR) and scheduler.last_epoch >= scheduler.total_steps - 1
        ):
            return  # past its end, where torch would rise again and then raise, the last rate stays
        with warnings.catch_warnings():
            # Where fp16 has skipped the first update, whose gradients were too large.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            scheduler.step()

    def state_dict(self) -> dict[str, Any] | None:
        """Return all that further rates depend on; None where they never change."""
        if self._rising is not None and self.scheduler is not None:
            return {"rising": self._rising.state_dict(), "following": self.scheduler.state_dict()}
        return None if self.scheduler is None else self.scheduler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``; ValueError for one of another schedule."""
        if self._rising is not None and self.scheduler is not None:
            _check_keys(state, ("rising", "following"))
            _load(self._rising, state["rising"])
            _load(self.scheduler, state["following"])
        elif self.scheduler is not None:
            _load(self.scheduler, state)


def _load(scheduler: LRScheduler, state: Mapping[str, Any]) -> None:
    # It takes over any attribute it is given, so it must be given its own only.
    _check_keys(state, scheduler.state_dict())
    scheduler.load_state_dict(dict(state))


def _check_keys(state: Mapping[str, Any], known: Any) -> None:
    odd = set(state) ^ set(known)
    if odd:
        raise ValueError(f"scheduler: {', '.join(sorted(map(str, odd)))} comes or goes")


def find_scheduler(name: str) -> type[Any] | None:
    """Return the torch.optim.lr_scheduler class called ``name``, None for "constant"; RecipeValueError where none."""
    lowered = name.lower()
    if lowered == "constant":
        return None
    kind = _SCHEDULERS.get(_SHORT.get(lowered, lowered))
    if kind is None:
        hint = did_you_mean(lowered, ["constant", *_SHORT, *_SCHEDULERS]) or "; use constant, multistep, cosine or step"
        raise RecipeValueError("scheduler.name", f"no torch scheduler '{name}'{hint}")
    if kind.__name__ in REFUSED_SCHEDULERS:
        raise RecipeValueError("scheduler.name", f"{kind.__name__} cannot be used: {REFUSED_SCHEDULERS[kind.__name__]}")
    return kind


def scheduler_problems(section: SchedulerSection, epochs: int) -> list[tuple[str, str]]:
    """Return (key, problem) pairs of a schedule, tried on an optimiser of its own; [] where it fits."""
    kind = find_scheduler(section.name)
    problems = list(_kind_problems(kind, section))
    problems += [
        (f"scheduler.{argument}", problem) for argument, problem in _scheduler_kwargs_problems(kind, section, epochs)
    ]
    if problems:
        return problems
    refusal = _refusal(section, epochs)
    if refusal is None or refusal.key != "scheduler":
        return [] if refusal is None else [(refusal.key, refusal.reason)]

    def fails_without(argument: str) -> bool:
        return _refusal(section.model_copy(update={argument: None}), epochs) is not None

    return [(blamed("scheduler", section.kwargs, fails_without), refusal.reason)]


def _refusal(section: SchedulerSection, epochs: int) -> RecipeValueError | None:
    """Return why a schedule does not take its arguments, or cannot step with them; None where it can."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    try:
        schedule = Schedule(section, optimizer, epochs)
        for _ in range(section.warmup_epochs + 2):
            optimizer.step()
            schedule.after_step()
            schedule.after_test(0.0)
            schedule.after_pass()
    except RecipeValueError as error:
        return error
    except Exception as error:  # torch looks at most arguments only now
        return RecipeValueError("scheduler", f"{section.name} cannot step with its arguments ({one_line(error)})")
    return None


def scheduler_notes(section: SchedulerSection, epochs: int, updates: int = 1) -> tuple[str, ...]:
    """Return what is allowed but may not be meant: milestones that the run never reaches."""
    length = epochs if section.interval == "epoch" else epochs * updates
    late = [milestone for milestone in section.kwargs.get("milestones", []) if milestone >= length]
    if not late:
        return ()
    listed = ", ".join(map(str, late))
    return (f"scheduler.milestones: {listed} not reached in {counted(length, section.interval)}",)


def steps_before_last_drop(section: SchedulerSection, epochs: int, updates: int) -> int:
    """Return how many optimiser steps precede the last one with a lower rate than the one before it; 0 where none.

    ``updates`` are the optimiser steps of each of the ``epochs``. Of a schedule that goes by tests nobody knows.
    """
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    schedule = Schedule(section, optimizer, epochs, updates)
    of_each = 1 if section.interval == "step" else updates
    found, rate = 0, float(optimizer.param_groups[0]["lr"])
    for number in range(1, epochs * updates // of_each) if schedule.scheduler is not None else ():
        optimizer.step()
        schedule.after_step()
        schedule.after_pass()
        before, rate = rate, float(optimizer.param_groups[0]["lr"])
        found = number if rate < before else found
    return found * of_each


def _kind_problems(kind: type[Any] | None, section: SchedulerSection) -> list[tuple[str, str]]:
    """Return what does not go with the kind of schedule, whatever its arguments are."""
    if kind is not None and kind.__name__ in _BY_STEP and section.interval == "epoch":
        return [("scheduler.interval", f"{kind.__name__} goes by optimiser steps; use interval: step")]
    if kind is OneCycleLR and section.warmup_epochs:
        return [("scheduler.warmup_epochs", "OneCycleLR rises by itself, for pct_start of the run; leave it out")]
    if kind is ReduceLROnPlateau and section.interval == "step":
        return [("scheduler.interval", "ReduceLROnPlateau goes by tests; leave it out")]
    return []


def _scheduler_kwargs_problems(kind: type[Any] | None, section: SchedulerSection, epochs: int) -> list[tuple[str, str]]:
    if kind is None:
        return [(argument, f"unknown argument '{argument}' of constant") for argument in section.kwargs]
    follow: dict[str, Any] = {section.length_argument: epochs} if section.length_argument is not None else {}
    supplied = ["optimizer", "last_epoch"]
    if kind is OneCycleLR:
        follow["max_lr"] = 1.0
    if kind is ReduceLROnPlateau:  # which has no last_epoch
        supplied = ["optimizer", "mode"]
    return check_kwargs(kind, {**follow, **section.kwargs}, supplied=supplied)


def build_scheduler(
    section: SchedulerSection, optimizer: Optimizer, epochs: int, updates: int = 1, *, lower_is_better: bool = False
) -> LRScheduler | None:
    """Build torch's schedule, to be stepped after every interval; None where the learning rate never changes.

    ``updates`` are the optimiser steps of an epoch, and matter for ``interval: step`` alone. During ``warmup_epochs`` =
    W intervals the rate rises linearly: interval e of them has e / (W + 1) of it, the first one after them all of it.
    The schedule proper then begins; ``milestones`` stay intervals of the run, and lengths that the recipe does not give
    (T_max, total_iters, total_steps) are the intervals left. Raises RecipeValueError.
    """
    kind = find_scheduler(section.name)
    for key, problem in _kind_problems(kind, section):
        raise RecipeValueError(key, problem)
    for argument, problem in _scheduler_kwargs_problems(kind, section, epochs):
        raise RecipeValueError(f"scheduler.{argument}", problem)
    of_epoch = updates if section.interval == "step" else 1
    warmup = section.warmup_epochs * of_epoch
    try:
        if kind is ReduceLROnPlateau:
            return ReduceLROnPlateau(optimizer, "min" if lower_is_better else "max", **section.kwargs)
        # Made one after the other: each sets the optimiser to its own first rate.
        rising = _rise(optimizer, warmup) if warmup else None
        if kind is None:
            return rising
        kwargs = _scheduler_kwargs(section, epochs * of_epoch, warmup)
        if kind is OneCycleLR:
            kwargs.setdefault("max_lr", [group["lr"] for group in optimizer.param_groups])
        following: LRScheduler = kind(optimizer, **kwargs)
        if rising is None:
            return following
        return SequentialLR(optimizer, [rising, following], milestones=[warmup])
    except RecipeValueError:
        raise
    except Exception as error:
        raise RecipeValueError("scheduler", f"{section.name} refuses its arguments ({one_line(error)})") from error


def _rise(optimizer: Optimizer, intervals: int) -> LinearLR:
    return LinearLR(optimizer, 1 / (intervals + 1), total_iters=intervals)


def _scheduler_kwargs(section: SchedulerSection, intervals: int, warmup: int) -> dict[str, Any]:
    kwargs = section.kwargs
    if section.length_argument is not None:  # what is left after the warm-up
        kwargs.setdefault(section.length_argument, max(1, intervals - warmup))
    if "milestones" in kwargs:
        milestones, unit = kwargs["milestones"], section.interval
        if not isinstance(milestones, list) or not all(type(number) is int for number in milestones):
            raise RecipeValueError(
                "scheduler.milestones", f"{milestones!r} is not a list of {unit}s, such as [100, 150]"
            )
        early = [number for number in milestones if number <= warmup]
        if early:
            raise RecipeValueError("scheduler.milestones", f"{early[0]} is not after the {warmup} warm-up {unit}s")
        kwargs["milestones"] = [number - warmup for number in milestones]
    return kwargs
