"""From a policy section to a policy, and the share that spends another run's FLOPs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from neq_cli.errors import RecipeError
from neq_cli.freezing import Baseline, NEq, Observation, Stochastic
from neq_cli.freezing.anatomy import Anatomy, anatomy_of
from neq_cli.freezing.backward.sliced import MODES, BackwardMode
from neq_cli.recipe import BaselinePolicy, CustomPolicy, NEqPolicy, StochasticPolicy
from neq_cli.training.policies import (
    build_policy,
    chosen_share,
    matching_p,
    mean_stochastic_flops,
    trainable_shares,
)


def network() -> nn.Module:
    """Layers of 3, 5 and 4 neurons, and an output layer."""
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 5, 1), nn.Flatten(), nn.Linear(80, 4), nn.ReLU(), nn.Linear(4, 2)
    )


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    return anatomy_of(network(), torch.zeros(1, 1, 4, 4))


def paper_flops(p: float, epochs: int) -> float:
    """The arithmetic of the network above, written out."""
    layers = ((3, 9 * 16), (5, 3 * 16), (4, 80))  # neurons, multiply-adds of each
    dense = sum(2 * neurons * each for neurons, each in layers) + 2 * 2 * 4
    saved = sum(2 * int(p * neurons) * each for neurons, each in layers)
    return dense - saved * (epochs - 1) / epochs


def executed_flops(p: float, mode: BackwardMode) -> float:
    """What one epoch with p frozen computes; the images need no gradient, so that the first layer has one half."""
    head = 2 * 4
    if mode != "dense" and p == 1.0:
        return head  # nothing trains below it
    weights = inputs = 0
    for number, (neurons, each) in enumerate(((3, 9 * 16), (5, 3 * 16), (4, 80))):
        trainable = neurons if mode == "dense" else neurons - int(p * neurons)
        weights += trainable * each
        inputs += (number > 0) * (trainable if mode == "truncated" else neurons) * each
    return weights + inputs + 2 * head


@pytest.mark.parametrize("p", [0.0, 0.2, 0.25, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("epochs", [1, 2, 250])
def test_mean_flops_of_a_random_share(anatomy: Anatomy, p: float, epochs: int) -> None:
    for mode in MODES:
        paper, executed = mean_stochastic_flops(anatomy, p, epochs, mode)
        assert paper == pytest.approx(paper_flops(p, epochs))
        first, others = executed_flops(0.0, mode), executed_flops(p, mode)
        assert executed == pytest.approx((first + (epochs - 1) * others) / epochs)
    assert mean_stochastic_flops(anatomy, p, epochs) == mean_stochastic_flops(anatomy, p, epochs, "exact")


def test_the_output_layer_keeps_its_share(anatomy: Anatomy) -> None:
    assert trainable_shares(anatomy, 0.5) == pytest.approx({"0": 2 / 3, "1": 3 / 5, "3": 1 / 2, "5": 1.0})


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1), epochs=st.integers(1, 30))
def test_a_matched_share_is_the_closest_there_is(share: float, epochs: int) -> None:
    anatomy = anatomy_of(network(), torch.zeros(1, 1, 4, 4))
    target = paper_flops(1.0, epochs) + share * (paper_flops(0.0, epochs) - paper_flops(1.0, epochs))
    found = paper_flops(matching_p(anatomy, target, epochs), epochs)
    # Every set of counts that some p leads to, by trying them all: a step is 1/60 wide at least.
    closest = min(abs(paper_flops(number / 600, epochs) - target) for number in range(601))
    assert abs(found - target) <= closest + 1e-6 * target


def test_a_matched_share_lies_inside_its_step(anatomy: Anatomy) -> None:
    p = matching_p(anatomy, paper_flops(0.5, 10), 10)
    assert {name: int(p * n) for name, n in (("0", 3), ("1", 5), ("3", 4))} == {"0": 1, "1": 2, "3": 2}
    assert 0.5 < p < 0.6


def observations() -> dict[str, Observation]:
    return {
        name: Observation(torch.ones(n), torch.zeros(n), torch.zeros(n), torch.ones(n, dtype=torch.bool))
        for name, n in (("a", 7), ("b", 16), ("c", 1))
    }


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 1.0])
def test_a_random_policy_freezes_int_p_n(p: float) -> None:
    policy = build_policy(StochasticPolicy(p=p), seed=3, epochs=9)
    for epoch in range(1, 4):
        chosen = policy.choose(observations(), epoch)
        assert {name: int((~mask).sum()) for name, mask in chosen.items()} == {
            "a": int(p * 7), "b": int(p * 16), "c": int(p * 1)
        }  # fmt: skip


def test_random_draws_follow_from_the_seed() -> None:
    def draws(seed: int) -> list[Tensor]:
        policy = build_policy(StochasticPolicy(p=0.5), seed, 9)
        return [policy.choose(observations(), epoch)["b"] for epoch in range(1, 6)]

    assert all(map(torch.equal, draws(1), draws(1)))
    assert not all(map(torch.equal, draws(1), draws(2)))
    assert not torch.equal(draws(1)[0], draws(1)[1])


def test_sections_become_policies() -> None:
    assert isinstance(build_policy(BaselinePolicy(), 1, 9), Baseline)
    policy = build_policy(NEqPolicy(epsilon=0.02, mu=0.25, definition="reference"), 1, 9)
    assert isinstance(policy, NEq)
    assert (policy.epsilon, policy.mu, policy.definition) == (0.02, 0.25, "reference")
    policy = build_policy(StochasticPolicy(p="match:somewhere", matched_p=0.4), 1, 9)
    assert isinstance(policy, Stochastic)
    assert policy.p == 0.4


def test_a_policy_of_a_recipe_is_warned_of_by_the_recipe_alone() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(policy := build_policy(NEqPolicy(mu=0.9), 1, 9), NEq)
    assert policy.mu == 0.9


def test_a_share_that_is_not_matched_yet() -> None:
    assert chosen_share(StochasticPolicy(p=0.3, matched_p=0.4)) == 0.3
    with pytest.raises(RecipeError, match=r"^policy.p: 'match:somewhere' has not been matched yet; give"):
        chosen_share(StochasticPolicy(p="match:somewhere"))


class FirstRows:
    """Freezes each layer's first rows."""

    def __init__(self, rows: int = 1) -> None:
        if rows < 0:
            raise ValueError("rows is negative")
        self.rows = rows

    def choose(self, observations: Mapping[str, Observation], epoch: int) -> Mapping[str, Tensor]:
        return {name: torch.arange(len(seen.phi)) >= self.rows for name, seen in observations.items()}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


