from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from neq_cli import Baseline, Freezer


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside, as long as they live, and remembers the most."""

    def __init__(self) -> None:
        super().__init__()
        self.holders: dict[int, int] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        known = {t.untyped_storage()._cdata for t in tree_flatten(arguments)[0] if isinstance(t, Tensor)}
        result = function(*arguments, **(keywords or {}))
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata in self.holders or storage._cdata not in known:
                    self._hold(tensor, storage._cdata, storage.nbytes())
        return result

    def _hold(self, tensor: Tensor, key: int, size: int) -> None:
        if key not in self.holders:
            self.holders[key] = 0
            self.now += size
            self.most = max(self.most, self.now)
        self.holders[key] += 1
        weakref.finalize(tensor, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self.holders[key] -= 1
        if not self.holders[key]:
            del self.holders[key]
            self.now -= size


def size_of(tensors: Iterator[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_live_bytes_counts_what_lives() -> None:
    outside = torch.zeros(1000)
    with LiveBytes() as count:
        first = torch.ones(256)  # 1 kB
        views = [first[:10], first.view(16, 16)]
        second = first + 1
        assert count.now == 2048
        del first
        assert count.now == 2048  # views keep it
        views.clear()
        assert count.now == 1024
        outside.add_(1)
        outside[:5].mul_(2)
        assert count.now == 1024
        del second
    assert (count.now, count.most) == (0, 2048)


def test_memory_is_one_copy_of_the_weights_plus_one_batch_of_activations() -> None:
    def make() -> nn.Module:
        return nn.Sequential(
            *(part for _ in range(6) for part in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(True))),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 300),
            nn.Linear(300, 300),
        )

    batch = 4
    layer_outputs = batch * (6 * 2 * 8 * 16 * 16 + 300 + 300) * 4  # float32
    one_output = batch * 8 * 16 * 16 * 4

    def measure(batches: int) -> tuple[int, int, int]:
        net = make()
        weights = size_of(iter(net.state_dict().values()))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        loader = [torch.randn(batch, 8, 16, 16) for _ in range(batches)]
        with LiveBytes() as count:
            freezer = Freezer(net, optimizer, loader, Baseline())
            held = count.now
            move_outside(net)
            count.most = count.now
            freezer.step()
            peak = count.most - held
            after = count.now
        return held - weights, peak, after - weights

    def move_outside(net: nn.Module) -> None:
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(1.01)

    held, peak, after = measure(2)
    # Between epochs: the weights' copy, and a few numbers for each of 696 neurons.
    assert 0 <= held < 40_000
    assert 0 <= after < 40_000
    # While probing: the old network's outputs, and what a forward pass and the sums themselves take (a few layers'
    # outputs; twice where they are float64).
    assert layer_outputs <= peak < layer_outputs + 12 * one_output
    # Twice the probe set, not a byte more.
    assert measure(4)[1] == pytest.approx(peak, abs=1000)
