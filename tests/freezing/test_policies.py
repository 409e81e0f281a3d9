from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from rounding import apart
from torch import Tensor, nn

from neq_cli import Baseline, Freezer, NEq, Observation, Policy, Stochastic
from neq_cli.errors import FreezingError


def observations(velocities: Mapping[str, list[float]]) -> dict[str, Observation]:
    return {
        name: Observation(
            torch.ones(len(values)),
            torch.zeros(len(values)),
            torch.tensor(values),
            torch.ones(len(values), dtype=torch.bool),
        )
        for name, values in velocities.items()
    }


def test_baseline_freezes_nothing() -> None:
    assert Baseline().choose(observations({"a": [0.0, 1.0]}), 1) == {}


def test_neq_freezes_what_is_slow() -> None:
    seen = observations({"a": [0.0, 0.01, -0.01, 0.009], "b": [-0.5]})
    chosen = NEq(epsilon=0.01).choose(seen, 1)
    assert {name: trainable.tolist() for name, trainable in chosen.items()} == {
        "a": [False, True, True, False],
        "b": [True],
    }
    assert NEq(0.01, definition="reference").choose(seen, 1)["a"].tolist() == [False, False, False, False]


def test_neq_has_the_papers_defaults() -> None:
    policy = NEq()
    assert (policy.epsilon, policy.mu, policy.definition) == (0.001, 0.5, "paper")


def test_neq_checks_its_arguments() -> None:
    with pytest.raises(ValueError, match="epsilon is -1"):
        NEq(-1)
    with pytest.raises(ValueError, match="epsilon is nan"):
        NEq(float("nan"))
    for mu in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="mu is"):
            NEq(mu=mu)
    with pytest.raises(ValueError, match="definition is 'papr'"):
        NEq(definition="papr")  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match=r"mu=0\.9") as said:
        assert NEq(mu=0.9).mu == 0.9
    assert [warning.filename for warning in said] == [__file__]  # where it was asked for
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        NEq(mu=0.5)


@pytest.mark.parametrize("p", [0.0, 0.2, 0.29, 0.5, 0.99, 1.0])
def test_stochastic_freezes_the_share_of_every_layer_rounded_down(p: float) -> None:
    sizes = {"a": 1, "b": 4, "c": 10, "d": 100}
    policy = Stochastic(p)
    for epoch in (1, 2):
        chosen = policy.choose(observations({name: [0.0] * size for name, size in sizes.items()}), epoch)
        for name, size in sizes.items():
            assert chosen[name].dtype == torch.bool
            assert int((~chosen[name]).sum()) == int(p * size)


def test_stochastic_draws_anew_each_epoch_and_every_neuron_alike() -> None:
    policy, seen = Stochastic(0.3, seed=1), observations({"a": [0.0] * 20})
    draws = torch.stack([~policy.choose(seen, epoch)["a"] for epoch in range(400)])
    assert not torch.equal(draws[0], draws[1])
    # Binomial with n = 400 and p = 0.3: mean 120, standard deviation 9.2; six of them on either side.
    assert ((draws.sum(0) - 120).abs() < 55).all()


def test_stochastic_goes_on_where_it_was_saved() -> None:
    seen = observations({"a": [0.0] * 30, "b": [0.0] * 5})
    straight = Stochastic(0.5, seed=3)
    for epoch in range(4):
        straight.choose(seen, epoch)
    resumed = Stochastic(0.5, seed=99)
    resumed.load_state_dict({name: value.clone() for name, value in straight.state_dict().items()})
    for epoch in range(4, 8):
        expected, got = straight.choose(seen, epoch), resumed.choose(seen, epoch)
        assert all(torch.equal(expected[name], got[name]) for name in seen)


