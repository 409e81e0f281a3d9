from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from neq_cli.freezing.backward.dispatch import Dispatch, Kernel, KernelChoice
from neq_cli.freezing.backward.functions import cast_for_autocast, memory_format_of
from neq_cli.freezing.backward.gradients import GradientPlan
from neq_cli.freezing.backward.operations import Convolution, LinearMap, Operation


class Forced(Dispatch):
    """Chooses one kernel, and keeps which ones it was offered."""

    def __init__(self, kernel: Kernel = "sliced") -> None:
        super().__init__()
        self.kernel = kernel
        self.offered: list[Kernel] = []
        self.by_rule: Kernel | None = None

    def choose(
        self, kind: str, kernels: Sequence[Kernel], run: Callable[[Kernel], object], by_rule: Kernel, *_: Any
    ) -> KernelChoice:
        self.offered, self.by_rule = list(kernels), by_rule
        return KernelChoice(self.kernel, {})


def convolution(groups: int = 1, padding: int = 0, *, transposed: bool = False) -> Convolution:
    return Convolution((1, 1), (padding, padding), (1, 1), transposed, (0, 0), groups)


def first(count: int, rows: int) -> Tensor:
    return torch.arange(rows) < count


def leaves(*shapes: tuple[int, ...], of_input: bool = True) -> list[Tensor]:
    return [torch.randn(shape).requires_grad_(of_input or place > 0) for place, shape in enumerate(shapes)]


