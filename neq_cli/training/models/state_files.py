"""State dicts in files: safetensors, or what torch.save wrote of tensors alone; pickled code is never run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from neq_cli.errors import RecipeValueError, one_line

_NESTED = ("model", "state_dict")
_SUFFIXES = (".safetensors", ".pt", ".pth")


def checkpoint_path(checkpoint: str) -> Path:
    """Return the path with ~ and $VARIABLES expanded; RecipeValueError where it is of no kind that can be read."""
    path = Path(os.path.expandvars(checkpoint)).expanduser()
    if path.suffix not in _SUFFIXES:
        raise RecipeValueError("model.checkpoint", f"'{path}' is none of {', '.join(_SUFFIXES)}")
    return path


def read_state(path: Path, key: str = "model.checkpoint") -> Mapping[str, Tensor]:
    """Return the tensors of ``path``, unpacked from what training scripts wrap them in; RecipeValueError at ``key``."""
    try:
        contents: Any
        if path.suffix == ".safetensors":
            contents = load_file(path)
        else:
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise RecipeValueError(
            key, f"'{path}' holds more than plain tensors, or is damaged; save a plain state_dict"
        ) from error
    except Exception as error:
        raise RecipeValueError(key, f"'{path}' cannot be read ({one_line(error)})") from error
    for nested in _NESTED:
        if isinstance(contents, Mapping) and isinstance(contents.get(nested), Mapping):
            contents = contents[nested]
    if not isinstance(contents, Mapping) or not all(isinstance(tensor, Tensor) for tensor in contents.values()):
        raise RecipeValueError(key, f"'{path}' holds no state_dict of tensors")
    state = dict(contents)
    for prefix in ("module.", "_orig_mod."):  # left by DistributedDataParallel and torch.compile
        consume_prefix_in_state_dict_if_present(state, prefix)
    return state
