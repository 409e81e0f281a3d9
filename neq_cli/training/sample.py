"""One sample of the data, tried before anything is trained: whether model and task fit it, and what FLOPs count on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neq_cli.errors import FreezingError, NeqError, RecipeValueError, one_line, place_in_code
from neq_cli.freezing.anatomy import Anatomy, anatomy_of
from neq_cli.freezing.model.calling import Call, inputs_of
from neq_cli.freezing.model.observing import first_input, undisturbed
from neq_cli.freezing.probe import copied, device_of
from neq_cli.recipe import Recipe
from neq_cli.training.data.parts import Data
from neq_cli.training.errors import of_the_recipe
from neq_cli.training.loop.calling import forward_of, parts_of, probe_call
from neq_cli.training.loop.tasks import Task, checked_results
from neq_cli.training.models.build import FITTED, check_fit, find_builder


@dataclass(frozen=True)
class Sample:
    """A batch of one sample, how the model is called with it, and what is to be said: what FLOPs are counted on."""

    batch: Any
    call: Call | None = None
    given: bool = False  # to the Freezer, which else finds one sample in the first row of what it probes
    notes: tuple[str, ...] = ()

    def anatomy(self, model: nn.Module, exclude: Sequence[str]) -> Anatomy:
        """Return what a look at ``model`` tells, which is where it is. RecipeError where it cannot be frozen so."""
        inputs = copied(inputs_of(self.batch, self.call), device_of(model))
        try:
            return anatomy_of(model, inputs, exclude=exclude, call=self.call, single=True)
        except FreezingError as error:
            raise of_the_recipe(error) from error


def check_together(recipe: Recipe, model: nn.Module, data: Data, task: Task) -> Sample:
    """Return a sample of the data for ``model``. NeqError or RecipeError, one line, where these do not fit together."""
    call, batch = probe_call(task), data.sample()
    if recipe.cuda_graph and not all(isinstance(part, Tensor) for part in parts_of(batch)):
        what = f"and those of {data.name} are not; set it to false"
        raise RecipeValueError("cuda_graph", f"captures batches whose inputs and targets are a tensor each, {what}")
    only_images = call is None and not data.as_it_is
    notes = check_fit(model, data, recipe.task, _classes_argument(recipe)) if only_images else ()
    if recipe.task_is_own or data.as_it_is:
        check_task(task, model, batch, data.name)
    return Sample(first_input(batch), notes=notes) if only_images else Sample(batch, call, given=True)


def _classes_argument(recipe: Recipe) -> str | None:
    """Return the argument that tells the model how many classes there are; None where it takes no such thing."""
    builder = find_builder(recipe.model, recipe.task)
    return builder.classes_argument if builder.classes_argument in builder.accepted else None


def check_task(task: Task, model: nn.Module, batch: Any, name: str) -> None:
    """Have model and task do with a ``batch`` of one item of the data called ``name`` what a test does with it.

    Raises NeqError, one line with its place, where that fails: before an epoch is trained for it. It leaves no trace.
    """
    inputs, targets = copied(list(parts_of(batch)), device_of(model))
    with undisturbed(model), torch.no_grad():
        model.eval()
        try:
            outputs = forward_of(task, model)(model, inputs, targets)
        except NeqError:
            raise
        except Exception as error:
            said = f"cannot be called with an item of {name}: {_with_place(error)}"
            raise RecipeValueError("model", said, FITTED) from error
        try:
            totals = task.new_totals(device_of(model))
            task.update(totals, outputs, targets, task.loss(outputs, targets))
            checked_results(task, totals)
        except NeqError:
            raise
        except Exception as error:
            raise RecipeValueError("task", f"cannot be tested on an item of {name}: {_with_place(error)}") from error


def _with_place(error: Exception) -> str:
    return f"{one_line(error)} ({place_in_code(error)})"
