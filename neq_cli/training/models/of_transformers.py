"""transformers' models as transformers/TYPE, /CLASS or a checkpoint on this machine; no code of a checkpoint is run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from neq_cli.errors import RecipeValueError, did_you_mean
from neq_cli.recipe import ModelSection
from neq_cli.recipe.entrypoints import accepted_arguments
from neq_cli.text import some_of
from neq_cli.training.models.builder import Builder, ImageDefaults, side_of
from neq_cli.training.models.configurations import (
    class_of,
    configured,
    image_statistics,
    place_of,
    quietly,
    unreadable,
)
from neq_cli.training.models.libraries import imported

_HEADS = {"classification": "AutoModelForImageClassification", "segmentation": "AutoModelForSemanticSegmentation"}
"""By task, the class that knows the network of a configuration."""
_NOT_FOR_KWARGS = {
    **dict.fromkeys(("dtype", "torch_dtype"), "is not for a recipe's kwargs; say precision"),
    **dict.fromkeys(("architectures", "transformers_version"), "says nothing to the network; remove it"),
}
_OF_CONFIGURATIONS = ("num_labels", "attn_implementation")
"""What every configuration takes without naming it."""


@dataclass(frozen=True)
class TransformersBuilder(Builder):
    """A network of one configuration class; ``make`` takes the configuration's values.

    ``checkpoint`` is the folder, or the name in the Hugging Face cache, that the values start from and the weights lie
    in.
    """

    configuration_class: type
    by_task: bool  # whether the task decides what comes last
    labelled: bool  # whether it tells classes apart
    checkpoint: str | None = None

    classes_argument: ClassVar[str] = "num_labels"
    channels_argument: ClassVar[str | None] = "num_channels"

    @property
    def needs_task(self) -> bool:
        return self.by_task

    @property
    def accepted(self) -> set[str]:
        kind: Any = self.configuration_class
        names = {*_OF_CONFIGURATIONS, *getattr(kind, "attribute_map", {})}
        for part in kind.__mro__[:-1]:
            names |= accepted_arguments(part.__init__)[0]
        with suppress(Exception):  # those made of other configurations want to be given them
            names |= set(vars(kind()))
        # Some, such as out_features, are kept under another name and set through a property.
        names |= {name for name, part in inspect.getmembers(kind) if isinstance(part, property) and part.fset}
        names = {name for name in names if not name.startswith("_")}
        return names - {"self", *_NOT_FOR_KWARGS}

    def problems(self, kwargs: Mapping[str, Any]) -> list[tuple[str, str]]:
        # transformers keeps whatever it is given, and says nothing of it.
        known = self.accepted
        found = []
        for argument in kwargs:
            if argument in _NOT_FOR_KWARGS:
                found.append((argument, _NOT_FOR_KWARGS[argument]))
            elif argument not in known:
                hint = did_you_mean(argument, known)
                takes = f"which takes those of {self.configuration_class.__name__}"
                found.append((argument, f"unknown argument '{argument}' of {self.name}, {takes}{hint}"))
        return found

    def completed(self, section: ModelSection, num_classes: int | None) -> dict[str, Any]:
        named = "id2label" in section.kwargs or not self.labelled  # names of classes tell how many there are
        return super().completed(section, None if named else num_classes)

    def find_weights(self, section: ModelSection) -> Any:
        if self.checkpoint is None:
            raise RecipeValueError(
                "model.weights",
                f"{self.name} names no weights; name a checkpoint, such as transformers/google/vit-base-patch16-224, "
                "or give a file as model.checkpoint",
            )
        if section.weights != "DEFAULT":
            raise RecipeValueError("model.weights", f"'{section.weights}' of {self.name} is not known; say DEFAULT")
        return self.checkpoint

    def published(self, section: ModelSection, model: nn.Module) -> Mapping[str, Tensor]:
        checkpoint = self.find_weights(section)
        # A network beside ours: transformers fits tensors to names as it reads them.
        try:
            with quietly(self.name), torch.random.fork_rng(devices=[]):
                loaded, report = type(model).from_pretrained(  # type: ignore[attr-defined]
                    checkpoint,
                    config=model.config,
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                    local_files_only=True,
                    trust_remote_code=False,
                )
        except Exception as error:
            raise RecipeValueError("model.weights", unreadable(self.name, checkpoint, "weights", error)) from error
        # transformers 5 has (name, shape there, shape here) in place of the name of what differs.
        fresh = {
            *report["missing_keys"],
            *(key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]),
        }
        return {name: tensor for name, tensor in loaded.state_dict().items() if name not in fresh}

    def image_defaults(self, section: ModelSection) -> ImageDefaults:
        with quietly(self.name):
            configuration = configured(self.configuration_class, self.checkpoint, self.name, section.kwargs)
        seeing = getattr(configuration, "vision_config", configuration)  # CLIP reads, too
        mean, std = image_statistics(self.checkpoint, self.name)
        channels = getattr(seeing, "num_channels", None)
        return ImageDefaults(
            side_of(getattr(seeing, "image_size", None)), mean, std, channels if isinstance(channels, int) else None
        )


def find_transformers(name: str, task: str | None = None) -> TransformersBuilder:
    """Return the builder of a model type, a class, or a checkpoint; RecipeValueError where there is none.

    A type or checkpoint gets the head of ``task``; where that is None, its network cannot be built yet.
    """
    full = f"transformers/{name}"
    transformers = imported("transformers", full)
    if "/" in name or name.startswith(("~", ".")):
        checkpoint = place_of(name)
        return _headed(transformers, full, class_of(checkpoint, full), task, checkpoint)
    if name in transformers.CONFIG_MAPPING:
        return _headed(transformers, full, transformers.CONFIG_MAPPING[name], task)
    kind: Any = getattr(transformers, name, None) if name.isidentifier() else None
    if _is_network(kind):
        labelled = name.endswith(("Classification", "Segmentation"))
        make = _maker(full, kind.config_class, kind._from_config)
        return TransformersBuilder(full, make, kind.config_class, by_task=False, labelled=labelled)
    known = sorted({*_types(transformers, "classification"), *_types(transformers, "segmentation")})
    hint = did_you_mean(name, [*known, *transformers.CONFIG_MAPPING]) or (
        "; it is a type such as vit, a class such as ViTForImageClassification, a folder (./NAME), or what "
        "`hf download OWNER/NAME` has fetched"
    )
    raise RecipeValueError("model.name", f"transformers has no model '{name}'{hint}")


def _is_network(kind: Any) -> bool:
    return inspect.isclass(kind) and issubclass(kind, nn.Module) and getattr(kind, "config_class", None) is not None


def _headed(
    transformers: Any, name: str, kind: type, task: str | None, checkpoint: str | None = None
) -> TransformersBuilder:
    """Return the builder of a configuration class with the head of ``task``."""
    configuration_class: Any = kind
    if task is not None:
        if task not in _HEADS:
            raise RecipeValueError(
                "model.name",
                f"'{name}' leaves what comes last to the task, and '{task}' is none that neq knows; name a class, such "
                "as transformers/ViTForImageClassification",
            )
        known = _types(transformers, task)
        if configuration_class.model_type not in known:
            raise RecipeValueError(
                "model.name",
                f"transformers has no {task} model of type '{configuration_class.model_type}'; "
                f"it has {some_of(known, 12)}",
            )
    head = getattr(transformers, _HEADS.get(task or "", _HEADS["classification"]))
    make = _maker(name, configuration_class, head.from_config, checkpoint)
    return TransformersBuilder(name, make, configuration_class, by_task=True, labelled=True, checkpoint=checkpoint)


def _types(transformers: Any, task: str) -> list[str]:
    """Return the model types that have a head for ``task``."""
    head = getattr(transformers, _HEADS[task])
    return sorted({configuration.model_type for configuration in head._model_mapping})


def _maker(
    name: str, configuration_class: type, build: Callable[..., nn.Module], checkpoint: str | None = None
) -> Callable[..., nn.Module]:
    """Return what makes a network of a configuration's values, in float32 whatever the checkpoint's are stored in."""

    def make(**values: Any) -> nn.Module:
        with quietly(name):
            return build(configured(configuration_class, checkpoint, name, values), dtype=torch.float32)

    return make
