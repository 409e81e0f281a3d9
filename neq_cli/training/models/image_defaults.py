"""What a recipe leaves out of its images, from the model it names: their channels, size, mean and std."""

from __future__ import annotations

from typing import Any

from neq_cli.errors import RecipeValueError
from neq_cli.recipe import DataSection, Recipe
from neq_cli.training.data.catalogue import sample_shape
from neq_cli.training.models.build import find_builder
from neq_cli.training.models.builder import Builder, ImageDefaults

_AGREEING = ("data.channels", "model.kwargs.in_channels", "model.kwargs.in_chans", "model.kwargs.num_channels")


def with_image_defaults(recipe: Recipe) -> tuple[Recipe, tuple[str, ...]]:
    """Return the recipe with what the model's own configuration says of images, and a note of what was taken from it.

    What the recipe says itself stays. Data of the user's own (``data.entrypoint``) may come prepared: left alone.
    Of channels nothing is noted: whoever opens the data can say whether images are changed for it. Raises
    RecipeValueError where the model is not there, or takes other channels than the recipe gives.
    """
    data = recipe.data
    if data.entrypoint is not None or recipe.model.entrypoint is not None:
        return recipe, ()
    builder = find_builder(recipe.model, recipe.task)
    defaults = builder.image_defaults(recipe.model)
    data = data.model_copy(update=_channels(data, builder, defaults))
    recipe = recipe.model_copy(update={"data": data})
    taken = {**_size(data, defaults), **_statistics(data, defaults)}
    if not taken:
        return recipe, ()
    said = ", ".join(f"{key} {_shown(value)}" for key, value in taken.items())
    note = f"data: {said}, which {recipe.model.name} is configured for; the recipe may give others"
    return recipe.model_copy(update={"data": data.model_copy(update=taken)}), (note,)


def _channels(data: DataSection, builder: Builder, defaults: ImageDefaults) -> dict[str, Any]:
    taken = defaults.channels
    if taken is None or data.channels == taken:
        return {}
    if data.channels == "auto":
        return {"channels": taken} if taken in (1, 3) else {}
    argument = builder.channels_argument
    mend = "and no other number; timm/NAME with model.kwargs.in_chans takes any"
    mend = mend if argument is None else f"by model.kwargs.{argument}; give both the same"
    raise RecipeValueError("data.channels", f"{data.channels}, but {builder.name} takes {taken}, {mend}", _AGREEING)


def _size(data: DataSection, defaults: ImageDefaults) -> dict[str, Any]:
    size, shape = defaults.size, sample_shape(data)
    if size is None or data.image_size is not None or "image_size" in data.kwargs:  # FakeData's
        return {}
    is_so = shape is not None and shape[1:] == (size, size)
    cannot_be_cut = data.base_size is not None and data.base_size < size
    return {} if is_so or cannot_be_cut else {"image_size": size}


def _statistics(data: DataSection, defaults: ImageDefaults) -> dict[str, Any]:
    shape, mean, std = sample_shape(data), defaults.mean, defaults.std
    if mean is None or std is None or data.mean is not None or data.std is not None:
        return {}
    channels = 3 if shape is None else shape[0]
    return {"mean": list(mean), "std": list(std)} if len(mean) == len(std) == channels else {}


def _shown(value: int | list[float]) -> str:
    return str(value) if isinstance(value, int) else f"[{', '.join(f'{one:g}' for one in value)}]"
