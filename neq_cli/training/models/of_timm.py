"""timm's models as timm/NAME or timm/NAME.TAG, their weights and the images they are made for; timm is optional."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from neq_cli.errors import RecipeValueError, did_you_mean, one_line
from neq_cli.recipe import ModelSection
from neq_cli.recipe.entrypoints import accepted_arguments
from neq_cli.training.models.builder import Builder, ImageDefaults, side_of
from neq_cli.training.models.libraries import imported
from neq_cli.training.models.meta import parameters_without_numbers
from neq_cli.training.models.state_files import read_state

_WEIGHTS = (
    "is not for a recipe's kwargs; say model.weights=DEFAULT for timm's weights, or give a file as model.checkpoint"
)
_NOT_FOR_KWARGS = {
    "pretrained": _WEIGHTS,
    "pretrained_cfg": _WEIGHTS,
    "pretrained_cfg_overlay": _WEIGHTS,
    "checkpoint_path": _WEIGHTS,
    "cache_dir": "is not for a recipe's kwargs; set HF_HUB_CACHE",
    "features_only": "returns features, which are no classes; remove it",
}
_FILES = ("model.safetensors", "pytorch_model.bin")
"""What timm's repositories on the Hugging Face hub call weights; the first is the rule."""


@dataclass(frozen=True)
class TimmBuilder(Builder):
    """``timm.create_model`` of one architecture; ``tag`` says whose weights' configuration holds, "" timm's first."""

    architecture: str
    tag: str

    channels_argument: ClassVar[str | None] = "in_chans"

    @property
    def accepted(self) -> set[str]:
        return set(_arguments(self.architecture)[0])

    def problems(self, kwargs: Mapping[str, Any]) -> list[tuple[str, str]]:
        known, others = _arguments(self.architecture)
        found = []
        for argument, value in kwargs.items():
            if argument in _NOT_FOR_KWARGS:
                if (argument, value) != ("pretrained", False):
                    found.append((argument, _NOT_FOR_KWARGS[argument]))
            # Some take arguments that no signature names, such as bn_eps: those are tried.
            elif argument not in known and (others or self._refuses(argument, value)):
                hint = did_you_mean(argument, known)
                found.append((argument, f"unknown argument '{argument}' of {self.name}{hint}"))
        return found

    def _refuses(self, argument: str, value: Any) -> bool:
        try:
            with parameters_without_numbers():
                self.make(**{argument: 0 if value is None else value})  # timm leaves out what is None
        except TypeError as error:
            return re.search(rf"unexpected keyword argument '{re.escape(argument)}'", str(error)) is not None
        except Exception:  # the value, of which the builder says more with the other arguments
            return False
        return False

    def completed(self, section: ModelSection, num_classes: int | None) -> dict[str, Any]:
        kwargs = super().completed(section, num_classes)
        kwargs.pop("pretrained", None)  # False, as problems has made sure
        found = self.configuration(section)
        if found is not None and found.tag:
            kwargs["pretrained_cfg"] = found.tag  # which may ask for images of another size than timm's first
        return kwargs

    def configuration(self, section: ModelSection) -> Any:
        """Return timm's configuration of the weights that the recipe names, or would name by DEFAULT.

        RecipeValueError where there are no weights of the tag; None where timm has none for the architecture at all.
        """
        tag = self.tag
        if section.weights not in (None, "DEFAULT"):
            tag = str(section.weights).removeprefix(f"{self.architecture}.")
            if self.tag not in ("", tag):
                raise RecipeValueError(
                    "model.weights",
                    f"'{tag}', but the name says '{self.tag}'; say DEFAULT, or leave it out of the name",
                )
        timm = imported("timm", self.name)
        name = f"{self.architecture}.{tag}" if tag else self.architecture
        return timm.get_pretrained_cfg(name) if _has_configuration(timm, self.architecture, tag) else None

    def find_weights(self, section: ModelSection) -> Any:
        found = self.configuration(section)
        tags = _tags(imported("timm", self.name), self.architecture)
        if not tags:
            raise RecipeValueError(
                "model.weights", f"timm has no weights of {self.architecture}; give a file as model.checkpoint, or null"
            )
        if found is None:
            hint = did_you_mean(str(section.weights), tags) or f"; {', '.join(['DEFAULT', *tags])}"
            raise RecipeValueError("model.weights", f"{self.name} has no weights '{section.weights}'{hint}")
        if not found.hf_hub_id:
            raise RecipeValueError(
                "model.weights",
                f"'{section.weights}' of {self.name} is not on the Hugging Face hub, but at "
                f"{found.url or 'no address'}; give a file as model.checkpoint",
            )
        return found

    def published(self, section: ModelSection, model: nn.Module) -> Mapping[str, Tensor]:
        found = self.find_weights(section)
        state = dict(read_state(self._file(section, found.hf_hub_id, found.hf_hub_filename), "model.weights"))
        kwargs = {**self.completed(section, None), "num_classes": getattr(model, "num_classes", None)}
        # A network beside ours, since what fits tensors to other sizes, channels and classes is known to timm's
        # builders alone. What it has no tensors for is random there as here.
        try:
            with torch.random.fork_rng(devices=[]), _missing_names(type(model)) as missing:
                loaded = self.make(pretrained=True, pretrained_cfg_overlay={"state_dict": state}, **kwargs)
        except Exception as error:
            raise RecipeValueError(
                "model.weights", f"'{section.weights}' does not fit {self.name} ({one_line(error)}); remove it"
            ) from error
        return {name: tensor for name, tensor in loaded.state_dict().items() if name not in missing}

    def _file(self, section: ModelSection, repository: str, name: str | None) -> Path:
        """Return the file of weights in the Hugging Face cache, downloaded where it is not there."""
        hub = imported("huggingface_hub", self.name)
        errors = imported("huggingface_hub.errors", self.name)
        names = (name,) if name else _FILES
        for known in names:
            cached = hub.try_to_load_from_cache(repository, known)
            if isinstance(cached, str):
                return Path(cached)
        for known in names:
            try:
                with _quietly("huggingface_hub"):
                    return Path(hub.hf_hub_download(repository, known))
            except Exception as error:
                absent = isinstance(error, errors.EntryNotFoundError) and not isinstance(
                    error, errors.LocalEntryNotFoundError
                )
                if absent and known != names[-1]:
                    continue
                cache = imported("huggingface_hub.constants", self.name).HF_HUB_CACHE
                raise RecipeValueError(
                    "model.weights",
                    f"'{section.weights}' of {self.name} is not in '{cache}', and could not be fetched "
                    f"({type(error).__name__}); where there is a network, `hf download {repository}` puts it there, "
                    "or give a file as model.checkpoint",
                ) from error
        raise AssertionError("there is always a last name")

    def image_defaults(self, section: ModelSection) -> ImageDefaults:
        found = self.configuration(section)
        if found is None:
            return ImageDefaults(channels=self.given_channels(section, None))
        settings = imported("timm.data", self.name).resolve_data_config(pretrained_cfg=found.to_dict())
        size = section.kwargs.get("img_size") or settings["input_size"][-2:]
        channels = self.given_channels(section, settings["input_size"][0])
        return ImageDefaults(side_of(size), settings["mean"], settings["std"], channels)


