"""A Freezer in several processes observes what one process would, and all of them hold the same sets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from rounding import phi_apart
from torch import Tensor, nn

from neq_cli import Freezer, NEq, Observation
from neq_cli.errors import FreezingError
from neq_cli.freezing.processes.agreement import pack, unpack


class Net(nn.Module):
    """Convolutions, a norm with statistics, attention, and a layer that negative inputs do not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.rare, self.hidden, self.head = nn.Conv2d(6, 6, 1), nn.Linear(6, 7), nn.Linear(7, 3)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.conv(images)))
        if bool(images[0, 0, 0, 0] > 0):
            hidden = self.rare(hidden)
        tokens = hidden.flatten(2).transpose(1, 2)
        return self.head(torch.tanh(self.hidden(self.attention(tokens, tokens, tokens)[0].mean(1))))


def probe() -> Tensor:
    images = torch.randn(12, 2, 5, 5, generator=torch.Generator().manual_seed(7))
    images[:, 0, 0, 0] = -1
    images[9:, 0, 0, 0] = 1
    return images


def moved(model: nn.Module, number: int) -> None:
    """Change weights and statistics, the same way everywhere."""
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.05 * torch.rand(tensor.shape, generator=generator))


def observed(
    shares: list[list[int]], definition: Any, batch: int, dtype: torch.dtype
) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """Return phi and set of every layer after each of three epochs, with a share of the probe set for each process.

    One process alone takes all shares, one after another, each cut into batches as its process would.
    """
    together = torch.distributed.is_initialized()
    torch.manual_seed(3)
    model = Net().eval().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    # A batch never mixes inputs that reach the rare layer with others: the model looks at the first one only.
    loader = [
        probe().to(dtype)[part]
        for own in map(torch.tensor, [shares[torch.distributed.get_rank()]] if together else shares)
        for group in (own[own < 9], own[own >= 9])
        for part in group.split(batch)
        if len(part)
    ]
    group = torch.distributed.group.WORLD if together else None
    freezer = Freezer(model, optimizer, loader, NEq(0.004, definition=definition), process_group=group)
    result = []
    for epoch in range(3):
        moved(model, epoch)
        freezer.step()
        result.append({name: (freezer.dynamics[name].phi, freezer.trainable[name]) for name in freezer.layers})
    return result


@pytest.mark.parametrize("definition", ["paper", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "shares",
    [
        [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]],
        [[0, 1, 2, 3, 4, 5, 6], [7, 8], [9, 10, 11]],  # uneven, and the rare layer is reached in one only
    ],
)
def test_many_processes_find_what_one_does(
    workers: Any, shares: list[list[int]], definition: str, dtype: torch.dtype
) -> None:
    # Libraries choose by the batch's size how to add up. In double precision other batches may do so: no output is
    # rounded more than 150 times. In single precision, the same batches give the same outputs, here as there, and
    # what is left is how their sums, in double precision, come together: of 9 positions in 12 inputs at most.
    if dtype == torch.float64:
        alone, tolerance = observed([list(range(12))], definition, 4, dtype), phi_apart(150, 108)
    else:
        alone, tolerance = observed(shares, definition, 2, dtype), phi_apart(0, 108)
    everyone = workers(len(shares), observed, shares, definition, 2, dtype)
    frozen = 0
    for epoch, expected in enumerate(alone):
        for name, (phi, trainable) in expected.items():
            for rank, found in enumerate(everyone):
                if definition == "reference" and name.startswith("attention"):
                    continue  # attention inside counts positions first, and these layers never freeze there
                assert (found[epoch][name][0] - phi).abs().max() <= tolerance, (epoch, name, rank)
                assert torch.equal(found[epoch][name][0], everyone[0][epoch][name][0])
                assert torch.equal(found[epoch][name][1], trainable), (epoch, name, rank)
            frozen += int((~trainable).sum())
    assert frozen > 2
    assert not alone[0]["rare"][0].isnan().any()


