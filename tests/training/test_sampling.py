"""The order of an epoch and its draws: complete, and a matter of seed and epoch alone."""

from __future__ import annotations

import pytest
import torch

from neq_cli.training.sampling import ShuffledSampler, shuffled


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
