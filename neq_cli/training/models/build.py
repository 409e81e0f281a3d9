"""The network a recipe names, with random weights: a library's, CIFAR ResNets, any Python callable; its fit to data."""

from __future__ import annotations

import re
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from neq_cli.errors import NeqError, RecipeValueError, did_you_mean, one_line, place_in_code
from neq_cli.freezing.model.restoring import found_again
from neq_cli.recipe import ModelSection
from neq_cli.recipe.entrypoints import load_entrypoint
from neq_cli.training.blame import blamed
from neq_cli.training.loop.tasks import main_output
from neq_cli.training.models import cifar_resnet
from neq_cli.training.models.builder import Builder
from neq_cli.training.models.meta import parameters_without_numbers, without_numbers
from neq_cli.training.models.of_timm import find_timm
from neq_cli.training.models.of_torchvision import find_torchvision
from neq_cli.training.models.of_transformers import find_transformers

if TYPE_CHECKING:
    from neq_cli.training.data.parts import Data

_OF_IMAGES = ("name", "entrypoint", "kwargs", "image_size", "base_size", "channels", "augment")
FITTED = ("model.name", "model.entrypoint", "model.kwargs", *(f"data.{key}" for key in _OF_IMAGES))
"""The keys that decide whether model and data fit each other."""
_OF_CHANNELS = tuple(f"model.kwargs.{key}" for key in ("in_channels", "in_chans", "num_channels"))
_CHANNELS = ("model.name", "model.entrypoint", *_OF_CHANNELS, "data.name", "data.entrypoint", "data.channels")
LIBRARIES: Mapping[str, Callable[[str, str | None], Builder]] = {
    "timm": lambda name, task: find_timm(name),
    "transformers": find_transformers,
}
"""Whose models are called LIBRARY/NAME: functions of the name, and of the recipe's task where that is known."""


def find_builder(section: ModelSection, task: str | None = None) -> Builder:
    """Return the builder that ``section`` names; RecipeValueError where there is none.

    ``task`` is the recipe's; a builder whose network depends on it cannot build without.
    """
    if section.entrypoint is not None:
        make = load_entrypoint(section.entrypoint, "model.entrypoint")
        return Builder(section.entrypoint, make)
    name = section.name or ""
    if name.lower() in cifar_resnet.NAMES:
        depth = int(name.lower().removeprefix("resnet"))
        return Builder(name.lower(), partial(cifar_resnet.cifar_resnet, depth))
    library, slash, rest = name.partition("/")
    if not slash:
        return find_torchvision(name, list(cifar_resnet.NAMES))
    if library not in LIBRARIES:
        hint = did_you_mean(library, LIBRARIES) or f"; known are {' and '.join(LIBRARIES)}"
        raise RecipeValueError("model.name", f"no library '{library}' of models{hint}")
    return LIBRARIES[library](rest, task)


def kwargs_problems(section: ModelSection, builder: Builder) -> list[tuple[str, str]]:
    """Return (argument, problem) pairs of ``section.kwargs``."""
    problems = builder.problems(section.kwargs)
    # A missing number of classes is the data's to give.
    count = builder.classes_argument
    return [(argument, text) for argument, text in problems if argument != count or argument in section.kwargs]


def build_model(section: ModelSection, num_classes: int | None = None, task: str | None = None) -> nn.Module:
    """Build the network on the CPU with random weights from the global generator, which the caller seeds.

    ``num_classes`` of the data is passed on where ``section.kwargs`` does not give it and the builder takes it;
    ``task`` is the recipe's. Neither ``weights`` nor ``checkpoint`` is opened here: see ``weights.load_weights``.
    """
    builder = find_builder(section, task)
    for argument, problem in kwargs_problems(section, builder):
        raise RecipeValueError(f"model.kwargs.{argument}", problem)
    return call_builder(section, builder, _completed(section, builder, num_classes))


def build_on_meta(section: ModelSection, num_classes: int | None = None, task: str | None = None) -> nn.Module:
    """Build the network as ``build_model`` does, on the meta device: without numbers, nor memory for them."""
    try:
        with parameters_without_numbers():
            model = build_model(section, num_classes, task)
    except RecipeValueError:  # some read a weight while they are built; and if that is not it, this says so again
        with torch.device("cpu"):
            model = build_model(section, num_classes, task)
    return without_numbers(model)


def try_builder(section: ModelSection, builder: Builder) -> None:
    """Raise RecipeValueError where the builder, tried without memory for parameters, refuses its arguments."""
    if section.entrypoint is not None:  # what it does is not known
        return
    kwargs = _completed(section, builder, None)
    try:
        with parameters_without_numbers():
            call_builder(section, builder, kwargs, blame=False)
    except RecipeValueError:  # some read a weight while they are built; and if that is not it, this says so again
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            call_builder(section, builder, kwargs)


def too_few_classes(given: int, classes: int) -> str:
    """Return what to say of a model with fewer outputs than the data has classes."""
    return f"{given} outputs for data of {classes} classes; leave it out or raise it"


def _completed(section: ModelSection, builder: Builder, num_classes: int | None) -> dict[str, Any]:
    given = section.kwargs.get(builder.classes_argument)
    if isinstance(given, int) and num_classes is not None and given < num_classes:
        raise RecipeValueError(f"model.kwargs.{builder.classes_argument}", too_few_classes(given, num_classes))
    return builder.completed(section, num_classes)


