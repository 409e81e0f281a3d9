"""Factors by hand: what is told of a product is what disturbing one row of the parameter shows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from neq_cli.freezing.model.layouts import RowLayout
from neq_cli.freezing.model.uses import Product, Uses

pytestmark = pytest.mark.usefixtures("double")

Form = tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], tuple[int, ...]]
EXPERTS = torch.tensor([0, 0, 2, 2, 2, 3])  # which of four experts gets each of six tokens; one gets none
ENDS = torch.tensor([2, 2, 5, 6], dtype=torch.int32)


def mixture(inputs: Tensor, stack: Tensor, *, transposed: bool) -> Tensor:
    """Each expert's tokens through its own part of the stack, one expert after another."""
    parts = []
    for expert in EXPERTS.unique():
        weight = stack[expert]
        chosen = inputs[torch.where(expert == EXPERTS)[0]]
        parts.append(chosen @ weight if transposed else nn.functional.linear(chosen, weight))
    return torch.cat(parts)


# How inputs and a parameter are multiplied, and the shapes of both.
FORMS: dict[str, Form] = {
    "scale of the last axis": (lambda x, p: x * p, (2, 5, 4), (4,)),
    "scale first": (lambda x, p: p * x, (2, 5, 4), (4,)),
    "scale of channels": (lambda x, p: x * p.view(1, -1, 1, 1), (2, 4, 3, 5), (4,)),
    "scale of channels, stored so": (lambda x, p: p * x, (2, 4, 3, 5), (4, 1, 1)),
    "scale between": (lambda x, p: x * p[:, None], (2, 4, 5), (4,)),
    "scale in place": (lambda x, p: x.mul_(p), (2, 5, 4), (4,)),
    "one more than the scale": (lambda x, p: x * (1 + p.float().to(x.dtype)), (2, 5, 4), (4,)),
    "scale of what was computed": (lambda x, p: x * -torch.exp(p), (2, 5, 4), (4,)),
    "table of states": (lambda x, p: x[..., None] * -p.exp()[None, :, None, :], (2, 4, 5), (4, 3)),
    "linear": (nn.functional.linear, (2, 5, 3), (4, 3)),
    "linear by keywords": (lambda x, p: nn.functional.linear(weight=p, input=x), (2, 5, 3), (4, 3)),
    "linear of the transpose": (lambda x, p: nn.functional.linear(x, p.t()), (2, 5, 3), (3, 4)),
    "times": (lambda x, p: x @ p, (2, 5, 3), (3, 4)),
    "times the transpose": (lambda x, p: torch.matmul(x, p.T), (2, 5, 3), (4, 3)),
    "from the left": (lambda x, p: p @ x, (2, 3, 5), (4, 3)),
    "transpose from the left": (lambda x, p: p.mT @ x, (2, 3, 5), (3, 4)),
    "from the left, a vector": (lambda x, p: p @ x, (3,), (4, 3)),
    "matrices": (lambda x, p: x.mm(p), (5, 3), (3, 4)),
    "convolution": (lambda x, p: nn.functional.conv1d(x, p, padding=1), (2, 3, 6), (4, 3, 3)),
    "convolution, squeezed and back": (
        lambda x, p: nn.functional.conv1d(x, p.squeeze(1).unsqueeze(1), groups=4),
        (2, 4, 6),
        (4, 1, 3),
    ),
    "images": (lambda x, p: nn.functional.conv2d(input=x, weight=p), (2, 3, 6, 5), (4, 3, 3, 2)),
    "experts one by one": (lambda x, p: mixture(x, p, transposed=False), (6, 3), (4, 5, 3)),
    "experts by their inputs": (lambda x, p: mixture(x, p, transposed=True), (6, 3), (4, 3, 5)),
    "experts in one product": (lambda x, p: torch.bmm(x, p), (4, 2, 3), (4, 3, 5)),
    "experts in one product, transposed": (lambda x, p: x @ p.transpose(1, 2), (4, 2, 3), (4, 5, 3)),
}


def products_of(form: Form, inputs: Tensor, parameter: Tensor) -> tuple[Tensor, list[Product]]:
    found: list[Product] = []
    with torch.no_grad(), Uses({"parameter": parameter}, found.append):
        output = form[0](inputs.clone(), parameter)
    return output, found


@pytest.mark.parametrize("name", FORMS)
def test_a_row_moves_its_place_along_the_axis_and_nothing_else(name: str) -> None:
    form = FORMS[name]
    inputs, parameter = torch.randn(form[1]), nn.Parameter(torch.randn(form[2]))
    _, before = products_of(form, inputs, parameter)
    assert before
    assert len({product.use for product in before}) == 1
    layout = before[0].use.layout
    for row in range(layout.count(parameter)):
        disturbed = nn.Parameter(parameter.detach().clone())
        index = layout.index(disturbed, torch.tensor([row]))
        layout.view(disturbed.data)[index] += 1
        _, after = products_of(form, inputs, disturbed)
        reached = False
        for old, new in zip(before, after, strict=True):
            assert old.first == new.first
            moved = (
                (old.output != new.output).movedim(old.use.axis, 0).reshape(old.output.shape[old.use.axis], -1).any(1)
            )
            expected = torch.arange(len(moved)) + old.first == row
            assert torch.equal(moved, expected), (row, old.first)
            reached |= bool(moved.any())
        assert reached or layout.kind.startswith("stacked")


