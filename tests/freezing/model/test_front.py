"""Fronts of networks drawn by hand: chains, branches, residual streams, and parameters outside neurons."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from neq_cli.freezing.anatomy import Anatomy, anatomy_of


class Branches(nn.Module):
    """stem -> (left -> left2, right) -> join -> head; a shortcut leads from the stem to the head."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("stem", "left", "left2", "right", "join", "head"):
            setattr(self, name, nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        left, right = self.left2(self.left(stem).relu()), self.right(stem)
        return self.head(self.join(left + right) + stem)  # type: ignore[no-any-return]


class Tokens(nn.Module):
    """A class token before two residual blocks, a shift between them, and a table that only the second block uses."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.shift, self.table = (nn.Parameter(torch.ones(1, 1, 4)) for _ in range(3))
        self.embed, self.first, self.second, self.head = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), 1, 4), self.embed(x)], 1)
        x = x + (self.shift + self.first(x).relu())
        x = x + self.second(x + self.table)
        return self.head(x[:, 0])  # type: ignore[no-any-return]


def look(net: nn.Module, inputs: Tensor, exclude: tuple[str, ...] = ()) -> Anatomy:
    return anatomy_of(net, inputs, exclude=exclude)


@pytest.mark.parametrize(
    ("frozen", "front"),
    [
        ("", ""),
        ("stem", "stem"),
        ("left right", ""),
        ("stem left2", "stem"),
        ("stem left left2", "stem left left2"),
        ("stem left left2 join", "stem left left2"),
        ("stem left left2 right join", "stem left left2 right join"),
        ("stem left left2 right join head", "stem left left2 right join"),  # the output layer never freezes
    ],
)
def test_a_layer_is_in_the_front_once_all_that_reaches_it_is(frozen: str, front: str) -> None:
    assert look(Branches(), torch.ones(1, 4)).front(frozen.split()) == set(front.split())


def test_layers_that_never_freeze_or_are_fixed() -> None:
    assert look(Branches(), torch.ones(1, 4), ("stem",)).front(["stem", "left", "right"]) == frozenset()
    net = Branches()
    net.stem.requires_grad_(False)  # type: ignore[union-attr]
    assert look(net, torch.ones(1, 4)).front(["left"]) == {"stem", "left"}


def test_what_is_tied_to_a_layer_that_trains_trains() -> None:
    net = Branches()
    net.right.weight, net.right.bias = net.stem.weight, net.stem.bias  # type: ignore[union-attr]
    anatomy = look(net, torch.ones(1, 4))
    assert anatomy.neurons.ties
    assert anatomy.front(["stem", "left"]) == frozenset()
    assert anatomy.front(["stem", "left", "right"]) == {"stem", "left", "right"}


@pytest.mark.parametrize(
    ("frozen", "still"),
    [
        ("embed", ""),
        ("embed first", "token"),
        ("embed first second", "token shift table"),
        ("first second", ""),
    ],
)
def test_parameters_outside_neurons_join_at_their_first_use(frozen: str, still: str) -> None:
    anatomy = look(Tokens(), torch.ones(1, 3, 4))
    trains = {name: torch.full((layer.neurons,), name not in frozen) for name, layer in anatomy.neurons.layers.items()}
    assert anatomy.outside_front(trains) == set(still.split())


def torchvision_model(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        models = pytest.importorskip("torchvision.models")
        size = {"image_size": 32} if name == "vit_b_16" else {}
        return models.get_model(name, num_classes=4, **size)  # type: ignore[no-any-return]

    return build


@pytest.mark.parametrize("name", ["vit_b_16", "swin_t", "convnext_tiny", "resnet18"])
def test_the_front_of_a_model_is_what_forward_order_says(name: str) -> None:
    """By an oracle without a trace: a layer is in the front where its output needs no gradient once it is fixed."""
    model = torchvision_model(name)()
    anatomy = look(model, torch.zeros(1, 3, 32, 32))
    names = anatomy.may_freeze
    for count in (1, len(names) // 3, len(names) - 2):
        front = anatomy.front(names[:count])
        assert front == set(names[:count])
    # Without the first layer nothing is a front: all comes after it.
    assert anatomy.front(names[1:]) == frozenset()