def saved_by(run: Callable[[], Tensor]) -> tuple[list[Tensor], Tensor]:
    """Return the tensors that autograd keeps for the backward pass of what ``run`` returns."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor.detach()  # the very tensor would hold itself where a node saves its output

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run()
    return kept, output


# Which kernels there are to choose from.


@pytest.mark.parametrize(
    ("operation", "shapes", "trainable", "offered"),
    [
        (LinearMap(), [(5, 4), (40, 4)], first(9, 40), ["dense", "sliced", "rounded"]),
        (LinearMap(), [(5, 4), (40, 4)], first(16, 40), ["dense", "sliced"]),  # round already
        (LinearMap(), [(5, 4), (12, 4)], first(12, 12) & (torch.arange(12) > 0), ["dense", "sliced", "rounded"]),
        (convolution(), [(2, 4, 5, 5), (40, 4, 3, 3)], first(9, 40), ["dense", "sliced", "rounded"]),
        (convolution(), [(2, 4, 5, 5), (40, 4, 1, 1)], first(9, 40), ["dense", "sliced", "rounded", "pointwise"]),
        (convolution(), [(2, 4, 5, 5), (32, 4, 1, 1)], first(16, 32), ["dense", "sliced", "pointwise"]),
        (convolution(padding=1), [(2, 4, 5, 5), (32, 4, 1, 1)], first(16, 32), ["dense", "sliced"]),
        (convolution(groups=2), [(2, 4, 5, 5), (32, 2, 1, 1)], first(16, 32), ["dense", "sliced"]),
        (convolution(transposed=True), [(2, 4, 5, 5), (4, 32, 1, 1)], first(16, 32), ["dense", "sliced"]),
    ],
)
def test_kernels_offered(
    operation: Operation, shapes: list[tuple[int, ...]], trainable: Tensor, offered: list[str]
) -> None:
    dispatch = Forced()
    plan = GradientPlan(trainable, truncated=False, dispatch=dispatch)
    plan.apply(operation, *leaves(*shapes), None).sum().backward()
    assert dispatch.offered == offered


@pytest.mark.parametrize(
    ("rows", "by_rule"),
    [(1, "sliced"), (16, "sliced"), (17, "sliced"), (48, "sliced"), (49, "dense"), (63, "dense")],
)
def test_the_rule_slices_where_three_quarters_of_the_rows_are_enough(rows: int, by_rule: Kernel) -> None:
    dispatch = Forced()
    plan = GradientPlan(first(rows, 64), truncated=False, dispatch=dispatch)
    plan.apply(LinearMap(), *leaves((5, 4), (64, 4)), None).sum().backward()
    assert dispatch.by_rule == by_rule


# How many rows were computed.


@pytest.mark.parametrize(
    ("kernel", "trainable", "groups", "computed"),
    [
        ("dense", first(9, 40), 1, 40),
        ("sliced", first(9, 40), 1, 9),
        ("rounded", first(9, 40), 1, 16),
        ("rounded", first(33, 40), 1, 40),
        ("pointwise", first(9, 40), 1, 9),
        ("sliced", first(9, 40), 4, 9),  # all in the first group
        ("sliced", first(11, 40), 4, 20),  # as many in each of two groups
        ("sliced", torch.arange(40) % 10 == 3, 4, 4),
    ],
)
def test_rows_computed(kernel: Kernel, trainable: Tensor, groups: int, computed: int) -> None:
    plan = GradientPlan(trainable, truncated=False, dispatch=Forced(kernel))
    input, weight = leaves((2, 4 * groups, 3, 3), (40, 4, 1, 1))
    assert plan.rows_computed() is None
    assert plan.last_choice() is None
    plan.apply(convolution(groups), input, weight, None).sum().backward()
    assert plan.rows_computed() == computed
    assert plan.last_choice() == KernelChoice(kernel, {})


def test_a_whole_and_a_frozen_plan_compute_all_and_none() -> None:
    weight = torch.randn(6, 4, requires_grad=True)
    input = torch.randn(3, 4, requires_grad=True)
    for trainable, truncated in ((first(6, 6), False), (first(0, 6), False), (first(0, 6), True)):
        plan = GradientPlan(trainable, truncated=truncated, dispatch=Forced())
        output = plan.apply(LinearMap(), input, weight, None)
        assert torch.equal(output, functional.linear(input, weight))
        gradients = torch.autograd.grad(output.sum() + 0 * (input.sum() + weight.sum()), [input, weight])
        whole = torch.autograd.grad(functional.linear(input, weight).sum(), [input, weight])
        none = [torch.zeros_like(gradient) for gradient in whole]
        expected = whole if trainable.any() else none if truncated else [whole[0], none[1]]
        assert all(torch.equal(found, wanted) for found, wanted in zip(gradients, expected, strict=True))
    assert plan.rows_computed() == 0


def test_a_weight_that_is_used_piece_by_piece() -> None:
    dispatch = Forced()
    trainable = torch.tensor([True, True, False, True, False, False])
    plan = GradientPlan(trainable, truncated=False, dispatch=dispatch)
    weight, input = torch.randn(6, 4, requires_grad=True), torch.randn(3, 4)
    assert plan.chunk(0, 6) is plan
    assert plan.chunk(2, 2) is plan.chunk(2, 2)
    assert plan.chunk(2, 2).trainable.tolist() == [False, True]
    output = torch.cat([plan.chunk(at, 2).apply(LinearMap(), input, weight[at : at + 2], None) for at in (0, 2, 4)], 1)
    assert plan.rows_computed() == 2 + 1 + 0  # before the backward pass, as many as train
    output.sum().backward()
    assert plan.rows_computed() == 3
    assert plan.last_choice() == KernelChoice("sliced", {})
    expected = input.sum(0).expand(6, 4) * trainable[:, None]
    torch.testing.assert_close(weight.grad, expected)


# Operands that are not rows of the neurons.


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("rows", [0, 3, 6])
@pytest.mark.parametrize("owns", [set(), {"weight"}, {"bias"}, {"weight", "bias"}])
def test_an_operand_that_is_not_the_neurons_has_its_whole_gradient(owns: Any, rows: int, truncated: bool) -> None:
    cases: list[tuple[Operation, tuple[int, ...], tuple[int, ...]]] = [
        (LinearMap(), (2, 7, 4), (6, 4)),
        (convolution(), (2, 4, 5, 5), (6, 4, 3, 3)),
        (convolution(transposed=True), (2, 4, 5, 5), (4, 6, 3, 3)),
    ]
    for operation, *shapes in cases:
        of = leaves(*shapes, (6,))
        plan = GradientPlan(first(rows, 6), truncated=truncated, dispatch=Forced(), owns=frozenset(owns))
        expected = torch.autograd.grad(operation.forward(*of).sin().sum(), of)
        output = plan.apply(operation, *of)
        assert torch.equal(output, operation.forward(*of))
        anything = output.sin().sum() + 0 * sum(leaf.sum() for leaf in of)
        of_input, *found = torch.autograd.grad(anything, of)
        # The same as compiled code asks for it.
        error = output.detach().cos()
        again = plan.all_gradients(operation, error, *(leaf.detach() for leaf in of[:2]), (True, True, True))
        for number, operand in enumerate(("weight", "bias"), 1):
            wanted = expected[number]
            by_row = operation.layout.view if operand == "weight" else torch.clone
            whole = operand not in owns or (operand == "bias" and "weight" not in owns) or rows == 6
            for gradient in (found[number - 1], again[number]):
                got = torch.zeros_like(wanted) if gradient is None else gradient
                torch.testing.assert_close(by_row(got)[:rows], by_row(wanted)[:rows])
                torch.testing.assert_close(by_row(got)[rows:], by_row(wanted)[rows:] * whole)
        if not truncated or rows == 6:
            torch.testing.assert_close(of_input, expected[0])


# What is kept for the backward pass.


def test_a_frozen_convolution_keeps_its_weight_only_and_a_linear_layer_too() -> None:
    cases: list[tuple[Operation, tuple[int, ...], tuple[int, ...]]] = [
        (LinearMap(), (7, 4), (6, 4)),
        (convolution(), (2, 4, 5, 5), (6, 4, 3, 3)),
        (convolution(groups=2), (2, 4, 5, 5), (6, 2, 3, 3)),
        (convolution(transposed=True), (2, 4, 5, 5), (4, 6, 3, 3)),
    ]
    for operation, input_shape, weight_shape in cases:
        for of_input in (True, False):
            input, weight = leaves(input_shape, weight_shape, of_input=of_input)
            plan = GradientPlan(first(0, 6), truncated=False, dispatch=Forced())
            kept, output = saved_by(lambda: plan.apply(operation, input, weight, None))  # noqa: B023
            elements = sum(tensor.numel() for tensor in kept)
            assert elements == (weight.numel() if of_input else 0), operation
            assert output.requires_grad == of_input
            truncated = GradientPlan(first(0, 6), truncated=True, dispatch=Forced())
            kept, output = saved_by(lambda: truncated.apply(operation, input, weight, None))  # noqa: B023
            assert kept == []
            assert not output.requires_grad


def test_a_partly_frozen_layer_keeps_what_a_stock_one_keeps() -> None:
    input, weight, bias = leaves((2, 4, 5, 5), (6, 4, 3, 3), (6,))
    plan = GradientPlan(first(3, 6), truncated=False, dispatch=Forced())
    kept, _ = saved_by(lambda: plan.apply(convolution(), input, weight, bias))
    stock, _ = saved_by(lambda: functional.conv2d(input, weight, bias))
    assert sum(t.numel() for t in kept) == sum(t.numel() for t in stock) == input.numel() + weight.numel()


def test_the_memory_that_stands_for_a_frozen_convolutions_input_is_never_read() -> None:
    """Fill what the allocator hands out with NaN: the gradient must not know. Only its format counts."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        input, weight = (
            tensor.detach().to(memory_format=memory_format) for tensor in leaves((2, 4, 5, 5), (6, 4, 3, 3))
        )
        input.requires_grad_()
        plan = GradientPlan(first(0, 6), truncated=False, dispatch=Forced())
        output = plan.apply(convolution(), input, weight, None)
        junk = [torch.full(input.shape, float("nan")) for _ in range(20)]
        del junk
        (found,) = torch.autograd.grad(output.sum(), input)
        (expected,) = torch.autograd.grad(functional.conv2d(input, weight).sum(), input)
        torch.testing.assert_close(found, expected)
        assert found.stride() == expected.stride()


