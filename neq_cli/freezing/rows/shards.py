"""The part of a parameter that this process holds, where ``fully_shard`` divides it; along one dimension only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neq_cli.freezing.model.layouts import RowLayout


@dataclass(frozen=True)
class Part:
    """Which places along one ``dimension`` of a tensor of this whole ``shape`` this process holds."""

    shape: torch.Size
    dimension: int
    start: int
    length: int

    def cut(self, whole: Tensor) -> Tensor:
        """Return a view of this process's part of a ``whole`` tensor."""
        return whole.narrow(self.dimension, self.start, self.length)


def is_sharded(tensor: Tensor) -> bool:
    """Return whether ``tensor`` is a DTensor: torch.distributed.tensor is never imported to know."""
    return hasattr(tensor, "_local_tensor")


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor, in its own memory; any other tensor as it is."""
    part: Tensor = getattr(tensor, "_local_tensor", tensor)
    return part


def whole(tensor: Tensor) -> Tensor:
    """Return all of a sharded tensor, which every process must ask for alike; any other tensor as it is."""
    given: Any = tensor
    gathered: Tensor = given.full_tensor() if is_sharded(tensor) else given
    return gathered


def part_of(tensor: Any) -> Part | None:
    """Return which part of a sharded tensor is here; None of any other tensor."""
    if not is_sharded(tensor):
        return None
    mesh, placements = tensor.device_mesh, tensor.placements
    number = next(number for number, one in enumerate(placements) if one.is_shard())
    dimension = placements[number].dim
    size, held = tensor.shape[dimension], tensor._local_tensor.shape[dimension]
    # As torch.chunk divides: all parts are as long as the first, but for those at the end.
    each = -(-size // mesh.size(number))
    return Part(tensor.shape, dimension, min(each * mesh.get_local_rank(number), size), held)


def own_rows(parameter: Tensor, layout: RowLayout, frozen: Tensor) -> tuple[RowLayout, Tensor]:
    """Return how the part of ``parameter`` that is here falls into rows, and which of these are ``frozen``.

    ``layout`` and ``frozen`` (bool, [rows], on the CPU) are those of the whole.
    """
    part = part_of(parameter)
    if part is None:
        return layout, frozen
    if layout.kind == "leading" and part.dimension == 0:
        return layout, part.cut(frozen)
    if layout == RowLayout("transposed") and part.dimension != 1 and part.length:
        return layout, frozen  # of every column some elements
    every = torch.zeros(part.shape, dtype=torch.bool, device="cpu")
    layout.view(every)[layout.index(every, frozen.nonzero().squeeze(1))] = True
    return RowLayout("flat"), part.cut(every).flatten()
