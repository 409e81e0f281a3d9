"""How an epoch's record becomes CSV cells and tensors; names of columns and tensors are at home here."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from neq_cli.events import EpochRecord, LayerState

SCHEMA = "1"
LAYER_COLUMNS = (
    "epoch",
    "layer",
    "kind",
    "neurons",
    "frozen",
    "phi_mean",
    "velocity_abs_mean",
    "flops_paper",
    "flops_executed",
)
NEURON_FIELDS = ("phi", "delta_phi", "velocity", "trained", "trainable")


def cell(value: float | int) -> str:
    """Write a number so that reading gives the same one back; NaN is an empty cell."""
    if isinstance(value, (int, np.integer)):
        return str(int(value))
    return "" if math.isnan(value) else repr(float(value))


def layer_row(epoch: int, layer: LayerState) -> list[str]:
    """Return the row of layers.csv; means are over the neurons whose value is not NaN."""
    means = (_mean(layer.phi), _mean(np.abs(layer.velocity)))
    numbers = (layer.neurons, layer.frozen, *means, layer.flops_paper, layer.flops_executed)
    return [str(epoch), layer.name, layer.kind, *map(cell, numbers)]


def _mean(values: NDArray[np.float32]) -> float:
    """Mean of what is not NaN, in float64; NaN where nothing is left."""
    known = values[~np.isnan(values)]
    return float(known.mean(dtype=np.float64)) if known.size else math.nan


def neurons_file(record: EpochRecord, policy: str) -> bytes:
    """Return a safetensors file with every layer's ``NEURON_FIELDS``, each [neurons], and the epoch's metadata."""
    tensors: dict[str, NDArray[Any]] = {}
    for layer in record.layers:
        for field in NEURON_FIELDS:
            dtype = np.bool_ if field in ("trained", "trainable") else np.float32
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
