"""The sliced operations are opaque to torch.compile, so that one graph serves every frozen set."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

from neq_cli.freezing.backward.functions import cast_for_autocast, no_view
from neq_cli.freezing.backward.gradients import GradientPlan
from neq_cli.freezing.backward.operations import Convolution, LinearMap, Operation

# Weak, since a plan leads to its Freezer, where somebody's callback does, and a module is for ever.
_plans: weakref.WeakValueDictionary[int, GradientPlan] = weakref.WeakValueDictionary()
_numbers = itertools.count()


class Slot:
    """Where compiled code finds the plan in force: by a number that stays the same as plans come and go."""

    def __init__(self) -> None:
        self.number = next(_numbers)
        self._plan: GradientPlan | None = None

    def put(self, plan: GradientPlan) -> None:
        self._plan = _plans[self.number] = plan


def apply_compiled(
    number: int, input: Tensor, weight: Tensor, bias: Tensor | None, arguments: list[list[int]]
) -> Tensor:
    """Return the output of an operation, recorded for the backward pass; ``arguments`` are those of ``_operation``.

    The input is kept and its gradient computed whatever is frozen: that the graph cannot tell.
    """
    input, weight, bias = cast_for_autocast(input, weight, bias)
    output: Tensor = torch.ops.neq.apply(number, input, weight, bias, *arguments)
    return output


def _operation(
    stride: list[int], padding: list[int], dilation: list[int], output_padding: list[int], groups: list[int]
) -> Operation:
    """Return a linear map where ``groups`` is empty; a transposed convolution where ``output_padding`` is not."""
    if not groups:
        return LinearMap()
    transposed = bool(output_padding)
    none = (0,) * len(stride)
    return Convolution(
        tuple(stride), tuple(padding), tuple(dilation), transposed, tuple(output_padding) or none, groups[0]
    )


@torch.library.custom_op("neq::apply", mutates_args=())
def _apply(
    number: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    output_padding: list[int],
    groups: list[int],
) -> Tensor:
    return no_view(_operation(stride, padding, dilation, output_padding, groups).forward(input, weight, bias))


@_apply.register_fake
def _(number: int, input: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    return _operation(*arguments).forward(input, weight, bias)


@torch.library.custom_op("neq::gradients", mutates_args=())
def _gradients(
    number: int,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    output_padding: list[int],
    groups: list[int],
    of_input: bool,
    of_bias: bool,
) -> list[Tensor]:
    """Return the gradients of input, weight and bias; without elements where not asked for."""
    operation = _operation(stride, padding, dilation, output_padding, groups)
    gradients = _plans[number].all_gradients(operation, grad_output, input, weight, (of_input, True, of_bias))
    forms = _forms(grad_output, input, weight, of_input=of_input, of_bias=of_bias, linear=not groups)
    return [_in_form(gradient, form) for gradient, form in zip(gradients, forms, strict=True)]


@_gradients.register_fake
def _(number: int, grad_output: Tensor, input: Tensor, weight: Tensor, *arguments: Any) -> list[Tensor]:
    *_, groups, of_input, of_bias = arguments
    return _forms(grad_output, input, weight, of_input=of_input, of_bias=of_bias, linear=not groups)


def _forms(
    grad_output: Tensor, input: Tensor, weight: Tensor, *, of_input: bool, of_bias: bool, linear: bool
) -> list[Tensor]:
    """Return tensors of the shapes and strides that compiled code is promised; what is in them does not count."""
    rows = grad_output.shape[-1 if linear else 1]
    return [
        torch.empty_like(input) if of_input else input.new_empty(0),
        torch.empty_like(weight),
        grad_output.new_empty(rows if of_bias else 0),
    ]


def _in_form(gradient: Tensor | None, form: Tensor) -> Tensor:
    if gradient is None:
        return form.zero_()
    return gradient if gradient.stride() == form.stride() else form.copy_(gradient)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    number, input, weight, bias, *ctx.arguments = inputs
    ctx.number, ctx.has_bias = number, bias is not None
    ctx.save_for_backward(input, weight)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    input, weight = ctx.saved_tensors
    of_input, of_bias = ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[3]
    of_inputs, of_weights, of_biases = torch.ops.neq.gradients(
        ctx.number, grad_output, input, weight, *ctx.arguments, of_input, of_bias
    )
    return (
        None,
        of_inputs if of_input else None,
        of_weights if ctx.needs_input_grad[2] else None,
        of_biases if of_bias else None,
        *[None] * len(ctx.arguments),
    )


_apply.register_autograd(_backward, setup_context=_setup)
