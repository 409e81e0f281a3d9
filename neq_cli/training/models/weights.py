"""Weights to start from: torchvision's by name, or a file of tensors; pickled code is never run."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from neq_cli.errors import RecipeValueError, did_you_mean, one_line
from neq_cli.recipe import ModelSection
from neq_cli.training.errors import of_the_disk
from neq_cli.training.models.build import find_builder

_NESTED = ("model", "state_dict")
_SUFFIXES = (".safetensors", ".pt", ".pth")


def load_weights(model: nn.Module, section: ModelSection) -> tuple[str, ...]:
    """Load what ``section.weights`` or ``section.checkpoint`` names into ``model``.

    Returns notes on what was not loaded: torchvision weights go wherever their shapes fit, so that a model with another
    number of classes keeps its own last layer. A checkpoint must fit entirely. Raises RecipeValueError.
    """
    if section.weights is not None:
        return _load_torchvision(model, section)
    if section.checkpoint is not None:
        return _load_checkpoint(model, section)
    if section.weights_backbone is not None:
        _load_backbone(model, section)
    return ()


def find_weights(section: ModelSection) -> Any:
    """Return torchvision's weights entry that ``section.weights`` names; RecipeValueError where there is none."""
    builder = find_builder(section)
    if not builder.torchvision:
        raise RecipeValueError(
            "model.weights", f"{builder.name} has no weights by name; give a file as model.checkpoint, or null"
        )
    known = torchvision.models.get_model_weights(builder.name)
    name = str(section.weights).removeprefix(f"{known.__name__}.")
    if name not in known.__members__:
        names = ", ".join(known.__members__)
        hint = did_you_mean(name.upper(), known.__members__)
        raise RecipeValueError(
            "model.weights", f"{builder.name} has no weights '{section.weights}'{hint or f'; {names}'}"
        )
    return known[name]


def find_backbone_weights(section: ModelSection) -> Any:
    """Return torchvision's entry that ``section.weights_backbone`` names; RecipeValueError where there is none."""
    builder = find_builder(section)
    default = None
    if builder.torchvision:
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


def checkpoint_path(checkpoint: str) -> Path:
    """Return the path with ~ and $VARIABLES expanded; RecipeValueError where it is of no kind that can be read."""
    path = Path(os.path.expandvars(checkpoint)).expanduser()
    if path.suffix not in _SUFFIXES:
        raise RecipeValueError("model.checkpoint", f"'{path}' is none of {', '.join(_SUFFIXES)}")
    return path


def find_checkpoint(checkpoint: str) -> Path:
    """Return the checkpoint's path; RecipeValueError where there is no such file."""
    path = checkpoint_path(checkpoint)
    try:
        is_there = path.is_file()
    except OSError as error:
        raise RecipeValueError("model.checkpoint", f"'{path}' cannot be read ({one_line(error)})") from error
    if not is_there:
        raise RecipeValueError("model.checkpoint", f"no file '{path}'; give the path of one that is there")
    return path


def _load_torchvision(model: nn.Module, section: ModelSection) -> tuple[str, ...]:
    loaded = _fetched(find_weights(section), section, "weights")
    own = model.state_dict()
    fitting = {name: tensor for name, tensor in loaded.items() if name in own and own[name].shape == tensor.shape}
    if not fitting:
        raise RecipeValueError("model.weights", f"no tensor of '{section.weights}' fits the model; remove it")
    model.load_state_dict(fitting, strict=False)
    # BatchNorm's counters are missing from old files; every other tensor left out starts from scratch.
    fresh = [name for name in own if name not in fitting and not name.endswith("num_batches_tracked")]
    if not fresh:
        return ()
    return (f"model.weights: {len(fresh)} of {len(own)} tensors start from scratch: {_listed(fresh)}",)


def _load_backbone(model: nn.Module, section: ModelSection) -> None:
    """Load a classifier's weights into the layers of the backbone that were taken from it; its head is left out."""
    loaded = _fetched(find_backbone_weights(section), section, "weights_backbone")
    backbone = model.get_submodule("backbone")
    own = backbone.state_dict()
    # MobileNet's backbone is its `features` alone, ResNet's the whole of it.
    fitting = {name: loaded[key] for name in own for key in (name, f"features.{name}") if key in loaded}
    missing = [name for name in own if name not in fitting and not name.endswith("num_batches_tracked")]
    if missing:
        raise RecipeValueError("model.weights_backbone", f"the backbone's {_listed(missing)} are not in it; remove it")
    backbone.load_state_dict(fitting, strict=False)


