"""The network a recipe names, with random weights: torchvision's, CIFAR ResNets, any Python callable."""

from __future__ import annotations

import inspect
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torchvision
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.weak import WeakTensorKeyDictionary

from neq_cli.errors import NeqError, RecipeValueError, did_you_mean, one_line, place_in_code
from neq_cli.freezing.model.restoring import found_again
from neq_cli.recipe import ModelSection
from neq_cli.recipe.entrypoints import accepted_arguments, check_kwargs, load_entrypoint
from neq_cli.training.loop.tasks import main_output
from neq_cli.training.models import cifar_resnet

if TYPE_CHECKING:
    from neq_cli.training.data.parts import Data

_SUPPLIED = ("weights", "weights_backbone", "progress")
_NOT_FOR_RECIPES = {
    "detection": "detects objects; take it by model.entrypoint, with a task, as the recipe 'detection' does",
    "video": "takes clips, and recipes train on images; in a training loop of your own, Freezer takes it",
    "optical_flow": "takes pairs of images, and recipes train on single ones",
    "quantization": "is made for inference with integers; take the model without 'quantized_'",
}


@dataclass(frozen=True)
class Builder:
    """What makes the network: the callable, what its ``**kwargs`` go to, and the name that messages use."""

    name: str
    make: Callable[..., nn.Module]
    forwards_to: tuple[Callable[..., Any], ...] = ()
    torchvision: bool = False

    @property
    def accepted(self) -> set[str]:
        """Arguments known to be taken; ``**kwargs`` may hide others."""
        return accepted_arguments(self.make, self.forwards_to)[0]


def torchvision_names() -> list[str]:
    """Return the names of torchvision's classification and segmentation models."""
    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names + segmentation_names()


def segmentation_names() -> list[str]:
    """Return the names of torchvision's segmentation models."""
    names: list[str] = torchvision.models.list_models(module=torchvision.models.segmentation)
    return names


def find_builder(section: ModelSection) -> Builder:
    """Return the builder that ``section`` names; RecipeValueError where there is none."""
    if section.entrypoint is not None:
        make = load_entrypoint(section.entrypoint, "model.entrypoint")
        return Builder(section.entrypoint, make)
    name = (section.name or "").lower()
    if name in cifar_resnet.NAMES:
        depth = int(name.removeprefix("resnet"))
        return Builder(name, partial(cifar_resnet.cifar_resnet, depth))
    known = torchvision_names()
    if name not in known:
        if name in torchvision.models.list_models():
            kind = torchvision.models.get_model_builder(name).__module__.split(".")[2]
            raise RecipeValueError("model.name", f"'{name}' {_NOT_FOR_RECIPES[kind]}")
        hint = did_you_mean(name, [*known, *cifar_resnet.NAMES]) or "; `neq recipes` and torchvision list what there is"
        raise RecipeValueError("model.name", f"no torchvision model '{section.name}'{hint}")
    make = torchvision.models.get_model_builder(name)
    # torchvision's builders are `resnet18(*, weights, progress, **kwargs) -> ResNet`: the class has the real arguments.
    behind = inspect.signature(make, eval_str=True).return_annotation
    # Segmentation models' builders keep their **kwargs to themselves.
    forwards = inspect.isclass(behind) and name not in segmentation_names()
    return Builder(name, make, (behind,) if forwards else (), torchvision=True)


def kwargs_problems(section: ModelSection, builder: Builder) -> list[tuple[str, str]]:
    """Return (argument, problem) pairs of ``section.kwargs``."""
    supplied = _SUPPLIED if builder.torchvision else ()
    problems = check_kwargs(
        builder.make,
        section.kwargs,
        supplied=supplied,
        forwards_to=builder.forwards_to,
        closed=builder.torchvision,  # ConvNeXt's and RegNet's **kwargs go nowhere
        name=builder.name,
    )
    # A missing num_classes is the data's to give.
    return [(argument, text) for argument, text in problems if argument != "num_classes" or argument in section.kwargs]


def build_model(section: ModelSection, num_classes: int | None = None) -> nn.Module:
    """Build the network on the CPU with random weights from the global generator, which the caller seeds.

    ``num_classes`` of the data is passed on where ``section.kwargs`` does not give it and the builder takes it.
    Neither ``weights`` nor ``checkpoint`` is opened here: see ``neq_cli.training.models.weights.load_weights``.
    """
    builder = find_builder(section)
    for argument, problem in kwargs_problems(section, builder):
        raise RecipeValueError(f"model.kwargs.{argument}", problem)
    return call_builder(section, builder, _completed(section, builder, num_classes))


def build_on_meta(section: ModelSection, num_classes: int | None = None) -> nn.Module:
    """Build the network as ``build_model`` does, on the meta device: without numbers, nor memory for them."""
    try:
        with parameters_without_numbers():
            model = build_model(section, num_classes)
    except RecipeValueError:  # some read a weight while they are built; and if that is not it, this says so again
        with torch.device("cpu"):
            model = build_model(section, num_classes)
        empty = _Emptied()
        for module in model.modules():
            module._parameters.update({key: empty.of(own) for key, own in module._parameters.items()})
    return model.to("meta")  # the buffers


