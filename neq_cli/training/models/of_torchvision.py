"""Torchvision's classification and segmentation models, and the weights it publishes for them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torchvision
from torch import Tensor, nn

from neq_cli.errors import RecipeValueError, did_you_mean, one_line
from neq_cli.recipe import ModelSection
from neq_cli.recipe.entrypoints import accepted_arguments, check_kwargs
from neq_cli.training.errors import of_the_disk
from neq_cli.training.models.builder import Builder

_SUPPLIED = ("weights", "weights_backbone", "progress")
_NOT_FOR_RECIPES = {
    "detection": "detects objects; take it by model.entrypoint, with a task, as the recipe 'detection' does",
    "video": "takes clips, and recipes train on images; in a training loop of your own, Freezer takes it",
    "optical_flow": "takes pairs of images, and recipes train on single ones",
    "quantization": "is made for inference with integers; take the model without 'quantized_'",
}


def torchvision_names() -> list[str]:
    """Return the names of torchvision's classification and segmentation models."""
    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names + segmentation_names()


def segmentation_names() -> list[str]:
    """Return the names of torchvision's segmentation models."""
    names: list[str] = torchvision.models.list_models(module=torchvision.models.segmentation)
    return names


@dataclass(frozen=True)
class TorchvisionBuilder(Builder):
    """A builder of torchvision's, and what its ``**kwargs`` go to."""

    forwards_to: tuple[Callable[..., Any], ...] = ()

    channels_argument: ClassVar[str | None] = None

    @property
    def accepted(self) -> set[str]:
        return accepted_arguments(self.make, self.forwards_to)[0]

    def problems(self, kwargs: Mapping[str, Any]) -> list[tuple[str, str]]:
        return check_kwargs(
            self.make,
            kwargs,
            supplied=_SUPPLIED,
            forwards_to=self.forwards_to,
            closed=True,  # ConvNeXt's and RegNet's **kwargs go nowhere
            name=self.name,
        )

    def completed(self, section: ModelSection, num_classes: int | None) -> dict[str, Any]:
        kwargs = super().completed(section, num_classes)
        kwargs["weights"] = None
        if "weights_backbone" in self.accepted:
            kwargs["weights_backbone"] = None
        if section.weights is not None and "transform_input" in self.accepted:
            # GoogLeNet's and Inception's published weights expect inputs normalised their own way.
            kwargs.setdefault("transform_input", True)
        return kwargs

    def find_weights(self, section: ModelSection) -> Any:
        known = torchvision.models.get_model_weights(self.name)
        name = str(section.weights).removeprefix(f"{known.__name__}.")
        if name not in known.__members__:
            names = ", ".join(known.__members__)
            hint = did_you_mean(name.upper(), known.__members__)
            raise RecipeValueError(
                "model.weights", f"{self.name} has no weights '{section.weights}'{hint or f'; {names}'}"
            )
        return known[name]

    def published(self, section: ModelSection, model: nn.Module) -> Mapping[str, Tensor]:
        return fetched(self.find_weights(section), section, "weights")


def find_torchvision(name: str, others: list[str]) -> TorchvisionBuilder:
    """Return the builder of that name in lower case; RecipeValueError where there is none, nor one of ``others``."""
    lower = name.lower()
    known = torchvision_names()
    if lower not in known:
        if lower in torchvision.models.list_models():
            kind = torchvision.models.get_model_builder(lower).__module__.split(".")[2]
            raise RecipeValueError("model.name", f"'{lower}' {_NOT_FOR_RECIPES[kind]}")
        hint = did_you_mean(lower, [*known, *others]) or "; `neq recipes` and torchvision list what there is"
        raise RecipeValueError("model.name", f"no torchvision model '{name}'{hint}")
    make = torchvision.models.get_model_builder(lower)
    # torchvision's builders are `resnet18(*, weights, progress, **kwargs) -> ResNet`: the class has the real arguments.
    behind = inspect.signature(make, eval_str=True).return_annotation
    # Segmentation models' builders keep their **kwargs to themselves.
    forwards = inspect.isclass(behind) and lower not in segmentation_names()
    return TorchvisionBuilder(lower, make, (behind,) if forwards else ())


def find_backbone_weights(section: ModelSection, builder: Builder) -> Any:
    """Return torchvision's entry that ``section.weights_backbone`` names; RecipeValueError where there is none."""
    default = None
    if isinstance(builder, TorchvisionBuilder):
        default = inspect.signature(builder.make).parameters.get("weights_backbone")
    if default is None:
        raise RecipeValueError("model.weights_backbone", f"{builder.name} has no backbone of its own; remove it")
    known = type(default.default)
    name = str(section.weights_backbone).removeprefix(f"{known.__name__}.")
    if name not in known.__members__:
        hint = did_you_mean(name.upper(), known.__members__) or f"; {', '.join(known.__members__)}"
        raise RecipeValueError(
            "model.weights_backbone", f"{builder.name}'s backbone has no weights '{section.weights_backbone}'{hint}"
        )
    return known[name]


def fetched(entry: Any, section: ModelSection, key: str) -> dict[str, Tensor]:
    """Return the tensors of torchvision's ``entry``, which ``key`` of ``section`` names, downloaded where need be."""
    try:
        loaded: dict[str, Tensor] = entry.get_state_dict(progress=True, check_hash=True)
    except Exception as error:
        cache = Path(torch.hub.get_dir()) / "checkpoints"  # as torch's own download has it
        mend = f"where there is no network, put {entry.url} into '{cache}'"
        if of_the_disk(error):
            mend = "set TORCH_HOME to a folder with room"
        raise RecipeValueError(
            f"model.{key}",
            f"'{getattr(section, key)}' of {section.name} is not in '{cache}', and could not be fetched "
            f"({one_line(error)}); {mend}, or give a file as model.checkpoint",
        ) from error
    return loaded
