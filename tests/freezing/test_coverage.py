from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from neq_cli import Freezer, NEq
from neq_cli.freezing.coverage import FIXED, PRODUCTS, Coverage, Part


class Net(nn.Module):
    """A fixed layer, a token of its own, attention between tokens, a layer that shares its weight, an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)
        self.stem.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.cat([self.token.expand(len(inputs), -1, -1), self.stem(inputs)], 1)
        scores = hidden @ hidden.transpose(1, 2)
        return self.head(self.norm(self.second(torch.tanh(self.first(scores @ hidden)))).mean(1))


def coverage() -> Coverage:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    return Freezer(net, optimizer, [torch.randn(2, 5, 3)], NEq(), exclude=["norm"]).coverage()


def test_every_parameter_and_every_product_is_in_one_place() -> None:
    """By hand, for one sample of 5 tokens and the one of the model: 6 x 4."""
    found = coverage()
    assert found.parameters == 16 + 4 + 20 + 8 + 10  # the stem, the token, first and second, norm, head
    stem, layers, head = 5 * 4 * 3, 2 * 6 * 4 * 4, 4 * 2
    products = 2 * 6 * 6 * 4
    assert found.flops == stem + layers + 2 * 6 * 4 + head + products
    assert found.outside == (
        Part(FIXED, 16, stem, ("stem.weight", "stem.bias")),
        Part("parameter of Net", 4, 0.0, ("token",)),
        Part(PRODUCTS, 0, products, ()),
    )
    assert found.never_frozen == (
        Part("output layer", 10, head, ("head",)),
        Part("excluded by 'norm'", 8, 48, ("norm",)),
    )
    assert found.parameters_of_neurons == 38
    assert str(found) == (
        "65.5 % of 58 parameters and 41.6 % of the forward pass are neurons'; 34.5 % of the parameters may freeze; "
        "outside neurons: 27.6 % does not train, 6.9 % parameter of Net"
    )


def test_nothing_is_rounded_to_all_or_none() -> None:
    whole = Coverage(10**6, 100.0, (), ())
    assert str(whole) == (
        "100 % of 1,000,000 parameters and 100 % of the forward pass are neurons'; 100 % of the parameters may freeze"
    )
    almost = Coverage(10**6, 100.0, (Part("parameter of Net", 3, 0.0, ("token",)),), ())
    assert str(almost).startswith("99.9 % of 1,000,000 parameters")
    assert str(almost).endswith("outside neurons: 0.0003 % parameter of Net")


def test_plain_values_name_so_many_at_most() -> None:
    names = tuple(str(number) for number in range(100))
    plain = Coverage(10, 1.0, (Part("a reason", 1, 0.0, names),), ()).to_dict(most_names=3)
    assert plain == {
        "parameters": 10,
        "flops": 1.0,
        "outside": [{"reason": "a reason", "parameters": 1, "flops": 0.0, "names": ["0", "1", "2"]}],
        "never_frozen": [],
    }


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 8, 3), nn.ConvTranspose2d(4, 8, 3, groups=2), nn.Embedding(7, 5)])
def test_layers_of_every_layout_are_neurons_whole(layer: nn.Module) -> None:
    model = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(2))
    inputs = torch.arange(6).view(2, 3) if isinstance(layer, nn.Embedding) else torch.randn(2, 4, 6, 6)
    model(inputs)
    freezer = Freezer(model, torch.optim.SGD(model.parameters(), lr=0.1), [inputs])
    assert freezer.coverage().outside == ()