def test_stochastic_follows_its_seed_and_leaves_the_global_generator_alone() -> None:
    seen = observations({"a": [0.0] * 30})
    before = torch.get_rng_state()
    first, again, other = (Stochastic(0.5, seed).choose(seen, 1)["a"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_stochastic_checks_p() -> None:
    for p in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="p is"):
            Stochastic(p)


def test_the_policies_are_policies() -> None:
    assert all(isinstance(policy, Policy) for policy in (Baseline(), NEq(), Stochastic(0.5)))


# Policies of one's own, in a Freezer.


class Own:
    """Answers what it is told and remembers what it was asked."""

    def __init__(self, answer: Any = None) -> None:
        self.answer = answer
        self.asked: list[tuple[int, dict[str, Observation]]] = []

    def choose(self, observations: Mapping[str, Observation], epoch: int) -> Any:
        self.asked.append((epoch, dict(observations)))
        return {} if self.answer is None else self.answer

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


def freezer_with(policy: Any) -> Freezer:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Linear(5, 2))
    return Freezer(net, torch.optim.SGD(net.parameters(), lr=0.1), [torch.randn(4, 3)], policy)


def move(freezer: Freezer) -> None:
    with torch.no_grad():
        for parameter in freezer.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def train(freezer: Freezer) -> None:
    freezer.optimizer.zero_grad()
    freezer.model(torch.randn(4, 3)).pow(2).sum().backward()
    freezer.optimizer.step()


def mask(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.bool)


def test_a_policy_sees_the_set_in_force_and_is_asked_after_every_epoch() -> None:
    policy = Own()
    freezer = freezer_with(policy)
    assert policy.asked == []
    answers = [{"0": mask(0, 1, 0, 1)}, {"0": mask(1, 1, 1, 0), "2": mask(0, 0, 0, 0, 1)}, {}]
    sizes = {"0": 4, "2": 5, "3": 2}
    in_force = {name: [True] * n for name, n in sizes.items()}
    for epoch, answer in enumerate(answers, 1):
        move(freezer)
        policy.answer = answer
        returned = freezer.step()
        asked_epoch, seen = policy.asked[-1]
        assert asked_epoch == epoch == len(policy.asked)
        assert {name: observation.trainable.tolist() for name, observation in seen.items()} == in_force
        in_force = {
            name: answer[name].tolist() if name in answer else [True] * len(in_force[name]) for name in in_force
        }
        assert {name: observation.trainable.tolist() for name, observation in returned.items()} == in_force
        assert {name: trainable.tolist() for name, trainable in freezer.trainable.items()} == in_force
        for name in seen:  # the numbers are the same ones
            assert torch.equal(seen[name].phi, returned[name].phi)
            assert torch.equal(seen[name].velocity, returned[name].velocity)


def test_observations_are_float32_and_on_the_cpu() -> None:
    seen = freezer_with(Own()).step()["0"]
    assert (seen.phi.dtype, seen.delta_phi.dtype, seen.velocity.dtype) == (torch.float32,) * 3
    assert seen.trainable.dtype == torch.bool
    assert seen.phi.shape == seen.delta_phi.shape == seen.velocity.shape == seen.trainable.shape == (4,)


def test_a_policy_that_writes_into_what_it_sees_changes_nothing() -> None:
    class Vandal(Own):
        def choose(self, observations: Mapping[str, Observation], epoch: int) -> Any:
            for seen in observations.values():
                for tensor in (seen.phi, seen.delta_phi, seen.velocity):
                    tensor.fill_(7.0)
                seen.trainable.zero_()
            return {}

    results = []
    for policy in (Own(), Vandal()):
        torch.manual_seed(4)
        freezer = freezer_with(policy)
        for _ in range(2):
            move(freezer)
            seen = freezer.step()
        results.append(seen)
    for name, seen in results[0].items():
        assert torch.equal(seen.velocity, results[1][name].velocity)
        assert torch.equal(seen.trainable, results[1][name].trainable)


def test_an_answer_changed_afterwards_changes_nothing() -> None:
    answer = {"0": mask(1, 0, 1, 0)}
    freezer = freezer_with(Own(answer))
    freezer.step()
    answer["0"].fill_(False)
    assert freezer.trainable["0"].tolist() == [True, False, True, False]


