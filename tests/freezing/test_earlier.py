"""The weights that the probe compares with: those of what is frozen whole are the model's own, kept nowhere else."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from typing import Any, get_args

import pytest
import torch
from frozen import Sets
from torch import Tensor, nn

from neq_cli import Freezer
from neq_cli.errors import FreezingError
from neq_cli.freezing.earlier import PLACES, Earlier, Snapshot
from neq_cli.recipe import values

SETS: tuple[tuple[str, ...], ...] = (("0",), ("0", "2"), ("2",), (), ("0",))
"""The layers that are frozen whole after each epoch."""


class Layers(Sets):
    """A policy that freezes layers whole, others in every epoch."""

    def choose(self, observations: Mapping[str, Any], epoch: int) -> Mapping[str, Tensor]:
        frozen = SETS[epoch - 1]
        return {name: torch.full_like(seen.trainable, name not in frozen) for name, seen in observations.items()}


class Training:
    def __init__(self, place: Snapshot = "device") -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)
        self.freezer = Freezer(self.net, self.optimizer, [torch.randn(5, 6)], Layers({}), probe_snapshot=place)
        self.inputs = torch.randn(16, 6)

    def epoch(self, between: Callable[[], object] = lambda: None) -> dict[str, Tensor]:
        """Train, and return phi of every layer."""
        for _ in range(2):
            self.optimizer.zero_grad()
            self.net(self.inputs).square().sum().backward()
            self.optimizer.step()
        between()
        return {name: seen.phi for name, seen in self.freezer.step().items()}

    def shared(self) -> set[str]:
        """Return the names of the parameters that are kept as the model's own."""
        kept = self.freezer._previous.tensors
        return {
            name
            for name, one in self.net.named_parameters()
            if (there := kept[name]) is not None and there.data_ptr() == one.data_ptr()
        }


@pytest.fixture
def copies_of_all(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return what has copies kept of every tensor from then on."""
    return lambda: monkeypatch.setattr(Earlier, "share", lambda self, model, names: None)


def assert_same(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("place", PLACES)
def test_what_is_frozen_whole_is_not_copied_and_all_is_compared_as_ever(
    place: Snapshot, copies_of_all: Callable[[], None]
) -> None:
    training, found = Training(place), []
    assert not training.shared()
    for frozen in SETS:
        found.append(training.epoch())
        assert training.shared() == {f"{name}.{one}" for name in frozen for one in ("weight", "bias")}
    training.freezer.detach()
    assert not training.shared()
    copies_of_all()
    plain = Training()
    assert_same(found, [plain.epoch() for _ in SETS])
    assert not plain.shared()
    assert any((phi["0"] < 1 - 1e-6).any() for phi in found[3:]), "what was thawed moves"


@pytest.mark.parametrize("whole", [True, False])
def test_loading_into_what_is_frozen_makes_copies_first(whole: bool, copies_of_all: Callable[[], None]) -> None:
    def trained() -> list[dict[str, Tensor]]:
        training = Training()
        other = {name: one + 1 for name, one in training.net.state_dict().items()}
        part = {name.removeprefix("0."): one for name, one in other.items() if name.startswith("0.")}

        def load() -> None:
            training.net.load_state_dict(other) if whole else training.net[0].load_state_dict(part)

        return [training.epoch(), training.epoch(load), training.epoch(), training.epoch()]

    found = trained()
    assert (found[1]["0"] < 1 - 1e-6).any(), "loaded weights differ from those before"
    copies_of_all()
    assert_same(found, trained())


@pytest.mark.parametrize("place", PLACES)
def test_a_resumed_run_shares_again(place: Snapshot) -> None:
    training = Training(place)
    for _ in range(2):
        training.epoch()
    saved = [copy.deepcopy(one.state_dict()) for one in (training.net, training.optimizer, training.freezer)]
    other = Training(place)
    for one, state in zip((other.net, other.optimizer, other.freezer), saved, strict=True):
        one.load_state_dict(state)
    assert other.shared() == training.shared() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    before = [one.detach().clone() for one in other.net.parameters()]
    other.freezer.load_state_dict(saved[2])
    assert all(torch.equal(a, b) for a, b in zip(before, other.net.parameters(), strict=True))
    assert_same([other.epoch() for _ in range(3)], [training.epoch() for _ in range(3)])


def test_copies_of_the_model_have_no_part_in_it() -> None:
    training = Training()
    training.epoch()
    for other in (copy.deepcopy(training.net), pickle.loads(pickle.dumps(training.net))):
        other.load_state_dict({name: one + 1 for name, one in training.net.state_dict().items()})
    assert training.shared() == {"0.weight", "0.bias"}
    training.freezer.detach()
    assert not any(module._load_state_dict_pre_hooks for module in training.net.modules())


def test_a_frozen_model_that_moves_to_another_type_is_followed() -> None:
    training = Training()
    training.epoch()
    training.net.double()
    training.optimizer.state.clear()
    training.inputs = training.inputs.double()
    training.freezer.probe_loader = [batch.double() for batch in training.freezer.probe_loader]
    assert (training.epoch()["0"] > 1 - 1e-6).all()


def test_a_place_that_is_none() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(FreezingError, match=r"^probe_snapshot: 'gpu' is not a place for the weights before; "):
        Freezer(net, optimizer, [torch.ones(1, 2)], probe_snapshot="gpu")  # type: ignore[arg-type]
    assert get_args(values.Snapshot) == PLACES


@pytest.mark.gpu
def test_copies_on_the_cpu_leave_the_devices_memory_alone() -> None:
    found = []
    for place in PLACES:
        torch.manual_seed(0)
        net = nn.Sequential(*[nn.Linear(1000, 1000) for _ in range(4)], nn.Linear(1000, 2)).cuda()
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
        inputs = torch.randn(5, 1000, device="cuda")
        before = torch.cuda.memory_allocated()
        freezer = Freezer(net, optimizer, [inputs], probe_snapshot=place)
        net(inputs).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        phi = freezer.step()["0"].phi
        found.append((torch.cuda.memory_allocated() - before, phi))
    assert found[0][0] > 16_000_000 > 1_000_000 > found[1][0]
    assert torch.equal(found[0][1], found[1][1])
