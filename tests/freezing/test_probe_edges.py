from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from rounding import apart, phi_apart, unit
from torch import Tensor, nn

from neq_cli import Freezer, NEq, Observation
from neq_cli.errors import FreezingError
from neq_cli.freezing.equilibrium import Definition

# Of a neuron that put out 20 numbers, the same twice; handed out in single precision.
UNCHANGED = phi_apart(0, 20) + unit(torch.float32)


def move(net: nn.Module, share: float = 0.3) -> None:
    """Stand in for an epoch of training: change every parameter and buffer of ``net``."""
    with torch.no_grad():
        for tensor in [*net.parameters(), *net.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(share * torch.randn_like(tensor) * tensor.abs().mean().clamp_min(0.1))
        for name, buffer in net.named_buffers():
            if name.endswith("running_var"):
                buffer.abs_()


def freezer_for(net: nn.Module, probe: Tensor, policy: Any) -> Freezer:
    return Freezer(net, torch.optim.SGD(net.parameters(), lr=0.1), [probe], policy)


class FreezeAll:
    """A policy that wants to freeze every neuron there is."""

    def choose(self, observations: Mapping[str, Observation], epoch: int) -> Mapping[str, Tensor]:
        return {name: torch.zeros_like(seen.trainable) for name, seen in observations.items()}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


@pytest.mark.parametrize("definition", ["paper", "reference"])
def test_dead_neurons(definition: Definition) -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Flatten(), nn.Linear(16, 2))
    with torch.no_grad():
        net[0].weight[:3] = 0
        net[0].bias[:3] = 0
    freezer = freezer_for(net, torch.randn(5, 2, 2, 2), NEq(definition=definition))
    with torch.no_grad():
        net[0].weight[1] = 1.0  # comes alive
        net[0].weight[3] *= -2.0  # turns round
    phi = freezer.step()["0"].phi
    assert phi[:3].tolist() == [1, 0, 1]
    assert phi[3] < 1
    with torch.no_grad():
        net[0].weight[1] = 0.0  # dies again
    assert freezer.step()["0"].phi.tolist() == pytest.approx([1, 0, 1, 1], abs=UNCHANGED)


def test_a_sample_that_does_not_reach_a_neuron_counts_as_equal_in_the_reference_definition() -> None:
    # Sample 0 is all zeros, without bias: 0 against 0 is 1. Sample 1 turns round: -1. The mean is 0.
    net = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.Flatten(), nn.Linear(4, 2))
    probe = torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)])
    freezer = freezer_for(net, probe, NEq(definition="reference"))
    with torch.no_grad():
        net[0].weight.mul_(-3)
    assert freezer.step()["0"].phi.tolist() == [0.0]


@pytest.mark.parametrize("definition", ["paper", "reference"])
def test_nan_outputs_train_and_their_velocity_restarts(definition: Definition) -> None:
    class All(FreezeAll):
        mu = 0.5

    All.definition = definition
    net = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Flatten(), nn.Linear(12, 2))
    freezer = freezer_for(net, torch.randn(5, 2, 2, 2), All())
    move(net)
    freezer.step()
    good = net[0].weight.detach().clone()
    with torch.no_grad():
        net[0].weight[1] = torch.nan

    def check(phi_is_nan: bool, delta_is_nan: bool) -> None:
        seen = freezer.step()["0"]
        assert bool(seen.phi[1].isnan()) is phi_is_nan
        assert bool(seen.delta_phi[1].isnan()) is delta_is_nan
        assert bool(seen.trainable[1]) is delta_is_nan
        if delta_is_nan:
            assert seen.velocity[1] == 0
        # Its neighbours are none the wiser.
        assert torch.isfinite(seen.phi[[0, 2]]).all()
        assert not seen.trainable[[0, 2]].any()

    check(phi_is_nan=True, delta_is_nan=True)
    with torch.no_grad():
        net[0].weight.copy_(good)
    check(phi_is_nan=True, delta_is_nan=True)  # healthy now, but compared with NaN
    move(net)
    check(phi_is_nan=False, delta_is_nan=True)  # its phi has no predecessor
    phi = freezer.dynamics["0"].phi[1].item()
    move(net)
    check(phi_is_nan=False, delta_is_nan=False)
    dynamics = freezer.dynamics["0"]
    # Both definitions start from velocity 0 and delta 0 again.
    assert dynamics.velocity[1].item() == pytest.approx(dynamics.phi[1].item() - phi, abs=apart(2))


def test_infinite_outputs_are_unknown_too() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    freezer = freezer_for(net, torch.randn(4, 2), FreezeAll())
    with torch.no_grad():
        net[0].bias[0] = torch.inf
    seen = freezer.step()["0"]
    assert seen.phi.isnan().tolist() == [True, False]
    assert seen.trainable.tolist() == [True, False]


class WithUnreached(nn.Module):
    """One layer never called, one called in training mode only, one that sees as many tokens as pass a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.unused, self.auxiliary, self.expert, self.head = (nn.Linear(3, 3) for _ in range(5))

    def forward(self, inputs: Tensor) -> Any:
        hidden = self.first(inputs)
        routed = self.expert(hidden[inputs[:, 0] > 1e3])
        out = self.head(hidden + routed.sum(0))
        return (out, self.auxiliary(hidden)) if self.training else out


def test_layers_the_probe_does_not_reach_always_train() -> None:
    net = WithUnreached()
    freezer = freezer_for(net, torch.randn(4, 3), FreezeAll())
    move(net)
    seen = freezer.step()
    for name in ("unused", "auxiliary", "expert"):  # the gate lets no token through
        assert seen[name].phi.isnan().all(), name
        assert seen[name].trainable.all(), name
        assert (seen[name].velocity == 0).all(), name
    assert not seen["first"].trainable.any()
    assert seen["head"].trainable.all()
    assert freezer.anatomy.never_frozen["unused"] == "not reached by the probe"
    assert "auxiliary" in freezer.anatomy.never_frozen


@pytest.mark.parametrize(("old", "new"), [(1.0, 2.0), (2.0, 1.0), (0.0, 1.0), (1.0, 0.0)])
def test_a_layer_called_differently_by_old_and_new_network_is_unknown(old: float, new: float) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Parameter(torch.tensor(old))
            self.first, self.again, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = self.first(inputs)
            for _ in range(int(self.gate)):
                hidden = self.again(hidden)
            return self.head(hidden)

    net = Gated()
    freezer = freezer_for(net, torch.randn(4, 3), FreezeAll())
    with torch.no_grad():
        net.gate.fill_(new)
    seen = freezer.step()
    assert seen["again"].phi.isnan().all()
    assert seen["again"].trainable.all()
    assert torch.allclose(seen["first"].phi, torch.ones(3), rtol=0, atol=UNCHANGED)


def test_an_empty_probe_set_and_one_that_can_be_read_once_are_refused() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(FreezingError, match=r"^probe_loader: yields no batch"):
        Freezer(net, optimizer, [])
    with pytest.raises(FreezingError, match=r"^probe_loader: can be read only once"):
        Freezer(net, optimizer, iter([torch.randn(2, 3)]))
    batches = [torch.randn(2, 3)]
    freezer = Freezer(net, optimizer, batches)
    batches.clear()
    with pytest.raises(FreezingError, match=r"^probe_loader: yields no batch"):
        freezer.step()
