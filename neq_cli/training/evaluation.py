"""One pass of trained weights over the test data, in the very steps of a run's own tests; nothing is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from neq_cli.errors import RecipeValueError, RunDirectoryError
from neq_cli.freed_memory import keep_freed_memory
from neq_cli.recipe import DataSection, Recipe
from neq_cli.text import some_of
from neq_cli.training.batches.loaders import tested_once
from neq_cli.training.data.catalogue import find_name
from neq_cli.training.data.parts import Data, load_data
from neq_cli.training.loop.calling import forward_of, parts_of
from neq_cli.training.loop.step import autocast_of, moved_to, test_batch
from neq_cli.training.loop.tasks import Classification, Segmentation, build_task, checked_results
from neq_cli.training.machine.device import resolve_device, seed_everything
from neq_cli.training.machine.full_memory import full_memory_named
from neq_cli.training.models.build import build_model
from neq_cli.training.models.outputs import main_output
from neq_cli.training.models.weights import misfits
from neq_cli.training.sample import check_together

_TOP = 5
Pass = Callable[[int, int], object]
"""Is told how many batches are done, of how many."""


@dataclass(frozen=True)
class Tested:
    """What a pass comes to. ``pairs`` are the true class, the predicted one and how often, [pairs] each.

    Predictions beyond the classes of the data are one, ``classes``. None where the task tells no classes.
    """

    metrics: Mapping[str, float]
    data: str
    images: int
    counted: str  # what they are: "images", or "items"
    class_names: tuple[str, ...]
    classes: int | None
    pairs: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]] | None
    segmentation: bool


def start_device(recipe: Recipe) -> torch.device:
    """Return the device, ready to compute as in a run of the recipe."""
    device = resolve_device(recipe.device)
    if device.type == "cpu":
        keep_freed_memory()
    seed_everything(recipe.seed, deterministic=recipe.deterministic)
    return device


def trained_model(recipe: Recipe, weights: Mapping[str, Tensor], classes: int | None, place: Path) -> nn.Module:
    """Return the recipe's network with ``weights``, read from ``place``, on the CPU and in eval mode.

    Weights that the recipe starts from are not looked at. RunDirectoryError, one line, where the weights are others'.
    """
    model = build_model(recipe.model, classes, recipe.task)
    if problem := misfits(weights, model.state_dict()):
        mend = "it needs the recipe and the code that it was trained by"
        raise RunDirectoryError(f"{place}: does not fit the model that the recipe makes: {problem}; {mend}")
    model.load_state_dict(dict(weights))
    return model.eval()


def on_device(recipe: Recipe, model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model on ``device``, in the memory format that it was trained in; contiguous where none is told."""
    last = recipe.channels_last is True
    return model.to(device).to(memory_format=torch.channels_last if last else torch.contiguous_format)


@full_memory_named("evaluation")
def evaluate(
    recipe: Recipe,
    weights: Mapping[str, Tensor],
    place: Path,
    known: tuple[int | None, tuple[str, ...]] = (None, ()),
    on_batch: Pass = lambda done, batches: None,
    *,
    held_out: tuple[int, int] | None = None,
) -> Tested:
    """Test ``weights``, read from ``place``, on the test data of ``recipe``, in its precision and batches.

    ``known``: the number of classes that they were trained for, and their names; data of others is refused.
    ``held_out``: how many images of how many the run kept from training to test them; where the recipe's
    ``data.validation`` comes to others, it is refused. Raises RecipeError, RunDirectoryError or TrainingError.
    """
    device = start_device(recipe)
    data = load_data(_section(recipe.data, known[0]), recipe.seed, own_task=recipe.task_is_own, tested_only=True)
    if held_out is not None and data.validation:
        _check_held_out(data, *held_out)
    names = _class_names(data, *known)
    model = trained_model(recipe, weights, data.num_classes, place)
    task = build_task(recipe.task, recipe.label_smoothing, data.num_classes)
    check_together(recipe.model_copy(update={"cuda_graph": False}), model, data, task)
    model = on_device(recipe, model, device)
    batches = tested_once(data, recipe.batch_size, recipe.data.workers, recipe.seed, device)
    call, totals = forward_of(task, model), task.new_totals(device)
    guesses = _Guesses(data.num_classes) if isinstance(task, Classification) else None
    for done, batch in enumerate(batches, 1):
        last = recipe.channels_last is True
        inputs, targets = (moved_to(device, part, channels_last=last) for part in parts_of(batch))
        outputs = test_batch(task, partial(call, model, inputs, targets), targets, totals, autocast_of(recipe, device))
        if guesses is not None:
            guesses.add(outputs, targets)
        on_batch(done, len(batches))
    metrics = checked_results(task, totals)
    classes, pairs = data.num_classes, None
    if guesses is not None and guesses.whole:
        metrics.update(guesses.metrics())
        classes, pairs = guesses.classes, guesses.pairs()
    if isinstance(task, Segmentation):
        pairs = _pairs_of(totals[2:].view(task.classes, task.classes + 1))
    return Tested(
        metrics=metrics,
        data=data.name,
        images=len(data.test),
        counted="items" if data.as_it_is else "images",
        class_names=names,
        classes=classes,
        pairs=pairs,
        segmentation=isinstance(task, Segmentation),
    )


