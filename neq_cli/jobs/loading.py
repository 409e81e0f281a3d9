"""Gets the model of a run back, or of a file of weights: a network in eval mode that knows its images and classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

import torch
from torch import nn

from neq_cli.complaints import complain
from neq_cli.errors import NeqError, did_you_mean
from neq_cli.jobs.prepare import located
from neq_cli.jobs.trained import Trained, WhichWeights, find_trained, known_images
from neq_cli.training.data.catalogue import sample_shape
from neq_cli.training.data.picture import Transform, transform_of
from neq_cli.training.evaluation import on_device, trained_model
from neq_cli.training.machine.device import resolve_device
from neq_cli.training.models.build import channels_of

if TYPE_CHECKING:
    from neq_cli.runs.store.content import Content

UNTRACKED = "track=[]"
"""The change of a recipe by which its trackers need not be installed where nothing is trained."""


def load(
    path: str | Path,
    *,
    weights: WhichWeights | None = None,
    recipe: str | None = None,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Return the trained model of a run directory, or of a file of weights, in eval mode on ``device``.

    The file is one that `neq train` or `neq export` wrote, .safetensors or .pt; ``recipe`` is for one that does not
    tell what it was trained by. ``weights``: "best", "last" or "final" (None: the best, the final ones where there are
    none, else the last). Parameters are as they were trained (float32, also of a bf16 run: ``torch.autocast`` is for
    its precision), averaged where the recipe has ``ema``, in the run's memory format. The Python that a run's recipe
    names is imported, as by `neq train`; what a file of weights says alone has none imported.

    The module is the network itself, whose state dict and children are its own, with two attributes more:

    - ``model.transform(image)`` returns what the model sees of an image, float32 [channels, height, width] on the CPU,
      prepared as the run's test images were: of a PIL image, the path of one, or an array or tensor. It needs no data,
      and pickles. Where the data comes prepared by code of its own it raises NeqError when it is called, and says so.
    - ``model.classes`` are the names of the classes by their numbers, or the numbers where they have no names; () where
      the data has no classes, or an earlier version did not tell them.

    A model that has something of its own by these names keeps it, and gets ``neq_transform`` or ``neq_classes``, which
    a line on stderr says. Random states are left as they were. Raises NeqError, one line, for what is wrong.
    """
    if weights is not None and weights not in get_args(WhichWeights):
        known = get_args(WhichWeights)
        raise NeqError(f"weights: '{weights}' is none of {', '.join(known)}{did_you_mean(str(weights), known)}")
    trained = find_trained(Path(path).expanduser(), weights, recipe, [f"device={device}", UNTRACKED])
    model = rebuilt(trained)
    _give(model, "transform", _transform(trained, model))
    _give(model, "classes", _classes(trained.content))
    return on_device(trained.loaded.recipe, model, resolve_device(trained.loaded.recipe.device))


def rebuilt(trained: Trained) -> nn.Module:
    """Return the model with its weights, on the CPU and in eval mode; no generator of random numbers has moved."""
    # The weights that it starts with are drawn, and replaced.
    with located(trained.loaded), torch.random.fork_rng(devices=[]):
        return trained_model(trained.loaded.recipe, trained.weights.tensors, trained.content.classes, trained.place)


@dataclass(frozen=True)
class Untold:
    """Stands where a transform would, and says why there is none."""

    why: str

    def __call__(self, image: Any) -> NoReturn:
        raise NeqError(f"model.transform: {self.why}")


def _transform(trained: Trained, model: nn.Module) -> Transform | Untold:
    recipe, content = trained.loaded.recipe, trained.content
    try:
        shape = content.image_shape or sample_shape(recipe.data)
        channels = channels_of(model) if shape is None else shape[0]
        return transform_of(recipe, known_images(content), channels, shape)
    except NeqError as error:
        return Untold(str(error))


def _classes(content: Content) -> tuple[str, ...]:
    return content.class_names or tuple(map(str, range(content.classes or 0)))


def _give(model: nn.Module, name: str, value: object) -> None:
    """Set an attribute where the model has none of that name: its own would be called by its forward pass."""
    if hasattr(model, name):
        complain(f"note: the model has its own '{name}'; what neq knows is its 'neq_{name}'")
        name = f"neq_{name}"
    # No submodule or parameter: the model's own, and its state dict, stay what they are.
    object.__setattr__(model, name, value)
