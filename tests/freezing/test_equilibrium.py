from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import apart, phi_apart

from neq_cli.freezing.equilibrium import Definition, Dynamics, at_equilibrium, cosine

similarities = st.lists(st.floats(-1, 1), min_size=1, max_size=12)


def run(phis: list[float], mu: float, definition: Definition = "paper") -> list[Dynamics]:
    """Return the dynamics of one neuron after every epoch, epoch 0 first."""
    states = [Dynamics.start(1)]
    for phi in phis:
        states.append(states[-1].next(torch.tensor([phi], dtype=torch.float64), mu, definition))
    return states


def test_start_is_a_network_compared_with_itself() -> None:
    start = Dynamics.start(3)
    assert start.phi.tolist() == [1, 1, 1]
    assert start.delta_phi.tolist() == start.velocity.tolist() == [0, 0, 0]
    assert start.phi.dtype == torch.float64


@given(similarities, st.floats(0, 0.95))
@settings(max_examples=200, deadline=None)
def test_velocity_is_the_papers_closed_form(phis: list[float], mu: float) -> None:
    # Eq. 5: v^t = phi^t + sum over m = 1..t of (-1)^m [mu^(m-1) + mu^m] phi^(t-m). Its sum runs on to a velocity before
    # phi^0; with v^0 = 0 the last term, that of phi^0, is mu^(t-1) alone.
    series = [1.0, *phis]
    for t, state in enumerate(run(phis, mu)[1:], 1):
        expected = series[t]
        for m in range(1, t + 1):
            weight = mu ** (m - 1) + (mu**m if m < t else 0.0)
            expected += (-1) ** m * weight * series[t - m]
        # 13 terms of 2 at most; the power of mu and the sums here, the steps there: three roundings an epoch.
        assert state.velocity.item() == pytest.approx(expected, abs=apart(39, magnitude=26))


@given(similarities)
@settings(max_examples=50, deadline=None)
def test_without_mu_velocity_is_the_change_of_similarity(phis: list[float]) -> None:
    for (before, now), state in zip(itertools.pairwise([1.0, *phis]), run(phis, 0.0)[1:], strict=True):
        assert state.velocity.item() == state.delta_phi.item() == now - before


def test_velocity_by_hand() -> None:
    # delta: -0.5, 0.25, 0.125; v: -0.5, 0.25 + 0.25, 0.125 - 0.25
    states = run([0.5, 0.75, 0.875], 0.5)
    assert [state.delta_phi.item() for state in states] == [0, -0.5, 0.25, 0.125]
    assert [state.velocity.item() for state in states] == [0, -0.5, 0.5, -0.125]


def test_velocity_of_the_reference_by_hand() -> None:
    # delta: -0.5, 0.25, 0.125; differences of delta: -0.5, 0.75, -0.125; v: -0.5, 0.75 - 0.25, -0.125 + 0.25
    states = run([0.5, 0.75, 0.875], 0.5, "reference")
    assert [state.velocity.item() for state in states] == [0, -0.5, 0.5, 0.125]


@given(similarities, st.floats(0, 0.95))
@settings(max_examples=100, deadline=None)
def test_velocity_of_the_reference_is_a_sum_of_second_differences(phis: list[float], mu: float) -> None:
    # Unrolled: v^t = sum over k of mu^(t-k) (delta^k - delta^(k-1)), with delta^0 = 0.
    series = [1.0, *phis]
    delta = [0.0] + [now - before for before, now in itertools.pairwise(series)]
    for t, state in enumerate(run(phis, mu, "reference")[1:], 1):
        expected = sum(mu ** (t - k) * (delta[k] - delta[k - 1]) for k in range(1, t + 1))
        # 12 terms of 4 at most, each rounded four times an epoch at most.
        assert state.velocity.item() == pytest.approx(expected, abs=apart(48, magnitude=48))


@given(st.lists(st.floats(0, 1), min_size=30, max_size=30), st.floats(0, 0.5))
@settings(max_examples=50, deadline=None)
def test_velocity_stays_bounded_in_the_safe_range(phis: list[float], mu: float) -> None:
    # |delta| <= 1 for phi in [0, 1], so that the geometric series bounds |v| by 1 / (1 - mu) <= 2.
    assert all(abs(state.velocity.item()) <= 1 / (1 - mu) + apart(60, magnitude=2) for state in run(phis, mu))


@pytest.mark.parametrize("definition", ["paper", "reference"])
def test_an_unknown_similarity_restarts_the_velocity(definition: Definition) -> None:
    states = run([0.5, math.nan, 0.25, 0.5], 0.5, definition)
    assert [math.isnan(state.delta_phi.item()) for state in states] == [False, False, True, True, False]
    assert [state.velocity.item() for state in states] == [0, -0.5, 0, 0, 0.25]


def test_neurons_do_not_mix() -> None:
    phis = [[0.1, 0.9, math.nan], [0.3, 0.8, 0.5], [0.2, 0.7, 0.25]]
    together = Dynamics.start(3)
    for phi in phis:
        together = together.next(torch.tensor(phi, dtype=torch.float64), 0.4)
    alone = [run([phi[i] for phi in phis], 0.4)[-1].velocity.item() for i in range(3)]
    assert together.velocity.tolist() == alone


def test_equilibrium_is_strict_in_the_paper_and_not_in_the_reference() -> None:
    velocity = torch.tensor([0.25, -0.25, 0.2, -0.3, 0.0])
    assert at_equilibrium(velocity, 0.25).tolist() == [False, False, True, False, True]
    assert at_equilibrium(velocity, 0.25, "reference").tolist() == [True, True, True, False, True]
    assert at_equilibrium(torch.zeros(1), 0.0).tolist() == [False]
    assert at_equilibrium(torch.zeros(1), 0.0, "reference").tolist() == [True]


numbers = st.floats(-1e3, 1e3).filter(lambda number: number == 0 or abs(number) > 1e-3)


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_cosine_from_sums(pairs: list[tuple[float, float]]) -> None:
    a, b = np.array(pairs).T
    sums = torch.tensor([a @ b, a @ a, b @ b], dtype=torch.float64)
    lengths = np.linalg.norm(a), np.linalg.norm(b)
    if not any(lengths):
        expected = 1.0
    elif not all(lengths):
        expected = 0.0
    else:
        expected = float(a @ b / lengths[0] / lengths[1])
    assert cosine(sums).item() == pytest.approx(expected, abs=phi_apart(0, len(pairs)))
    assert -1 <= cosine(sums).item() <= 1


def test_cosine_of_sums_that_are_not_finite() -> None:
    for position in range(3):
        for value in (math.nan, math.inf):
            sums = torch.ones(3, dtype=torch.float64)
            sums[position] = value
            assert cosine(sums).isnan()


def test_cosine_of_very_small_and_very_large_vectors() -> None:
    # (1, 1) and (1, 0), scaled: the squares of 1e-150 and 1e150 are near the ends of float64.
    for a, b in ((1e-150, 1e-150), (1e150, 1e150), (1e-150, 1e150)):
        sums = torch.tensor([a * b, 2 * a * a, b * b], dtype=torch.float64)
        assert cosine(sums).item() == pytest.approx(math.sqrt(0.5), abs=phi_apart(0, 2))
