"""A sharded model runs on plain parameters, gathered unit by unit as it goes; it is not differentiated so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neq_cli.freezing.rows.shards import local, whole


@dataclass(frozen=True)
class Unit:
    """What ``fully_shard`` gathers together.

    ``state``: its own of that. ``parameters``: what it knows of each sharded parameter, by name.
    """

    state: Any
    parameters: Mapping[str, Any]


class StandIns:
    """Plain parameters in the places of sharded ones: of their shapes, with values while they are gathered.

    They are gathered here and not by fully_shard, whose forward pass casts as its mixed precision says, and may be left
    half way where a model raises. ``values``: DTensors by name.
    """

    def __init__(
        self, units: tuple[Unit, ...], sharded: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]
    ) -> None:
        self.units = units
        self.values = values
        self.parameters = {
            name: nn.Parameter(_blank(value), requires_grad=sharded[name].requires_grad)
            for name, value in values.items()
        }
        self._at_once = False
        self._running: dict[int, int] = {}  # how deep in its modules' forward passes, by unit

    @contextmanager
    def instead(self, *, at_once: bool) -> Iterator[None]:
        """Have methods that are registered with fully_shard gather from here; ``at_once``: all is gathered already."""
        self._at_once = at_once
        if at_once:
            for unit in self.units:
                self._gather(unit)
        with ExitStack() as stack:
            for number, unit in enumerate(self.units):
                for key, stand_in in (("_pre_forward", self._before(number)), ("_post_forward", self._after(number))):
                    setattr(unit.state, key, stand_in)
                    stack.callback(delattr, unit.state, key)
            yield

    def take_over(self) -> None:
        """Take fully_shard's hooks off its modules and put others there; to be undone by ``found_again``."""
        for number, unit in enumerate(self.units):
            unit.state._pre_forward_hook_handle.remove()
            unit.state._post_forward_hook_handle.remove()
            for module in unit.state._modules:
                module.register_forward_pre_hook(self._before(number), prepend=True, with_kwargs=True)
                module.register_forward_hook(self._after(number))

    def free(self) -> None:
        """Leave no values."""
        for unit in self.units:
            self._free(unit)

    def _before(self, number: int) -> Any:
        def enter(module: nn.Module, arguments: Any, keywords: Any) -> Any:
            depth = self._running.get(number, 0)
            self._running[number] = depth + 1
            if not depth and not self._at_once:
                self._gather(self.units[number])
            return arguments, keywords

        return enter

    def _after(self, number: int) -> Any:
        def leave(module: nn.Module, arguments: Any, output: Any) -> Any:
            self._running[number] -= 1
            if not self._running[number] and not self._at_once:
                self._free(self.units[number])
            return output

        return leave

    @torch.no_grad()
    def _gather(self, unit: Unit) -> None:
        for name in unit.parameters:
            part, gathered = local(self.values[name]), whole(self.values[name])
            # A single process's part is the whole, and none of the model's business here.
            alias = gathered.data_ptr() == part.data_ptr()
            self.parameters[name].data = gathered.clone() if alias else gathered

    @torch.no_grad()
    def _free(self, unit: Unit) -> None:
        for name in unit.parameters:
            self.parameters[name].data = _blank(self.values[name])


def _blank(value: Tensor) -> Tensor:
    """Return a tensor of the shape of ``value`` that takes the memory of one element."""
    return torch.empty((), dtype=value.dtype, device=value.device).expand(value.shape)