def emptied(kept: tuple[int, int], later: tuple[int, int]) -> str | list[float]:
    """Train with so many batches in the processes' shares, at the first look and afterwards."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    rank, group = torch.distributed.get_rank(), torch.distributed.group.WORLD
    inputs = torch.randn(5, 4)
    loader = [inputs] * kept[rank]
    try:
        freezer = Freezer(model, torch.optim.SGD(model.parameters(), lr=0.1), loader, process_group=group)
        loader[:] = [inputs] * later[rank]
        moved(model, 1)
        return freezer.step()["0"].phi.tolist()
    except FreezingError as error:
        return str(error)


def test_a_share_may_be_empty_but_not_all(workers: Any) -> None:
    some = workers(2, emptied, (1, 0), (0, 1))
    assert some[0] == some[1]
    assert all(-1 <= value < 0.9999 for value in some[0])
    assert set(workers(2, emptied, (1, 1), (0, 0))) == set(workers(2, emptied, (0, 1), (1, 1)))
    assert set(workers(2, emptied, (1, 1), (0, 0))) == {"probe_loader: yields no batch; give it at least one input"}


class Growing(nn.Module):
    """A layer that is called once more by whoever looks at a weight, which was none at first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head, self.looks = nn.Linear(4, 4), nn.Linear(4, 2), False
        self.calls = nn.Parameter(torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        for _ in range(int(self.calls) if self.looks else 0):
            hidden = self.first(hidden)
        return self.head(hidden)


def unlike() -> tuple[list[float], list[float]]:
    model = Growing()
    group = torch.distributed.group.WORLD
    freezer = Freezer(model, torch.optim.SGD(model.parameters(), lr=0.1), [torch.ones(2, 4)], process_group=group)
    model.looks = torch.distributed.get_rank() == 1
    with torch.no_grad():
        model.calls.fill_(1)
    freezer.step()
    return tuple(freezer.dynamics[name].phi.tolist() for name in ("first", "head"))  # type: ignore[return-value]


def test_calls_that_differ_in_one_process_leave_the_similarity_unknown_in_all(workers: Any) -> None:
    for first, head in workers(2, unlike):
        assert all(map(math.isnan, first))
        assert not any(map(math.isnan, head))


class Scripted:
    """Freezes all but every n-th neuron of every layer; the n by epoch. Answers in process 0 alone."""

    def __init__(self, every: list[int]) -> None:
        self.every = every

    def choose(self, observations: Mapping[str, Observation], epoch: int) -> Mapping[str, Tensor]:
        assert torch.distributed.get_rank() == 0
        every = self.every[epoch - 1]
        if every == 0:
            raise FreezingError("policy Scripted: has had enough")
        if every == -1:
            raise ZeroDivisionError("by nothing")
        if every == -2:
            return {"nowhere": torch.ones(1, dtype=torch.bool)}
        return {name: torch.arange(len(seen.trainable)) % every == 0 for name, seen in observations.items()}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


def small() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(torch.distributed.get_rank())  # not the same weights: process 0's count
    model = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 2))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def failing(every: int) -> tuple[str, str, int, dict[str, Tensor]]:
    model, optimizer = small()
    policy = Scripted([3, every, 2])
    freezer = Freezer(model, optimizer, [torch.ones(2, 4)], policy, process_group=torch.distributed.group.WORLD)
    freezer.step()
    try:
        freezer.step()
    except Exception as error:
        kind, message = type(error).__name__, str(error)
    epoch, sets = freezer.epoch, freezer.trainable
    policy.every[1] = 2  # all can go on
    freezer.step()
    return kind, message, epoch, sets


@pytest.mark.parametrize(
    ("every", "kind", "message"),
    [
        (0, "FreezingError", "policy Scripted: has had enough"),
        (-1, "ZeroDivisionError", "by nothing"),
        (-2, "FreezingError", "policy Scripted: chose for a layer 'nowhere' that the model does not have"),
    ],
)
def test_a_policy_that_fails_in_process_0_fails_in_all(workers: Any, every: int, kind: str, message: str) -> None:
    first, *others = workers(3, failing, every)
    assert first[:2] == (kind, message)
    prefix = "" if kind == "FreezingError" else f"process 0: {kind}: "
    for found in others:
        assert found[:2] == ("FreezingError", prefix + message)
    for found in (first, *others):
        assert found[2] == 1
        assert found[3]["0"].tolist() == [True, False, False] * 3


