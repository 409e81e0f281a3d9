from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from neq_cli import Baseline, Freezer

# What a Freezer leaves as it found it.


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.Conv2d(6, 8, 3, groups=2),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(2),
        )
        self.head = nn.Linear(32, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).flatten(1))


class TokenNet(nn.Module):
    """``nn.TransformerEncoderLayer``: attention with packed weights, fast paths in eval mode, LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.embed(tokens)).mean(1))


def freezer_for(net: nn.Module, batches: Iterable[Any]) -> Freezer:
    return Freezer(net, torch.optim.SGD(net.parameters(), lr=0.1), batches, Baseline())


class Noisy(Dataset[Tensor]):
    """Draws from all three generators, as augmentation does."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        return torch.randn(3, 8, 8) + random.random() + float(np.random.rand())


class Everything(nn.Module):
    """Batch norm, dropout, an encoder layer with a fast path, noise in forward, and mixed modes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = ConvNet()
        self.tokens = TokenNet()
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        images.sub_(0.5)  # normalises its input in place
        noise = torch.rand(1) + random.random() + float(np.random.rand())
        return self.conv(images) + self.tokens(self.dropout(images[:, :, 0, :5])) + noise


def hooks_of(module: nn.Module) -> dict[str, int]:
    return {
        f"{name}{key}": len(value)
        for name, part in module.named_modules()
        for key, value in vars(part).items()
        if "hooks" in key and "state_dict" not in key
    }


def surroundings(net: nn.Module) -> dict[str, Any]:
    numpy_state = np.random.get_state()
    return {
        "buffers": {name: buffer.clone() for name, buffer in net.named_buffers()},
        "parameters": {name: parameter.detach().clone() for name, parameter in net.named_parameters()},
        "gradients": {n: None if p.grad is None else p.grad.clone() for n, p in net.named_parameters()},
        "needs gradients": {name: parameter.requires_grad for name, parameter in net.named_parameters()},
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (numpy_state[0], torch.from_numpy(numpy_state[1].copy()), *numpy_state[2:]),
        "modes": {name: module.training for name, module in net.named_modules()},
        "classes": {name: type(module) for name, module in net.named_modules()},
        "hooks": hooks_of(net),
        "grad mode": torch.is_grad_enabled(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "linear": nn.functional.linear,
        "checkpoint": torch.utils.checkpoint.CheckpointFunction.apply,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def assert_same(first: Any, second: Any, where: str = "") -> None:
    if isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_same(first[key], second[key], f"{where} {key}")
    elif isinstance(first, tuple):
        for number, (a, b) in enumerate(zip(first, second, strict=True)):
            assert_same(a, b, f"{where} [{number}]")
    elif isinstance(first, Tensor):
        assert torch.equal(first, second), where
    else:
        assert first == second, where


@pytest.mark.parametrize("fast_path", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
def test_probe_leaves_no_trace(fast_path: bool, gradients: bool) -> None:
    net = Everything()
    net.train()
    net.conv.features[1].eval()  # somebody keeps this one's statistics
    net.tokens.block.self_attn.eval()
    net(torch.randn(4, 3, 8, 8)).sum().backward()
    loader = DataLoader(Noisy(), batch_size=3, shuffle=True)
    torch.backends.mha.set_fastpath_enabled(fast_path)
    try:
        with torch.set_grad_enabled(gradients):
            before = surroundings(net)
            freezer = freezer_for(net, loader)
            assert_same(before, surroundings(net))
            freezer.step()
            assert_same(before, surroundings(net))
            freezer.flops()
            freezer.detach()
            assert_same(before, surroundings(net))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_a_step_that_fails_leaves_no_trace_either() -> None:
    class Fails(ConvNet):
        fail = False

        def forward(self, images: Tensor) -> Tensor:
            out = super().forward(images)
            if self.fail:
                raise ValueError("broken")
            return out

    net = Fails()
    freezer = freezer_for(net, [torch.randn(4, 3, 8, 8)])
    net.fail = True
    before = surroundings(net)
    with pytest.raises(ValueError, match="broken"):
        freezer.step()
    assert_same(before, surroundings(net))
    assert freezer.epoch == 0