def no_policy() -> object:
    return object()


def test_a_policy_of_ones_own() -> None:
    policy = build_policy(CustomPolicy(kind="entrypoint", entrypoint=f"{__name__}:FirstRows", kwargs={"rows": 2}), 1, 9)
    assert policy.choose(observations(), 1)["a"].tolist() == [False] * 2 + [True] * 5


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("FirstRows", {"rows": -1}, "cannot be made: ValueError: rows is negative"),
        ("no_policy", {}, "returned a object without choose, state_dict and load_state_dict"),
        ("Missing", {}, "has no 'Missing'"),
    ],
)
def test_a_policy_that_fails_is_one_line(name: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as raised:
        build_policy(CustomPolicy(kind="entrypoint", entrypoint=f"{__name__}:{name}", kwargs=kwargs), 1, 9)
    (problem,) = raised.value.problems
    assert problem.startswith("policy.entrypoint: ")
    assert message in problem
    assert "\n" not in problem


class WithToken(nn.Module):
    """A bare parameter before two layers and the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.ones(1, 4))
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x + self.token)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("scope", "executed"), [("layer", 2 * 16 + 2 * 8), ("front", 8)])
def test_parameters_outside_neurons_stand_still_in_a_front_alone(scope: Any, executed: int) -> None:
    """All layers frozen: whole layers pass the error on to the token, a front ends before the output layer."""
    anatomy = anatomy_of(WithToken(), torch.zeros(1, 4))
    dense = 2 * (2 * 16 + 8)
    paper, mean = mean_stochastic_flops(anatomy, 1.0, 2, scope=scope)
    assert mean == pytest.approx((dense + executed) / 2)
    assert paper == pytest.approx((dense + 2 * 8) / 2)
