"""Buffers that forward passes register, replace, resize or take away, in training and while the model is looked at."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from bits import everything
from torch import Tensor, nn

from neq_cli import Baseline, Freezer, NEq, Stochastic
from neq_cli.errors import FreezingError


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


class Cached(nn.Module):
    """A linear layer before a table of factors that a forward pass makes as it needs it, in one of many ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.notes: list[int] = []
        self.by_length: dict[int, Tensor] = {}
        if way in ("grows", "in place", "data", "other type"):
            self.register_buffer("table", torch.ones(1, 4))
        elif way == "none":
            self.register_buffer("table", None, persistent=False)
        elif way == "attribute":
            self.table = torch.ones(1, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        length = inputs.shape[1]
        self.notes.append(length)
        factors = (1 + torch.arange(length, dtype=inputs.dtype))[:, None].expand(length, 4)
        if self.way in ("born", "not kept"):
            if not hasattr(self, "table") or len(self.table) < length:
                self.register_buffer("table", factors.clone(), persistent=self.way == "born")
        elif self.way == "shrinks":
            self.register_buffer("table", factors.clone())
        elif self.way in ("grows", "none", "attribute"):
            if self.table is None or len(self.table) < length:
                self.table = factors.clone()
        elif self.way == "in place":
            if len(self.table) < length:
                self.table.resize_(length, 4).copy_(factors)
        elif self.way == "data":
            if len(self.table) < length:
                self.table.data = factors.clone()
        elif self.way == "other type":
            self.table = factors.double() if length > 3 else factors.float()
        elif self.way == "gone":
            if hasattr(self, "table"):
                del self.table
            else:
                self.register_buffer("table", factors.clone())
        elif self.way == "dictionary":
            self.by_length.setdefault(length, factors.clone())
        table = self.by_length.get(length, getattr(self, "table", factors))
        return self.head((torch.relu(self.first(inputs)) * table[:length].to(inputs.dtype)).mean(1))


WAYS = [
    "born", "not kept", "shrinks", "grows", "none", "attribute", "in place", "data", "other type", "gone", "dictionary",
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_what_a_look_makes_of_buffers_is_taken_back(way: str) -> None:
    net = Cached(way)
    before = everything(net)
    # Batches of other lengths than those in training, longer and shorter.
    freezer = Freezer(net, sgd(net), [torch.randn(2, 5, 4), torch.randn(2, 3, 4), torch.randn(1, 7, 4)], Baseline())
    assert everything(net) == before
    assert net.notes == []
    for length in (4, 6, 2, 3):
        net(torch.randn(2, length, 4))
        before, notes, lengths = everything(net), list(net.notes), dict(net.by_length)
        freezer.step()
        assert everything(net) == before
        assert net.notes == notes
        assert net.by_length == lengths


@pytest.mark.parametrize("way", WAYS)
def test_each_network_runs_with_the_buffers_that_it_had(way: str) -> None:
    class Noted(Cached):
        def forward(self, inputs: Tensor) -> Tensor:
            table = getattr(self, "table", None)
            found.append(None if table is None else (table.dtype, table.tolist()))
            return super().forward(inputs)

    def held() -> Any:
        table = getattr(net, "table", None)
        return None if table is None else (table.dtype, table.tolist())

    found: list[Any] = []
    net = Noted(way)
    freezer = Freezer(net, sgd(net), [torch.randn(2, 3, 4), torch.randn(2, 6, 4)], Baseline())
    old = held()
    for length in (4, 6, 2, 3):
        net(torch.randn(2, length, 4))
        new = held()
        found.clear()
        freezer.step()
        # The attribute is no buffer, and both networks'.
        assert found == ([new] * 4 if way == "attribute" else [old, new] * 2)
        old = new


@pytest.mark.parametrize("way", ["born", "not kept", "none", "grows", "other type", "gone", "dictionary"])
def test_similarity_across_buffers_that_come_and_go_is_that_of_the_weights(way: str) -> None:
    net, probe = Cached(way), torch.randn(3, 5, 4)
    freezer = Freezer(net, sgd(net), [probe], Baseline())
    for length in (4, 6, 2):
        old = copy.deepcopy(net.first)
        net(torch.randn(2, length, 4))
        with torch.no_grad():
            net.first.weight.add_(torch.randn(4, 4))
        phi = freezer.step()["first"].phi
        outputs = [layer(probe).double().flatten(0, 1) for layer in (net.first, old)]
        # Products of 15 outputs in single precision's rounding.
        expected = nn.functional.cosine_similarity(*outputs, dim=0)
        assert torch.allclose(phi.double(), expected, rtol=0, atol=32 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("flattened", [False, True])
def test_a_resumed_freezer_goes_on_with_buffers_that_came_meanwhile(way: str, flattened: bool) -> None:
    def stepped(freezer: Freezer, net: nn.Module, number: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            net.first.weight.add_(torch.randn(4, 4, generator=generator))
        net(torch.randn(2, 2 + number, 4, generator=generator))
        return {name: seen.velocity for name, seen in freezer.step().items()}

    probe = torch.randn(3, 5, 4)
    net = Cached(way)
    freezer = Freezer(net, sgd(net), [probe], Stochastic(0.5))
    for number in range(2):
        stepped(freezer, net, number)
    resumed, state = copy.deepcopy(net), copy.deepcopy(freezer.state_dict())
    if flattened:  # as formats do that hold tensors alone
        state["previous"] = {name: tensor for name, tensor in state["previous"].items() if tensor is not None}
    expected = [stepped(freezer, net, number) for number in range(2, 4)]
    again = Freezer(resumed, sgd(resumed), [probe], Stochastic(0.5))
    again.load_state_dict(state)
    for number, wanted in zip(range(2, 4), expected, strict=True):
        found = stepped(again, resumed, number)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_state_that_belongs_to_another_model_is_still_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    freezer = Freezer(net, sgd(net), [torch.randn(3, 4)], Baseline())
    state = freezer.state_dict()
    for name, wrong in {"1.running_mean": torch.zeros(5), "1.running_var": None, "0.weight": None}.items():
        with pytest.raises(FreezingError, match=f"^freezer state: belongs to another model; '{name}' differs"):
            freezer.load_state_dict({**state, "previous": {**state["previous"], name: wrong}})
    with pytest.raises(FreezingError, match=r"^freezer state: previous: 'cache' is 'nothing'; it must be a tensor"):
        freezer.load_state_dict({**state, "previous": {**state["previous"], "cache": "nothing"}})


def in_several_processes() -> list[list[float]]:
    """Buffers grow by what each process's own batches need."""
    net = Cached("born")
    rank, group = torch.distributed.get_rank(), torch.distributed.group.WORLD
    freezer = Freezer(net, sgd(net), [torch.ones(1, 3 + rank, 4)], NEq(0.0), process_group=group)
    found = []
    for epoch in range(3):
        with torch.no_grad():
            net.first.weight.add_(torch.randn(4, 4, generator=torch.Generator().manual_seed(epoch)))
        net(torch.ones(1, 2 + (epoch + rank) % 3, 4))
        before = everything(net)
        freezer.step()
        assert everything(net) == before
        found.append(freezer.dynamics["first"].phi.tolist())
    found.append(freezer._previous.tensors["table"].flatten().tolist())
    return found


def test_buffers_that_differ_between_processes_are_process_0_s(workers: Any) -> None:
    first, second = workers(2, in_several_processes)
    assert first == second


def test_a_buffer_made_in_inference_mode_is_left_alone() -> None:
    net = Cached("born")
    freezer = Freezer(net, sgd(net), [torch.randn(2, 3, 4)], Baseline())
    with torch.inference_mode():
        net(torch.randn(2, 6, 4))
    assert net.table.is_inference()
    kept = net.table
    freezer.step()
    assert net.table is kept
    freezer.step()
    assert net.table is kept
