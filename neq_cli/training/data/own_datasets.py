"""Data of a user's own callable: two datasets with a length and an index, which may not tell their classes."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Any

import torch

from neq_cli.errors import NeqError, RecipeValueError, one_line
from neq_cli.recipe import DataSection
from neq_cli.recipe.entrypoints import accepted_arguments, load_entrypoint
from neq_cli.training.data.items import taken_as_they_are
from neq_cli.training.data.opened import Source, class_names, numbered, place_of


def open_entrypoint(section: DataSection, entrypoint: str, *, own_task: bool) -> Source:
    """Return what the callable of the user's own makes. RecipeValueError where it fails, or is not two datasets."""
    make = load_entrypoint(entrypoint, "data.entrypoint")
    kwargs = dict(section.kwargs)
    if "root" in accepted_arguments(make)[0]:
        kwargs.setdefault("root", str(section.folder))
    try:
        made = make(**kwargs)
    except NeqError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise RecipeValueError(
            "data.entrypoint", f"'{entrypoint}' raised {one_line(error)} ({frame.filename}:{frame.lineno})"
        ) from error
    if not (isinstance(made, Sequence) and len(made) == 2 and all(map(_is_dataset, made))):
        raise RecipeValueError(
            "data.entrypoint", f"'{entrypoint}' must return (train, test), two datasets with a length and an index"
        )
    train, test = made
    if len(train) and _are_items(train, entrypoint, own_task=own_task):
        return Source(entrypoint, train, test, _told_classes(train), as_it_is=True)
    return Source(entrypoint, train, test, _classes_of(train, entrypoint, section.ignore_index))


def _are_items(dataset: Any, entrypoint: str, *, own_task: bool) -> bool:
    try:
        return taken_as_they_are(dataset, own_task=own_task)
    except NeqError as error:
        raise RecipeValueError("data", str(error)) from error
    except Exception as error:
        place = place_of(dataset, 0, entrypoint)
        what = f"the first item of {entrypoint}" if place.startswith("image 0 of ") else place
        raise RecipeValueError("data", f"{what} cannot be used ({one_line(error)})") from error


def _is_dataset(candidate: Any) -> bool:
    return hasattr(candidate, "__getitem__") and hasattr(candidate, "__len__")


def _told_classes(dataset: Any) -> tuple[str, ...]:
    """Return the class names that a dataset of the user's own tells, numbers for ``num_classes``, or none."""
    while hasattr(dataset, "dataset") and not hasattr(dataset, "classes"):  # torch.utils.data.Subset
        dataset = dataset.dataset
    if getattr(dataset, "classes", None):
        return class_names(dataset.classes)
    return numbered(dataset.num_classes) if isinstance(getattr(dataset, "num_classes", None), int) else ()


def _classes_of(dataset: Any, entrypoint: str, ignore_index: int) -> tuple[str, ...]:
    """Return the class names that a dataset of the user's own tells, or numbers for them."""
    if told := _told_classes(dataset):
        return told
    while hasattr(dataset, "dataset") and not hasattr(dataset, "classes"):
        dataset = dataset.dataset
    labels = getattr(dataset, "targets", getattr(dataset, "labels", None))
    if labels is None and hasattr(dataset, "tensors"):  # torch.utils.data.TensorDataset
        labels = dataset.tensors[-1]
    if labels is None or len(labels) == 0:
        raise RecipeValueError(
            "data.entrypoint",
            f"the training dataset of '{entrypoint}' does not tell its classes; give it classes or targets",
        )
    numbers = torch.as_tensor(labels)
    if numbers.ndim > 1:  # masks
        numbers = numbers[numbers != ignore_index]
    return numbered(int(numbers.max()) + 1)
