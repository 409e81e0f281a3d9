"""Torch's fused optimiser kernels: where they fit, and what they take for granted without looking.

By hand: torch publishes no list of what its fused kernels take.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from neq_cli.training.loop.checkpoint import restore_formats


def fits(kind: Callable[..., Optimizer], arguments: Mapping[str, Any], parameters: Sequence[Tensor]) -> bool:
    """Whether ``kind(parameters, **arguments)`` can work with ``fused=True`` and come to the same, up to rounding.

    Found by a trial on the parameters' devices and types, for torch has no list of what supports which. False where
    the arguments have a say in it already.
    """
    if "fused" not in inspect.signature(kind).parameters or {"fused", "foreach"} & set(arguments):
        return False
    if kind is SGD and arguments.get("momentum") and arguments.get("dampening"):
        return False  # its momentum starts undampened, which ``complete`` cannot prepare
    return all(_plain(one) for one in parameters) and _trial(kind, arguments, parameters)


def _plain(parameter: Tensor) -> bool:
    # The kernels walk through memory from the first element on, whatever the strides.
    dense = torch.empty_like(parameter, device="meta").stride() == parameter.stride()
    return type(parameter) in (Tensor, nn.Parameter) and dense


def _trial(kind: Callable[..., Optimizer], arguments: Mapping[str, Any], parameters: Sequence[Tensor]) -> bool:
    places = {(one.device, one.dtype) for one in parameters}
    small = [nn.Parameter(torch.zeros(2, device=device, dtype=dtype)) for device, dtype in places]
    for one in small:
        one.grad = torch.zeros_like(one)
    try:
        kind(small, **arguments, fused=True).step()
    except Exception:
        return False  # not on this device, not in this type, or wrong arguments, which are told without it
    return True


def complete(optimizer: Optimizer) -> None:
    """Make the state of a fused optimiser what its kernels take it for, now and whenever a state is loaded.

    Tensors are stored as their parameters are: the CPU's kernels pair elements by their place in memory. SGD's momentum
    is there from the start, at zero, which comes to the same: else it is garbage where GradScaler skips the first step,
    and a parameter whose first gradient comes later than others' is refused.
    """
    _complete(optimizer)
    optimizer.register_load_state_dict_post_hook(_complete)


def _complete(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        starts_at_zero = isinstance(optimizer, SGD) and group["momentum"] and not group["dampening"]
        for parameter in group["params"]:
            state = optimizer.state[parameter] if starts_at_zero else optimizer.state.get(parameter, {})
            if starts_at_zero and state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
    restore_formats(optimizer)
