"""Convolutions and linear layers with frozen neurons compute their gradients by a plan, or leave all to PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from neq_cli.freezing.backward.compiled import apply_compiled
from neq_cli.freezing.backward.gradients import GradientPlan
from neq_cli.freezing.backward.operations import Convolution, LinearMap, Operation
from neq_cli.freezing.backward.swapping import NUMBER, PLAN, Swapped, stands_aside, swap
from neq_cli.freezing.model.layouts import Cost


@dataclass(frozen=True)
class SlicedOperands:
    """The plan of a module's weight, and the weight and bias that it is for.

    Another weight that ``functional_call`` puts in its place for a call is no neuron's, nor is another bias.
    ``seen``: of a sharded model, what stands in a parameter's place while its module runs.
    """

    plan: GradientPlan
    weight: Tensor
    bias: Tensor | None
    seen: Callable[[Tensor], Tensor] | None = None

    def has_weight(self, weight: Tensor) -> bool:
        """Return whether ``weight`` is the one that the plan is for."""
        return weight is self.weight or (self.seen is not None and weight is self.seen(self.weight))

    def has_bias(self, bias: Tensor | None) -> bool:
        """Return whether ``bias`` is the one that the neurons own, or neither is there."""
        own = self.bias
        return bias is own or (self.seen is not None and own is not None and bias is self.seen(own))


def swap_sliced(module: nn.Module, cost: Cost, sliced: SlicedOperands, number: int) -> None:
    """Have ``module``, a convolution or linear layer, compute its gradients by a plan; ``number`` is of its slot."""
    vars(module)[NUMBER] = number
    swap(module, _SLICED[cost], sliced)


class _SlicedConvolution(Swapped):
    """A convolution with frozen neurons."""

    def forward(self, input: Tensor) -> Tensor:
        module = cast(nn.Conv2d, self)
        call = _call_of(input)
        if stands_aside() or _has_another_weight(module) or _is_pytorch(module, call):
            return cast(Tensor, super().forward(input))
        padding, input = _padded(module, input)
        return _convolve(module, input, padding, (), call)


class _SlicedTransposedConvolution(Swapped):
    """A transposed convolution with frozen neurons."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        module = cast(nn.ConvTranspose2d, self)
        if stands_aside() or _has_another_weight(module):
            return cast(Tensor, super().forward(input, output_size))
        padding = cast("tuple[int, ...]", module.padding)
        sizes: Any = (module.stride, padding, module.kernel_size, len(module.kernel_size), module.dilation)
        return _convolve(module, input, padding, tuple(module._output_padding(input, output_size, *sizes)))


class _SlicedLinear(Swapped):
    """A linear layer with frozen neurons."""

    def forward(self, input: Tensor) -> Tensor:
        module = cast(nn.Linear, self)
        call = _call_of(input)
        if stands_aside() or _has_another_weight(module) or _is_pytorch(module, call):
            return cast(Tensor, super().forward(input))
        if torch.compiler.is_compiling():
            return apply_compiled(cast(int, module._neq_number), input, module.weight, module.bias, [[]] * 5)
        return _apply(module, LinearMap(), input, call)


_SLICED: Mapping[Cost, type[Swapped]] = {
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


def _convolve(
    module: Any, input: Tensor, padding: tuple[int, ...], output_padding: tuple[int, ...], call: object = None
) -> Tensor:
    """Return a convolution's output; a transposed one's where ``output_padding`` is given."""
    dimensions = len(module.kernel_size)
    if input.dim() == dimensions + 1:  # one sample, without a batch dimension
        return _convolve(module, input.unsqueeze(0), padding, output_padding, call).squeeze(0)
    if torch.compiler.is_compiling():
        sizes = [module.stride, padding, module.dilation, output_padding, [module.groups]]
        return apply_compiled(module._neq_number, input, module.weight, module.bias, [list(size) for size in sizes])
    transposed = bool(output_padding)
    operation = Convolution(
        module.stride, padding, module.dilation, transposed, output_padding or (0,) * dimensions, module.groups
    )
    return _apply(module, operation, input, call)


def _apply(module: Any, operation: Operation, input: Tensor, call: object) -> Tensor:
    sliced: SlicedOperands = vars(module)[PLAN]
    bias = module.bias
    owns_bias, own_weight = sliced.has_bias(bias) or _is_replica(module), module.weight is sliced.weight
    return sliced.plan.apply(
        operation, input, module.weight, bias, owns_bias=owns_bias, own_weight=own_weight, call=call
    )


def _call_of(input: Tensor) -> object:
    """Return all that decides whether a module's forward pass is left to PyTorch; None where code is compiled."""
    if torch.compiler.is_compiling():
        return None
    kind = input.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return (input.shape, input.stride(), input.dtype, kind, input.requires_grad, autocast)


def _is_pytorch(module: nn.Module, call: object) -> bool:
    return call is not None and cast(SlicedOperands, vars(module)[PLAN]).plan.is_pytorch(call)


def _has_another_weight(module: nn.Module) -> bool:
    if torch.compiler.is_compiling():  # there the plan is not looked at, so that one graph serves all
        return False
    sliced, weight = cast(SlicedOperands, vars(module)[PLAN]), cast(Tensor, module.weight)
    return not (sliced.has_weight(weight) or _is_replica(module))


def _is_replica(module: nn.Module) -> bool:
    """Whether DataParallel made ``module``, whose parameters' gradients become those of the original's."""
    return "_is_replica" in vars(module)
