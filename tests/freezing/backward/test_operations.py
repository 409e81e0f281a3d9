from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from neq_cli.freezing.backward.operations import (
    Convolution,
    LinearMap,
    Operation,
    PointwiseConvolution,
    select_channels,
)
from neq_cli.freezing.backward.slices import slice_rows


def convolution(kind: type[Convolution] = Convolution, **changes: object) -> Convolution:
    usual = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "transposed": False, "output_padding": (0, 0)}
    return kind(**{**usual, "groups": 1, **changes})  # type: ignore[arg-type]


Stock = Callable[[Tensor, Tensor, Tensor | None], Tensor]
functional = nn.functional
# Operation, PyTorch's own function, input and weight.
CASES: dict[str, tuple[Operation, Stock, tuple[int, ...], tuple[int, ...]]] = {
    "linear": (LinearMap(), functional.linear, (5, 4), (3, 4)),
    "linear on one vector": (LinearMap(), functional.linear, (4,), (3, 4)),
    "linear on images": (LinearMap(), functional.linear, (2, 5, 3, 4), (3, 4)),
    "conv": (
        convolution(stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
        lambda x, w, b: functional.conv2d(x, w, b, (2, 1), (1, 0), (1, 2)),
        (2, 4, 7, 6),
        (6, 4, 3, 2),
    ),
    "grouped conv": (
        convolution(groups=2),
        lambda x, w, b: functional.conv2d(x, w, b, groups=2),
        (2, 4, 5, 5),
        (6, 2, 3, 3),
    ),
    "transposed conv": (
        convolution(transposed=True, stride=(2, 2), output_padding=(1, 0), groups=2),
        lambda x, w, b: functional.conv_transpose2d(x, w, b, 2, 0, (1, 0), 2),
        (2, 4, 3, 3),
        (4, 3, 2, 2),
    ),
    "conv over one dimension": (
        convolution(stride=(2,), padding=(1,), dilation=(1,), output_padding=(0,)),
        lambda x, w, b: functional.conv1d(x, w, b, 2, 1),
        (2, 4, 7),
        (6, 4, 3),
    ),
    "pointwise": (convolution(PointwiseConvolution), functional.conv2d, (2, 4, 3, 5), (6, 4, 1, 1)),
    "strided pointwise": (
        convolution(PointwiseConvolution, stride=(2, 3)),
        lambda x, w, b: functional.conv2d(x, w, b, (2, 3)),
        (2, 4, 6, 5),
        (6, 4, 1, 1),
    ),
}


def rows(operation: Operation, weight: Tensor) -> int:
    return operation.layout.count(weight)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_autograd_and_only_those_asked_for(name: str, channels_last: bool) -> None:
    operation, stock, input_shape, weight_shape = CASES[name]
    input = torch.randn(input_shape, dtype=torch.float64)
    if channels_last and len(input_shape) == 4:
        input = input.to(memory_format=torch.channels_last)
    weight = torch.randn(weight_shape, dtype=torch.float64)
    bias = torch.randn(rows(operation, weight), dtype=torch.float64)
    leaves = [tensor.clone().requires_grad_() for tensor in (input, weight, bias)]
    output = stock(*leaves)
    error = torch.randn_like(output)
    expected = torch.autograd.grad(output, leaves, error)
    torch.testing.assert_close(operation.forward(input, weight, bias), output.detach())
    for wanted in itertools.product([False, True], repeat=3):
        found = operation.backward(error, input, weight, of_input=wanted[0], of_weight=wanted[1], of_bias=wanted[2])
        for asked, gradient, truth in zip(wanted, found, expected, strict=True):
            if asked:
                torch.testing.assert_close(gradient, truth)
            else:
                assert gradient is None


@pytest.mark.parametrize("name", CASES)
def test_the_smaller_layer_is_the_layer_on_its_share(name: str) -> None:
    operation, stock, input_shape, weight_shape = CASES[name]
    input, weight = (torch.randn(shape, dtype=torch.float64) for shape in (input_shape, weight_shape))
    count = rows(operation, weight)
    per_group = count // operation.groups
    # Only the last group, where there are several, and one row of it less.
    trainable = torch.arange(count) > count - per_group
    if operation.groups == 1:
        trainable[:2] = torch.tensor([True, False])
    part = slice_rows(
        trainable,
        groups=operation.groups,
        inputs=operation.inputs_per_group(weight),
        multiple=1,
        device=torch.device("cpu"),
    )
    smaller = operation.sliced(part)
    assert smaller.groups == part.groups == 1
    assert type(smaller) is type(operation)
    output = operation.forward(input, weight, None)
    share = smaller.forward(operation.inputs(input, part), part.rows_of_weight(weight, operation.layout), None)
    torch.testing.assert_close(share, operation.outputs(output, part))

    # The gradient of the smaller layer's input, put back: the error through those rows alone.
    leaf = input.clone().requires_grad_()
    error = torch.randn_like(output)
    axis = -1 if isinstance(operation, LinearMap) else 1
    shape = [count if place == axis % output.dim() else 1 for place in range(output.dim())]
    (expected,) = torch.autograd.grad(stock(leaf, weight, None), leaf, error * trainable.view(shape))
    through, _, _ = smaller.backward(
        operation.outputs(error, part),
        operation.inputs(input, part),
        part.rows_of_weight(weight, operation.layout),
        of_input=True,
        of_weight=False,
        of_bias=False,
    )
    torch.testing.assert_close(operation.whole_input_gradient(through, input, part), expected)


@pytest.mark.parametrize("shape", [(2, 5), (2, 5, 3), (2, 5, 3, 4), (2, 5, 3, 4, 2)])
def test_channels_are_selected_in_the_format_that_they_came_in(shape: tuple[int, ...]) -> None:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for memory_format in (torch.contiguous_format, formats.get(len(shape), torch.contiguous_format)):
        tensor = torch.randn(shape).to(memory_format=memory_format)
        chosen = select_channels(tensor, torch.tensor([3, 0, 4]))
        assert torch.equal(chosen, torch.stack([tensor[:, 3], tensor[:, 0], tensor[:, 4]], 1))
        assert chosen.is_contiguous(memory_format=memory_format)
