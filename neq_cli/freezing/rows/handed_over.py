"""Gradients of trainable rows are handed over as they were computed, and made whole when somebody looks at them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_map_only

Hand = Callable[[Tensor], None]
"""Takes the gradient of a weight's trainable rows, [rows that train, ...], in autograd's place."""


class RowsGradient(Tensor):
    """A parameter's gradient that is zero but in some ``rows`` (int64, [k]), of which it has the ``values`` ([k, ...]).

    Whatever is done with it is done with the whole, which is made then and takes its place: clipping, scaling, hooks,
    prints and all else see a gradient like any other.
    """

    rows: Tensor
    handed: Tensor | None  # the values; None once the whole is made

    @staticmethod
    def __new__(cls, parameter: nn.Parameter, rows: Tensor, values: Tensor) -> RowsGradient:
        return Tensor._make_wrapper_subclass(
            cls, parameter.shape, strides=parameter.stride(), dtype=values.dtype, device=values.device
        )

    def __init__(self, parameter: nn.Parameter, rows: Tensor, values: Tensor) -> None:
        super().__init__()
        self.rows, self.handed = rows, values
        self._parameter = weakref.ref(parameter)
        self._whole: Tensor | None = None

    def whole(self) -> Tensor:
        """Return the whole gradient, the same tensor every time."""
        if self._whole is None:
            assert self.handed is not None
            parameter = cast(Tensor, self._parameter())
            whole = torch.zeros_like(parameter, dtype=self.handed.dtype, requires_grad=False)
            self._whole, self.handed = whole.index_copy_(0, self.rows, self.handed), None
        return self._whole

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        """Do with the whole what Python code asks for, and put the whole into the gradient's place."""
        if id(getattr(function, "__self__", None)) in _FORM:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*arguments, **(keywords or {}))
        return function(*_whole_in(arguments, replace=True), **_whole_in(keywords or {}, replace=True))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        """Do with the whole what autograd asks for, which adds another gradient in its place."""
        return function(*_whole_in(arguments, replace=False), **_whole_in(keywords or {}, replace=False))


# What the form alone tells, without a look at the values.
_FORM = frozenset(map(id, (Tensor.shape, Tensor.dtype, Tensor.device, Tensor.layout, Tensor.is_sparse)))


def _whole_in(value: Any, *, replace: bool) -> Any:
    def made(gradient: RowsGradient) -> Tensor:
        whole, parameter = gradient.whole(), gradient._parameter()
        if replace and parameter is not None and parameter.grad is gradient:
            parameter.grad = whole
        return whole

    return tree_map_only(RowsGradient, made, value)


def hand_for(parameter: nn.Parameter, rows: Tensor) -> Hand | None:
    """Return what takes the gradient of the ``rows`` of ``parameter`` in the running backward pass.

    None where it must go through autograd: there is a gradient already that is whole, hooks wait for it, or the pass
    does not fill ``.grad``, or is recorded itself.
    """
    gradient = parameter.grad
    before = None if gradient is None else rows_alone(gradient)
    if gradient is not None and before is None:
        return None
    # One is ours: it zeroes frozen rows.
    hooks = len(parameter._post_accumulate_grad_hooks or ()) - 1
    if parameter._backward_hooks or hooks > 0 or torch.is_grad_enabled() or not _is_filled(parameter):
        return None

    def take(values: Tensor) -> None:
        values = values.to(parameter.dtype)
        parameter.grad = RowsGradient(parameter, rows, values if before is None else before + values)

    return take


def _is_filled(parameter: nn.Parameter) -> bool:
    try:
        return bool(torch._C._will_engine_execute_node(get_gradient_edge(parameter).node))
    except RuntimeError:  # the pass is one of torch.autograd.grad with respect to the parameter
        return False


def rows_alone(gradient: Tensor) -> Tensor | None:
    """Return the values of a gradient that has nothing but its rows; None of any other."""
    return gradient.handed if isinstance(gradient, RowsGradient) else None


def whole_gradient(gradient: Tensor) -> Tensor:
    """Return ``gradient``, or the whole that was made of it."""
    return gradient.whole() if isinstance(gradient, RowsGradient) else gradient