WRONG: dict[str, tuple[Any, str]] = {
    "unknown layer": ({"zero": mask(1, 1, 1, 1)}, "'zero' that the model does not have"),
    "shape": ({"0": mask(1, 1, 1)}, r"answered torch.bool \[3\] for layer '0'; it must be a bool tensor of \[4\]"),
    "dimensions": ({"0": torch.ones(4, 1, dtype=torch.bool)}, r"\[4, 1\]"),
    "dtype": ({"0": torch.ones(4)}, "answered torch.float32"),
    "integers": ({"0": torch.ones(4, dtype=torch.int64)}, "answered torch.int64"),
    "list": ({"0": [True] * 4}, "answered list for layer '0'"),
    "one good, one wrong": ({"2": mask(0, 0, 0, 0, 0), "0": None}, "answered NoneType for layer '0'"),
    "output layer, wrong": ({"3": mask(1)}, "layer '3'"),
    "nothing": ("x", "answered str; it must be a mapping"),
    "sequence": ([mask(1, 1, 1, 1)], "answered list; it must be a mapping"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_answer_raises_and_changes_nothing(case: str) -> None:
    answer, message = WRONG[case]
    torch.manual_seed(4)
    freezer, policy = freezer_with(None), Own({"0": mask(1, 0, 1, 0)})
    freezer.policy = policy
    train(freezer)
    freezer.step()
    train(freezer)
    state = {
        "epoch": freezer.epoch,
        "trainable": {name: trainable.tolist() for name, trainable in freezer.trainable.items()},
        "previous": {name: tensor.clone() for name, tensor in freezer.state_dict()["previous"].items()},
        "velocity": {name: layer["velocity"].tolist() for name, layer in freezer.state_dict()["layers"].items()},
    }
    weight = freezer.model[0].weight.detach().clone()
    policy.answer = answer
    with pytest.raises(FreezingError, match=r"^policy Own: .*" + message):
        freezer.step()
    after = freezer.state_dict()
    assert freezer.epoch == state["epoch"] == 1
    assert {name: trainable.tolist() for name, trainable in freezer.trainable.items()} == state["trainable"]
    assert all(torch.equal(tensor, after["previous"][name]) for name, tensor in state["previous"].items())
    assert {name: layer["velocity"].tolist() for name, layer in after["layers"].items()} == state["velocity"]
    assert torch.equal(freezer.model[0].weight, weight)
    # The set of before is still held, and the next answer is taken as if this one had not been.
    train(freezer)
    assert [i for i in range(4) if torch.equal(freezer.model[0].weight[i], weight[i])] == [1, 3]
    policy.answer = {}
    freezer.step()
    assert [epoch for epoch, _ in policy.asked] == [1, 2, 2]


def test_velocity_is_computed_with_the_policys_mu_and_definition_where_it_has_them() -> None:
    class Careless(Own):
        mu = 0.0

    class Reference(Own):
        mu, definition = 0.25, "reference"

    # Observations are rounded to single precision: the velocity, and up to five deltas of 2 at most that make it up.
    deltas = apart(1, torch.float32, magnitude=12)
    for policy, mu, definition in ((Own(), 0.5, "paper"), (Careless(), 0.0, "paper"), (Reference(), 0.25, "reference")):
        freezer = freezer_with(policy)
        steps = []
        for _ in range(3):
            move(freezer)
            steps.append(freezer.step()["0"])
        delta = [0.0, *(float(seen.delta_phi[0]) for seen in steps)]
        velocity = 0.0
        for t in range(1, 4):
            change = delta[t] if definition == "paper" else delta[t] - delta[t - 1]
            velocity = change + (mu if definition == "reference" else -mu) * velocity
        assert float(steps[-1].velocity[0]) == pytest.approx(velocity, abs=deltas)


def test_without_a_policy_neq_is_used() -> None:
    assert isinstance(freezer_with(None).policy, NEq)