def _section(section: DataSection, classes: int | None) -> DataSection:
    """Return the section with the number of classes of masks, which test masks alone may not show."""
    if section.name is None or find_name(section.name) != "segmentation_folder" or classes is None:
        return section
    if "num_classes" in section.kwargs or (section.folder / "classes.txt").is_file():
        return section
    return section.model_copy(update={"kwargs": {**section.kwargs, "num_classes": classes}})


def _check_held_out(data: Data, tested: int, size: int) -> None:
    """Raise RecipeValueError where other images are held out than the run's: it may have trained on those."""
    found = len(data.test.indices), len(data.train) + len(data.test)
    if found != (tested, size):
        raise RecipeValueError(
            "data.validation",
            f"{found[0]} of {found[1]} images would be tested, and the run held {tested} of {size} out: it may have "
            "trained on some of these; restore the data, or test all of a folder that it never saw by "
            "data.validation=null",
        )


def _class_names(data: Data, classes: int | None, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return what classes are called. RecipeValueError where those of the data are not those of the weights."""
    if classes is not None and data.num_classes is not None and data.num_classes != classes:
        raise RecipeValueError("data.root", f"{data.name} has {data.num_classes} classes, and the run's data {classes}")
    numbers = tuple(map(str, range(len(data.classes))))
    differing = sorted(set(names) ^ set(data.classes))
    # Masks and labels that come without names are called by their numbers.
    if names and data.classes not in (names, numbers):
        shown = some_of(f"'{name}'" for name in differing) or "their order"
        raise RecipeValueError("data.root", f"{data.name} and the run's data differ in classes: {shown}")
    return names or data.classes


class _Guesses:
    """What each image was taken for, beside what it is; ``whole`` until outputs are not one number for each class."""

    def __init__(self, classes: int | None) -> None:
        self.classes = classes
        self.whole = True
        self._of_five = 0
        self._images = 0
        self._outputs = 0
        self._true: list[Tensor] = []
        self._predicted: list[Tensor] = []

    def add(self, outputs: Any, targets: Tensor) -> None:
        """Add a batch."""
        logits = main_output(outputs)
        if not (self.whole and logits.ndim == 2 and targets.ndim == 1):
            self.whole = False
            return
        self._outputs = logits.shape[1]
        if self._outputs > _TOP:
            self._of_five += int((logits.topk(_TOP, dim=1).indices == targets[:, None]).sum())
        self._images += len(targets)
        self._true.append(targets.cpu())
        self._predicted.append(logits.argmax(1).cpu())

    def metrics(self) -> dict[str, float]:
        """Return the top-5 accuracy in percent where there are more than five classes."""
        if self._outputs <= _TOP or not self._images or (self.classes or _TOP + 1) <= _TOP:
            return {}
        return {"top5": 100 * self._of_five / self._images}

    def pairs(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return each pair of a true and a predicted class with how often it came, in order."""
        self.classes = self._outputs if self.classes is None else self.classes
        predicted = torch.cat(self._predicted).clamp(max=self.classes)
        codes = (torch.cat(self._true) * (self.classes + 1) + predicted).numpy()
        found, counts = np.unique(codes, return_counts=True)
        true, taken = np.divmod(found, self.classes + 1)
        return true.astype(np.int64), taken.astype(np.int64), counts.astype(np.int64)


def _pairs_of(confusion: Tensor) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    matrix = confusion.detach().cpu().double().round().long().numpy()
    true, predicted = np.nonzero(matrix)
    return true.astype(np.int64), predicted.astype(np.int64), matrix[true, predicted]
