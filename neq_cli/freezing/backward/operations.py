"""Convolution and linear map, forward and backward: whole, or for some rows of the weight as a smaller layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from neq_cli.freezing.model.layouts import RowLayout

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of input, weight and bias; None where not asked for."""


@dataclass(frozen=True)
class Slice:
    """Rows of a weight with ``groups`` groups of as many rows each, as one smaller layer.

    ``computed`` are all rows of that smaller layer, group by group, ``kept`` the places in it of those that train (the
    others are there to fill up). ``inputs`` are the input channels of its groups; None: all of the layer's.
    """

    computed: Tensor  # int64, [rows computed]
    kept: Tensor | None  # int64, [rows kept]; None: all
    trainable: Tensor  # int64, [rows kept]: computed[kept]
    groups: int
    inputs: Tensor | None  # int64

    def rows_of_weight(self, weight: Tensor, layout: RowLayout) -> Tensor:
        """Return the smaller layer's weight."""
        if layout.kind == "leading":
            return weight.index_select(0, self.computed)
        rows = layout.view(weight)[layout.index(weight, self.computed)]  # [rows, inputs per group, *kernel]
        return self._with_inputs_first(rows)

    def in_place_of_weight(self, weight: Tensor, layout: RowLayout) -> Tensor:
        """Return what looks like the smaller layer's weight, for kernels that do not read it; nothing is copied."""
        return (
            weight.narrow(0, 0, len(self.computed)) if layout.kind == "leading" else self.rows_of_weight(weight, layout)
        )

    def _with_inputs_first(self, rows: Tensor) -> Tensor:
        """Swap rows and inputs within each group: [groups * a, b, *kernel] becomes [groups * b, a, *kernel]."""
        return rows.reshape(self.groups, -1, *rows.shape[1:]).transpose(1, 2).flatten(0, 1)

    def gradient_of_weight(self, gradient: Tensor, weight: Tensor, layout: RowLayout) -> Tensor:
        """Return the whole weight's gradient, zero but for the trainable rows, from the smaller layer's."""
        if layout.kind != "leading":
            gradient = self._with_inputs_first(gradient)
        gradient = self.those_that_train(gradient)
        whole = torch.zeros_like(weight)
        if layout.kind == "leading":
            return whole.index_copy_(0, self.trainable, gradient)
        layout.view(whole).index_put_(layout.index(whole, self.trainable), gradient)
        return whole

    def gradient_of_bias(self, gradient: Tensor, rows: int) -> Tensor:
        """Return the gradient of a bias of ``rows``, zero but for the trainable ones, from the smaller layer's."""
        return gradient.new_zeros(rows).index_copy_(0, self.trainable, self.those_that_train(gradient))

    def those_that_train(self, gradient: Tensor) -> Tensor:
        """Return the trainable ones of the smaller layer's rows, [rows computed, ...]."""
        return gradient if self.kept is None else gradient.index_select(0, self.kept)

    def only_trainable(self, weight: Tensor, layout: RowLayout) -> Tensor:
        """Return the smaller layer's weight with zeros in the rows that are there to fill up: they pass no error."""
        if self.kept is None:
            return weight
        trains = torch.zeros_like(self.computed, dtype=weight.dtype).index_fill_(0, self.kept, 1)
        if layout.kind == "leading":
            return weight * trains.view(-1, *[1] * (weight.dim() - 1))
        by_group = trains.view(self.groups, 1, -1).expand(-1, len(weight) // self.groups, -1).flatten(0, 1)
        return weight * by_group.view(*by_group.shape, *[1] * (weight.dim() - 2))


def slice_rows(trainable: Tensor, *, groups: int, inputs: int, multiple: int, device: torch.device) -> Slice:
    """Return the smallest slice that holds the rows of ``trainable`` (bool, [rows], CPU, at least one true).

    Every group of it has as many rows, a ``multiple`` where the layer has so many; groups without a trainable row are
    left out. ``inputs`` are the input channels of one group. The slice's tensors lie on ``device``.
    """
    by_group = trainable.view(groups, -1)
    chosen = by_group.any(1).nonzero()
    by_group = by_group[chosen.squeeze(1)]
    most = int(by_group.sum(1).max())
    count = min(-(-most // multiple) * multiple, by_group.shape[1])
    # Trainable rows first, then as many frozen ones as fill the group up; both in their order.
    order = by_group.int().argsort(dim=1, descending=True, stable=True)[:, :count].sort(dim=1).values
    kept = by_group.gather(1, order).flatten()
    computed = (order + chosen * by_group.shape[1]).flatten()
    channels = None
    if len(chosen) < groups:
        channels = (chosen * inputs + torch.arange(inputs, device="cpu")).flatten().to(device)
    places = None if bool(kept.all()) else kept.nonzero().squeeze(1).to(device)
    computed = computed.to(device)
    return Slice(computed, places, computed if places is None else computed[places], len(chosen), channels)


class Operation(Protocol):
    """A map with a weight: what autograd would do for it, but for the rows and the gradients asked for."""

    @property
    def layout(self) -> RowLayout:
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

    def as_matrix(self, tensor: Tensor) -> Tensor | None:
        """Return an input or output as a view [positions, channels], if the map is a matrix product with it."""

    def from_matrix(self, matrix: Tensor, like: Tensor) -> Tensor:
        """Return what ``as_matrix`` made [positions, channels] of, in the shape and format of ``like``."""


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
    def layout(self) -> RowLayout:
        return RowLayout("transposed", self.groups) if self.transposed else RowLayout()

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

    def as_matrix(self, tensor: Tensor) -> Tensor | None:
        one_to_one = self.groups == 1 and not self.transposed and not any(self.padding) and set(self.stride) == {1}
        last = tensor.movedim(1, -1)
        return last.flatten(0, -2) if one_to_one and last.is_contiguous() else None

    def from_matrix(self, matrix: Tensor, like: Tensor) -> Tensor:
        return matrix.view(like.movedim(1, -1).shape).movedim(-1, 1)

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
    def layout(self) -> RowLayout:
        return RowLayout()

    def inputs_per_group(self, weight: Tensor) -> int:
        return weight.shape[1]

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if input.dim() > 2 and not input.is_contiguous() and not (input.requires_grad or weight.requires_grad):
            # Where nothing needs a gradient, matmul multiplies such an input sample by sample, not at once: on a CPU
            # an attention's projection took 2.8 times as long.
            return linear(input.reshape(-1, input.shape[-1]), weight, bias).view(*input.shape[:-1], len(weight))
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

    def as_matrix(self, tensor: Tensor) -> Tensor | None:
        return tensor.reshape(-1, tensor.shape[-1])

    def from_matrix(self, matrix: Tensor, like: Tensor) -> Tensor:
        return matrix.view(like.shape)


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
