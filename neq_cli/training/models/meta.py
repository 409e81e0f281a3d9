"""Networks without their numbers: parameters on the meta device, which take no memory; other tensors are real."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.weak import WeakTensorKeyDictionary


@contextmanager
def parameters_without_numbers() -> Iterator[None]:
    """Put every parameter that is registered inside on the meta device, and nothing else.

    Other tensors have their numbers, which some builders read: RegNet's widths, rates of stochastic depth.
    """
    empty = _Emptied()

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        return empty.of(parameter)

    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        hook = register_module_parameter_registration_hook(on_meta)
        try:
            yield
        finally:
            hook.remove()


def without_numbers(model: nn.Module) -> nn.Module:
    """Return ``model`` itself, its parameters and buffers on the meta device."""
    empty = _Emptied()
    for module in model.modules():
        module._parameters.update({key: empty.of(own) for key, own in module._parameters.items()})
    return model.to("meta")  # the buffers


class _Emptied:
    """Parameters on the meta device in place of others; one that is registered twice stays one."""

    def __init__(self) -> None:
        self._known = WeakTensorKeyDictionary()

    def of(self, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or isinstance(parameter, nn.UninitializedParameter):
            return parameter
        if parameter not in self._known:
            self._known[parameter] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        found: nn.Parameter = self._known[parameter]
        return found
