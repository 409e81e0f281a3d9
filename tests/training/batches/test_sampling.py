"""The order of an epoch and its draws: complete, a matter of seed and epoch alone, and shared out step by step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from neq_cli.training.batches.sampling import Share, ShuffledSampler, shuffled


def test_a_sampler_gives_every_image_once_each_epoch() -> None:
    sampler = ShuffledSampler(50, seed=3)
    epochs = [list(sampler) for _ in range(3)]
    for keys in epochs:
        assert sorted(index for index, _ in keys) == list(range(50))
        assert all(0 <= draw < 2**63 for _, draw in keys)
        assert len({draw for _, draw in keys}) == 50
    assert epochs[0] != epochs[1] != epochs[2]
    assert sampler.epoch == 3
    assert len(sampler) == 50


def test_a_sampler_follows_seed_and_epoch_alone() -> None:
    first = ShuffledSampler(50, seed=3)
    list(first)
    again = ShuffledSampler(50, seed=3)
    again.epoch = 1
    torch.manual_seed(77)
    assert list(first) == list(again)
    assert list(ShuffledSampler(50, seed=3)) != list(ShuffledSampler(50, seed=4))


@pytest.mark.parametrize("epoch", [1, 4])
def test_tensors_and_keys_of_an_epoch_are_the_same(epoch: int) -> None:
    keys, tensors = ShuffledSampler(20, seed=5), ShuffledSampler(20, seed=5)
    keys.epoch = tensors.epoch = epoch - 1
    order, draws = tensors.begin()
    assert list(keys) == list(zip(order.tolist(), draws.tolist(), strict=True))
    assert keys.epoch == tensors.epoch == epoch
    assert all(map(torch.equal, (order, draws), shuffled(20, 5, epoch)))


def test_an_epoch_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    shuffled(20, 5, 1)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("consumed", [0, 7, 12, 49, 60])
def test_processes_take_runs_of_the_one_order_in_turn(consumed: int) -> None:
    keys = list(zip(*(values.tolist() for values in shuffled(50, 5, 3)), strict=True))[consumed:]
    samplers = [ShuffledSampler(50, 5, 4, Share(rank, 3)) for rank in range(3)]
    for sampler in samplers:
        sampler.epoch, sampler.consumed = 2, consumed
    ours = [list(sampler) for sampler in samplers]
    steps = max(0, 50 - consumed) // 12
    assert [sampler.steps(consumed) for sampler in samplers] == [steps] * 3
    for step in range(steps):
        for rank in range(3):
            start = 12 * step + 4 * rank
            assert ours[rank][4 * step : 4 * step + 4] == keys[start : start + 4]
    assert [len(part) for part in ours] == [4 * steps] * 3
    # The next pass is a whole one again.
    assert [len(list(sampler)) for sampler in samplers] == [len(sampler) for sampler in samplers] == [16] * 3
    assert [sampler.epoch for sampler in samplers] == [4] * 3


@pytest.mark.parametrize("size", [0, 2, 9, 10, 11])
@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_parts_in_a_row_are_those_of_numpy(size: int, processes: int) -> None:
    things = np.arange(size)
    parts = [things[Share(rank, processes).part(size)].tolist() for rank in range(processes)]
    assert parts == [part.tolist() for part in np.array_split(things, processes)]
