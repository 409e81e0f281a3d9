from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from neq_cli.runs.compare.curves import axis_word, curve, learning_rate, places, study
from neq_cli.runs.store.run import Run

BASELINE = {"kind": "baseline"}


def test_configurations_are_the_rows_of_the_comparison(make_run: Callable[..., Run], recipe: Any) -> None:
    runs = [make_run(f"n{seed}", recipe(seed=seed)) for seed in (2, 1)]
    runs.append(make_run("b", recipe(policy=BASELINE)))
    found = study(runs)
    assert [each.name for each in found.configurations] == ["Baseline", "NEq eps=0.001 mu=0.5"]
    assert [[run.path.name for run in each.runs] for each in found.configurations] == [["b"], ["n1", "n2"]]
    assert [each.number for each in found.configurations] == [1, 2]
    assert found.baseline is found.configurations[0]
    assert (found.configurations[1].kind, found.configurations[1].epochs) == ("neq", 3)


def test_baseline_given_apart_is_among_the_runs(make_run: Callable[..., Run], recipe: Any) -> None:
    baseline = make_run("b", recipe(policy=BASELINE))
    found = study([make_run("n")], baseline)
    assert found.baseline is not None
    assert found.baseline.runs == (baseline,)


def test_curve_over_runs_of_different_length(make_run: Callable[..., Run], recipe: Any) -> None:
    plain = recipe(epochs=3)
    first = make_run("a", plain, metrics=[{"test_top1": value} for value in (10, float("nan"), 30)])
    second = make_run("b", plain, metrics=[{"test_top1": 20}, {"test_top1": float("nan")}], finish=False)
    found = curve([first, second], lambda run: run.column("test_top1"))
    np.testing.assert_array_equal(found.mean, [15, np.nan, 30])
    np.testing.assert_array_equal(found.low, [10, np.nan, 30])
    np.testing.assert_array_equal(found.high, [20, np.nan, 30])


def test_values_that_cannot_be_drawn_count_as_not_measured(make_run: Callable[..., Run], recipe: Any) -> None:
    values = (float("inf"), 1e99, -1e99, 5.0)
    run = make_run("a", recipe(epochs=4), metrics=[{"test_top1": value} for value in values])
    np.testing.assert_array_equal(curve([run], lambda run: run.column("test_top1")).mean, [np.nan] * 3 + [5])


def rates(make_run: Callable[..., Run], recipe: Any, values: list[float]) -> Run:
    return make_run("r", recipe(epochs=len(values)), metrics=[{"lr": value} for value in values])


def test_steps_of_the_learning_rate(make_run: Callable[..., Run], recipe: Any) -> None:
    found = learning_rate([rates(make_run, recipe, [0.1, 0.1, 0.01, 0.01, 0.001])])
    assert found is not None
    assert found.steps == ((3, 0.01), (5, 0.001))
    assert (found.begins, found.when) == ((2, 4), ("from epoch 3 on", "from epoch 5 on"))
    assert (found.gradual, found.first, found.last) == (False, 0.1, 0.001)


def test_a_cosine_is_gradual(make_run: Callable[..., Run], recipe: Any) -> None:
    values = [0.1 * (1 + np.cos(np.pi * epoch / 30)) / 2 for epoch in range(20)]
    found = learning_rate([rates(make_run, recipe, values)])
    assert found is not None
    assert (found.steps, found.gradual) == ((), True)


def test_a_rate_that_always_jumps_is_gradual(make_run: Callable[..., Run], recipe: Any) -> None:
    found = learning_rate([rates(make_run, recipe, [2.0**-epoch for epoch in range(12)])])
    assert found is not None
    assert (found.steps, found.gradual) == ((), True)


def test_rates_of_zero_and_none_make_no_steps(make_run: Callable[..., Run], recipe: Any) -> None:
    found = learning_rate([rates(make_run, recipe, [0.0, 0.1, float("nan"), -1.0, float("inf")])])
    assert found is not None
    assert found.steps == ()


def test_observations_stand_where_they_were_made(make_observed: Callable[..., Run]) -> None:
    first = make_observed("a", metrics=[{"test_top1": value} for value in (10, 20, 30)])
    second = make_observed("b", metrics=[{"test_top1": value} for value in (30, 40)], finish=False)
    found = curve([first, second], lambda run: run.column("test_top1"))
    np.testing.assert_array_equal(found.at, [0.25, 0.5, 0.75])
    np.testing.assert_array_equal(found.mean, [20, 30, 30])
    np.testing.assert_array_equal(found.high, [30, 40, 30])
    assert axis_word([first, second]) == "epoch"


def test_runs_with_rows_elsewhere_are_folded_where_they_meet(
    make_run: Callable[..., Run], make_observed: Callable[..., Run]
) -> None:
    epochs = make_run("a", metrics=[{"test_top1": value} for value in (10, 20)])
    halves = make_observed("b", every=200, metrics=[{"test_top1": value} for value in (0, 30, 0, 60)])
    found = curve([epochs, halves], lambda run: run.column("test_top1"))
    np.testing.assert_array_equal(found.at, [0.5, 1, 1.5, 2])
    np.testing.assert_array_equal(found.mean, [0, 20, 0, 40])


def test_observations_that_do_not_tell_their_epochs_are_counted(make_observed: Callable[..., Run]) -> None:
    run = make_observed("a", metrics=[{"passed_epochs": np.nan}] * 3)
    np.testing.assert_array_equal(places(run), [1, 2, 3])
    assert axis_word([run]) == "observation"
    assert axis_word([run, make_observed("b")]) == "observation or epoch"


def test_steps_of_the_learning_rate_among_observations(make_observed: Callable[..., Run]) -> None:
    found = learning_rate([make_observed(metrics=[{"lr": value} for value in (0.1, 0.1, 0.1, 0.1, 0.01)])])
    assert found is not None
    # The fifth was made after 1.25 epochs; the rate of the first four held up to the fourth.
    assert (found.steps, found.begins, found.when) == (((5, 0.01),), (1.0,), ("after epoch 1",))
    untold = learning_rate([make_observed("b", metrics=[{"lr": r, "passed_epochs": np.nan} for r in (0.1, 0.01)])])
    assert untold is not None
    assert untold.when == ("from observation 2 on",)
