"""What a callback keeps in a trainer's own checkpoint folder: neq.safetensors and neq.json, both or neither."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neq_cli.errors import FreezingError, RunDirectoryError
from neq_cli.freezing import Freezer
from neq_cli.runs.store.disk import atomic_write, writing
from neq_cli.runs.store.untrusted import read_json
from neq_cli.text import printable
from neq_cli.training.loop.checkpoint import load_state, save_state

TENSORS, VALUES = "neq.safetensors", "neq.json"
_VERSION = 1
_SAVED = {"observed": int, "lr": float, "weights": str, "dispatch": dict, "columns": list, "late": list}
"""What is read again of the values, and of what types."""


def save_beside(folder: Path, state: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Put a Freezer's ``state`` and plain ``values`` into a checkpoint's ``folder``; TrainingError of the disk."""
    with writing(folder):
        # What stood there before is given up first and the values come last: where they are, the tensors are theirs.
        (folder / VALUES).unlink(missing_ok=True)
        atomic_write(folder / TENSORS, partial(save_state, state))
        atomic_write(folder / VALUES, json.dumps({"version": _VERSION, **values}, indent=1).encode())


def load_into(freezer: Freezer, folder: Path, *, begin_anew: bool, step: int) -> dict[str, Any]:
    """Have ``freezer`` go on from a checkpoint's ``folder``, of that ``step``.

    Return its values, none where it has no state and the training may ``begin_anew`` there. Raises FreezingError where
    it may not or the state is of other weights, RunDirectoryError where it is damaged.
    """
    if not (folder / VALUES).is_file():
        if begin_anew:
            freezer.notes.append(f"step {step}: {folder} has no state of neq; everything trains anew")
            return {}
        raise FreezingError(
            f"{folder}: has no neq.json (saved without NEqCallback, or killed while it was saved; or resumed from "
            "elsewhere, which checkpoint= names); resume from an earlier checkpoint, or give begin_anew=True, with "
            "which everything trains from here"
        )
    saved, values = _load_beside(folder)
    if values["weights"] != fingerprint(freezer.model):
        raise FreezingError(
            f"{folder}: its neq.json belongs to other weights than the trainer has loaded; give "
            "NEqCallback(checkpoint=...) the folder that it resumes from"
        )
    freezer.dispatch.load_state_dict(values["dispatch"])
    freezer.load_state_dict(saved)
    return values


def fingerprint(model: nn.Module) -> str:
    """Return a checksum over all parameters that train, by which a state finds the weights that it belongs to."""
    checksum = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            content = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            checksum = zlib.crc32(content.data, checksum)
    return f"{checksum:08x}"


def _load_beside(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return the state and the values that ``save_beside`` was given; RunDirectoryError where they are damaged."""
    values = read_json(folder / VALUES)
    if values.get("version") != _VERSION:
        raise RunDirectoryError(f"{printable(folder / VALUES)}: is of another neq; this one reads version {_VERSION}")
    for key, kind in _SAVED.items():
        if not isinstance(values.get(key), kind):
            raise RunDirectoryError(f"{printable(folder / VALUES)}: damaged ({key}); resume from another checkpoint")
    return load_state(folder / TENSORS), values
