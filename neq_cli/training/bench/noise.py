"""What the bench takes its batch from: noise in the shape that recipe and model give, or data where only it tells."""

from __future__ import annotations

import torch

from neq_cli.recipe import Recipe
from neq_cli.training.data.catalogue import Shape, called, class_count, has_masks
from neq_cli.training.data.images import ImagesInMemory
from neq_cli.training.data.parts import Data, load_data
from neq_cli.training.data.transforms import Preparation
from neq_cli.training.models.build import build_on_meta
from neq_cli.training.models.outline import count_outputs, images_shape


def find_data(recipe: Recipe) -> tuple[Data, bool]:
    """Return what the batch is taken from, and whether it is noise in the shape of the recipe's data.

    Noise, so that no data is needed, wherever the recipe's keys give the shape. The classes are then the data's where
    they are known without opening it, else the model's outputs. Raises NeqError where the model does not take such an
    image, or the data has to be opened and cannot be.
    """
    classes = class_count(recipe.data)
    model = build_on_meta(recipe.model, classes, recipe.task)
    shape = images_shape(recipe.data, model)
    if shape is None:
        return load_data(recipe.data, recipe.seed, own_task=recipe.task_is_own), False
    name = recipe.data.entrypoint or called(recipe.data.name or "")
    if classes is None:
        classes = count_outputs(recipe.model, model, name, shape, recipe.task)
    return _noise(recipe, name, shape, classes), True


def _noise(recipe: Recipe, name: str, shape: Shape, classes: int) -> Data:
    """Return one batch of images whose pixels are random and normalised, with random labels or masks."""
    generator = torch.Generator().manual_seed(recipe.seed)
    images = torch.randint(0, 256, (recipe.batch_size, *shape), dtype=torch.uint8, generator=generator)
    known = has_masks(recipe.data)
    masked = recipe.task == "segmentation" if known is None else known
    labels = torch.randint(classes, (recipe.batch_size, *(shape[1:] if masked else ())), generator=generator)
    # Mean and deviation of uniform noise.
    preparation = Preparation(mean=(0.5,) * shape[0], std=(12**-0.5,) * shape[0])
    part = ImagesInMemory(images, labels, torch.arange(recipe.batch_size), preparation, augmented=False)
    return Data(name, part, part, part, classes, (), shape, images[0].nbytes, own=False, masked=masked)
