"""Nested state to one safetensors file and back: tensors as tensors, all else as JSON; nothing pickled."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from neq_cli.errors import RunDirectoryError, TrainingError
from neq_cli.training.loop.shards import InShards, Shards, put_together
from neq_cli.training.loop.tensor_file import (
    are_sizes,
    damaged,
    dtype_name,
    dtype_named,
    read_header,
    read_tensors,
    write_tensors,
)

_VERSION = "2"
_SHARDS = "shards"  # in the metadata, where tensors lie in shards
_TWISTER = 624  # words of the Mersenne Twister's state, NumPy's and Python's
_Numpy = tuple[str, Any, int, int, float]


def save_state(state: Mapping[str, Any], path: Path, shards: Shards | None = None) -> None:
    """Write ``state``, nested dictionaries, lists and tuples of tensors and plain values, to ``path``, with a checksum.

    Of what an InShards stands for, the parts lie in ``shards`` already. Tensors are stored contiguous;
    ``restore_formats`` puts an optimiser's back into their parameters' memory formats.
    Raises TrainingError for a value that JSON does not know, such as a policy of the user's own may keep.
    """
    tensors: dict[str, Tensor] = {}
    try:
        structure = json.dumps(_encode(state, "", tensors))
    except (RecursionError, ValueError) as error:
        raise TrainingError(f"checkpoint: nested too deep, or a number too long ({type(error).__name__})") from error
    beside = {} if shards is None else {_SHARDS: shards.to_text()}
    write_tensors(tensors, {"version": _VERSION, "structure": structure, **beside}, path)


def load_state(path: Path, *, whole: bool = True) -> Any:
    """Return what ``save_state`` wrote, tensors on the CPU in memory of their own.

    ``whole``: those whose parts lie in shards too; else an InShards stands for each, once all shards are found whole.
    Raises RunDirectoryError, one line, where a single bit of the file, or of its shards, is not as it was written.
    """
    metadata, tensors = read_tensors(path)
    if whole:
        return put_together(_state(path, metadata, tensors))
    if _SHARDS in metadata:
        Shards.of(metadata[_SHARDS], path).check()
    return _state(path.absolute(), metadata, tensors)  # other processes may read it in other working directories


def shards_of(path: Path) -> Path | None:
    """Return the folder with a checkpoint's shards, None where it has none. RunDirectoryError where it is damaged."""
    metadata, _ = read_header(path)
    return Shards.of(metadata[_SHARDS], path).folder if _SHARDS in metadata else None


def _state(path: Path, metadata: Mapping[str, str], tensors: dict[str, Tensor]) -> Any:
    version = metadata.get("version", "none")
    if "structure" not in metadata or version != _VERSION:
        raise damaged(path, f"checkpoint version {version[:20]}, and this neq reads {_VERSION}")
    if "checksum" not in metadata:
        raise damaged(path, "a checkpoint without its checksum")
    shards = Shards.of(metadata[_SHARDS], path) if _SHARDS in metadata else None
    try:
        state = _decode(json.loads(metadata["structure"]), tensors, shards)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise damaged(path, f"not the structure of a checkpoint: {type(error).__name__}") from error
    if tensors:
        raise damaged(path, f"{len(tensors)} tensors that belong nowhere")
    return state


