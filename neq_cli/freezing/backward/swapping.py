"""Modules change class while a frozen set is in force: to subclasses that compute fewer gradients."""

from __future__ import annotations

import copyreg
import threading
from collections.abc import Callable, Iterable
from functools import cache, wraps
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from neq_cli.errors import FreezingError
from neq_cli.freezing.backward.functions import Scaled, in_transform
from neq_cli.freezing.backward.intercepting import WatchedWeights, intercepted
from neq_cli.freezing.model.layers import BATCH_NORMS

OURS = "_neq_"
"""What the names of all that we put into a module begin with."""
PLAN, NUMBER = "_neq_plan", "_neq_number"
_OWN, _STILL = "_neq_own", "_neq_still"


class Identities:
    """Knows ``parameters`` by their identities; ``seen``: of a sharded model, what stands in their places now."""

    def __init__(self, parameters: Iterable[Tensor], seen: Callable[[Tensor], Tensor] | None = None) -> None:
        self.parameters, self.seen = tuple(parameters), seen
        self._own = frozenset(map(id, self.parameters))

    def __contains__(self, identity: int) -> bool:
        seen = self.seen
        return identity in self._own or (seen is not None and any(identity == id(seen(p)) for p in self.parameters))


def swap_frozen(module: nn.Module, owned: Identities) -> None:
    """Have ``module`` compute no gradient of the parameters ``owned``."""
    swap(module, _FrozenBatchNorm if _is_batch_norm(module) else _Frozen, owned)


def swap_intercepting(module: nn.Module, weights: WatchedWeights) -> None:
    """Have ``module`` pass ``weights`` to ``torch.nn.functional.linear`` by their plans."""
    swap(module, _Intercepting, weights)


def swap_still(module: nn.Module, parameters: Identities) -> None:
    """Have ``module`` give those of its own ``parameters`` to forward passes of the model detached.

    On top of what else it is. The model must be told to count its forward passes, by ``swap_root``, last of all.
    """
    vars(module)[_STILL] = parameters
    module.__class__ = subclass(cast(Any, _Still), cast(Any, type(module)))


def swap_root(module: nn.Module) -> None:
    """Have the model's own forward pass be known while it runs, on top of what else it is."""
    module.__class__ = subclass(cast(Any, _Root), cast(Any, type(module)))


def restore(module: nn.Module) -> None:
    """Give ``module`` its own class back."""
    if isinstance(module, Swapped):
        for key in [key for key in vars(module) if key.startswith(OURS)]:
            del vars(module)[key]
        module.__class__ = _own_class(type(module))


def swap(module: nn.Module, swapped: type[Swapped], plan: object) -> None:
    """Have ``module`` be of a subclass of its own class that does what ``swapped`` does, by its ``plan``."""
    vars(module)[PLAN] = plan
    if not isinstance(module, Swapped):
        module.__class__ = subclass(cast(Any, swapped), cast(Any, type(module)))


@cache
def subclass(swapped: Any, own: Any) -> Any:
    """Return the subclass of ``own`` that does what ``swapped`` does."""
    members = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__, _OWN: own}
    if swapped.takes_anything:  # what asks for what the module takes finds it

        @wraps(own.forward)
        def forward(self: Any, *arguments: Any, **keywords: Any) -> Any:
            return swapped.forward(self, *arguments, **keywords)

        members["forward"] = forward
    return type(own.__name__, (swapped, own), members)


def _own_class(kind: Any) -> Any:
    """Return the class that ``kind`` would be had no module been swapped."""
    if not issubclass(kind, Swapped):
        return kind
    if _OWN in vars(kind):
        return _own_class(vars(kind)[_OWN])
    # Made of the swapped class by others, as torch.nn.utils.parametrize does for each module.
    members = {key: value for key, value in vars(kind).items() if key not in ("__dict__", "__weakref__")}
    return type(kind.__name__, tuple(map(_own_class, kind.__bases__)), members)


def _is_batch_norm(module: nn.Module) -> bool:
    kinds = [kind for kind in BATCH_NORMS if isinstance(module, kind)]
    return bool(kinds) and kinds[0] is not nn.SyncBatchNorm and type(module).forward is nn.BatchNorm2d.forward


