"""What modules are while a frozen set is in force: subclasses of their own class that compute fewer gradients."""

from __future__ import annotations

import copyreg
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from neq_cli.errors import FreezingError
from neq_cli.freezing.compiled import apply_compiled
from neq_cli.freezing.functions import Scaled, in_transform
from neq_cli.freezing.neurons import BATCH_NORMS, Cost
from neq_cli.freezing.operations import Convolution, LinearMap
from neq_cli.freezing.plans import Plan

_PLAN, _NUMBER = "_neq_plan", "_neq_number"


@dataclass(frozen=True)
class Watched:
    """A weight that is passed to a function, by its plan; row i of it goes with ``bias[start + i]``, where one is."""

    plan: Plan
    bias: Tensor | None
    start: int


def swap_sliced(module: nn.Module, cost: Cost, plan: Plan, number: int) -> None:
    """Have ``module``, a convolution or linear layer, compute its gradients by ``plan``; ``number`` is of its slot."""
    vars(module)[_NUMBER] = number
    _swap(module, _SLICED[cost], plan)


def swap_frozen(module: nn.Module, owned: frozenset[str]) -> None:
    """Have ``module`` compute no gradient of its own parameters called ``owned``."""
    _swap(module, _FrozenBatchNorm if _is_batch_norm(module) else _Frozen, owned)


def swap_intercepting(module: nn.Module, plans: Mapping[int, Watched]) -> None:
    """Have ``module`` pass weights to ``torch.nn.functional.linear`` by ``plans``, by the weight's identity."""
    _swap(module, _Intercepting, plans)


def restore(module: nn.Module) -> None:
    """Give ``module`` its own class back."""
    if isinstance(module, _Swapped):
        vars(module).pop(_PLAN)
        vars(module).pop(_NUMBER, None)
        module.__class__ = _own_class(type(module))


def _swap(module: nn.Module, swapped: type[_Swapped], plan: object) -> None:
    vars(module)[_PLAN] = plan
    if not isinstance(module, _Swapped):
        module.__class__ = _subclass(cast(Any, swapped), cast(Any, type(module)))


@cache
def _subclass(swapped: Any, own: Any) -> Any:
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return type(own.__name__, (swapped, own), names)


def _own_class(kind: Any) -> Any:
    return kind.__bases__[1]


def _is_batch_norm(module: nn.Module) -> bool:
    kinds = [kind for kind in BATCH_NORMS if isinstance(module, kind)]
    return bool(kinds) and kinds[0] is not nn.SyncBatchNorm and type(module).forward is nn.BatchNorm2d.forward


class _Swapped(nn.Module):
    """What a module is while a frozen set is in force; copies and pickles of it are of its own class again."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        _, _, state, *rest = reduced
        # What object itself uses, but for the newer protocols, where pickle insists on the class that self has now.
        make = copyreg._reconstructor  # type: ignore[attr-defined]
        state = {key: value for key, value in state.items() if key not in (_PLAN, _NUMBER)}
        return (make, (_own_class(type(self)), object, None), state, *rest)

    def __prepare_scriptable__(self) -> Any:
        name = _own_class(type(self)).__name__
        raise FreezingError(
            f"torch.jit.script: a {name} of this model computes fewer gradients, which cannot be scripted; "
            "script it inside `with freezer.suspended():`, or after freezer.detach()"
        )


def _stands_aside() -> bool:
    """Whether modules compute as their own class does: nobody differentiates, or a transform does that cannot see
    through our Functions (torch.func, forward mode, tracing, export)."""
    if torch.compiler.is_compiling():
        # Not `is_exporting()`: to what torch.compile traces in torch 2.9 that is always true.
        return not torch.is_grad_enabled() or torch.compiler._is_exporting_flag
    return not torch.is_grad_enabled() or in_transform() or torch._C._is_tracing() or forward_ad._current_level >= 0


class _SlicedConvolution(_Swapped):
    """A convolution with frozen neurons."""

    def forward(self, input: Tensor) -> Tensor:
        if _stands_aside():
            return cast(Tensor, super().forward(input))
        module = cast(nn.Conv2d, self)
        padding, input = _padded(module, input)
        return _convolve(module, input, padding, ())


class _SlicedTransposedConvolution(_Swapped):
    """A transposed convolution with frozen neurons."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if _stands_aside():
            return cast(Tensor, super().forward(input, output_size))
        module = cast(nn.ConvTranspose2d, self)
        padding = cast("tuple[int, ...]", module.padding)
        sizes: Any = (module.stride, padding, module.kernel_size, len(module.kernel_size), module.dilation)
        return _convolve(module, input, padding, tuple(module._output_padding(input, output_size, *sizes)))


class _SlicedLinear(_Swapped):
    """A linear layer with frozen neurons."""

    def forward(self, input: Tensor) -> Tensor:
        if _stands_aside():
            return cast(Tensor, super().forward(input))
        module = cast(nn.Linear, self)
        if torch.compiler.is_compiling():
            return apply_compiled(cast(int, module._neq_number), input, module.weight, module.bias, [[]] * 5)
        plan: Plan = vars(self)[_PLAN]
        return plan.apply(LinearMap(), input, module.weight, module.bias)


