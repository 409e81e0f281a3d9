"""``torch.inference_mode`` around what a Freezer does: nothing of it may stay behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neq_cli import Freezer, Stochastic
from neq_cli.errors import FreezingError


def network() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 3)
    )


def trained(around_making: Any, around_step: Any, around_evaluation: Any, backward: str) -> dict[str, Tensor]:
    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    with around_making():
        # The loader may make its tensors in that mode too.
        probe = [torch.randn(3, 1, 3, 3, generator=torch.Generator().manual_seed(7))]
        freezer = Freezer(net, optimizer, probe, Stochastic(0.5, seed=3), backward=backward)
    for epoch in range(3):
        generator = torch.Generator().manual_seed(epoch)
        for _ in range(2):
            optimizer.zero_grad()
            net(torch.randn(4, 1, 3, 3, generator=generator)).square().mean().backward()
            optimizer.step()
        with around_evaluation():
            net.eval()
            net(torch.randn(4, 1, 3, 3, generator=generator))
            net.train()
        with around_step():
            freezer.step()
            state = freezer.state_dict()
        if epoch == 1:
            with around_step():
                freezer.load_state_dict(state)
    with around_step():
        freezer.detach()
    tensors = [*freezer.trainable.values(), *state["previous"].values()]
    tensors += [
        getattr(moved, name) for moved in freezer.dynamics.values() for name in ("phi", "delta_phi", "velocity")
    ]
    assert not any(tensor.is_inference() for tensor in tensors)
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


@pytest.mark.parametrize("backward", ["exact", "truncated", "dense"])
def test_inference_mode_around_the_freezer_changes_nothing(backward: str) -> None:
    expected = trained(torch.enable_grad, torch.enable_grad, torch.no_grad, backward)
    for places in range(1, 8):
        around = [torch.inference_mode if places >> place & 1 else torch.enable_grad for place in range(3)]
        found = trained(*around, backward)
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), (places, name)


def test_a_model_made_in_inference_mode_is_refused_by_name() -> None:
    with torch.inference_mode():
        net = network()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with pytest.raises(FreezingError, match=r"^model: parameter '0.weight' was made in torch.inference_mode"):
            Freezer(net, optimizer, [torch.randn(2, 1, 3, 3)])
    with pytest.raises(FreezingError, match=r"^model: parameter '0.weight' was made in torch.inference_mode"):
        Freezer(net, optimizer, [torch.randn(2, 1, 3, 3)])