# A choice made in a backward pass is one that forward passes go by as soon as it is settled.


def test_a_layer_for_which_the_dense_kernel_won_runs_pytorchs_own_path() -> None:
    dispatch = Dispatch()
    settled: dict[str, KernelChoice] = {}
    plan = GradientPlan(first(3, 6), truncated=False, dispatch=dispatch, settled=settled)
    input, weight = leaves((2, 4, 5, 5), (6, 4, 3, 3))
    plan.apply(convolution(), input, weight, None).sum().backward()
    (kind,) = dispatch.choices
    for kernel, name in (("dense", "ConvolutionBackward0"), ("sliced", "SomeRowsBackward")):
        dispatch.load_state_dict({kind: {"kernel": kernel, "milliseconds": {}}})
        again = GradientPlan(first(3, 6), truncated=False, dispatch=dispatch, settled=settled)
        settled.clear()
        assert type(again.apply(convolution(), input, weight, None).grad_fn).__name__ == "SomeRowsBackward"
        settled.update(dispatch.choices)
        output = again.apply(convolution(), input, weight, None)
        assert type(output.grad_fn).__name__ == name
        output.sum().backward()
        assert again.rows_computed() == (6 if kernel == "dense" else 3)
    truncated = GradientPlan(first(3, 6), truncated=True, dispatch=dispatch)
    truncated.apply(convolution(), input, weight, None).sum().backward()
    table = {kind: {"kernel": "dense", "milliseconds": {}} for kind in dispatch.choices}
    dispatch.load_state_dict(table)
    # Its errors are not the dense ones: never PyTorch's own path.
    truncated = GradientPlan(first(3, 6), truncated=True, dispatch=dispatch, settled=dict(dispatch.choices))
    output = truncated.apply(convolution(), input, weight, None)
    assert type(output.grad_fn).__name__ == "SomeRowsBackward"


# Formats and autocast.


def test_the_memory_format_of_a_tensor() -> None:
    image, volume = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5, 6)
    assert memory_format_of(image) is memory_format_of(volume) is torch.contiguous_format
    assert memory_format_of(image.to(memory_format=torch.channels_last)) is torch.channels_last
    assert memory_format_of(volume.to(memory_format=torch.channels_last_3d)) is torch.channels_last_3d
    assert memory_format_of(torch.randn(2, 3).t()) is torch.contiguous_format
    assert memory_format_of(image.transpose(2, 3)) is torch.contiguous_format
    assert memory_format_of(torch.randn(2, 1, 4, 4).to(memory_format=torch.channels_last)) is torch.contiguous_format


def test_casts_are_those_of_autocast() -> None:
    single, double, integers = torch.randn(2, 2), torch.randn(2, 2).double(), torch.ones(2, dtype=torch.int64)
    assert cast_for_autocast(single, double, None) == (single, double, None)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            found = cast_for_autocast(single, double, integers)
            with torch.autocast("cpu", enabled=False):
                assert cast_for_autocast(single, double, None)[0] is single
        assert [tensor.dtype for tensor in found if tensor is not None] == [dtype, torch.float64, torch.int64]
