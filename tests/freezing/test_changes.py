from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn.utils import parametrizations, parametrize, prune

from neq_cli import Freezer, Observation, Stochastic
from neq_cli.errors import FreezingError
from neq_cli.freezing.backward.sliced import MODES, BackwardMode


class Even:
    """Freezes every second neuron of each layer, beginning with the first; all of those called ``whole``."""

    def choose(self, observations: Mapping[str, Observation], epoch: int) -> Mapping[str, Tensor]:
        return {
            name: torch.arange(len(seen.trainable)) % 2 == 1 if name != "whole" else torch.zeros_like(seen.trainable)
            for name, seen in observations.items()
        }

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential()
    for name, module in {
        "whole": nn.Linear(6, 6),
        "first": nn.Linear(6, 8),
        "norm": nn.BatchNorm1d(8),
        "act": nn.Tanh(),
        "second": nn.Linear(8, 8),
        "third": nn.Linear(8, 8),
        "head": nn.Linear(8, 3),
    }.items():
        net.add_module(name, module)
    return net


def sgd(parameters: Iterable[Tensor]) -> optim.Optimizer:
    return optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)


PROBE = [torch.linspace(-2, 2, 30).view(5, 6).sin()]


def train(net: nn.Module, optimizer: optim.Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        inputs = torch.randn(7, 6, dtype=next(net.parameters()).dtype)
        net(inputs).square().sum().backward()
        optimizer.step()


def moved(before: Tensor, after: Tensor) -> list[bool]:
    return (before != after.detach()).flatten(1 if before.dim() > 1 else 0).view(len(before), -1).any(1).tolist()


HALF = [False, True] * 4


# Gradients that are switched off while `step()` chooses.


@pytest.mark.parametrize("mode", MODES)
def test_what_freezes_while_gradients_are_off_is_held_from_when_they_are_on(mode: BackwardMode) -> None:
    net = make_net()
    optimizer = sgd(net.parameters())
    freezer = Freezer(net, optimizer, PROBE, Even(), backward=mode)
    train(net, optimizer)
    net.requires_grad_(False)
    freezer.step()
    assert not any(one.requires_grad for one in net.parameters())
    net.requires_grad_(True)
    before = copy.deepcopy(net.state_dict())
    train(net, optimizer, 3)
    for name in ("first.weight", "first.bias", "norm.weight", "second.weight"):
        assert moved(before[name], net.get_parameter(name)) == HALF, name
        assert not net.get_parameter(name).grad[::2].any()
    for name in ("whole.weight", "whole.bias"):
        assert torch.equal(before[name], net.get_parameter(name))
        assert net.get_parameter(name).grad is None
    assert all(moved(before["head.weight"], net.head.weight))


def test_gradients_off_and_on_again_between_two_steps_lose_nothing() -> None:
    net = make_net()
    optimizer = sgd(net.parameters())
    freezer = Freezer(net, optimizer, PROBE, Even())
    train(net, optimizer)
    freezer.step()
    before = net.first.weight.detach().clone()
    for wanted in (False, True, False, True):
        net.first.requires_grad_(wanted)
        train(net, optimizer)
    assert moved(before, net.first.weight) == HALF
    assert not freezer.notes


# Parameters that join the optimiser.


def test_parameters_that_join_the_optimiser_are_observed_from_the_next_step_on(caplog: Any) -> None:
    net = make_net()
    optimizer = sgd([*net.second.parameters(), *net.head.parameters()])
    freezer = Freezer(net, optimizer, PROBE, Even())
    assert list(freezer.layers) == ["second", "head"]
    train(net, optimizer)
    freezer.step()
    dynamics = freezer.dynamics["second"]
    optimizer.add_param_group({"params": [*net.first.parameters(), *net.norm.parameters()]})
    before = net.first.weight.detach().clone()
    old = copy.deepcopy(net)
    train(net, optimizer)
    assert all(moved(before, net.first.weight))
    with caplog.at_level(logging.WARNING, logger="neq_cli"):
        seen = freezer.step()
    assert list(seen) == ["first", "norm", "second", "head"]
    assert [record.getMessage() for record in caplog.records] == [
        "first, norm: joined the optimiser; observed from now on"
    ]
    assert freezer.notes == ["epoch 2: first, norm: joined the optimiser; observed from now on"]
    # Nothing is known of them but how similar they stayed; they train for an epoch whatever the policy says.
    a, b = (net(PROBE[0]) for net in (old.eval()[:2], copy.deepcopy(net).eval()[:2]))
    torch.testing.assert_close(seen["first"].phi, nn.functional.cosine_similarity(a, b, dim=0), rtol=1e-5, atol=1e-6)
    assert seen["first"].delta_phi.isnan().all()
    assert not seen["first"].velocity.any()
    assert all(seen[name].trainable.all() for name in ("first", "norm"))
    # The others go on as if nothing had been.
    assert seen["second"].trainable.tolist() == HALF
    assert torch.equal(seen["second"].delta_phi, (freezer.dynamics["second"].phi - dynamics.phi).float())
    train(net, optimizer)
    phi = freezer.dynamics["first"].phi
    seen = freezer.step()
    assert torch.equal(seen["first"].delta_phi, (freezer.dynamics["first"].phi - phi).float())
    assert torch.equal(seen["first"].velocity, seen["first"].delta_phi)  # Eq. 4 with a velocity of 0 before
    assert seen["first"].trainable.tolist() == HALF
    before = net.first.weight.detach().clone()
    train(net, optimizer)
    assert moved(before, net.first.weight) == HALF
    freezer.detach()
    train(net, optimizer)
    assert all(moved(before, net.first.weight))
    assert type(net.first) is nn.Linear


def test_a_layer_whose_gradients_are_switched_on_later_joins_too() -> None:
    net = make_net()
    net.first.requires_grad_(False)
    optimizer = sgd(net.parameters())
    freezer = Freezer(net, optimizer, PROBE, Even())
    assert "first" not in freezer.layers
    train(net, optimizer)
    freezer.step()
    net.first.requires_grad_(True)
    net.second.requires_grad_(False)  # meanwhile, which does not lose its hold
    train(net, optimizer)
    assert list(freezer.step()) == ["whole", "first", "norm", "second", "third", "head"]
    assert not net.second.weight.requires_grad
    net.second.requires_grad_(True)
    train(net, optimizer)
    freezer.step()
    before = copy.deepcopy(net.state_dict())
    train(net, optimizer)
    for name in ("first.weight", "second.weight"):
        assert moved(before[name], net.get_parameter(name)) == HALF, name


def test_a_group_that_leaves_the_optimiser_owns_no_neurons() -> None:
    net = make_net()
    optimizer = optim.SGD([{"params": net.first.parameters()}, {"params": net.head.parameters()}], lr=0.1)
    freezer = Freezer(net, optimizer, PROBE, Even())
    train(net, optimizer)
    freezer.step()
    del optimizer.param_groups[0]
    train(net, optimizer)
    assert list(freezer.step()) == ["head"]
    assert len(freezer.notes) == 1


def grown(saved: str) -> tuple[nn.Module, optim.Optimizer, Freezer]:
    """Return what has come to where a group has joined, or not yet been seen, as told."""
    net = make_net()
    optimizer = sgd([*net.second.parameters(), *net.head.parameters()])
    freezer = Freezer(net, optimizer, PROBE, Stochastic(0.5, seed=3))
    torch.manual_seed(1)
    train(net, optimizer)
    freezer.step()
    optimizer.add_param_group({"params": [*net.first.parameters(), *net.norm.parameters()]})
    if saved == "after the step":
        train(net, optimizer)
        freezer.step()
    return net, optimizer, freezer


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("saved", ["before the step", "after the step"])
def test_a_state_saved_after_a_group_joined_goes_on_bit_for_bit(saved: str, late: bool) -> None:
    net, optimizer, freezer = grown(saved)
    state = copy.deepcopy((net.state_dict(), optimizer.state_dict(), freezer.state_dict()))
    other = make_net()
    other_optimizer = sgd([*other.second.parameters(), *other.head.parameters()])

    def join() -> None:
        other_optimizer.add_param_group({"params": [*other.first.parameters(), *other.norm.parameters()]})

    if not late:
        join()
    other_freezer = Freezer(other, other_optimizer, PROBE, Stochastic(0.5, seed=3))
    if late:  # joins a Freezer that is there
        join()
    other.load_state_dict(state[0])
    other_optimizer.load_state_dict(state[1])
    other_freezer.load_state_dict(state[2])
    results = []
    for a, b, c in ((net, optimizer, freezer), (other, other_optimizer, other_freezer)):
        torch.manual_seed(2)
        for _ in range(3):
            train(a, b)
            seen = c.step()
        results.append([*a.state_dict().values(), *(one.trainable for one in seen.values()), *tensors(c.state_dict())])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value.nan_to_num(7)
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from tensors(one)


def test_saving_changes_nothing() -> None:
    results = []
    for save in (False, True):
        net, optimizer, freezer = grown("before the step")
        for _ in range(2):
            if save:
                freezer.state_dict()
            train(net, optimizer)
            freezer.step()
        results.append([*net.state_dict().values(), *tensors(freezer.state_dict())])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


# Modules and parameters that are replaced.


def replace_module(net: nn.Sequential, optimizer: optim.Optimizer) -> None:
    net.second = nn.Linear(8, 8)
    optimizer.add_param_group({"params": net.second.parameters()})


def replace_parameter(net: nn.Sequential, optimizer: optim.Optimizer) -> None:
    net.second.weight = nn.Parameter(torch.randn(8, 8))
    optimizer.add_param_group({"params": [net.second.weight]})


def replace_in_the_optimizer_too(net: nn.Sequential, optimizer: optim.Optimizer) -> None:
    net.second.weight = nn.Parameter(torch.randn(8, 8))
    optimizer.param_groups[0]["params"][6] = net.second.weight


def widen(net: nn.Sequential, optimizer: optim.Optimizer) -> None:
    net.second, net.third = nn.Linear(8, 12), nn.Linear(12, 8)
    optimizer.add_param_group({"params": [*net.second.parameters(), *net.third.parameters()]})


def widen_in_place(net: nn.Sequential, optimizer: optim.Optimizer) -> None:
    with torch.no_grad():
        net.second.weight.set_(torch.randn(12, 8))  # type: ignore[call-overload]
        net.second.bias.set_(torch.randn(12))  # type: ignore[call-overload]
        net.third.weight.set_(torch.randn(8, 12))  # type: ignore[call-overload]
    optimizer.state.clear()
    optimizer.zero_grad()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("replace", [replace_module, replace_parameter, replace_in_the_optimizer_too, widen])
@pytest.mark.parametrize("trained", [False, True])
def test_what_is_replaced_trains_wholly_is_reported_so_and_taken_in(
    replace: Callable[[nn.Sequential, optim.Optimizer], None], mode: BackwardMode, trained: bool, caplog: Any
) -> None:
    net = make_net()
    optimizer = sgd(net.parameters())
    freezer = Freezer(net, optimizer, PROBE, Even(), backward=mode)
    for _ in range(2):
        train(net, optimizer)
        assert freezer.step()["second"].trainable.tolist() == HALF
    replace(net, optimizer)
    before = copy.deepcopy(net.state_dict())
    if trained:
        with caplog.at_level(logging.WARNING, logger="neq_cli"):
            train(net, optimizer)
        assert all(moved(before["second.weight"], net.second.weight))
        assert freezer.trainable["second"].all()
        assert moved(before["first.weight"], net.first.weight) == HALF
        assert "second: replaced in the model; trains wholly until step() takes it in" in caplog.messages[0].replace(
            "second, third", "second"
        )
    seen = freezer.step()
    assert all(one.trainable.all() for one in seen.values())
    assert len(seen["second"].phi) == len(net.second.weight)
    assert "looked at anew" in freezer.notes[-1]
    assert "second" in freezer.notes[-1]
    train(net, optimizer)
    seen = freezer.step()
    before = copy.deepcopy(net.state_dict())
    train(net, optimizer)
    for name in ("first.weight", "second.weight", "second.bias"):
        assert moved(before[name], net.get_parameter(name)) == seen[name.partition(".")[0]].trainable.tolist()
        assert not all(moved(before[name], net.get_parameter(name)))


def test_a_parameter_of_another_shape_is_taken_in() -> None:
    net = make_net()
    optimizer = sgd(net.parameters())
    freezer = Freezer(net, optimizer, PROBE, Even())
    train(net, optimizer)
    freezer.step()
    freezer.detach()
    widen_in_place(net, optimizer)
    assert len(freezer.step()["second"].trainable) == 12


def test_a_replaced_layer_that_the_optimiser_does_not_update_is_refused_by_name() -> None:
    net = make_net()
    optimizer = sgd(net.parameters())
    freezer = Freezer(net, optimizer, PROBE, Even())
    train(net, optimizer)
    freezer.step()
    net.second = nn.Linear(8, 8)
    with pytest.raises(
        FreezingError, match=r"^layer 'second': .* 'second\.weight'; add it to .* new Freezer$"
    ) as caught:
        freezer.step()
    assert "\n" not in str(caught.value)
    net.second.requires_grad_(False)  # one that is not to be trained
    assert "second" not in freezer.step()


def reload(net: nn.Sequential) -> None:
    net.load_state_dict(copy.deepcopy(net.state_dict()), assign=True)


def convert_into_others(net: nn.Sequential) -> None:
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    net.double()
    torch.__future__.set_overwrite_module_params_on_conversion(before)


@pytest.mark.parametrize("replace", [reload, convert_into_others])
def test_parameters_replaced_behind_the_optimisers_back_are_refused_by_name(
    replace: Callable[[nn.Sequential], None],
) -> None:
    net = make_net()
    optimizer = sgd(net.parameters())
    freezer = Freezer(net, optimizer, PROBE, Even())
    train(net, optimizer)
    freezer.step()
    replace(net)
    with pytest.raises(FreezingError, match=r"^layer 'whole': its parameters were replaced after the Freezer was made"):
        freezer.step()


def prune_it(net: nn.Sequential) -> None:
    prune.l1_unstructured(net.second, "weight", amount=0.3)


def parametrize_it(net: nn.Sequential) -> None:
    parametrize.register_parametrization(net.second, "weight", nn.Tanh())


def spectral_norm(net: nn.Sequential) -> None:
    parametrizations.spectral_norm(net.second)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", [prune_it, parametrize_it, spectral_norm])
def test_a_weight_that_comes_to_be_computed_from_the_same_parameter(
    change: Callable[[nn.Sequential], None], mode: BackwardMode, trained: bool
) -> None:
    net = make_net()
    optimizer = sgd(net.parameters())
    freezer = Freezer(net, optimizer, PROBE, Even(), backward=mode)
    for _ in range(2):
        train(net, optimizer)
        freezer.step()
    change(net)
    if trained:
        train(net, optimizer)
        assert freezer.trainable["second"].all()
    freezer.step()
    assert "second" in freezer.notes[-1]
    before = copy.deepcopy(net.state_dict())
    train(net, optimizer)
    freezer.step()
    for name, parameter in net.named_parameters():
        assert any(moved(before[name], parameter)), name
    before = {name: one.detach().clone() for name, one in net.named_parameters()}
    train(net, optimizer)
    assert moved(before["first.weight"], net.first.weight) == HALF
    for layer, rows in freezer.trainable.items():
        for owned in freezer.layers[layer].rows:
            assert moved(before[owned.parameter], net.get_parameter(owned.parameter)) == rows.tolist(), owned.parameter
    freezer.detach()
    if change is not prune_it:
        parametrize.remove_parametrizations(net.second, "weight")
        assert type(net.second) is nn.Linear


def test_weight_norm_whose_new_parameters_the_optimiser_lacks_is_refused_by_name_and_taken_in_once_added() -> None:
    net = make_net()
    optimizer = sgd(net.parameters())
    freezer = Freezer(net, optimizer, PROBE, Even())
    train(net, optimizer)
    freezer.step()
    parametrizations.weight_norm(net.second)
    with pytest.raises(FreezingError, match=r"^layer 'second': .*'second\.parametrizations\.weight\.original"):
        freezer.step()
    optimizer.add_param_group({"params": net.second.parametrizations.parameters()})
    freezer.step()
    train(net, optimizer)
    freezer.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("trained", [False, True])
def test_a_model_of_another_type_is_held_and_observed_in_it(dtype: torch.dtype, trained: bool) -> None:
    net = make_net()
    optimizer = sgd(net.parameters())
    probe = [PROBE[0]]
    freezer = Freezer(net, optimizer, probe, Even())
    train(net, optimizer)
    freezer.step()
    net.to(dtype)
    optimizer.state.clear()
    optimizer.zero_grad()
    probe[0] = probe[0].to(dtype)
    before = net.first.weight.detach().clone()
    if trained:
        train(net, optimizer)
        assert moved(before, net.first.weight) == HALF
    freezer.step()
    before = net.first.weight.detach().clone()
    train(net, optimizer)
    assert moved(before, net.first.weight) == HALF
    assert not freezer.notes


def test_a_failed_look_leaves_the_sets_in_force() -> None:
    net = make_net()
    optimizer = sgd(net.parameters())
    freezer = Freezer(net, optimizer, PROBE, Even())
    train(net, optimizer)
    freezer.step()
    head, net.head = net.head, nn.Linear(5, 3)  # that does not fit
    optimizer.add_param_group({"params": net.head.parameters()})
    with pytest.raises(RuntimeError):
        freezer.step()
    net.head = head
    before = copy.deepcopy(net.state_dict())
    train(net, optimizer)
    assert moved(before["first.weight"], net.first.weight) == HALF


def test_nothing_is_looked_at_anew_where_nothing_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    net = make_net()
    optimizer = sgd(net.parameters())
    freezer = Freezer(net, optimizer, PROBE, Even())
    monkeypatch.setattr(freezer, "_study", None)
    for _ in range(3):
        train(net, optimizer)
        freezer.step()
    copy.deepcopy(net)
    freezer.step()
    assert not freezer.notes
