"""The two maps that own most of a network's weights, convolution and linear, forward and backward, whole or sliced."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from neq_cli.freezing.backward.slices import Slice
from neq_cli.freezing.model.neurons import Layout

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of input, weight and bias; None where not asked for."""


class Operation(Protocol):
    """A map with a weight: what autograd would do for it, but for the rows and the gradients asked for."""

    @property
    def layout(self) -> Layout:
        """How the weight's elements fall into rows."""

    @property
    def groups(self) -> int:
        """How many groups of rows see inputs of their own."""

    def inputs_per_group(self, weight: Tensor) -> int:
        """Return the input channels that one group of ``weight`` sees."""

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the output."""

    def backward(
        self, grad_output: Tensor, input: Tensor, weight: Tensor, *, of_input: bool, of_weight: bool, of_bias: bool
    ) -> Gradients:
        """Return the gradients asked for; ``input`` may be uninitialised memory where the weight's is not."""

    def gradient_of_bias(self, grad_output: Tensor, shape: torch.Size) -> Tensor:
        """Return the whole gradient of a bias of ``shape``."""

    def sliced(self, part: Slice) -> Operation:
        """Return the smaller layer's operation."""

    def outputs(self, grad_output: Tensor, part: Slice) -> Tensor:
        """Return the smaller layer's share of ``grad_output``."""

    def inputs(self, input: Tensor, part: Slice) -> Tensor:
        """Return the smaller layer's share of ``input``."""

    def whole_input_gradient(self, gradient: Tensor, input: Tensor, part: Slice) -> Tensor:
        """Return the gradient of the whole input from the smaller layer's."""


@dataclass(frozen=True)
class Convolution:
    """A convolution over one to three dimensions, or its transposed form; input is [batch, channels, *positions]."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    @property
    def layout(self) -> Layout:
        return Layout("transposed", self.groups) if self.transposed else Layout()

    def inputs_per_group(self, weight: Tensor) -> int:
        return weight.shape[0] // self.groups if self.transposed else weight.shape[1]

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.convolution(input, weight, bias, *self._arguments())

    def backward(
        self, grad_output: Tensor, input: Tensor, weight: Tensor, *, of_input: bool, of_weight: bool, of_bias: bool
    ) -> Gradients:
        sizes = [grad_output.shape[1]] if of_bias else None
        wanted = [of_input, of_weight, of_bias]
        gradients: Gradients = torch.ops.aten.convolution_backward(
            grad_output, input, weight, sizes, *self._arguments(), wanted
        )
        return gradients

    def gradient_of_bias(self, grad_output: Tensor, shape: torch.Size) -> Tensor:
        return grad_output.sum([0, *range(2, grad_output.dim())])

    def sliced(self, part: Slice) -> Convolution:
        return replace(self, groups=part.groups)

    def outputs(self, grad_output: Tensor, part: Slice) -> Tensor:
        return select_channels(grad_output, part.computed)

    def inputs(self, input: Tensor, part: Slice) -> Tensor:
        return input if part.inputs is None else select_channels(input, part.inputs)

    def whole_input_gradient(self, gradient: Tensor, input: Tensor, part: Slice) -> Tensor:
        if part.inputs is None:
            return gradient
        return torch.zeros_like(input).index_copy_(1, part.inputs, gradient)

    def _arguments(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups


@dataclass(frozen=True)
class PointwiseConvolution(Convolution):
    """A convolution whose kernel is one position: its weight gradient is one matrix product over all positions."""

    def backward(
        self, grad_output: Tensor, input: Tensor, weight: Tensor, *, of_input: bool, of_weight: bool, of_bias: bool
    ) -> Gradients:
        of_weight_only = of_bias_only = None
        if of_weight:
            steps = tuple(slice(None, None, step) for step in self.stride)
            seen = input[(slice(None),) * 2 + steps]
            # Two-dimensional views where the memory is channels_last; a copy otherwise.
            errors, values = (tensor.movedim(1, -1).flatten(0, -2) for tensor in (grad_output, seen))
            of_weight_only = (errors.t() @ values).view_as(weight)
        if of_bias:
            of_bias_only = self.gradient_of_bias(grad_output, grad_output.shape[1:2])
        of_input_only = None
        if of_input:
            of_input_only = super().backward(grad_output, input, weight, of_input=True, of_weight=False, of_bias=False)[
                0
            ]
        return of_input_only, of_weight_only, of_bias_only


@dataclass(frozen=True)
class LinearMap:
    """A linear map of the last dimension; input is [*, features]."""

    groups: int = 1

    @property
    def layout(self) -> Layout:
        return Layout()

    def inputs_per_group(self, weight: Tensor) -> int:
        return weight.shape[1]

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear(input, weight, bias)

    def backward(
        self, grad_output: Tensor, input: Tensor, weight: Tensor, *, of_input: bool, of_weight: bool, of_bias: bool
    ) -> Gradients:
        errors = grad_output.reshape(-1, grad_output.shape[-1])
        return (
            (errors @ weight).view(*grad_output.shape[:-1], weight.shape[1]) if of_input else None,
            errors.t() @ input.reshape(-1, input.shape[-1]) if of_weight else None,
            errors.sum(0) if of_bias else None,
        )

    def gradient_of_bias(self, grad_output: Tensor, shape: torch.Size) -> Tensor:
        return grad_output.sum_to_size(shape)  # whatever can be added to the output may stand there

    def sliced(self, part: Slice) -> LinearMap:
        return self

    def outputs(self, grad_output: Tensor, part: Slice) -> Tensor:
        return select_columns(grad_output.reshape(-1, grad_output.shape[-1]), part.computed)

    def inputs(self, input: Tensor, part: Slice) -> Tensor:
        return input.reshape(-1, input.shape[-1])

    def whole_input_gradient(self, gradient: Tensor, input: Tensor, part: Slice) -> Tensor:
        return gradient.view(input.shape)


def select_channels(tensor: Tensor, channels: Tensor) -> Tensor:
    """Return ``tensor[:, channels]`` in the memory format of ``tensor`` ([batch, channels, *positions]).

    In channels_last, ``index_select`` along dimension 1 would be slow and return the other.
    """
    last = tensor.movedim(1, -1)
    if tensor.dim() > 2 and last.is_contiguous() and not tensor.is_contiguous():
        chosen = select_columns(last.reshape(-1, tensor.shape[1]), channels)
        return chosen.view(*last.shape[:-1], len(channels)).movedim(-1, 1)
    return tensor.index_select(1, channels)


def select_columns(matrix: Tensor, columns: Tensor) -> Tensor:
    """Return ``matrix[:, columns]``."""
    if matrix.device.type == "cpu":
        # In half of index_select's time (measured on a Zen 4 core).
        return matrix.gather(1, columns.expand(len(matrix), -1))
    return matrix.index_select(1, columns)
