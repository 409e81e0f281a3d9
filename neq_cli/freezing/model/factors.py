"""What of which parameter a tensor is: the parameter itself, a view of it, or computed from it element by element."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factor:
    """A tensor that is a parameter, a view of one or computed from one by element.

    ``dimensions``: of the parameter, by those of the tensor; None for one that is none of them. ``expert``: which place
    along dimension 0, where the tensor has only that one. ``own``: it is in the parameter's own memory.
    """

    name: str
    dimensions: tuple[int | None, ...]
    own: bool
    expert: int | None = None


class Factors:
    """Knows what tensors are of ``parameters``, by name, by the memory that they lie in."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.parameters = parameters
        # Bases by their memory, with the parameter's dimensions by their own.
        self._bases: dict[int, list[tuple[str, Tensor, tuple[int | None, ...]]]] = {}
        for name, parameter in parameters.items():
            self._remember(name, parameter, tuple(range(parameter.dim())))

    def of(self, tensor: Any) -> Factor | None:
        """Return what of which parameter ``tensor`` is; None where it is none."""
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or not tensor.numel():
            return None
        for name, base, known in self._bases.get(memory_of(tensor), ()):
            offset = int(tensor.storage_offset() - base.storage_offset())
            if 0 <= offset < base.numel():
                return self._factor(tensor, name, base, known, offset)
        return None

    def _factor(
        self, tensor: Tensor, name: str, base: Tensor, known: tuple[int | None, ...], offset: int
    ) -> Factor | None:
        by_stride = {base.stride(i): (known[i], base.shape[i]) for i in range(base.dim()) if base.shape[i] > 1}
        found = [by_stride.get(tensor.stride(i), (None, 0)) for i in range(tensor.dim())]
        dimensions = tuple(
            place if size == tensor.shape[i] and size > 1 else None for i, (place, size) in enumerate(found)
        )
        own = base is self.parameters[name]
        missing = {place for place, _ in by_stride.values()} - set(dimensions)
        if not missing and not offset:
            return Factor(name, dimensions, own)
        if missing == {0} and base.dim() > 1 and offset % base.stride(0) == 0:
            return Factor(name, dimensions, own, offset // base.stride(0))
        return None

    def _remember(self, name: str, base: Tensor, dimensions: tuple[int | None, ...]) -> None:
        if base.layout is torch.strided:
            self._bases.setdefault(memory_of(base), []).append((name, base, dimensions))

    def derive(self, tensor: Tensor, output: Tensor) -> None:
        """Know ``output``, which was computed from ``tensor`` alone, element by element, where that is known."""
        factor = self.of(tensor)
        new = output.shape == tensor.shape and memory_of(output) != memory_of(tensor)
        if factor is not None and factor.expert is None and new:
            self._remember(factor.name, output, factor.dimensions)


def memory_of(tensor: Tensor) -> int:
    """Return what tells the memory that a tensor lies in, on any device."""
    return int(tensor.untyped_storage()._cdata)