def tampered(where: str) -> str:
    model, optimizer = small()
    freezer = Freezer(
        model, optimizer, [torch.ones(2, 4)], Scripted([3, 2, 2]), process_group=torch.distributed.group.WORLD
    )
    freezer.step()
    if torch.distributed.get_rank() == 2:
        if where == "set":
            freezer.trainable["2"][3] ^= True
        elif where == "phi":
            freezer.dynamics["2"].phi[3] += 1e-15
        elif where == "epoch":
            freezer.epoch += 1
    if where == "during" and torch.distributed.get_rank() == 2:
        put_in_force = freezer._put_in_force

        def other_sets(trainable: dict[str, Tensor]) -> None:
            put_in_force({name: ~rows for name, rows in trainable.items()})

        freezer._put_in_force = other_sets  # type: ignore[method-assign]
    try:
        freezer.step()
    except FreezingError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("where", ["nowhere", "set", "phi", "epoch", "during"])
def test_sets_that_differ_stop_all_processes(workers: Any, where: str) -> None:
    messages = workers(3, tampered, where)
    if where == "nowhere":
        assert messages == [""] * 3
    else:
        assert len(set(messages)) == 1
        assert messages[0].startswith("process 2 holds other frozen sets than process 0; ")


def of_different_kinds() -> str:
    size = 5 + (torch.distributed.get_rank() == 1)
    model = nn.Sequential(nn.Linear(4, size), nn.Linear(size, 2))
    try:
        Freezer(
            model, torch.optim.SGD(model.parameters(), lr=0.1), [torch.ones(2, 4)],
            process_group=torch.distributed.group.WORLD,
        )  # fmt: skip
    except FreezingError as error:
        return str(error)
    return ""


def test_different_models_are_found_before_they_are_mixed(workers: Any) -> None:
    messages = workers(2, of_different_kinds)
    assert len(set(messages)) == 1
    assert messages[0].startswith("process 1 holds other layers or settings than process 0")


def statistics() -> tuple[list[float], float, float]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))
    freezer = Freezer(
        model, torch.optim.SGD(model.parameters(), lr=0.1), [torch.randn(4, 1, 2, 2)],
        process_group=torch.distributed.group.WORLD,
    )  # fmt: skip
    model[1].running_mean.fill_(float(torch.distributed.get_rank()))
    freezer.step()
    return (
        freezer.dynamics["1"].phi.tolist(),
        model[1].running_mean[0].item(),
        float(freezer._previous.tensors["1.running_mean"][0]),
    )


def test_the_statistics_are_process_0_s_while_it_looks_and_each_one_s_own_afterwards(workers: Any) -> None:
    found = workers(2, statistics)
    assert found[0][0] == pytest.approx([1, 1, 1], abs=phi_apart(0, 16))  # process 0 has not moved
    assert [(mean, before) for _, mean, before in found] == [(0.0, 0.0), (1.0, 0.0)]


@pytest.mark.parametrize("sizes", [{"a": 1}, {"a": 8, "b": 3}, {"a": 5, "b": 13, "c": 64}])
def test_packed_sets_are_the_sets(sizes: dict[str, int]) -> None:
    sets = {name: torch.rand(size) < 0.5 for name, size in sizes.items()}
    packed = pack(sets)
    assert packed.tolist() == [
        sum(int(bit) << place for place, bit in enumerate(bits))
        for bits in torch.cat(list(sets.values())).tolist()
        and [torch.cat(list(sets.values()))[i : i + 8].tolist() for i in range(0, sum(sizes.values()), 8)]
    ]
    assert all(torch.equal(sets[name], rows) for name, rows in unpack(packed, sizes).items())
