"""The neuron files of a run directory, written, and read as what anybody may have damaged: every fault is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from neq_cli.events import EpochRecord
from neq_cli.runs.store.untrusted import damaged, open_regular, unreadable
from neq_cli.text import printable

SCHEMA = "1"
_DTYPES = {"phi": "F32", "delta_phi": "F32", "velocity": "F32", "trained": "BOOL", "trainable": "BOOL"}
NEURON_FIELDS = tuple(_DTYPES)
_LARGEST_NEURONS = 64 * 2**20  # bytes: 4.7 million neurons
_LARGEST_HEADER = 4 * 2**20  # bytes: some seven thousand layers


def neurons_file(record: EpochRecord, policy: str) -> bytes:
    """Return a safetensors file with every layer's ``NEURON_FIELDS``, each [neurons], and the epoch's metadata."""
    tensors: dict[str, NDArray[Any]] = {}
    for layer in record.layers:
        for field in NEURON_FIELDS:
            dtype = np.bool_ if _DTYPES[field] == "BOOL" else np.float32
            tensors[f"{layer.name}/{field}"] = np.ascontiguousarray(getattr(layer, field), dtype=dtype)
    metadata = {"schema": SCHEMA, "epoch": str(record.epoch), "policy": policy}
    return _in_order(safetensors.numpy.save(tensors, metadata))


def _in_order(content: bytes) -> bytes:
    """Sort the metadata of a safetensors file, which the library leaves to chance: the same epoch, the same bytes."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def read_neurons(path: Path, fields: tuple[str, ...] = NEURON_FIELDS) -> dict[str, dict[str, NDArray[Any]]]:
    """Return ``{layer: {field: [neurons]}}``; the order of layers is not kept."""
    _check_header(path)
    try:
        with safe_open(path, framework="numpy") as file:
            schema = (file.metadata() or {}).get("schema")
            if schema != SCHEMA:
                raise damaged(path, f"schema {printable(schema, 60)!r} where this neq reads {SCHEMA}")
            layers: dict[str, dict[str, NDArray[Any]]] = {}
            for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                layer, _, field = key.rpartition("/")
                if field in fields:
                    _check_tensor(path, key, field, file.get_slice(key))
                    array = layers.setdefault(layer, {})[field] = file.get_tensor(key)
                    if array.dtype == np.bool_ and array.view(np.uint8).max(initial=0) > 1:
                        raise damaged(path, f"{printable(key, 80)}: a truth value that is neither 0 nor 1")
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise damaged(path, f"not a safetensors file: {printable(error, 60)!r}") from error
    except OSError as error:
        raise unreadable(path, error) from error
    for layer, arrays in layers.items():
        if len(arrays) != len(fields) or len({len(array) for array in arrays.values()}) != 1:
            raise damaged(path, f"{printable(layer, 80)}: its {', '.join(fields)} do not belong together")
    return layers


def _check_header(path: Path) -> None:
    # The library takes headers of a hundred million bytes, which become gigabytes of entries.
    try:
        with open_regular(path, _LARGEST_NEURONS) as file:
            length = int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise unreadable(path, error) from error
    if length > _LARGEST_HEADER:
        raise damaged(path, f"not a safetensors file: a header of {length} bytes")


def _check_tensor(path: Path, key: str, field: str, tensor: Any) -> None:
    dtype, shape = tensor.get_dtype(), tensor.get_shape()
    if dtype != _DTYPES[field] or len(shape) != 1:
        raise damaged(path, f"{printable(key, 80)}: {dtype}{shape} where {_DTYPES[field]}[neurons] belongs")
