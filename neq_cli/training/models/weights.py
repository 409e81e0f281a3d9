"""Weights to start from: those a library has by name, or a file of tensors; pickled code is never run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from neq_cli.errors import RecipeValueError, did_you_mean, one_line
from neq_cli.recipe import ModelSection
from neq_cli.text import some_of
from neq_cli.training.models.build import find_builder
from neq_cli.training.models.of_torchvision import fetched
from neq_cli.training.models.of_torchvision import find_backbone_weights as _find_backbone_weights
from neq_cli.training.models.state_files import checkpoint_path, read_state


def load_weights(model: nn.Module, section: ModelSection, task: str | None = None) -> tuple[str, ...]:
    """Load what ``section.weights`` or ``section.checkpoint`` names into ``model``, built for ``task``.

    Returns notes on what was not loaded: what ``section.fresh`` names; and a library's weights go wherever their shapes
    fit, so that a model with another number of classes keeps its own last layer. A checkpoint must fit entirely. Raises
    RecipeValueError.
    """
    if section.weights is not None:
        return _load_published(model, section, task)
    if section.checkpoint is not None:
        return _load_checkpoint(model, section)
    if section.weights_backbone is not None:
        _load_backbone(model, section)
    return ()


def find_weights(section: ModelSection) -> Any:
    """Return what ``section.weights`` names, without opening it; RecipeValueError where there is no such thing."""
    return find_builder(section).find_weights(section)


def find_backbone_weights(section: ModelSection) -> Any:
    """Return torchvision's entry that ``section.weights_backbone`` names; RecipeValueError where there is none."""
    return _find_backbone_weights(section, find_builder(section))


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


def _load_published(model: nn.Module, section: ModelSection, task: str | None) -> tuple[str, ...]:
    loaded = find_builder(section, task).published(section, model)
    own = model.state_dict()
    asked = _fresh(section, own)
    fitting = {
        name: tensor
        for name, tensor in loaded.items()
        if name in own and own[name].shape == tensor.shape and name not in asked
    }
    # BatchNorm's counters are missing from old files; every other tensor left out starts from scratch.
    counted = [name for name in own if not name.endswith("num_batches_tracked")]
    fresh = [name for name in counted if name not in fitting]
    if fresh == counted:
        raise RecipeValueError("model.weights", f"no tensor of '{section.weights}' fits the model; remove it")
    model.load_state_dict(fitting, strict=False)
    if not fresh:
        return ()
    return (f"model.weights: {len(fresh)} of {len(own)} tensors start from scratch: {some_of(fresh)}",)


def _load_backbone(model: nn.Module, section: ModelSection) -> None:
    """Load a classifier's weights into the layers of the backbone that were taken from it; its head is left out."""
    loaded = fetched(find_backbone_weights(section), section, "weights_backbone")
    backbone = model.get_submodule("backbone")
    own = backbone.state_dict()
    # MobileNet's backbone is its `features` alone, ResNet's the whole of it.
    fitting = {name: loaded[key] for name in own for key in (name, f"features.{name}") if key in loaded}
    missing = [name for name in own if name not in fitting and not name.endswith("num_batches_tracked")]
    if missing:
        raise RecipeValueError("model.weights_backbone", f"the backbone's {some_of(missing)} are not in it; remove it")
    backbone.load_state_dict(fitting, strict=False)


def _load_checkpoint(model: nn.Module, section: ModelSection) -> tuple[str, ...]:
    path = find_checkpoint(str(section.checkpoint))
    own = model.state_dict()
    loaded = as_torchvision(read_state(path), own)
    fresh = _fresh(section, own)
    loaded = {name: tensor for name, tensor in loaded.items() if not _matches(name, section.fresh)}
    own = {name: tensor for name, tensor in own.items() if name not in fresh}
    if problem := misfits(loaded, own):
        raise RecipeValueError("model.checkpoint", f"'{path}' does not fit the model: {problem}")
    model.load_state_dict(dict(loaded), strict=not fresh)
    return (f"model.fresh: {len(fresh)} tensors start from scratch: {some_of(fresh)}",) if fresh else ()


def _fresh(section: ModelSection, own: Mapping[str, Tensor]) -> list[str]:
    """Return which of the model's ``own`` tensors are to start at random; RecipeValueError for a glob without any."""
    for glob in section.fresh:
        if not any(fnmatchcase(name, glob) for name in own):
            hint = did_you_mean(glob, own) or f"; names are such as '{next(iter(own), '')}'"
            raise RecipeValueError("model.fresh", f"no tensor of the model matches '{glob}'{hint}")
    return [name for name in own if _matches(name, section.fresh)]


def misfits(loaded: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """Return in what ``loaded`` is not the state dict of a model that has its ``own``; "" where nothing is wrong."""
    missing = [name for name in own if name not in loaded]
    unexpected = [name for name in loaded if name not in own]
    mismatched = [
        f"{name} {list(loaded[name].shape)} for {list(own[name].shape)}"
        for name in own
        if name in loaded and loaded[name].shape != own[name].shape
    ]
    parts = (("missing", missing), ("not in the model", unexpected), ("of another shape", mismatched))
    problems = [f"{len(names)} {what} ({some_of(names)})" for what, names in parts if names]
    return f"tensors {'; '.join(problems)}" if problems else ""


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


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
