"""Optimisers that work row by row are told from those that mix rows, which are refused, by name or after a trial."""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.hooks import RemovableHandle

from neq_cli.errors import FreezingError
from neq_cli.freezing.model.layers import Layer
from neq_cli.freezing.rows.trial import updates_row_by_row

ROW_WISE_OPTIMIZERS = frozenset(
    ["SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "Adagrad", "Adadelta", "ASGD"]
)
MIXING_OPTIMIZERS: Mapping[str, str] = {
    "LBFGS": "its update mixes all parameters",
    "Adafactor": "its second moments mix the rows of a weight",
    "Muon": "it orthogonalises each weight, which mixes the rows",
    "SparseAdam": "it takes sparse gradients only",
}
# These pass everything on to the optimiser in their attribute ``optimizer``, and update nothing themselves.
_DELEGATES = {
    "AcceleratedOptimizer": ("accelerate",),
    "LightningOptimizer": ("lightning", "pytorch_lightning"),
    "_FabricOptimizer": ("lightning", "lightning_fabric"),
}


def unwrap_optimizer(optimizer: Any) -> Optimizer:
    """Return the optimiser inside what accelerate and Lightning put around it.

    Raises FreezingError where that is no ``torch.optim.Optimizer``.
    """
    while any(kind.__module__.split(".")[0] in _DELEGATES.get(kind.__name__, ()) for kind in type(optimizer).__mro__):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise FreezingError(
            f"optimizer: {type(optimizer).__name__} is no torch.optim.Optimizer, so that nothing can be done around "
            "its steps; give the one that it uses"
        )
    return optimizer


def with_inner(optimizer: Optimizer) -> list[Optimizer]:
    """Return ``optimizer`` and all those that it wraps, in its attributes or in lists and dictionaries there."""
    found = [optimizer]
    for one in found:
        found += [
            inner for inner in _optimizers_in(vars(one).values(), 2) if all(inner is not known for known in found)
        ]
    return found


def _optimizers_in(values: Iterable[Any], depth: int) -> Iterator[Optimizer]:
    for value in values:
        if isinstance(value, Optimizer):
            yield value
        elif depth and isinstance(value, (list, tuple, dict)):
            yield from _optimizers_in(value.values() if isinstance(value, dict) else value, depth - 1)


def make_hookable(optimizer: Optimizer) -> None:
    """Have hooks around the steps of an optimiser that never called its base class's constructor, as wrappers do."""
    for when in ("step_pre", "step_post", "load_state_dict_pre", "load_state_dict_post"):
        vars(optimizer).setdefault(f"_optimizer_{when}_hooks", OrderedDict())
    step = optimizer.step
    if getattr(step, "hooked", False):
        return

    @functools.wraps(step)
    def run(self: Optimizer, *arguments: Any, **keywords: Any) -> Any:
        return step(*arguments, **keywords)

    # On the instance, as learning rate schedulers do: others of its class have no hooks that could be called.
    hooked: Any = Optimizer.profile_hook_step(run)
    hooked.hooked = True
    vars(optimizer)["step"] = MethodType(hooked, optimizer)


def first_after_step(optimizer: Optimizer, hook: Callable[..., None]) -> RemovableHandle:
    """Have ``hook`` called after every step, before the other hooks there; torch itself can only put one last."""
    handle = optimizer.register_step_post_hook(hook)
    optimizer._optimizer_step_post_hooks.move_to_end(handle.id, last=False)  # type: ignore[attr-defined]
    return handle


def check_optimizer(optimizer: Optimizer, layers: Mapping[str, Layer], names: Mapping[str, nn.Parameter]) -> None:
    """Raise FreezingError where the optimiser does not update row by row, so that frozen rows could not be kept.

    Classes outside torch.optim are tried: a deep copy acts on small copies of all its parameters. ``layers`` say which
    rows of the parameters, by their ``names``, are neurons.
    """
    refuse_by_name(optimizer)
    kind = type(optimizer)
    if _is_stock(kind) and kind.__name__ in ROW_WISE_OPTIMIZERS:
        return
    layouts = {id(names[rows.parameter]): rows.layout for layer in layers.values() for rows in layer.rows}
    try:
        by_row, trial = updates_row_by_row(with_inner(optimizer), layouts)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise FreezingError(
            f"optimizer: {kind.__name__} could not be tried for row-wise updates ({reason}); if it updates element by "
            "element, vouch for it with Freezer(..., row_wise=True)"
        ) from error
    if not by_row:
        raise FreezingError(
            f"optimizer: {kind.__name__} mixes the rows of a weight, so that none can be frozen; "
            "use one that updates element by element, such as SGD or AdamW"
        )
    for parameter in (one for group in trial[0].param_groups for one in group["params"]):
        row_state(trial, parameter)


def refuse_by_name(optimizer: Optimizer) -> None:
    """Raise FreezingError where the optimiser, or one that it wraps, is known to mix rows."""
    for one in with_inner(optimizer):
        for kind in type(one).__mro__:
            if _is_stock(kind) and kind.__name__ in MIXING_OPTIMIZERS:
                reason = MIXING_OPTIMIZERS[kind.__name__]
                raise FreezingError(
                    f"optimizer: {kind.__name__} cannot freeze neurons ({reason}); use SGD, AdamW or RMSprop"
                )


def _is_stock(kind: type) -> bool:
    return kind.__module__.startswith("torch.optim")


def steps_by_element(optimizer: Optimizer) -> bool:
    """Whether the optimiser is one of torch's own whose step is known to treat every element of plain tensors alike."""
    kind, groups = type(optimizer), optimizer.param_groups
    plain = all(type(one) is nn.Parameter for group in groups for one in group["params"])
    differentiable = any(group.get("differentiable") for group in groups)
    return _is_stock(kind) and kind.__name__ in ROW_WISE_OPTIMIZERS and plain and not differentiable


def keeps_no_state(optimizer: Optimizer, parameter: nn.Parameter) -> bool:
    """Whether the optimiser is one of torch's own that keeps nothing beside ``parameter``: SGD without momentum."""
    groups = [group for group in optimizer.param_groups if any(one is parameter for one in group["params"])]
    return type(optimizer) is SGD and not any(group["momentum"] for group in groups)


def state_of(optimizers: Sequence[Optimizer], parameter: nn.Parameter) -> Mapping[str, Any]:
    """Return what all ``optimizers`` keep beside a parameter, by key; those after the first add their number to it."""
    merged: Mapping[str, Any] = optimizers[0].state.get(parameter, {})
    for number, optimizer in enumerate(optimizers[1:], 1):
        if optimizer.state is not optimizers[0].state:  # wrappers may have the very state of the one inside
            state = optimizer.state.get(parameter, {})
            merged = {**merged, **{f"{key} {number}": value for key, value in state.items()}}
    return merged


def row_state(optimizers: Sequence[Optimizer], parameter: nn.Parameter) -> dict[str, Tensor]:
    """Return the parameter's state tensors that have its shape, by key; scalars, such as Adam's ``step``, advance.

    Raises FreezingError where a tensor is neither a scalar nor of the parameter's shape.
    """
    state = state_of(optimizers, parameter)
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    for key, value in tensors.items():
        if value.shape != parameter.shape and value.numel() != 1:
            raise FreezingError(
                f"optimizer: {type(optimizers[0]).__name__}'s state {key!r} has shape {list(value.shape)} beside a "
                f"parameter of shape {list(parameter.shape)}, so that no row of it can be held"
            )
    # A parameter of one element is all row; a scalar beside it is told apart by its number of dimensions.
    return {key: value for key, value in tensors.items() if value.shape == parameter.shape}


def largest_learning_rate(optimizer: Optimizer) -> float:
    """Return the largest of the groups' learning rates; NaN where the optimiser has none."""
    return max((float(group["lr"]) for group in optimizer.param_groups if "lr" in group), default=math.nan)