def call_builder(section: ModelSection, builder: Builder, kwargs: dict[str, Any], *, blame: bool = True) -> nn.Module:
    """Call the builder; whatever it raises becomes one line, which under ``blame`` names the argument that is wrong."""
    try:
        with warnings.catch_warnings():
            # GoogLeNet and Inception announce a change of their default initialisation.
            warnings.simplefilter("ignore", FutureWarning)
            model = builder.make(**kwargs)
    except NeqError:
        raise
    except (Exception, SystemExit) as error:
        twice = re.search(r"multiple values for (?:keyword )?argument '(\w+)'", str(error))
        if twice and section.entrypoint is None:
            raise RecipeValueError(f"model.kwargs.{twice[1]}", f"{builder.name} sets it itself; remove it") from error
        reason = f"{builder.name} cannot be built: {one_line(error)}"
        if section.entrypoint is not None:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            key = "model.kwargs" if section.kwargs else "model.entrypoint"
            raise RecipeValueError(key, f"{reason} ({frame.filename}:{frame.lineno})") from error
        key = blamed("model.kwargs", section.kwargs if blame else (), partial(_fails_without, builder, kwargs))
        raise RecipeValueError(key, reason) from error
    if not isinstance(model, nn.Module):
        raise RecipeValueError(
            "model.entrypoint", f"'{builder.name}' returned a {type(model).__name__}, not a torch.nn.Module"
        )
    if next(model.parameters(), None) is None:
        raise RecipeValueError("model", f"{builder.name} has no parameters; there is nothing to train")
    return model


def _fails_without(builder: Builder, kwargs: Mapping[str, Any], argument: str) -> bool:
    try:
        with warnings.catch_warnings(), parameters_without_numbers():
            warnings.simplefilter("ignore")
            builder.make(**{name: value for name, value in kwargs.items() if name != argument})
    except (Exception, SystemExit):
        return True
    return False


def check_fit(
    model: nn.Module, data: Data, task: str | None = None, classes_argument: str | None = None
) -> tuple[str, ...]:
    """Run one probe sample through ``model`` in eval mode; RecipeValueError where data and model do not fit.

    The output must be [1, at least num_classes], and of the image's height and width where the data has masks; or
    smaller, where ``task``, the recipe's, is neq's own segmentation, which scales it up: a note says so. Another says
    where a task of neq's own has more outputs than classes, and by which ``classes_argument`` of the model's it would
    not. Runs where the model is, which is left as it was.
    """
    image = data.probe[0][0]
    shape = "x".join(str(size) for size in image.shape)
    parameter = next(model.parameters(), torch.empty(0))
    try:
        with found_again(model), torch.no_grad():
            model.eval()
            outputs = main_output(model(image.unsqueeze(0).to(parameter.device)))
    except Exception as error:
        raise misfit(model, data.name, image.shape, error) from error
    name, size = ("segmentation", list(image.shape[1:])) if data.masked else ("classification", [])
    given = list(outputs.shape[2:])
    scaled = task == "segmentation" and len(given) == 2 and all(0 < a <= b for a, b in zip(given, size, strict=True))
    if outputs.ndim != 2 + len(size) or outputs.shape[0] != 1 or (given != size and not scaled):
        raise RecipeValueError(
            "model",
            f"an image of {data.name}, {shape}, gives an output of shape {list(outputs.shape)}; "
            f"{name} needs {[1, data.num_classes, *size]}",
            FITTED,
        )
    if data.num_classes is not None and outputs.shape[1] < data.num_classes:
        raise RecipeValueError(
            "model",
            f"{outputs.shape[1]} outputs for the {data.num_classes} classes of {data.name}; "
            "give the model as many outputs as there are classes",
            FITTED,
        )
    notes = []
    own_task = task is not None and ":" in task
    if data.num_classes is not None and outputs.shape[1] > data.num_classes and not own_task:
        what = f"{outputs.shape[1]} outputs for the {data.num_classes} classes of {data.name}"
        mend = f"model.kwargs.{classes_argument}={data.num_classes} leaves them out"
        mend = "give the model one for each class" if classes_argument is None else mend
        notes.append(f"model: {what}: the others are never right, and count in the loss until that is learnt; {mend}")
    if given != size:
        what = "the model's outputs are smaller than the masks, and scaled up to them, bilinearly"
        sizes = " for masks of ".join("x".join(map(str, sides)) for sides in (given, size))
        notes.append(f"task: {what}: {sizes}")
    return tuple(notes)


def misfit(model: nn.Module, name: str, shape: Sequence[int], error: Exception) -> RecipeValueError:
    """Return what to say where ``model`` raised ``error`` on an image of ``name``, [channels, height, width]."""
    sizes = "x".join(map(str, shape))
    said = f"does not take an image of {name}, {sizes}: {one_line(error).rstrip('.')}"
    mend = _mend(model, shape[0], error)
    return RecipeValueError("model", f"{said}{mend}", _CHANNELS if "channels" in mend else FITTED)


def first_convolution(model: nn.Module) -> nn.Conv2d | None:
    """Return the convolution that meets the images, None where there is none."""
    return next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)


def channels_of(model: nn.Module) -> int:
    """Return how many channels its images have, for all that the model tells: 3 where no convolution meets them."""
    first = first_convolution(model)
    return 3 if first is None else first.in_channels


def _mend(model: nn.Module, channels: int, error: Exception) -> str:
    """Say what to change: the first convolution tells whether channels or sizes disagree, if the error may say that."""
    if not isinstance(error, RuntimeError | ValueError | AssertionError | IndexError):
        return f" ({place_in_code(error)})"  # a mistake in the model's own code
    first = first_convolution(model)
    if first is not None and first.in_channels != channels:
        or_data = f", or data.channels={first.in_channels}" if first.in_channels in (1, 3) else ""
        return (
            f"; its first convolution expects {first.in_channels} channels and the data has {channels} "
            f"(model.kwargs.in_channels, in_chans or num_channels, whichever the model has{or_data})"
        )
    return "; try another data.image_size, or model.kwargs.img_size or image_size where the model has one"
