from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from neq_cli import Freezer, Observation
from neq_cli.errors import FreezingError


class First:
    """Freezes neurons 0 and 2 of the first layer."""

    def choose(self, observations: Mapping[str, Observation], epoch: int) -> Mapping[str, Tensor]:
        return {"0": torch.tensor([False, True, False, True, True])}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class Elementwise(optim.Optimizer):
    """Sign of a momentum: element by element."""

    def __init__(self, params: Any, lr: float = 0.01, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                    momentum.mul_(group["beta"]).add_(parameter.grad)
                    parameter.sub_(group["lr"] * momentum.sign())


class Noise(Elementwise):
    """Adds noise to every step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(group["lr"] * torch.randn_like(parameter))


class LayerWise(optim.Optimizer):
    """Divides each weight's gradient by its norm."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(group["lr"] * parameter.grad / parameter.grad.norm())


class Unreachable(Elementwise):
    """Cannot be made from its defaults."""

    def __init__(self, params: Any, secret: str) -> None:
        super().__init__(params)


class OddState(Elementwise):
    """Keeps something beside each weight that is neither a number nor of the weight's shape."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for parameter in self.state:
            self.state[parameter]["history"] = torch.zeros(2, *parameter.shape)


def freezer_with(kind: type[optim.Optimizer], **arguments: Any) -> Freezer:
    net = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 2, bias=False))
    return Freezer(net, kind(net.parameters(), **arguments), [torch.randn(3, 4)], First())


def step(net: nn.Module, optimizer: optim.Optimizer) -> None:
    optimizer.zero_grad()
    net(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    "kind", [optim.LBFGS, optim.Adafactor, optim.SparseAdam, *([optim.Muon] if hasattr(optim, "Muon") else [])]
)
def test_torch_optimisers_that_mix_rows_are_refused_by_name(kind: type[optim.Optimizer]) -> None:
    with pytest.raises(
        FreezingError, match=rf"^optimizer: {kind.__name__} cannot freeze neurons \(.+\); use "
    ) as caught:
        freezer_with(kind, lr=0.1)
    assert "\n" not in str(caught.value)


def test_a_subclass_of_a_refused_one_is_refused() -> None:
    class Mine(optim.LBFGS):
        pass

    with pytest.raises(FreezingError, match=r"^optimizer: LBFGS cannot"):
        freezer_with(Mine)


def test_an_optimiser_of_ones_own_that_mixes_rows_is_refused_whatever_its_name() -> None:
    for name in ("LayerWise", "SGD", "Adam"):
        kind = type(name, (LayerWise,), {"__module__": "somebodys.optim"})
        with pytest.raises(FreezingError, match=rf"^optimizer: {name} mixes the rows of a weight, .*; use one that"):
            freezer_with(kind)


@pytest.mark.parametrize("kind", [Elementwise, Noise])
def test_an_optimiser_of_ones_own_that_works_by_element_is_taken(kind: type[optim.Optimizer]) -> None:
    freezer = freezer_with(kind)
    net, optimizer = freezer.model, freezer.optimizer
    step(net, optimizer)
    freezer.step()
    start = {"weight": net[0].weight.detach().clone(), "momentum": optimizer.state[net[0].weight]["momentum"].clone()}
    for _ in range(2):
        step(net, optimizer)
    for name, now in (("weight", net[0].weight), ("momentum", optimizer.state[net[0].weight]["momentum"])):
        assert [i for i in range(5) if torch.equal(now[i], start[name][i])] == [0, 2], name


def test_trying_an_optimiser_draws_no_random_numbers() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
    optimizer = Noise(net.parameters())
    before = torch.get_rng_state()
    Freezer(net, optimizer, [torch.zeros(1, 4)])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stock_subclass_is_taken() -> None:
    class Mine(optim.SGD):
        pass

    assert freezer_with(Mine, lr=0.1, momentum=0.9).step()


def test_an_optimiser_that_cannot_be_tried_is_refused() -> None:
    with pytest.raises(FreezingError, match=r"^optimizer: Unreachable could not be tried"):
        freezer_with(Unreachable, secret="x")


def test_state_without_rows_is_refused_before_training() -> None:
    with pytest.raises(FreezingError, match=r"^optimizer: OddState's state 'history' has shape \[2, "):
        freezer_with(OddState)