class Swapped(nn.Module):
    """What a module is while a frozen set is in force; copies and pickles of it are of its own class again."""

    takes_anything = False  # its forward passes on whatever it is given

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        _, _, state, *rest = reduced
        # What object itself uses, but for the newer protocols, where pickle insists on the class that self has now.
        make = copyreg._reconstructor  # type: ignore[attr-defined]
        state = {key: value for key, value in state.items() if not key.startswith(OURS)}
        return (make, (_own_class(type(self)), object, None), state, *rest)

    def __prepare_scriptable__(self) -> Any:
        name = _own_class(type(self)).__name__
        raise FreezingError(
            f"torch.jit.script: a {name} of this model computes fewer gradients, which cannot be scripted; "
            "script it inside `with freezer.suspended():`, or after freezer.detach()"
        )


def stands_aside() -> bool:
    """Whether modules compute as their own class does: nobody differentiates, or a transform does that cannot see
    through our Functions (torch.func, forward mode, tracing, export)."""
    if torch.compiler.is_compiling():
        # Not `is_exporting()`: to what torch.compile traces in torch 2.9 that is always true.
        return not torch.is_grad_enabled() or torch.compiler._is_exporting_flag
    return not torch.is_grad_enabled() or in_transform() or torch._C._is_tracing() or forward_ad._current_level >= 0


class _Frozen(Swapped):
    """Any other layer with no trainable neuron: its parameters take no part in the backward pass."""

    takes_anything = True

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        if stands_aside():
            return super().forward(*arguments, **keywords)
        own, state = self._parameters, vars(self)
        state["_parameters"] = {
            name: parameter.detach() if parameter is not None and id(parameter) in state[PLAN] else parameter
            for name, parameter in own.items()
        }
        # Recurrent modules have their weights in a list of their own beside the usual place.
        flat = state.get("_flat_weights")
        if flat is not None:
            state["_flat_weights"] = [one.detach() if id(one) in state[PLAN] else one for one in flat]
        try:
            return super().forward(*arguments, **keywords)
        finally:
            state["_parameters"] = own
            if flat is not None:
                state["_flat_weights"] = flat


class _FrozenBatchNorm(_Frozen):
    """Batch normalisation with no trainable neuron: by its running statistics it is a fixed scale and shift."""

    def forward(self, input: Tensor) -> Tensor:
        module = cast(nn.BatchNorm2d, self)
        others = any(p is not None and id(p) not in vars(self)[PLAN] for p in self._parameters.values())
        if others or module.training or module.running_var is None or stands_aside() or not input.requires_grad:
            return cast(Tensor, super().forward(input))
        scale = torch.rsqrt(module.running_var + module.eps)
        if module.weight is not None:
            scale = scale * module.weight.detach()
        return cast(Tensor, Scaled.apply(input, scale, super().forward))


class _Intercepting(Swapped):
    """A module that passes the weights of layers with frozen neurons to ``torch.nn.functional.linear``."""

    takes_anything = True

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        if stands_aside():
            return super().forward(*arguments, **keywords)
        with intercepted(vars(self)[PLAN].by_identity()):
            return super().forward(*arguments, **keywords)


class _Forward(threading.local):
    """How many forward passes of models with a frozen front this thread is in."""

    depth = 0


_forward = _Forward()


class _Root(Swapped):
    """A model whose forward pass is known while it runs."""

    takes_anything = True

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        _forward.depth += 1
        try:
            return super().forward(*arguments, **keywords)
        finally:
            _forward.depth -= 1


class _Still(Swapped):
    """A module with parameters outside neurons that stand still: a forward pass of the model, or a part of one that
    activation checkpointing repeats, gets them detached. Whoever else asks gets the parameters themselves."""

    def __getattr__(self, name: str) -> Any:
        value: Any = nn.Module.__getattr__(self, name)
        still = vars(self).get(_STILL)
        if still is None or id(value) not in still or stands_aside():
            return value
        running = _forward.depth > 0 or torch._C._current_graph_task_id() != -1
        return value.detach() if running else value
