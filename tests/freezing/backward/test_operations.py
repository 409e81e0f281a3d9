from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from neq_cli.freezing.backward.operations import (
    Convolution,
    LinearMap,
    Operation,
    PointwiseConvolution,
    Slice,
    select_channels,
    slice_rows,
)
from neq_cli.freezing.model.layouts import RowLayout


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


CPU = torch.device("cpu")


def cut(trainable: str, *, groups: int = 1, inputs: int = 2, multiple: int = 1) -> Slice:
    """Slice rows written as text, one character each: x trains, . is frozen; spaces part the groups."""
    rows = torch.tensor([letter == "x" for letter in trainable if letter != " "])
    return slice_rows(rows, groups=groups, inputs=inputs, multiple=multiple, device=CPU)


def listed(tensor: Tensor | None) -> list[int] | None:
    return None if tensor is None else tensor.tolist()


@pytest.mark.parametrize(
    ("trainable", "groups", "multiple", "computed", "kept", "inputs"),
    [
        ("x.xx.", 1, 1, [0, 2, 3], None, None),
        ("x.xx.", 1, 4, [0, 1, 2, 3], [0, 2, 3], None),  # the first frozen row fills up
        ("x.xx.", 1, 8, [0, 1, 2, 3, 4], [0, 2, 3], None),  # there are no more
        ("..x..", 1, 2, [0, 2], [1], None),
        ("xxxxx", 1, 2, [0, 1, 2, 3, 4], None, None),
        ("x. .x", 2, 1, [0, 3], None, None),  # as many rows in each group
        ("xx. x..", 2, 1, [0, 1, 3, 4], [0, 1, 2], None),
        ("... x.. .xx", 3, 1, [3, 4, 7, 8], [0, 2, 3], [2, 3, 4, 5]),  # the first group is left out, its inputs too
        ("... x.. .xx", 3, 3, [3, 4, 5, 6, 7, 8], [0, 4, 5], [2, 3, 4, 5]),
        (". x . x", 4, 1, [1, 3], None, [2, 3, 6, 7]),  # depthwise
        (". x . x", 4, 8, [1, 3], None, [2, 3, 6, 7]),  # a group has no more rows than one
    ],
)
def test_slices_by_hand(
    trainable: str, groups: int, multiple: int, computed: list[int], kept: list[int] | None, inputs: list[int] | None
) -> None:
    part = cut(trainable, groups=groups, multiple=multiple)
    assert listed(part.computed) == computed
    assert listed(part.kept) == kept
    assert listed(part.inputs) == inputs
    assert part.groups == sum("x" in group for group in (trainable.split() if groups > 1 else [trainable]))
    assert listed(part.trainable) == [n for n, letter in enumerate(trainable.replace(" ", "")) if letter == "x"]


@settings(deadline=None, derandomize=True, max_examples=300)
@given(data=st.data(), groups=st.integers(1, 5), rows=st.integers(1, 20), multiple=st.sampled_from([1, 2, 8, 16]))
def test_any_slice_is_the_smallest_layer_that_holds_what_trains(
    data: st.DataObject, groups: int, rows: int, multiple: int
) -> None:
    size = groups * rows
    trains = data.draw(st.lists(st.booleans(), min_size=size, max_size=size).filter(any))
    part = slice_rows(torch.tensor(trains), groups=groups, inputs=3, multiple=multiple, device=CPU)
    expected = [number for number, one in enumerate(trains) if one]
    assert part.trainable.tolist() == expected
    computed = part.computed.tolist()
    assert computed == sorted(set(computed))
    assert (part.computed if part.kept is None else part.computed[part.kept]).tolist() == expected
    # As many rows of each group that has any, no more than the largest group needs, but for the multiple.
    by_group = [sum(row // rows == group for row in expected) for group in range(groups)]
    present = [group for group, count in enumerate(by_group) if count]
    each = min(-(-max(by_group) // multiple) * multiple, rows)
    assert [row // rows for row in computed] == [group for group in present for _ in range(each)]
    assert part.groups == len(present)
    channels = [3 * group + offset for group in present for offset in range(3)]
    assert listed(part.inputs) == (None if len(present) == groups else channels)


LAYOUTS = [
    (RowLayout(), 1, (6, 2, 3)),
    (RowLayout(), 3, (6, 2, 3)),
    (RowLayout("transposed", 1), 1, (2, 6, 3)),
    (RowLayout("transposed", 3), 3, (6, 2, 3)),  # [groups * inputs, rows, kernel]: 2 rows in each of 3 groups
]


def by_hand(layout: RowLayout, groups: int, shape: tuple[int, ...]) -> list[list[tuple[int, int]]]:
    """Return for each row the places [first, second dimension] of the weight that make it up."""
    if layout.kind == "leading":
        return [[(row, column) for column in range(shape[1])] for row in range(shape[0])]
    inputs = shape[0] // groups
    return [
        [(group * inputs + channel, row) for channel in range(inputs)]
        for group in range(groups)
        for row in range(shape[1])
    ]


@pytest.mark.parametrize("multiple", [1, 2])
@pytest.mark.parametrize(("layout", "groups", "shape"), LAYOUTS)
def test_rows_go_in_and_gradients_come_out(
    layout: RowLayout, groups: int, shape: tuple[int, ...], multiple: int
) -> None:
    weight = torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)
    places = by_hand(layout, groups, shape)
    trains = [True, False, False, False, True, True]
    part = slice_rows(torch.tensor(trains), groups=groups, inputs=2, multiple=multiple, device=CPU)
    small = part.rows_of_weight(weight, layout)
    # The smaller layer is laid out as the layer is, so that its own rows are found in the same way.
    found = by_hand(layout, part.groups, tuple(small.shape))
    assert len(found) == len(part.computed)
    for row, own in zip(part.computed.tolist(), found, strict=True):
        assert [small[place].tolist() for place in own] == [weight[place].tolist() for place in places[row]]

    whole = part.gradient_of_weight(small.clone(), weight, layout)
    alone = part.only_trainable(small, layout)
    for number, row in enumerate(part.computed.tolist()):
        expected = [weight[place].tolist() if trains[row] else [0.0] * 3 for place in places[row]]
        assert [alone[place].tolist() for place in found[number]] == expected
    for row, own in enumerate(places):
        assert [whole[place].tolist() for place in own] == [
            weight[place].tolist() if trains[row] else [0.0] * 3 for place in own
        ]
    biases = torch.arange(10.0, 16.0)
    of_bias = part.gradient_of_bias(biases[part.computed], 6)
    assert of_bias.tolist() == [10.0, 0.0, 0.0, 0.0, 14.0, 15.0]


def test_the_gradient_is_laid_out_as_the_weight_is() -> None:
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    part = cut("x..x", inputs=3)
    gradient = part.gradient_of_weight(part.rows_of_weight(weight, RowLayout()), weight, RowLayout())
    assert gradient.stride() == weight.stride()


class Called(TorchDispatchMode):
    """Notes which operations run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        self.names.add(function._overloadpacket.__name__)
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_linear_map_is_one_product_whether_or_not_it_needs_gradients(has_bias: bool) -> None:
    """Of an input as attention transposes it: without gradients, PyTorch would multiply sample by sample."""
    inputs, weight = torch.randn(2, 5, 3).transpose(0, 1), torch.randn(4, 3)
    bias = torch.randn(4) if has_bias else None
    with Called() as plain:
        expected = torch.nn.functional.linear(inputs, weight.clone().requires_grad_(), bias)
    with Called() as called:
        found = LinearMap().forward(inputs, weight, bias)
    assert "bmm" not in plain.names | called.names
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()