class _Frozen(_Swapped):
    """Any other layer with no trainable neuron: its parameters take no part in the backward pass."""

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        if _stands_aside():
            return super().forward(*arguments, **keywords)
        own, state = self._parameters, vars(self)
        state["_parameters"] = {
            name: parameter.detach() if parameter is not None and name in state[_PLAN] else parameter
            for name, parameter in own.items()
        }
        try:
            return super().forward(*arguments, **keywords)
        finally:
            state["_parameters"] = own


class _FrozenBatchNorm(_Frozen):
    """Batch normalisation with no trainable neuron: by its running statistics it is a fixed scale and shift."""

    def forward(self, input: Tensor) -> Tensor:
        module = cast(nn.BatchNorm2d, self)
        if module.training or module.running_var is None or _stands_aside() or not input.requires_grad:
            return cast(Tensor, super().forward(input))
        scale = torch.rsqrt(module.running_var + module.eps)
        if module.weight is not None:
            scale = scale * module.weight.detach()
        return cast(Tensor, Scaled.apply(input, scale, super().forward))


class _Intercepting(_Swapped):
    """A module that passes the weights of layers with frozen neurons to ``torch.nn.functional.linear``."""

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        if _stands_aside():
            return super().forward(*arguments, **keywords)
        with _intercepted(vars(self)[_PLAN]):
            return super().forward(*arguments, **keywords)


_SLICED: Mapping[Cost, type[_Swapped]] = {
    "convolution": _SlicedConvolution,
    "transposed": _SlicedTransposedConvolution,
    "linear": _SlicedLinear,
}


def _padded(module: nn.Conv2d, input: Tensor) -> tuple[tuple[int, ...], Tensor]:
    """Return the padding left to the convolution, and the input with the rest of it done."""
    dimensions = len(module.kernel_size)
    if module.padding_mode != "zeros":
        padded = nn.functional.pad(input, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        return (0,) * dimensions, padded
    if module.padding == "valid":
        return (0,) * dimensions, input
    if module.padding != "same":
        return cast("tuple[int, ...]", module.padding), input
    totals = [step * (size - 1) for step, size in zip(module.dilation, module.kernel_size, strict=True)]
    # An odd total puts one more at the end, as PyTorch does.
    uneven = [side for total in reversed(totals) for side in (0, total % 2)]
    return tuple(total // 2 for total in totals), nn.functional.pad(input, uneven) if any(uneven) else input


def _convolve(module: Any, input: Tensor, padding: tuple[int, ...], output_padding: tuple[int, ...]) -> Tensor:
    """Return a convolution's output; a transposed one's where ``output_padding`` is given."""
    dimensions = len(module.kernel_size)
    if input.dim() == dimensions + 1:  # one sample, without a batch dimension
        return _convolve(module, input.unsqueeze(0), padding, output_padding).squeeze(0)
    if torch.compiler.is_compiling():
        sizes = [module.stride, padding, module.dilation, output_padding, [module.groups]]
        return apply_compiled(module._neq_number, input, module.weight, module.bias, [list(size) for size in sizes])
    transposed = bool(output_padding)
    operation = Convolution(
        module.stride, padding, module.dilation, transposed, output_padding or (0,) * dimensions, module.groups
    )
    plan: Plan = vars(module)[_PLAN]
    return plan.apply(operation, input, module.weight, module.bias)


class _Watched(threading.local):
    """The weights that this thread's running modules pass to functions, by identity."""

    plans: Mapping[int, Watched] = {}


_watched = _Watched()
_lock = threading.Lock()
_depth = 0
_stock_linear = nn.functional.linear


@contextmanager
def _intercepted(plans: Mapping[int, Watched]) -> Iterator[None]:
    """Send ``torch.nn.functional.linear`` with one of these weights, or a piece of one, through its plan."""
    global _depth, _stock_linear
    before, _watched.plans = _watched.plans, {**_watched.plans, **plans}
    with _lock:  # threads, as of DataParallel, may overlap: the first in replaces it, the last out puts it back
        if _depth == 0:
            _stock_linear, nn.functional.linear = nn.functional.linear, _sliced_linear
        _depth += 1
    try:
        yield
    finally:
        _watched.plans = before
        with _lock:
            _depth -= 1
            if _depth == 0:
                nn.functional.linear = _stock_linear


def _sliced_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # torch.split and chunk give views; `_base` is the parameter that they were cut from.
    whole = weight if id(weight) in _watched.plans else weight._base
    found = _watched.plans.get(id(whole))
    if found is None or whole is None or weight.shape[1:] != whole.shape[1:] or weight.stride() != whole.stride():
        return _stock_linear(input, weight, bias)  # not its rows, such as its transpose
    first = (int(weight.storage_offset()) - int(whole.storage_offset())) // max(whole.stride(0), 1)
    owns_bias = _is_piece(bias, found.bias, found.start + first, len(weight))
    return found.plan.chunk(first, len(weight)).apply(LinearMap(), input, weight, bias, owns_bias=owns_bias)


def _is_piece(bias: Tensor | None, own: Tensor | None, first: int, count: int) -> bool:
    """Whether ``bias`` is ``own[first : first + count]`` and not, say, something that was computed from it."""
    if bias is None or own is None or (bias is not own and bias._base is not own):
        return False
    place = int(bias.storage_offset()) - int(own.storage_offset())
    return bias.shape == (count,) and bias.stride() == own.stride() and place == first * own.stride(0)
