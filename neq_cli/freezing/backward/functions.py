"""Operations are recorded by autograd with some rows' gradients, or the input's alone; no output is a view."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from neq_cli.freezing.backward.operations import Operation

if TYPE_CHECKING:
    from neq_cli.freezing.backward.gradients import GradientPlan


_BATCHED: Any = torch._C._parse_dispatch_key("Batched")


class SomeRows(torch.autograd.Function):
    """The operation, with the gradients of a plan; a bias that is not the neurons' own (``owns_bias``) gets all of its.

    Where the weight is the neurons' own parameter (``own_weight``), the plan's hand may take the gradient of its rows.
    What it saves does not depend on the kernel, which the backward pass chooses.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        operation: Operation,
        plan: GradientPlan,
        owns_bias: bool,
        own_weight: bool,
    ) -> Tensor:
        ctx.operation, ctx.plan, ctx.own_weight = operation, plan, own_weight
        ctx.other_bias = None if bias is None or owns_bias else bias.shape
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight)
        return no_view(operation.forward(input, weight, bias))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 7
        input, weight = ctx.saved_tensors
        of_input, of_weight, of_bias = ctx.needs_input_grad[:3]
        wanted = (of_input, of_weight, of_bias and ctx.other_bias is None)
        hand = ctx.plan.hand() if ctx.own_weight and of_weight else None
        through, of_rows, of_biases = ctx.plan.gradients(
            ctx.operation, grad_output, input, weight, wanted, rows_alone=hand is not None
        )
        if hand is not None:
            hand(of_rows)
            of_rows = None
        return through, of_rows, _whole_if_other(ctx, grad_output, of_biases), None, None, None, None


class InputOnly(torch.autograd.Function):
    """An operation that passes the error on, or nothing where it is ``blocked``; of its input it keeps the shape.

    Of what else it is given only a bias that is not the neurons' own (``owns_bias``) gets a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        operation: Operation,
        blocked: bool,
        owns_bias: bool,
    ) -> Tensor:
        ctx.operation, ctx.blocked = operation, blocked
        ctx.other_bias = None if bias is None or owns_bias else bias.shape
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight)
        ctx.shape, ctx.memory_format = input.shape, memory_format_of(input)
        return no_view(operation.forward(input, weight, bias))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 6
        of_input = None
        if ctx.needs_input_grad[0] and not ctx.blocked:
            (weight,) = ctx.saved_tensors
            # Memory of the input's shape and format, which no kernel reads: it is not even initialised.
            like = torch.empty(
                ctx.shape, dtype=grad_output.dtype, device=grad_output.device, memory_format=ctx.memory_format
            )
            of_input, _, _ = ctx.operation.backward(
                grad_output, like, weight, of_input=True, of_weight=False, of_bias=False
            )
        return of_input, None, _whole_if_other(ctx, grad_output, None), None, None, None


class Scaled(torch.autograd.Function):
    """A function of the input whose derivative is a scale per channel: the input is not kept."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, scale: Tensor, function: Any) -> Tensor:
        ctx.save_for_backward(scale)
        return no_view(cast(Tensor, function(input)))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (scale,) = ctx.saved_tensors
        return grad_output * scale.view(-1, *[1] * (grad_output.dim() - 2)).to(grad_output.dtype), None, None


def _whole_if_other(ctx: Any, grad_output: Tensor, own: Tensor | None) -> Tensor | None:
    """Return the gradient of the bias: ``own``, the neurons', but for another one, which always trains whole."""
    if ctx.other_bias is None or not ctx.needs_input_grad[2]:
        return own
    gradient: Tensor = ctx.operation.gradient_of_bias(grad_output, ctx.other_bias)
    return gradient


def no_view(output: Tensor) -> Tensor:
    """Return ``output`` as a tensor that is not a view, without a copy; nobody else may hold what it is a view of.

    A linear map may return a view of a two-dimensional result, and autograd lets nobody overwrite a Function's views.
    """
    return cast(Tensor, torch.ops.aten._unsafe_view.default(output, output.shape)) if output._is_view() else output


def memory_format_of(tensor: Tensor) -> torch.memory_format:
    """Return the channels_last format that ``tensor`` is in, else the contiguous one."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    memory_format = formats.get(tensor.dim(), torch.contiguous_format)
    if tensor.is_contiguous() or not tensor.is_contiguous(memory_format=memory_format):
        return torch.contiguous_format
    return memory_format


def is_vectorised(error: Tensor) -> bool:
    """Return whether ``error`` stands for many at once, as under ``torch.vmap`` or with ``is_grads_batched``."""
    return in_transform() or torch._C._dispatch_keys(error).has(_BATCHED)


def in_transform() -> bool:
    """Return whether a transform of torch.func runs, which differentiates and batches what our Functions hide."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def cast_for_autocast(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast as autocast would inside the operation: there, in an autograd function, the casts would not be recorded."""
    kind = input.device.type
    if not torch.is_autocast_enabled(kind):
        return input, weight, bias
    dtype = torch.get_autocast_dtype(kind)

    def cast(tensor: Tensor) -> Tensor:
        eligible = tensor.is_floating_point() and tensor.dtype != torch.float64 and tensor.device.type == kind
        return tensor.to(dtype) if eligible else tensor

    return cast(input), cast(weight), None if bias is None else cast(bias)
