"""What frozen rows and their state are held at is written back in few calls and to the bit; dense tensors only."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from neq_cli.freezing.model.layouts import RowLayout
from neq_cli.freezing.rows.shards import local

# Numbers are multiplied and added as the integers that their bits spell: exact, whatever they are, NaN included.
# No integer is as wide as complex128, which stays what it is: exact where finite.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
# Up to so many elements, a pass over all of a tensor, in one call with others, costs less than a call for its rows:
# measured on a Zen 4 core; on an accelerator, estimated from a kernel's launch and the memory moved meanwhile.
_SMALL = {"cpu": 4096}
_SMALL_ELSEWHERE = 2**18
# From so many elements on, with at most this share of rows that train, an optimiser does better with these alone than
# with all rows and the frozen ones written back: measured on a Zen 4 core with SGD and AdamW, fused and not.
_FEW = ((2**17, 0.6), (2**14, 0.25))
# Rows of fewer bytes are not worth being addressed one by one.
_SHORT_ROW = 64


def bits(tensor: Tensor) -> Tensor:
    """Return a view of ``tensor``, same shape and strides, as integers of the same width."""
    plain = tensor.detach() if tensor.requires_grad else tensor
    return plain.view(_INTEGERS[tensor.element_size()])


class FrozenRows:
    """A parameter with frozen rows, and what they and their state are held at.

    ``frozen``: bool, [rows], on the CPU. ``held``: by key of the optimiser's state, the parameter itself under "". Of a
    sharded parameter ``layout`` and ``frozen`` are those of the part that is here, and so is what is held. ``whole``:
    whether all its rows are frozen, those of other processes included.
    """

    def __init__(
        self, parameter: nn.Parameter, layout: RowLayout, frozen: Tensor, *, whole: bool | None = None
    ) -> None:
        self.parameter = parameter
        self.layout = layout
        self.frozen = frozen
        self.whole = bool(frozen.all()) if whole is None else whole
        self.held: dict[str, Tensor] = {}
        self._seen: dict[str, tuple[Tensor, int]] = {}
        self._state_size = 0
        count = local(parameter).numel()
        row_bytes = count // max(1, len(frozen)) * parameter.element_size()
        small = count <= _SMALL.get(parameter.device.type, _SMALL_ELSEWHERE)
        self.by_row = layout.kind == "leading" and row_bytes >= _SHORT_ROW and not small
        columns = layout.kind == "transposed" and layout.groups == 1 and not small
        self.dimension = 0 if self.by_row else 1 if columns else None  # along which rows are selected by their numbers
        most = next((most for least, most in _FEW if count >= least), 0.0)
        self.few_train = self.dimension is not None and int((~frozen).sum()) <= most * len(frozen)

    @cached_property
    def rows(self) -> Tensor:
        """The frozen rows' numbers: int64, on the parameter's device."""
        return self.frozen.nonzero().squeeze(1).to(self.parameter.device)

    @cached_property
    def trains(self) -> Tensor:
        """What bits are multiplied with: 1 where an element trains, else 0. [rows, 1, ...] if by row, else full."""
        kind = _INTEGERS[self.parameter.element_size()]
        if self.by_row:
            return (~self.frozen).to(self.parameter.device, kind).view(-1, *[1] * (self.parameter.dim() - 1))
        factors = torch.ones_like(local(self.parameter).detach(), dtype=kind)
        self.layout.view(factors)[self.layout.index(factors, self.rows)] = 0
        return factors

    def read(self, tensor: Tensor) -> Tensor:
        """Return a copy of the frozen rows of ``tensor`` (of the parameter's shape, or of its part that is here): those
        alone if by row, else all of it with zeros where an element trains."""
        tensor = local(tensor)
        if self.by_row:
            return tensor.detach().index_select(0, self.rows.to(tensor.device))
        numbers = bits(tensor)
        return (numbers - numbers * self.trains.to(numbers)).view(tensor.dtype)

    def look(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Remember which ``tensors`` are kept: of ``state``, by key, and the parameter under ""."""
        self._seen = {key: (tensor, local(tensor).data_ptr()) for key, tensor in tensors.items()}
        self._state_size = len(state)

    def changed(self, state: Mapping[str, Any]) -> bool:
        """Whether, since ``look``, a tensor was born, replaced, or given other memory."""
        parameter, pointer = self._seen[""]
        if len(state) != self._state_size or local(parameter).data_ptr() != pointer:
            return True
        for key, value in state.items():
            if key in self._seen:
                tensor, pointer = self._seen[key]
                if value is not tensor or local(tensor).data_ptr() != pointer:
                    return True
            elif isinstance(value, Tensor) and value.shape == parameter.shape:
                return True
        return False


class Writer:
    """Writes what is held into many tensors: two calls for all those that are written by element, one per other."""

    def __init__(self) -> None:
        self.by_element: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor], list[Tensor]]] = {}
        self.by_row: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, frozen: FrozenRows, key: str, tensor: Tensor) -> None:
        """Write ``frozen.held[key]`` into ``tensor``, or its part that is here, from now on."""
        tensor = local(tensor)
        held = frozen.held[key] = _laid_out_as(frozen.held[key], tensor)
        if frozen.by_row:
            target, source = _in_wide_elements(tensor.detach(), held)
            self.by_row.append((target, frozen.rows.to(tensor.device), source))
            return
        numbers = bits(tensor)
        targets, factors, sources = self.by_element.setdefault((numbers.device, numbers.dtype), ([], [], []))
        targets.append(numbers)
        factors.append(frozen.trains.to(numbers))
        sources.append(bits(held))

    def write(self) -> None:
        for targets, factors, sources in self.by_element.values():
            torch._foreach_mul_(targets, factors)
            torch._foreach_add_(targets, sources)
        for target, rows, source in self.by_row:
            target.index_copy_(0, rows, source)


