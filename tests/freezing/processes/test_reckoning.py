"""Bytes that are reckoned are those that several processes hand to collective operations, and those that are kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neq_cli import Freezer, NEq
from neq_cli.freezing.processes.reckoning import Extent, exchanged, extent_of, held, hops, steps_that_hide
from neq_cli.training.bench.growth import counted


def network() -> nn.Module:
    """Four layers of 6, 6, 9 and 3 neurons, and three buffers of 4 * 6 + 4 * 6 + 8 bytes."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(54, 9), nn.ReLU(), nn.Linear(9, 3)
    )


def observed() -> tuple[Mapping[str, int], Mapping[str, int], Mapping[str, int], Extent]:
    """Return calls and bytes counted in an observation, what is reckoned for it, and of what."""
    model, group = network(), torch.distributed.group.WORLD
    probe = [torch.randn(2, 2, 5, 5)] if torch.distributed.get_rank() < 2 else []  # a share may be empty
    freezer = Freezer(model, torch.optim.SGD(model.parameters(), lr=0.1), probe, NEq(1e-3), process_group=group)
    freezer.step()
    with counted() as found:
        freezer.step()
    extent = extent_of(freezer)
    return dict(found.calls), dict(found.bytes), exchanged(extent, torch.distributed.get_world_size()), extent


@pytest.mark.parametrize("processes", [2, 3])
def test_what_is_exchanged_is_what_is_reckoned(workers: Any, processes: int) -> None:
    for calls, found, reckoned, extent in workers(processes, observed):
        assert (extent.neurons, extent.layers, extent.buffers) == (24, 4, 56)
        assert found["all_reduce"] == reckoned["checks"] + reckoned["sums"]
        assert found["broadcast"] == reckoned["phi"] + reckoned["sets"] + reckoned["buffers"]
        assert reckoned["checks"] == 2 * 32 * processes
        assert reckoned["sums"] == 8 * (4 * 24 + 2 * 4 + 2)
        assert (reckoned["phi"], reckoned["sets"]) == (8 * 24, 8 + 3)
        assert reckoned["buffers"] - 2 * (8 + extent.names) == 2 * 56
        # Broadcast: phi, two for the sets, and twice the length and the names of buffers and those of each type.
        assert calls == {"all_reduce": 3, "broadcast": 3 + 2 * (2 + 2)}


def test_one_process_exchanges_nothing() -> None:
    assert sum(exchanged(Extent(400, 56, 100, 24, 4), 1).values()) == 0


def test_what_is_held_is_what_is_reckoned() -> None:
    model = network()
    freezer = Freezer(model, torch.optim.SGD(model.parameters(), lr=0.1), [torch.randn(2, 2, 5, 5)], NEq(0.0))
    freezer.step()
    assert not any(bool((~rows).any()) for rows in freezer.trainable.values())
    moving = [tensor for one in freezer.dynamics.values() for tensor in vars(one).values()]
    kept: list[Tensor | None] = [*freezer._previous.tensors.values(), *moving, *freezer.trainable.values()]
    assert held(extent_of(freezer)) == sum(one.numel() * one.element_size() for one in kept if one is not None)


@pytest.mark.parametrize(
    ("processes", "messages"),
    [(2, 3 * 2 * 1 + 7 * 1), (4, 3 * 2 * 3 + 7 * 2), (1000, 3 * 2 * 999 + 7 * 10)],
)
def test_messages_that_follow_on_each_other(processes: int, messages: int) -> None:
    assert hops(processes, 3, 7) == messages


def test_steps_that_hide_an_observation() -> None:
    assert steps_that_hide(2.0, 0.5) == 400
    assert steps_that_hide(2.0, 0.5, rows=0.0025) == 800  # half of the hundredth is taken
    assert steps_that_hide(2.0, 0.5, rows=0.005) is None
    count = steps_that_hide(2.0, 0.3, rows=0.001)
    assert count is not None
    assert 2.0 + 0.001 * count <= 0.01 * 0.3 * count
    assert 2.0 + 0.001 * (count - 1) > 0.01 * 0.3 * (count - 1)
