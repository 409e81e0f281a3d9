"""Nested state to one safetensors file and back: tensors as tensors, all else as JSON; nothing pickled."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from neq_cli.errors import RunDirectoryError, TrainingError

_VERSION = "1"


def save_state(state: Mapping[str, Any], path: Path) -> None:
    """Write ``state``, nested dictionaries, lists and tuples of tensors and plain values, to ``path``.

    Tensors are stored contiguous; a reader that needs another memory format restores it. Raises TrainingError for
    a value that JSON does not know, such as a policy of the user's own may keep.
    """
    tensors: dict[str, Tensor] = {}
    structure = _encode(state, "", tensors)
    save_file(tensors, path, metadata={"version": _VERSION, "structure": json.dumps(structure)})


def load_state(path: Path) -> Any:
    """Return what ``save_state`` wrote, tensors on the CPU. Raises RunDirectoryError where the file is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("version") != _VERSION:
                raise RunDirectoryError(f"{path}: not a checkpoint of this version of neq")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dictionary
        return _decode(json.loads(metadata["structure"]), tensors)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise RunDirectoryError(f"{path}: damaged checkpoint ({type(error).__name__})") from error


def save_weights(state_dict: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a plain state_dict, shared and channels_last memory made plain, for any reader of safetensors."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state_dict.items()}
    save_file(tensors, path, metadata={"format": "pt", **metadata})


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the plain state_dict in ``path``: a file of weights, or a checkpoint's model (averaged, if it is)."""
    try:
        with safe_open(path, framework="pt") as file:
            if "structure" not in (file.metadata() or {}):
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dictionary
    except (OSError, SafetensorError) as error:
        raise RunDirectoryError(f"{path}: cannot be read as weights ({type(error).__name__})") from error
    state = load_state(path)
    if not isinstance(state, dict) or not {"model", "averaged"} <= state.keys():
        raise RunDirectoryError(f"{path}: not the checkpoint of a run; give one from its folder checkpoints")
    averaged: dict[str, Tensor] | None = state["averaged"]
    if averaged is None:
        return dict(state["model"])
    prefix = "module."
    return {name.removeprefix(prefix): tensor for name, tensor in averaged.items() if name.startswith(prefix)}


def _encode(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        while key in tensors:  # {"a": {"b": ...}, "a/b": ...}
            key += "'"
        tensors[key] = value.detach().cpu().contiguous().clone()
        return {"tensor": key}
    if isinstance(value, Mapping):
        # Pairs, because JSON would turn the integers that optimisers use as keys into text.
        return {"items": [[name, _encode(item, f"{key}/{name}", tensors)] for name, item in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_encode(item, f"{key}/{number}", tensors) for number, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TrainingError(
        f"checkpoint: {key.lstrip('/')}: a {type(value).__name__} cannot be stored; "
        "keep tensors, numbers, text, lists and dictionaries"
    )


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "tuple" in value:
        return tuple(_decode(item, tensors) for item in value["tuple"])
    return {name: _decode(item, tensors) for name, item in value["items"]}


def random_states() -> dict[str, Any]:
    """Return the states of torch's global generators, Python's and NumPy's."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (
            str(name),
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ),
    }
