"""Stacks of experts: neurons are one expert's outputs, compared token by token, whoever else a token went to."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from frozen import Sets, freeze
from rounding import apart_behind_layers
from torch import Tensor, nn

from neq_cli import Freezer

pytestmark = pytest.mark.usefixtures("double")

EXPERTS, INPUTS, OUTPUTS = 4, 3, 5


class Mixture(nn.Module):
    """Sends each token to one of four experts; they are stacked as [experts, outputs, inputs], or by inputs."""

    def __init__(self, *, by_inputs: bool = False, biased: bool = False) -> None:
        super().__init__()
        shape = (EXPERTS, INPUTS, OUTPUTS) if by_inputs else (EXPERTS, OUTPUTS, INPUTS)
        self.stack = nn.Parameter(torch.randn(shape))
        self.biases = nn.Parameter(torch.randn(EXPERTS, OUTPUTS)) if biased else None
        self.head = nn.Linear(OUTPUTS, 2)
        self.by_inputs = by_inputs
        self.choice = torch.zeros(0)

    def chosen(self, tokens: Tensor) -> Tensor:
        """Return which expert each token goes to, as a router would."""
        return (self.choice[: len(tokens)] if len(self.choice) else torch.arange(len(tokens)) % EXPERTS).long()

    def outputs(self, tokens: Tensor) -> Tensor:
        found = tokens.new_zeros(len(tokens), OUTPUTS)
        chosen = self.chosen(tokens)
        for expert in chosen.unique():
            own = torch.where(chosen == expert)[0]
            weight, some = self.stack[expert], tokens[own]
            made = some @ weight if self.by_inputs else nn.functional.linear(some, weight)
            if self.biases is not None:
                made = made + self.biases[expert]
            found = found.index_add(0, own, made)
        return found

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.outputs(tokens)))


KINDS: dict[str, Callable[[], Mixture]] = {
    "by outputs": Mixture,
    "by inputs": lambda: Mixture(by_inputs=True),
    "biased": lambda: Mixture(biased=True),
    "by inputs, biased": lambda: Mixture(by_inputs=True, biased=True),
}


def per_neuron(net: Mixture, tensor: Tensor) -> Tensor:
    """Return a parameter of the mixture as [experts x outputs, others]."""
    tensor = tensor.transpose(1, 2) if net.by_inputs and tensor.dim() == 3 else tensor
    return tensor.reshape(EXPERTS * OUTPUTS, -1)


@pytest.mark.parametrize("kind", KINDS)
def test_neurons_are_the_outputs_of_each_expert(kind: str) -> None:
    net, tokens = KINDS[kind](), torch.randn(7, INPUTS)
    freezer = Freezer(net, torch.optim.SGD(net.parameters(), lr=0.1), [tokens])
    assert {name: layer.neurons for name, layer in freezer.layers.items()} == {"stack": 20, "head": 2}
    assert freezer.coverage().outside == ()
    # A sample goes to one expert: 5 outputs of 3 inputs.
    assert freezer.flops().layers["stack"].paper_dense == 2 * OUTPUTS * INPUTS


@pytest.mark.parametrize("mode", ["exact", "truncated", "dense"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_frozen_neurons_keep_every_bit(kind: str, mode: Any) -> None:
    net, tokens = KINDS[kind](), torch.randn(7, INPUTS)
    twin = copy.deepcopy(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    frozen = torch.rand(20, generator=torch.Generator().manual_seed(0)) < 0.5
    freeze(net, tokens, {"stack": ~frozen}, mode, optimizer=optimizer)
    before = copy.deepcopy(net)
    for model in (net, twin):
        model(tokens).square().sum().backward()
    own = [name for name, _ in net.named_parameters() if "head" not in name]
    for name in own:
        ours, dense = net.get_parameter(name).grad, twin.get_parameter(name).grad
        assert ours is not None
        assert dense is not None
        found, expected = per_neuron(net, ours), per_neuron(net, dense)
        assert not found[frozen].any()
        assert torch.allclose(found[~frozen], expected[~frozen], rtol=0, atol=apart_behind_layers(100))
    optimizer.step()
    for name in own:
        same = per_neuron(net, net.get_parameter(name)) == per_neuron(net, before.get_parameter(name))
        assert torch.equal(same.all(1), frozen), name


def test_experts_that_are_frozen_whole_have_no_gradient() -> None:
    net, tokens = Mixture(biased=True), torch.randn(7, INPUTS)
    freeze(net, tokens, {"stack": torch.zeros(20, dtype=torch.bool)})
    net(tokens).sum().backward()
    assert net.stack.grad is None
    assert net.biases is not None
    assert net.biases.grad is None
    assert net.head.weight.grad is not None


def expected_phi(net: Mixture, before: Mixture, tokens: Tensor) -> Tensor:
    """Return Eq. 1 by hand: a token that does not go to an expert has zeros for its outputs. NaN where none does."""
    outputs = []
    for model in (before, net):
        made, chosen = model.outputs(tokens).detach(), model.chosen(tokens)
        whole = torch.zeros(EXPERTS, len(tokens), OUTPUTS)
        for expert in range(EXPERTS):
            whole[expert, chosen == expert] = made[chosen == expert]
        outputs.append(whole.transpose(1, 2).flatten(0, 1))
    old, new = outputs
    phi = (old * new).sum(1) / (old.norm(dim=1) * new.norm(dim=1))
    reached = torch.stack([model.chosen(tokens) == expert for expert in range(EXPERTS) for model in (net, before)])
    called = reached.view(EXPERTS, 2, -1).any(-1)
    phi = torch.where(called.all(1).repeat_interleave(OUTPUTS), phi, 0.0)  # tokens came or went: nothing in common
    return torch.where(called.any(1).repeat_interleave(OUTPUTS), phi, torch.nan)


@pytest.mark.parametrize(
    ("now", "then"),
    [
        ([0, 1, 2, 0, 1, 2, 0], [0, 1, 2, 0, 1, 2, 0]),  # each where it was
        ([0, 1, 2, 0, 1, 2, 0], [0, 1, 2, 1, 1, 2, 0]),  # one goes to another expert
        ([0, 1, 0, 0, 1, 0, 0], [0, 1, 2, 0, 1, 2, 0]),  # one expert gets none any more
        ([0, 1, 3, 0, 1, 2, 0], [0, 1, 2, 0, 1, 2, 0]),  # one gets its first
        ([1, 0, 2, 0, 1, 2, 0], [0, 1, 2, 0, 1, 2, 0]),  # as many as before, but others
    ],
)
def test_phi_compares_what_each_token_made_of_an_expert(now: list[int], then: list[int]) -> None:
    net, tokens = Mixture(), torch.randn(7, INPUTS)
    net.choice = torch.tensor(then)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    freezer = Freezer(net, optimizer, [tokens], Sets(0.5))
    before = copy.deepcopy(net)
    net(tokens).square().sum().backward()
    optimizer.step()

    # The router is no parameter here: it chooses anew once the old network's turn is over.
    def choose(module: nn.Module, _: Any) -> None:
        same = torch.equal(net.stack, before.stack)
        net.choice = torch.tensor(then if same else now)

    after = copy.deepcopy(net)
    after.choice = torch.tensor(now)
    hook = net.register_forward_pre_hook(choose)
    freezer.step()
    hook.remove()
    phi, expected = freezer.dynamics["stack"].phi, expected_phi(after, before, tokens)
    assert torch.equal(phi.isnan(), expected.isnan())
    assert torch.allclose(phi.nan_to_num(), expected.nan_to_num(), rtol=0, atol=apart_behind_layers(100))
    assert freezer.trainable["stack"][expected.isnan()].all(), "an expert that no token reached always trains"


def test_batches_in_which_an_expert_is_called_and_not_called_add_up() -> None:
    net = Mixture()
    first, second = torch.randn(3, INPUTS), torch.randn(7, INPUTS)
    net.choice = torch.tensor([0, 1, 0, 2, 2, 1, 0])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    freezer = Freezer(net, optimizer, [first, second])
    before = copy.deepcopy(net)
    net(second).square().sum().backward()
    optimizer.step()
    freezer.step()
    both = torch.cat([first, second])
    joined = [copy.deepcopy(one) for one in (net, before)]
    for one in joined:
        one.choice = torch.cat([net.choice[:3], net.choice])
    expected = expected_phi(*joined, both)
    phi = freezer.dynamics["stack"].phi
    assert torch.equal(phi.isnan(), expected.isnan())
    assert torch.allclose(phi.nan_to_num(), expected.nan_to_num(), rtol=0, atol=apart_behind_layers(100))


def test_tokens_that_are_not_known_are_compared_in_order_or_not_at_all() -> None:
    class Masked(Mixture):
        def outputs(self, tokens: Tensor) -> Tensor:
            found = tokens.new_zeros(len(tokens), OUTPUTS)
            for expert in range(EXPERTS):
                own = self.chosen(tokens) == expert
                if own.any():
                    found[own] = nn.functional.linear(tokens[own], self.stack[expert])
            return found

    for now, known in (([0, 1, 2, 0, 1, 2, 0], True), ([0, 1, 2, 1, 1, 2, 0], False)):
        net, tokens = Masked(), torch.randn(7, INPUTS)
        net.choice = torch.tensor([0, 1, 2, 0, 1, 2, 0])
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        freezer = Freezer(net, optimizer, [tokens])
        before = copy.deepcopy(net)
        net(tokens).square().sum().backward()
        optimizer.step()

        def choose(*_: Any, net: Any = net, before: Any = before, now: Any = now) -> None:
            net.choice = torch.tensor(now) if not torch.equal(net.stack, before.stack) else net.choice

        net.register_forward_pre_hook(choose)
        freezer.step()
        phi = freezer.dynamics["stack"].phi.view(EXPERTS, OUTPUTS)
        assert phi.isnan().all(1).tolist() == ([False, False, False, True] if known else [True, True, False, True])