def test_experts_in_groups_and_whose_tokens_they_got() -> None:
    stack, hidden = nn.Parameter(torch.randn(4, 8, 16).bfloat16()), torch.randn(7, 16).bfloat16()
    order = torch.tensor([6, 1, 0, 3, 5, 2])
    found: list[Product] = []
    with torch.no_grad(), Uses({"stack": stack}, found.append):
        output = torch._grouped_mm(hidden[order], stack.transpose(1, 2), offs=ENDS)
    assert [product.first for product in found] == [0, 8, 16, 24]
    assert [product.use.layout for product in found] == [RowLayout("stacked")] * 4
    assert [one.tokens.tolist() for one in found if one.tokens is not None] == [[6, 1], [], [0, 3, 5], [2]]
    assert torch.equal(torch.cat([one.output for one in found]), output)


def test_tokens_of_experts_one_by_one() -> None:
    stack = nn.Parameter(torch.randn(4, 5, 3))
    _, found = products_of(FORMS["experts one by one"], torch.randn(6, 3), stack)
    assert [product.first for product in found] == [0, 10, 15]
    assert [one.tokens.tolist() for one in found if one.tokens is not None] == [[0, 1], [2, 3, 4], [5]]


OTHERWISE: dict[str, Form] = {
    "added": (lambda x, p: x + p, (2, 5, 4), (4,)),
    "a mask": (lambda x, p: p * x, (4, 3), (4, 3)),
    "a mask of a vector": (lambda x, p: p * x, (4,), (4,)),
    "one number": (lambda x, p: x * p, (2, 5, 4), (1,)),
    "a part": (lambda x, p: x * p[1:], (2, 5, 3), (4,)),
    "every second": (lambda x, p: x @ p[:, ::2], (2, 3), (3, 4)),
    "in another order": (lambda x, p: x * p.flip(0), (2, 5, 4), (4,)),
    "its mean": (lambda x, p: x * p.mean(0, keepdim=True), (2, 5, 4), (4,)),
    "flattened": (lambda x, p: x * p.view(-1), (2, 5, 12), (4, 3)),
    "a product of itself": (lambda x, p: x @ (p @ p.t()), (2, 5, 4), (4, 3)),
    "looked up": (lambda x, p: p[torch.tensor([0, 2])], (2,), (4, 3)),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_is_no_factor_with_rows_of_its_own(name: str) -> None:
    form = OTHERWISE[name]
    assert products_of(form, torch.randn(form[1]), nn.Parameter(torch.randn(form[2])))[1] == []


SUMMANDS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], list[tuple[str, str, int]]]] = {
    "given to linear": (lambda x, w, b: nn.functional.linear(x, w, b), [("weight", "bias", 0)]),
    "by keyword": (lambda x, w, b: nn.functional.linear(x, bias=b, weight=w), [("weight", "bias", 0)]),
    "added": (lambda x, w, b: x @ w.t() + b, [("weight", "bias", 0)]),
    "added first": (lambda x, w, b: b + x @ w.t(), [("weight", "bias", 0)]),
    "added in place": (lambda x, w, b: (x @ w.t()).add_(b), [("weight", "bias", 0)]),
    "from the left": (lambda x, w, b: w @ x.mT + b[:, None], [("weight", "bias", 0)]),
    "along another axis": (lambda x, w, b: w @ torch.cat([x, x]).mT + b, []),
    "later": (lambda x, w, b: torch.relu(x @ w.t()) + b, []),
    "in another order": (lambda x, w, b: x @ w.t() + b.flip(0), []),
    "among others": (
        lambda x, w, b: nn.functional.linear(x, torch.cat([w, w]), torch.cat([torch.zeros(4), b])),
        [],
    ),
}


@pytest.mark.parametrize("name", SUMMANDS)
def test_what_is_added_to_a_product(name: str) -> None:
    form, expected = SUMMANDS[name]
    weight, bias = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4))
    found: list[tuple[str, str, int]] = []
    parameters = {"weight": weight, "bias": bias}
    with torch.no_grad(), Uses(parameters, lambda _: None, lambda *one: found.append(one)):
        form(torch.randn(2, 3), weight, bias)
    assert found == expected


def test_biases_that_are_put_together() -> None:
    weight, query, value = nn.Parameter(torch.randn(12, 3)), nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
    found: list[tuple[str, str, int]] = []
    parameters = {"weight": weight, "query": query, "value": value}
    with torch.no_grad(), Uses(parameters, lambda _: None, lambda *one: found.append(one)):
        nn.functional.linear(torch.randn(2, 3), weight, torch.cat([query, torch.zeros(4), value]))
    assert found == [("weight", "query", 0), ("weight", "value", 8)]


def test_how_often_a_parameter_is_used_tells_a_bias_from_what_is_more() -> None:
    weight, token = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(1, 1, 4))
    found: list[tuple[str, str, int]] = []
    uses = Uses({"weight": weight, "token": token}, lambda _: None, lambda *one: found.append(one))
    with torch.no_grad(), uses:
        tokens = token.expand(2, -1, -1)
        made = nn.functional.linear(torch.cat([tokens, torch.randn(2, 3, 4)], 1)[:, :1], weight)
        made + tokens  # the residual of a class token, as CaiT has it
    assert found == [("weight", "token", 0)]
    assert uses.times_used == {"token": 2, "weight": 1}
