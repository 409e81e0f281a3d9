"""What is wrong with a recipe that only torch, torchvision or Python can tell; opens no data and downloads nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from difflib import get_close_matches
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from neq_cli.errors import RecipeValueError
from neq_cli.recipe import (
    CustomPolicy,
    DataSection,
    ModelSection,
    OptimizerSection,
    Problem,
    Recipe,
    SchedulerSection,
    Section,
)
from neq_cli.recipe.entrypoints import accepted_arguments, check_kwargs, load_entrypoint
from neq_cli.training.data import catalogue
from neq_cli.training.loop import optimizers as optim
from neq_cli.training.loop import schedules, tasks
from neq_cli.training.models import build as models
from neq_cli.training.models import weights
from neq_cli.training.models.state_files import checkpoint_path

_DEVICES = {"auto": "auto", "cpu": "cpu", "cuda": "cuda", "mps": "mps", "gpu": "cuda"}  # what a word may mean


def check_section(name: str, section: Any) -> list[Problem]:
    """Return every problem of a section, of the device (its text), or of the whole recipe (``name`` "") beyond these.

    Imports the modules that entrypoints name, and calls none of them; builders of torchvision are tried on the meta
    device, which holds no numbers.
    """
    if name == "device":
        problem = device_problem(section)
        return [] if problem is None else [Problem("device", problem)]
    if isinstance(section, Recipe):
        return list(_recipe(section))
    checks: dict[type[Section], Callable[[Any], Iterator[Problem]]] = {
        ModelSection: _model,
        DataSection: _data,
        OptimizerSection: _optimizer,
        SchedulerSection: _scheduler,
        CustomPolicy: _policy,
    }
    check = checks.get(type(section))
    return list(check(section)) if check is not None else []


def device_problem(device: str) -> str | None:
    """Return why ``device`` cannot be used on this machine, or None where it can."""
    if device == "auto":
        return None
    try:
        kind = torch.device(device).type
    except RuntimeError:
        closest = get_close_matches(device.partition(":")[0].lower(), _DEVICES, n=1)
        hint = f"did you mean '{_DEVICES[closest[0]]}'?" if closest else "use auto, cpu, cuda, cuda:N or mps"
        return f"'{device}' is no torch device; {hint}"
    if kind == "cpu":
        return None
    if kind == "cuda" and not torch.cuda.is_available():
        return f"'{device}', but no CUDA device is available; use device=auto"
    if kind == "mps" and not torch.backends.mps.is_available():
        return f"'{device}', but no MPS device is available; use device=auto"
    found = torch.accelerator.current_accelerator()
    if found is None or found.type != kind:
        return f"'{device}' is not available; use device=auto"
    number, count = torch.device(device).index, torch.accelerator.device_count()
    if number is not None and number >= count:
        return f"'{device}', but this machine has {count}, counted from 0; use {kind}:{count - 1} or lower"
    return None


def _value_problem(call: Callable[[], Any]) -> Iterator[Problem]:
    """Yield what ``call`` raises about the recipe, if it does."""
    try:
        call()
    except RecipeValueError as error:
        yield _problem(error)


def _problem(error: RecipeValueError) -> Problem:
    return Problem(error.key, error.reason, error.others)


def _argument_problems(key: str, find: Callable[[], list[tuple[str, str]]]) -> Iterator[Problem]:
    try:
        for argument, problem in find():
            yield Problem(f"{key}.{argument}" if key else argument, problem)
    except RecipeValueError as error:
        yield _problem(error)


def _model(section: ModelSection) -> Iterator[Problem]:
    try:
        builder = models.find_builder(section)
    except RecipeValueError as error:
        yield _problem(error)
    else:
        problems = list(_argument_problems("model.kwargs", lambda: models.kwargs_problems(section, builder)))
        yield from problems
        if not problems and not builder.needs_task:
            yield from _value_problem(lambda: models.try_builder(section, builder))
        if section.weights is not None:
            yield from _value_problem(lambda: weights.find_weights(section))
        if section.weights_backbone is not None:
            yield from _value_problem(lambda: weights.find_backbone_weights(section))
    if section.checkpoint is not None:
        yield from _value_problem(lambda: checkpoint_path(str(section.checkpoint)))
        if section.weights is not None:
            yield Problem("model.checkpoint", "both weights and checkpoint are given; remove one of them")
    elif section.fresh and section.weights is None:
        yield Problem("model.fresh", "is for weights or a checkpoint, and none are given; remove it or give either")
    if section.weights_backbone is not None and (section.weights is not None or section.checkpoint is not None):
        yield Problem("model.weights_backbone", "whole weights are given too; remove one of them")


def _data(section: DataSection) -> Iterator[Problem]:
    problems = list(_argument_problems("data.kwargs", lambda: catalogue.kwargs_problems(section)))
    yield from problems
    if problems:
        return
    for key, problem in catalogue.hub_problems(section):
        yield Problem(f"data.{key}", problem)
    if section.name is None:
        return
    yield from _value_problem(lambda: catalogue.class_count(section))
    masks = catalogue.has_masks(section)
    found = [] if masks is None else catalogue.masks_problems(section, masks=masks)
    for key, problem in (*found, *catalogue.range_problems(section)):
        yield Problem(f"data.{key}", problem)

    def normalise() -> None:
        shape = catalogue.sample_shape(section)
        if shape is not None:
            catalogue.statistics(section, shape[0])

    yield from _value_problem(normalise)


def _optimizer(section: OptimizerSection) -> Iterator[Problem]:
    yield from _argument_problems("", lambda: optim.optimizer_problems(section))


def _scheduler(section: SchedulerSection) -> Iterator[Problem]:
    # No argument is wrong for one length of run and right for another, of those that are long enough for OneCycleLR.
    yield from _argument_problems("", lambda: schedules.scheduler_problems(section, section.warmup_epochs + 10))


def _policy(section: CustomPolicy) -> Iterator[Problem]:
    def find() -> list[tuple[str, str]]:
        policy = load_entrypoint(section.entrypoint, "policy.entrypoint")
        return check_kwargs(policy, section.kwargs, name=section.entrypoint)

    yield from _argument_problems("policy.kwargs", find)


def _recipe(recipe: Recipe) -> Iterator[Problem]:
    """Yield what concerns several sections or none."""
    yield from _head(recipe)
    yield from _classes(recipe)
    yield from _masks(recipe)
    yield from _graph(recipe)
    yield from _rest(recipe)
    yield from _task(recipe)


def _head(recipe: Recipe) -> Iterator[Problem]:
    """Try a model whose network the task decides on."""
    if recipe.model.entrypoint is None and models.find_builder(recipe.model).needs_task:
        yield from _value_problem(
            lambda: models.try_builder(recipe.model, models.find_builder(recipe.model, recipe.task))
        )


def _classes(recipe: Recipe) -> Iterator[Problem]:
    argument = models.find_builder(recipe.model).classes_argument
    given, classes = recipe.model.kwargs.get(argument), catalogue.class_count(recipe.data)
    if isinstance(given, int) and classes is not None and given < classes:
        yield Problem(f"model.kwargs.{argument}", models.too_few_classes(given, classes))


def _masks(recipe: Recipe) -> Iterator[Problem]:
    masks, name = catalogue.has_masks(recipe.data), recipe.data.name
    if masks and recipe.task == "classification":
        yield Problem("task", f"classification, but {name} has masks; use task=segmentation")
    if masks is False and recipe.task == "segmentation":
        mend = "use segmentation_folder, VOCSegmentation or COCO"
        yield Problem("task", f"segmentation, but {name} has no masks; {mend}")


def _graph(recipe: Recipe) -> Iterator[Problem]:
    if recipe.cuda_graph and recipe.precision == "fp16":
        yield Problem("cuda_graph", "fp16 has to look at every step's gradients to scale them; use precision=bf16")
    if recipe.cuda_graph and recipe.gradient_accumulation > 1:
        yield Problem("cuda_graph", "a captured step is one batch; use gradient_accumulation=1")
    if recipe.cuda_graph and recipe.scheduler.interval == "step":
        yield Problem("cuda_graph", "a captured step has the learning rate of its epoch; use scheduler.interval=epoch")


def _rest(recipe: Recipe) -> Iterator[Problem]:
    if recipe.stop_when_frozen is not None and schedules.find_scheduler(recipe.scheduler.name) is ReduceLROnPlateau:
        yield Problem("stop_when_frozen", "no drop of ReduceLROnPlateau is known to be the last; use another schedule")


def _task(recipe: Recipe) -> Iterator[Problem]:
    try:
        accepted, others = accepted_arguments(tasks.find_task(recipe.task))
    except RecipeValueError as error:
        yield _problem(error)
        return
    if recipe.label_smoothing and not others and "label_smoothing" not in accepted:
        yield Problem("label_smoothing", f"the task '{recipe.task}' does not take it; remove it")
