"""What a recipe comes to before it is trained: its model, its data where that is here, its neurons and its length."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from neq_cli.errors import NeqError, RecipeValueError
from neq_cli.freezing.coverage import coverage_of
from neq_cli.recipe import BaselinePolicy, Recipe
from neq_cli.training.batches.loaders import check_sizes
from neq_cli.training.data.catalogue import called, class_count, sample_shape
from neq_cli.training.data.parts import Data, load_data
from neq_cli.training.data.sources import MAY_FETCH
from neq_cli.training.estimate import look, outline
from neq_cli.training.policies import describe_policy


@dataclass(frozen=True)
class Summary:
    """A recipe in short; None for what only data tells that is not here. ``not_opened`` says why it is not."""

    model: str
    data: str
    policy: str
    not_opened: str | None = None
    parameters: int | None = None
    layers: int | None = None
    neurons: int | None = None
    of_neurons: float | None = None  # share of the parameters
    may_freeze: float | None = None  # share of the parameters, under the recipe's policy
    steps: int | None = None  # batches of an epoch, of one process

    def to_dict(self) -> dict[str, Any]:
        """Return it in plain values."""
        return asdict(self)


def summarise(recipe: Recipe) -> Summary:
    """Open the data where it lies here, nothing downloaded, and look at the model without its weights.

    Data that cannot be opened is told, not refused: a recipe may be checked on another machine than its data is on.
    RecipeError or NeqError, one line, where model and data are known not to fit together.
    """
    data, not_opened = _opened(recipe)
    if data is not None:
        check_sizes(data, recipe.batch_size, 1)
    told: dict[str, Any] = {
        "model": recipe.model.name or recipe.model.entrypoint or "",
        "data": _known(recipe) if data is None else data.description,
        "policy": describe_policy(recipe.policy),
        "not_opened": not_opened,
        "steps": None if data is None else len(data.train) // recipe.batch_size,
    }
    try:
        model, sample = outline(recipe, data)
    except RecipeValueError as error:
        if data is None and error.key.split(".")[0] == "data":  # only the data tells what the model will see
            return Summary(**told)
        raise
    anatomy = look(recipe, model, sample)
    coverage = coverage_of(anatomy, dict(model.named_parameters()))
    never = sum(part.parameters for part in coverage.never_frozen)
    freezing = 0 if isinstance(recipe.policy, BaselinePolicy) else coverage.parameters_of_neurons - never
    layers = anatomy.neurons.layers
    return Summary(
        **told,
        parameters=coverage.parameters,
        layers=len(layers),
        neurons=sum(layer.neurons for layer in layers.values()),
        of_neurons=coverage.parameters_of_neurons / max(coverage.parameters, 1),
        may_freeze=freezing / max(coverage.parameters, 1),
    )


def _opened(recipe: Recipe) -> tuple[Data | None, str | None]:
    section = recipe.data.model_copy(update={"download": False})
    try:
        return load_data(section, recipe.seed, own_task=recipe.task_is_own), None
    except RecipeValueError as error:
        fetched = recipe.data.download and (MAY_FETCH in error.reason or error.key == "data.download")
        return None, "not here; training fetches it first" if fetched else error.reason
    except NeqError as error:
        return None, str(error)


def _known(recipe: Recipe) -> str:
    """Say what is known of data that is not opened: "CIFAR10: images of 3x32x32, 10 classes"."""
    section = recipe.data
    name = called(section.name) if section.name is not None else str(section.entrypoint)
    shape, classes = sample_shape(section), class_count(section)
    told = [] if shape is None else [f"images of {'x'.join(map(str, shape))}"]
    told += [] if classes is None else [f"{classes} classes"]
    return f"{name}: {', '.join(told)}" if told else name