def find_timm(name: str) -> TimmBuilder:
    """Return the builder of ``NAME`` or ``NAME.TAG``; RecipeValueError where timm is missing or has no such model."""
    full = f"timm/{name}"
    timm = imported("timm", full)
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        hint = did_you_mean(architecture, timm.list_models()) or "; timm.list_models() has their names"
        raise RecipeValueError("model.name", f"timm has no model '{architecture}'{hint}")
    if tag and not _has_configuration(timm, architecture, tag):
        tags = _tags(timm, architecture)
        hint = did_you_mean(tag, tags) or f"; {', '.join(tags) or 'it has none'}"
        raise RecipeValueError("model.name", f"timm/{architecture} has no weights '{tag}'{hint}")
    return TimmBuilder(full, partial(timm.create_model, architecture), architecture, tag)


def _has_configuration(timm: Any, architecture: str, tag: str) -> bool:
    return tag in _tags(timm, architecture) if tag else bool(timm.models.get_arch_pretrained_cfgs(architecture))


def _tags(timm: Any, architecture: str) -> list[str]:
    """Return the tags of the weights that timm knows of."""
    names = timm.list_pretrained(f"{architecture}.*")
    return [name.partition(".")[2] for name in names]


@lru_cache(maxsize=64)
def _arguments(architecture: str) -> tuple[frozenset[str], bool]:
    """Return the arguments that timm's builder of an architecture and what it calls name, and whether others vanish.

    The network's class has the real ones; the module it lies in has functions that take some out on the way.
    """
    timm = imported("timm", f"timm/{architecture}")
    build = timm.model_entrypoint(architecture)
    try:
        with parameters_without_numbers():
            kind = type(build())
    except Exception:  # some read a weight while they are built
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            kind = type(build())
    module = imported(build.__module__, f"timm/{architecture}")
    inside = [part for part in vars(module).values() if getattr(part, "__module__", None) == module.__name__]
    parts = [part for part in (*kind.__mro__[:-1], *inside) if callable(part)]
    names = {name for part in parts for name in accepted_arguments(part)[0]}
    swallows = any(parameter.kind is parameter.VAR_KEYWORD for parameter in inspect.signature(kind).parameters.values())
    return frozenset(names - {"self", "kwargs"}), swallows


@contextmanager
def _quietly(logger: str) -> Iterator[None]:
    """Keep a library's warnings, such as those of each try without a network, off the screen."""
    level = logging.getLogger(logger).level
    logging.getLogger(logger).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logging.getLogger(logger).setLevel(level)


@contextmanager
def _missing_names(kind: type[nn.Module]) -> Iterator[set[str]]:
    """Collect the names that networks of class ``kind`` have no tensor for when weights are loaded into them.

    timm tells its log alone. The class has a method of its own for as long as this lasts.
    """
    names: set[str] = set()
    plain, own = kind.load_state_dict, vars(kind).get("load_state_dict")

    def watched(network: nn.Module, *arguments: Any, **options: Any) -> Any:
        result = plain(network, *arguments, **options)
        names.update(result.missing_keys)
        return result

    setattr(kind, "load_state_dict", watched)  # noqa: B010 - mypy has no assignment to a method
    try:
        with _quietly("timm"):
            yield names
    finally:
        if own is None:
            del kind.load_state_dict
        else:
            setattr(kind, "load_state_dict", own)  # noqa: B010
