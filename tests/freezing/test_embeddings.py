"""Embeddings: a neuron is an output feature, a column of the table; compared with arithmetic and with plain PyTorch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from frozen import Sets, freeze
from torch import Tensor, nn

from neq_cli import Freezer, NEq
from neq_cli.freezing.anatomy import anatomy_of

TOKENS, FEATURES = 7, 6
SET = torch.tensor([True, False, True, True, False, True])


class Words(nn.Module):
    """Words and their places, a layer, and an output layer, which may share its weight with the words."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(TOKENS, FEATURES, padding_idx=0), nn.Embedding(5, FEATURES)
        self.hidden, self.head = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, TOKENS, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        found = self.words(words) + self.places(torch.arange(words.shape[1]))
        return self.head(torch.tanh(self.hidden(found)))  # type: ignore[no-any-return]


@pytest.fixture
def sentences() -> Tensor:
    return torch.randint(0, TOKENS, (3, 5), generator=torch.Generator().manual_seed(0))


def gradients(net: nn.Module, sentences: Tensor) -> dict[str, Tensor | None]:
    net.zero_grad()
    net(sentences).square().sum().backward()
    return {name: parameter.grad for name, parameter in net.named_parameters()}


def test_a_neuron_is_a_column_and_costs_nothing(sentences: Tensor) -> None:
    anatomy = anatomy_of(Words(), sentences)
    assert [(name, layer.kind, layer.neurons) for name, layer in anatomy.neurons.layers.items()] == [
        ("words", "Embedding", FEATURES), ("places", "Embedding", FEATURES), ("hidden", "Linear", FEATURES),
        ("head", "Linear", TOKENS),
    ]  # fmt: skip
    assert anatomy.neurons.outside == {}
    assert anatomy.costs == {"words": 0, "places": 0, "hidden": 5 * 36, "head": 5 * 6 * TOKENS}


def test_similarity_by_hand(sentences: Tensor) -> None:
    """Eq. 1: the cosine of a feature over all words of the probe, after one step and before."""
    net = Words()
    freezer = Freezer(net, torch.optim.SGD(net.parameters(), lr=0.5), [sentences], NEq())
    before = net.words.weight.detach().clone()
    gradients(net, sentences)
    freezer.optimizer.step()
    phi = freezer.step()["words"].phi
    seen = [weight[sentences].flatten(0, 1).double() for weight in (before, net.words.weight.detach())]
    expected = torch.nn.functional.cosine_similarity(*seen, dim=0)
    torch.testing.assert_close(phi, expected.float())
    assert float(phi.min()) < 1


@pytest.mark.parametrize("kind", ["sgd", "adamw", "fused"])
def test_frozen_columns_stand_still_and_the_others_move_as_ever(kind: str, sentences: Tensor) -> None:
    def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
        if kind == "sgd":
            return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        return torch.optim.AdamW(net.parameters(), lr=0.1, fused=kind == "fused")

    net = Words()
    dense = copy.deepcopy(net)
    freezer = freeze(net, sentences, {"words": SET}, optimizer=optimizer_of(net))
    before = net.words.weight.detach().clone()
    found, expected = gradients(net, sentences), gradients(dense, sentences)
    for name, gradient in expected.items():
        if name == "words.weight":
            assert not found[name][:, ~SET].any()  # type: ignore[index]
            torch.testing.assert_close(found[name][:, SET], gradient[:, SET])  # type: ignore[index]
        else:
            torch.testing.assert_close(found[name], gradient)
    optimizer = optimizer_of(dense)
    optimizer.step()
    freezer.optimizer.step()
    assert torch.equal(net.words.weight[:, ~SET], before[:, ~SET])
    torch.testing.assert_close(net.words.weight[:, SET], dense.words.weight[:, SET])
    for _ in range(3):
        gradients(net, sentences)
        freezer.optimizer.step()
    assert torch.equal(net.words.weight[:, ~SET], before[:, ~SET])
    for value in freezer.optimizer.state[net.words.weight].values():
        if isinstance(value, Tensor) and value.shape == before.shape:
            assert bool(value[:, SET].any())


def test_a_language_model_has_a_front(sentences: Tensor) -> None:
    net = Words()
    freezer = Freezer(net, torch.optim.SGD(net.parameters(), lr=0.1), [sentences], NEq(1e9, scope="front"))
    freezer.step()
    assert [name for name, found in gradients(net, sentences).items() if found is not None] == ["head.weight"]
    assert freezer.kernels()["words"].kernel == "none"
    assert freezer.flops().executed == 5 * 6 * TOKENS  # the weight gradient of the output layer


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (Words(tied=True), "words.weight is shared along different dimensions"),
        (nn.Sequential(nn.Embedding(TOKENS, 4, max_norm=1.0), nn.Linear(4, 2)), "every forward pass brings its weight"),
    ],
)
def test_what_never_freezes(net: nn.Module, reason: str, sentences: Tensor) -> None:
    anatomy = anatomy_of(net, sentences)
    embedding = next(name for name, layer in anatomy.neurons.layers.items() if layer.kind == "Embedding")
    assert anatomy.never_frozen[embedding].startswith(reason)


def test_sparse_gradients_are_no_neurons_and_said(sentences: Tensor) -> None:
    net = nn.Sequential(nn.Embedding(TOKENS, 4, sparse=True), nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.1)
    freezer = Freezer(net, optimizer, [sentences], Sets({}))
    assert freezer.anatomy.neurons.outside == {"0.weight": "its gradients are sparse"}
    freezer.step()
    gradients(net, sentences)
    optimizer.step()