def save_weights(state_dict: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a plain state_dict, shared and channels_last memory made plain, for any reader of safetensors."""
    write_tensors(state_dict, {"format": "pt", **metadata}, path)


@dataclass(frozen=True)
class Weights:
    """The plain state_dict of a file, the text beside it, and the epoch after which it stood so; None: not told.

    Within an epoch it stood after none.
    """

    tensors: dict[str, Tensor]
    metadata: Mapping[str, str]
    epoch: int | None


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the plain state_dict in ``path``: a file of weights, or a checkpoint's model (averaged, if it is)."""
    return read_weights_whole(path).tensors


def read_weights_whole(path: Path) -> Weights:
    """Return what ``read_weights`` does, with what else the file tells of it."""
    metadata, tensors = read_tensors(path)
    if "structure" not in metadata:
        return Weights(tensors, metadata, told_epoch(metadata))
    state = _state(path, metadata, tensors)
    model, averaged = (state.get(key) for key in ("model", "averaged")) if isinstance(state, dict) else (None, None)
    prefix = ""
    if averaged is not None:
        model, prefix = averaged, "module."
    if not isinstance(model, dict) or not all(isinstance(name, str) for name in model):
        raise damaged(path, "not the checkpoint of a run")
    weights = {name.removeprefix(prefix): tensor for name, tensor in model.items() if name.startswith(prefix)}
    weights = put_together(weights)
    if not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise damaged(path, "its model is not one of tensors")
    epoch: Any = state.get("epoch") if state.get("so_far") is None else None
    return Weights(weights, metadata, epoch if type(epoch) is int else None)


def told_epoch(metadata: Mapping[str, str]) -> int | None:
    """Return the epoch that the text beside plain weights tells; None where it tells none."""
    told = metadata.get("epoch", "")
    return int(told) if re.fullmatch("[0-9]{1,9}", told) else None


def restore_formats(optimizer: Optimizer) -> None:
    """Give every tensor of the optimiser's state that has its parameter's shape its strides too."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            shaped = isinstance(value, Tensor) and value.shape == parameter.shape
            if shaped and value.stride() != parameter.stride():
                state[key] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def _encode(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        key = key.encode("utf-8", "replace").decode()
        while key in tensors:  # {"a": {"b": ...}, "a/b": ...}
            key += "'"
        tensors[key] = value
        return {"tensor": key}
    if isinstance(value, InShards):
        return {"sharded": [value.name, dtype_name(value.dtype), list(value.shape)]}
    if isinstance(value, Mapping):
        # Pairs, because JSON would turn the integers that optimisers use as keys into text.
        items = [[_encode_key(name, key), _encode(item, f"{key}/{name}", tensors)] for name, item in value.items()]
        # torch's MultiStepLR counts its milestones, and asks the counter for its elements.
        return {"counter" if isinstance(value, Counter) else "items": items}
    if isinstance(value, (list, tuple)):
        items = [_encode(item, f"{key}/{number}", tensors) for number, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TrainingError(
        f"checkpoint: {key.lstrip('/')}: a {type(value).__name__} cannot be stored; "
        "keep tensors, numbers, text, lists and dictionaries"
    )


def _encode_key(name: Any, key: str) -> Any:
    if name is None or isinstance(name, (bool, int, float, str)):
        return name
    raise TrainingError(f"checkpoint: {key.lstrip('/')}: a {type(name).__name__} as a key; use text or numbers")


def _decode(value: Any, tensors: dict[str, Tensor], shards: Shards | None) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors, shards) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors.pop(content)  # each stands in one place: a reference costs a file less than what it stands for
    if not isinstance(content, list):
        raise TypeError(kind)
    if kind == "sharded" and shards is not None:
        return _in_shards(content, shards)
    if kind == "tuple":
        return tuple(_decode(item, tensors, shards) for item in content)
    items = {name: _decode(item, tensors, shards) for name, item in content}
    if kind == "counter" and all(type(count) is int for count in items.values()):
        return Counter(items)
    if kind == "items":
        return items
    raise ValueError(kind)


def _in_shards(content: list[Any], shards: Shards) -> InShards:
    name, dtype, shape = content
    if not isinstance(name, str) or not are_sizes(shape) or not shape:
        raise ValueError("sharded")
    return InShards(name, dtype_named(dtype), torch.Size(shape), shards)


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


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Put back what ``random_states`` returned, all generators or none.

    Of CUDA's states, one per device, as many are set as there are of both. Raises RunDirectoryError for what is no
    such state.
    """
    try:
        for device, state in _devices(states):
            torch.Generator(device).set_state(state)  # a trial, as are the two below
        random.Random().setstate(_python_state(states["python"]))
        np.random.RandomState().set_state(_numpy_state(states["numpy"]))
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError, AttributeError, IndexError) as error:
        raise RunDirectoryError(
            f"checkpoint: random: not states of random generators ({type(error).__name__}); use another, or train again"
        ) from error
    for device, state in _devices(states):
        if device == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)
    random.setstate(_python_state(states["python"]))
    np.random.set_state(_numpy_state(states["numpy"]))


def _devices(states: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cuda = [(f"cuda:{number}", state) for number, state in zip(range(here), list(states["cuda"]), strict=False)]
    return [("cpu", states["torch"]), *cuda]


def _python_state(state: Any) -> tuple[int, tuple[int, ...], float | None]:
    version, words, gauss = state
    if gauss is not None and type(gauss) is not float:
        raise TypeError("gauss")
    return int(version), tuple(words), gauss


def _numpy_state(state: Any) -> _Numpy:
    name, words, position, has_gauss, gauss = state
    keys = np.asarray(words)
    # NumPy looks at none of these, and reads past the end of its own memory for a wrong position.
    fits = keys.shape == (_TWISTER,) and keys.dtype == np.int64 and keys.min() >= 0 and keys.max() < 2**32
    if name != "MT19937" or not fits or type(position) is not int or not 0 <= position <= _TWISTER:
        raise ValueError("numpy")
    if has_gauss not in (0, 1) or type(gauss) is not float:
        raise ValueError("gauss")
    return name, keys.astype(np.uint32), position, int(has_gauss), gauss
