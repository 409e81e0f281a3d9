"""A model without its numbers, and what it tells of the images that it takes, before any data is opened."""

from __future__ import annotations

import torch
from torch import nn

from neq_cli.recipe import DataSection, ModelSection
from neq_cli.training.data.catalogue import Shape, sample_shape
from neq_cli.training.models.build import build_model, find_builder, first_convolution, misfit
from neq_cli.training.models.outputs import main_output


def images_shape(section: DataSection, model: nn.Module) -> Shape | None:
    """Return [channels, height, width] of what ``model`` will see; None where only the data tells.

    Data of the user's own whose size the recipe gives has as many channels as the model's first convolution.
    """
    known = sample_shape(section)
    if known is not None or section.image_size is None:
        return known
    first = first_convolution(model)
    return (first.in_channels if first is not None else 3, section.image_size, section.image_size)


def count_outputs(section: ModelSection, outline: nn.Module, name: str, shape: Shape, task: str | None = None) -> int:
    """Return how many classes the model tells apart, tried on an image of ``name``; NeqError where it takes none.

    ``outline`` is the model as ``build_on_meta`` returns it.
    """
    given = section.kwargs.get(find_builder(section, task).classes_argument)
    if isinstance(given, int):
        return given
    try:
        return _count(outline, shape)
    except Exception:  # it may only be that the meta device has no numbers to read
        model = build_model(section, task=task)
    try:
        return _count(model, shape)
    except Exception as error:
        raise misfit(model, name, shape, error) from error


def _count(model: nn.Module, shape: Shape) -> int:
    device = next(model.parameters()).device
    with torch.no_grad():
        return int(main_output(model.eval()(torch.zeros(1, *shape, device=device))).shape[1])