def take_rows(tensor: Tensor, dimension: int, rows: Tensor) -> Tensor:
    """Return a copy of the ``rows`` (int64, [k]) along ``dimension``; each is laid out as it is in ``tensor``."""
    rows = rows.to(tensor.device)
    if dimension or tensor.is_contiguous() or not _in_one_piece(tensor):
        return tensor.index_select(dimension, rows)
    taken = tensor.as_strided((len(tensor), tensor.stride(0)), (tensor.stride(0), 1)).index_select(0, rows)
    return taken.as_strided((len(rows), *tensor.shape[1:]), tensor.stride())


def put_rows(tensor: Tensor, dimension: int, rows: Tensor, values: Tensor) -> None:
    """Write ``values``, as ``take_rows`` returned them, into the ``rows`` (int64, [k]) of ``tensor``."""
    rows = rows.to(tensor.device)
    # Where code is traced nothing has a place in memory.
    if dimension or not len(values) or values.stride() != tensor.stride() or torch.compiler.is_compiling():
        tensor.index_copy_(dimension, rows, values)
    else:
        target, source = _in_wide_elements(tensor, values)
        target.index_copy_(0, rows, source)


def _laid_out_as(held: Tensor, tensor: Tensor) -> Tensor:
    """Return ``held`` on the device, in the type and with the strides of ``tensor``, as far as a row is one piece."""
    strides = tensor.stride() if _in_one_piece(tensor) else held.stride()
    if (held.device, held.dtype, held.stride()) == (tensor.device, tensor.dtype, strides):
        return held
    return torch.empty_strided(held.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(held)


def _in_one_piece(tensor: Tensor) -> bool:
    if tensor.is_contiguous() and tensor.stride(0) * len(tensor) == tensor.numel():
        return True
    row = tensor.detach()[0]
    return tensor.stride(0) == row.numel() and torch.empty_like(row).stride() == row.stride()


def _in_wide_elements(tensor: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """Return both, laid out alike, as [rows, elements] with elements as wide as can be: each is copied by itself."""
    if not _in_one_piece(tensor):
        return tensor, held
    width, size = tensor[0].numel(), tensor.element_size()
    flat = [one.as_strided((len(one), width), (width, 1)) for one in (tensor, held)]
    for kind in (torch.complex128, torch.int64):
        places = (width * size, tensor.data_ptr(), tensor.storage_offset() * size, held.data_ptr())
        if kind.is_complex and tensor.device.type not in ("cpu", "cuda"):
            continue
        if all(place % kind.itemsize == 0 for place in places):
            return flat[0].view(kind), flat[1].view(kind)
    return flat[0], flat[1]
