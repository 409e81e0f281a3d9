"""What comes after a layer with frozen neurons may overwrite its output, whatever the layer, as with a stock one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from frozen import freeze
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("double")


class Functional(nn.Module):
    """Passes a linear layer's weight to a function, with its own bias, none, or another one."""

    def __init__(self, bias: str) -> None:
        super().__init__()
        self.map, self.bias = nn.Linear(6, 8, bias=bias == "own"), bias
        self.other = nn.Parameter(torch.randn(8))

    def forward(self, inputs: Tensor) -> Tensor:
        bias = {"own": self.map.bias, "none": None, "other": 2 * self.other}[self.bias]
        return nn.functional.linear(inputs, self.map.weight, bias)


class Attends(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, bias=bias, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return found


Make = Callable[[bool], nn.Module]
# A layer with 8 neurons, and the shape of one input to it.
LAYERS: dict[str, tuple[Make, tuple[int, ...]]] = {
    **{
        f"linear on {len(shape)} dimensions": (lambda bias: nn.Linear(6, 8, bias=bias), shape)
        for shape in ((6,), (5, 6), (2, 5, 6), (2, 3, 2, 6), (2, 3, 2, 2, 6))
    },
    "convolution": (lambda bias: nn.Conv2d(6, 8, 3, bias=bias), (2, 6, 4, 5)),
    "convolution of one sample": (lambda bias: nn.Conv2d(6, 8, 3, bias=bias), (6, 4, 5)),
    "convolution of positions": (lambda bias: nn.Conv2d(6, 8, 1, bias=bias), (2, 6, 4, 5)),
    "convolution over one dimension": (lambda bias: nn.Conv1d(6, 8, 3, bias=bias), (2, 6, 5)),
    "convolution over three dimensions": (lambda bias: nn.Conv3d(6, 8, 2, bias=bias), (2, 6, 3, 4, 3)),
    "grouped convolution": (lambda bias: nn.Conv2d(6, 8, 3, groups=2, bias=bias), (2, 6, 4, 5)),
    "transposed convolution": (lambda bias: nn.ConvTranspose2d(6, 8, 2, bias=bias), (2, 6, 3, 3)),
    "transposed convolution of one sample": (lambda bias: nn.ConvTranspose1d(6, 8, 2, bias=bias), (6, 4)),
    "attention": (Attends, (2, 5, 8)),
    "function": (lambda bias: Functional("own" if bias else "none"), (2, 5, 6)),
    "function with another bias": (lambda bias: Functional("other" if bias else "none"), (2, 5, 6)),
    "norm over positions": (lambda bias: nn.BatchNorm1d(8).eval(), (2, 8, 5)),
    "norm": (lambda bias: nn.BatchNorm1d(8).eval(), (5, 8)),
}

INPLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu_": lambda hidden: nn.functional.relu(hidden, inplace=True),
    "add_": lambda hidden: hidden.add_(1.0),
    "+= itself": lambda hidden: hidden.__iadd__(hidden.detach().flip(-1).sin()),
    "+= what trains": lambda hidden: hidden.__iadd__(torch.ones_like(hidden).requires_grad_()),
    "a part": lambda hidden: hidden[..., :2].mul_(2.0).sum() + hidden,
}


class Around(nn.Module):
    """Something that trains before the layer, an operation in place after it, and an output layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.scale, self.layer, self.head = nn.Parameter(torch.ones(())), layer, nn.Linear(1, 2)
        self.change: Callable[[Tensor], Tensor] = torch.relu_

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.change(self.layer(self.scale * inputs))
        return self.head(hidden.sin().sum().view(1, 1))


def gradients(model: nn.Module, inputs: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    model(inputs).square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def check(name: str, share: float, assert_gradients: Any) -> None:
    make, shape = LAYERS[name]
    for bias in (True, False):
        for mode in ("exact", "truncated"):
            model, inputs = Around(make(bias)), torch.randn(shape)
            reference = copy.deepcopy(model)
            batch = inputs[None] if name.endswith((" one sample", " 1 dimensions")) else inputs
            freezer = freeze(model, batch, share, mode)
            for model.change in INPLACE.values():
                reference.change = model.change
                found, dense = gradients(model, inputs), gradients(reference, inputs)
                if mode == "truncated":  # other errors reach what is below, as the tests of that mode show
                    for key in [key for key in dense if key == "scale" or "in_proj" in key]:
                        del found[key], dense[key]
                assert_gradients(freezer, found, dense)


@pytest.mark.parametrize("name", LAYERS)
def test_what_comes_after_may_overwrite_the_output(name: str, kernel: str, assert_gradients: Any) -> None:
    check(name, 0.5, assert_gradients)


@pytest.mark.parametrize("name", LAYERS)
def test_what_comes_after_may_overwrite_the_output_of_what_is_frozen_whole(name: str, assert_gradients: Any) -> None:
    check(name, 1.0, assert_gradients)


@pytest.mark.parametrize("what", ["input", "weight"])
def test_what_is_kept_for_the_backward_pass_may_not_be_overwritten(what: str, kernel: str) -> None:
    """Autograd sees it, as with stock layers."""
    for layer, shape in ((nn.Linear(4, 8), (2, 3, 4)), (nn.Conv2d(4, 8, 3), (2, 4, 4, 3))):
        inputs = torch.randn(shape)
        model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(layer(inputs)[0].numel(), 2))
        freeze(model, inputs, {"0": torch.arange(8) < 4})
        given = inputs.clone().requires_grad_()
        output = model(given)
        with torch.no_grad():
            (given if what == "input" else layer.weight).mul_(2.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()