def _fetched(entry: Any, section: ModelSection, key: str) -> dict[str, Tensor]:
    try:
        loaded: dict[str, Tensor] = entry.get_state_dict(progress=True, check_hash=True)
    except Exception as error:
        mend = "set TORCH_HOME to a folder with room" if of_the_disk(error) else "check the network"
        raise RecipeValueError(
            f"model.{key}",
            f"'{getattr(section, key)}' of {section.name} could not be fetched ({one_line(error)}); {mend}, "
            "or give a file as model.checkpoint",
        ) from error
    return loaded


def _load_checkpoint(model: nn.Module, section: ModelSection) -> tuple[str, ...]:
    path = find_checkpoint(str(section.checkpoint))
    own = model.state_dict()
    loaded = as_torchvision(_read(path), own)
    for glob in section.fresh:
        if not any(fnmatchcase(name, glob) for name in own):
            hint = did_you_mean(glob, own) or f"; names are such as '{next(iter(own), '')}'"
            raise RecipeValueError("model.fresh", f"no tensor of the model matches '{glob}'{hint}")
    fresh = [name for name in own if _matches(name, section.fresh)]
    loaded = {name: tensor for name, tensor in loaded.items() if not _matches(name, section.fresh)}
    own = {name: tensor for name, tensor in own.items() if name not in fresh}
    missing = [name for name in own if name not in loaded]
    unexpected = [name for name in loaded if name not in own]
    mismatched = [
        f"{name} {list(loaded[name].shape)} for {list(own[name].shape)}"
        for name in own
        if name in loaded and loaded[name].shape != own[name].shape
    ]
    parts = (("missing", missing), ("not in the model", unexpected), ("of another shape", mismatched))
    problems = [f"{len(names)} {what} ({_listed(names)})" for what, names in parts if names]
    if problems:
        raise RecipeValueError("model.checkpoint", f"'{path}' does not fit the model: tensors {'; '.join(problems)}")
    model.load_state_dict(dict(loaded), strict=not fresh)
    return (f"model.fresh: {len(fresh)} tensors start from scratch: {_listed(fresh)}",) if fresh else ()


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def _read(path: Path) -> Mapping[str, Tensor]:
    """Return the tensors of ``path``, unpacked from what training scripts wrap them in."""
    try:
        contents: Any
        if path.suffix == ".safetensors":
            contents = load_file(path)
        else:
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise RecipeValueError(
            "model.checkpoint", f"'{path}' holds more than plain tensors, or is damaged; save a plain state_dict"
        ) from error
    except Exception as error:
        raise RecipeValueError("model.checkpoint", f"'{path}' cannot be read ({one_line(error)})") from error
    for key in _NESTED:
        if isinstance(contents, Mapping) and isinstance(contents.get(key), Mapping):
            contents = contents[key]
    if not isinstance(contents, Mapping) or not all(isinstance(tensor, Tensor) for tensor in contents.values()):
        raise RecipeValueError("model.checkpoint", f"'{path}' holds no state_dict of tensors")
    state = dict(contents)
    for prefix in ("module.", "_orig_mod."):  # left by DistributedDataParallel and torch.compile
        consume_prefix_in_state_dict_if_present(state, prefix)
    return state


def _listed(names: Iterable[str], limit: int = 5) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# The authors' name, and what torchvision calls it; the number of a stage becomes an odd place for its blocks and the
# even one after it for the merging of patches that follows.
_RENAMED = (
    (re.compile(r"^patch_embed\.proj\."), "features.0.0."),
    (re.compile(r"^patch_embed\.norm\."), "features.0.2."),
    (re.compile(r"\.mlp\.fc1\."), ".mlp.0."),
    (re.compile(r"\.mlp\.fc2\."), ".mlp.3."),
)
_STAGE = re.compile(r"^layers\.(\d+)\.(blocks\.|downsample\.)")
_COMPUTED = "attn_mask"  # a buffer that torchvision computes in each pass


def as_torchvision(loaded: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``loaded`` as torchvision's Swin of state dict ``own`` names and shapes it; unchanged where it is none."""
    if "patch_embed.proj.weight" not in loaded or "features.0.0.weight" not in own:
        return dict(loaded)
    found = {}
    for name, tensor in loaded.items():
        if name.endswith(_COMPUTED):
            continue
        new = _renamed(name)
        # [window, window] there, one after the other here.
        found[new] = tensor.flatten() if new.endswith("relative_position_index") else tensor
    return found


def _renamed(name: str) -> str:
    for pattern, replacement in _RENAMED:
        name = pattern.sub(replacement, name)
    stage = _STAGE.match(name)
    if stage is None:
        return name
    number = 2 * int(stage[1]) + (1 if stage[2] == "blocks." else 2)
    return f"features.{number}.{name[stage.end() :]}"