@contextmanager
def parameters_without_numbers() -> Iterator[None]:
    """Put every parameter that is registered inside on the meta device, and nothing else.

    Other tensors have their numbers, which some builders read: RegNet's widths, rates of stochastic depth.
    """
    empty = _Emptied()

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        return empty.of(parameter)

    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        hook = register_module_parameter_registration_hook(on_meta)
        try:
            yield
        finally:
            hook.remove()


class _Emptied:
    """Parameters on the meta device in place of others; one that is registered twice stays one."""

    def __init__(self) -> None:
        self._known = WeakTensorKeyDictionary()

    def of(self, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or isinstance(parameter, nn.UninitializedParameter):
            return parameter
        if parameter not in self._known:
            self._known[parameter] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        found: nn.Parameter = self._known[parameter]
        return found


def try_builder(section: ModelSection, builder: Builder) -> None:
    """Raise RecipeValueError where the builder, tried without memory for parameters, refuses its arguments."""
    if section.entrypoint is not None:  # what it does is not known
        return
    with parameters_without_numbers():
        call_builder(section, builder, _completed(section, builder, None))


def too_few_classes(given: int, classes: int) -> str:
    """Return what to say of a model with fewer outputs than the data has classes."""
    return f"{given} outputs for data of {classes} classes; leave it out or raise it"


def _completed(section: ModelSection, builder: Builder, num_classes: int | None) -> dict[str, Any]:
    """Return the recipe's arguments with those that follow from the data and the weights."""
    kwargs = dict(section.kwargs)
    given = kwargs.get("num_classes")
    if isinstance(given, int) and num_classes is not None and given < num_classes:
        raise RecipeValueError("model.kwargs.num_classes", too_few_classes(given, num_classes))
    if num_classes is not None and "num_classes" in builder.accepted:
        kwargs.setdefault("num_classes", num_classes)
    if builder.torchvision:
        kwargs["weights"] = None
        if "weights_backbone" in builder.accepted:
            kwargs["weights_backbone"] = None
        if section.weights is not None and "transform_input" in builder.accepted:
            # GoogLeNet's and Inception's published weights expect inputs normalised their own way.
            kwargs.setdefault("transform_input", True)
    return kwargs


def call_builder(section: ModelSection, builder: Builder, kwargs: dict[str, Any]) -> nn.Module:
    """Call the builder; whatever it raises becomes one line at ``model``."""
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
        key = "model.kwargs" if section.kwargs or section.entrypoint is None else "model.entrypoint"
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f" ({frame.filename}:{frame.lineno})" if section.entrypoint else ""
        raise RecipeValueError(key, f"{builder.name} cannot be built: {one_line(error)}{place}") from error
    if not isinstance(model, nn.Module):
        raise RecipeValueError(
            "model.entrypoint", f"'{builder.name}' returned a {type(model).__name__}, not a torch.nn.Module"
        )
    if next(model.parameters(), None) is None:
        raise RecipeValueError("model", f"{builder.name} has no parameters; there is nothing to train")
    return model


def check_fit(model: nn.Module, data: Data, task: str | None = None) -> tuple[str, ...]:
    """Run one probe sample through ``model`` in eval mode, and raise NeqError where data and model do not fit.

    The output must be [1, at least num_classes], and of the image's height and width where the data has masks; or
    smaller, where ``task``, the recipe's, is neq's own segmentation, which scales it up: a note says so. Runs where the
    model is, which is left as it was.
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
        raise NeqError(
            f"model: an image of {data.name}, {shape}, gives an output of shape {list(outputs.shape)}; "
            f"{name} needs {[1, data.num_classes, *size]}"
        )
    if data.num_classes is not None and outputs.shape[1] < data.num_classes:
        raise NeqError(
            f"model: {outputs.shape[1]} outputs for the {data.num_classes} classes of {data.name}; "
            "give the model as many outputs as there are classes"
        )
    if given == size:
        return ()
    sizes = " for masks of ".join("x".join(map(str, sides)) for sides in (given, size))
    return (f"task: the model's outputs are smaller than the masks, and scaled up to them, bilinearly: {sizes}",)


def misfit(model: nn.Module, name: str, shape: Sequence[int], error: Exception) -> NeqError:
    """Return what to say where ``model`` raised ``error`` on an image of ``name``, [channels, height, width]."""
    sizes = "x".join(map(str, shape))
    return NeqError(
        f"model: does not take an image of {name}, {sizes}: {one_line(error)}{_mend(model, shape[0], error)}"
    )


def first_convolution(model: nn.Module) -> nn.Conv2d | None:
    """Return the convolution that meets the images, None where there is none."""
    return next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)


def _mend(model: nn.Module, channels: int, error: Exception) -> str:
    """Say what to change: the first convolution tells whether channels or sizes disagree, if the error may say that."""
    if not isinstance(error, RuntimeError | ValueError | AssertionError | IndexError):
        return f" ({place_in_code(error)})"  # a mistake in the model's own code
    first = first_convolution(model)
    if first is not None and first.in_channels != channels:
        return (
            f"; its first convolution expects {first.in_channels} channels and the data has {channels} "
            "(model.kwargs.in_channels where the model has it)"
        )
    return "; try another data.image_size"
