"""The network before, which the probe compares with: copies of tensors, the model's own where nothing changes them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from neq_cli.freezing.only_here import OnlyHere
from neq_cli.freezing.rows.frozen_rows import bits
from neq_cli.freezing.rows.shards import local

Snapshot = Literal["device", "cpu"]
"""Named for recipes in recipe/values.py once more, since neither room may import the other; a test compares them."""
PLACES: tuple[Snapshot, ...] = get_args(Snapshot)


class Earlier:
    """All parameters and buffers of a model as they were at a moment, by qualified name; of sharded ones, parts.

    ``place``: copies lie where the model's tensors do, or on the CPU. ``tensors``: None for a buffer without a tensor.
    """

    def __init__(self, place: Snapshot) -> None:
        self.place = place
        self.tensors: dict[str, Tensor | None] = {}
        self._shared: set[str] = set()
        self._hooks: list[RemovableHandle] = []

    def take(self, tensors: Mapping[str, Tensor | None], device: torch.device | None = None) -> None:
        """Have copies of ``tensors`` from now on, which may be others than before.

        They will be where ``tensors`` are; with ``device`` where copies are already, new ones there; all on the CPU if
        that is the place for them. Those that are shared and the same memory stay so: ``share`` must come next.
        """
        kept = self.tensors
        for name in [name for name in kept if name not in tensors]:
            del kept[name]
        for name, tensor in tensors.items():
            own = kept.get(name)
            if tensor is None:
                kept[name] = None
                continue
            if name in self._shared and own is not None:
                if own.data_ptr() == tensor.data_ptr():
                    continue
                own = None
            place = tensor.device if device is None else device if own is None else own.device
            place = torch.device("cpu") if self.place == "cpu" else place
            if own is not None and (own.shape, own.dtype, own.device) == (tensor.shape, tensor.dtype, place):
                # In place: a second copy of the weights would double the probe's memory for a moment.
                own.copy_(tensor)
            else:
                kept[name] = tensor.detach().to(place, copy=True)

    def share(self, model: nn.Module, names: frozenset[str]) -> None:
        """Keep no copies of the parameters ``names``, which nothing changes until the next ``take``, where they are the
        same; and of all others copies. Loading into the model makes copies first.
        """
        self._stop_watching()
        owners: dict[nn.Module, list[str]] = {}
        for name, parameter in model.named_parameters():
            own = self.tensors.get(name)
            if own is None:
                continue
            if name in names and _same_bits(own, local(parameter).detach()):
                self.tensors[name] = local(parameter).detach()
                self._shared.add(name)
                owners.setdefault(model.get_submodule(name.rpartition(".")[0]), []).append(name)
            else:
                self._copy(name)
        self._hooks = [
            module.register_load_state_dict_pre_hook(OnlyHere(partial(self.copy_shared, tuple(mine))))  # type: ignore[no-untyped-call]
            for module, mine in owners.items()
        ]

    def keep_own(self) -> None:
        """Have copies of everything."""
        self._stop_watching()
        for name in tuple(self._shared):
            self._copy(name)

    def follow(self, model: nn.Module) -> None:
        """Go where ``model`` has gone since: to another device, or another type.

        A buffer alone that is of another type now was made so by its module, and stays what it was.
        """
        parameters = dict(model.named_parameters())
        converted = any(
            tensor is not None and name in parameters and tensor.dtype != parameters[name].dtype
            for name, tensor in self.tensors.items()
        )
        for name, tensor in snapshot(model).items():
            earlier = self.tensors.get(name)
            if tensor is not None and earlier is not None:
                place = earlier.device if self.place == "cpu" else tensor.device
                self.tensors[name] = earlier.to(place, tensor.dtype if converted else earlier.dtype)

    def on(self, device: torch.device) -> dict[str, Tensor | None]:
        """Return all tensors on ``device``, where the CPU is only where they are kept."""
        if self.place == "device":
            return self.tensors
        return {name: None if one is None else one.to(device, non_blocking=True) for name, one in self.tensors.items()}

    def copy_shared(self, names: tuple[str, ...], *_: Any) -> None:
        """Have copies of ``names``, which are about to be changed."""
        for name in names:
            self._copy(name)

    def _copy(self, name: str) -> None:
        tensor = self.tensors.get(name)
        if name in self._shared and tensor is not None:
            place = torch.device("cpu") if self.place == "cpu" else tensor.device
            self.tensors[name] = tensor.to(place, copy=True)
        self._shared.discard(name)

    def _stop_watching(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def snapshot(model: nn.Module) -> dict[str, Tensor | None]:
    """Return all parameters and buffers by qualified name, detached; None for a buffer that has no tensor yet.

    Of what is sharded it is the part that this process holds.
    """
    tensors = {**dict(model.named_parameters()), **buffers_of(model)}
    return {name: None if tensor is None else local(tensor).detach() for name, tensor in tensors.items()}


def buffers_of(model: nn.Module) -> dict[str, Tensor | None]:
    """Return all buffers by qualified name, each once, and None for those that are registered without a tensor."""
    empty = {
        f"{prefix}.{key}" if prefix else key: None
        for prefix, module in model.named_modules()
        for key, buffer in module._buffers.items()
        if buffer is None
    }
    return {**empty, **dict(model.named_buffers())}


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype) == (b.shape, b.dtype) and torch.equal(bits(a.to(b.device)), bits(b))
