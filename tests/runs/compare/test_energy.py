"""Energy of runs against sums by hand, and that what was measured in different ways is never set in relation."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from typing import Any

import pytest

from neq_cli.runs.compare.comparison import Comparison, compare_runs, to_json
from neq_cli.runs.compare.energy import ways
from neq_cli.runs.compare.inspection import inspect_run
from neq_cli.runs.store.run import Run

BASELINE, NEQ = {"kind": "baseline"}, {"kind": "neq", "epsilon": 0.001}
RAPL = {"gpu": "not used", "cpu": "RAPL package-0, Fake CPU"}
NVML = {"gpu": "NVML total energy, Fake", "cpu": "not measured", "grams_per_kwh": 56.0}
Make = Callable[..., Run]


@pytest.fixture
def made(make_run: Make, recipe: Any) -> Make:
    """``made(policy, seed, joules of each epoch...)``; None in place of joules: a run that does not measure them."""

    def make(policy: dict[str, Any], seed: int, *joules: float | None, **environment: Any) -> Run:
        metrics = [{"test_top1": 90.0, **({} if each is None else {"joules": each})} for each in joules]
        told = {"energy": RAPL, **environment} if joules[0] is not None else {}
        plain = recipe(policy=policy, seed=seed, epochs=len(joules))
        return make_run(f"{policy['kind']}{seed}", plain, metrics=metrics, environment=told)

    return make


def notes_on_energy(comparison: Comparison) -> list[str]:
    return [note for note in comparison.notes if "energy" in note]


def test_joules_of_whole_runs_are_folded_and_set_against_the_baselines(made: Make) -> None:
    runs = [made(BASELINE, 1, 100, 100), made(BASELINE, 2, 100, 300), made(NEQ, 1, 100, 50), made(NEQ, 2, 60, 30)]
    comparison = compare_runs(runs)
    baseline, neq = comparison.rows
    assert baseline.joules is not None
    assert neq.joules is not None
    assert (baseline.joules.mean, baseline.joules_percent) == (300, 100)
    assert (neq.joules.mean, neq.joules.std, neq.joules.n) == (120, statistics.stdev([150, 90]), 2)
    assert neq.joules_percent == pytest.approx(40)
    assert comparison.energy == "cpu: RAPL package-0, Fake CPU"
    assert notes_on_energy(comparison) == []
    plain = to_json(comparison)
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["rows"][1]["joules"]["mean"] == 120


def test_what_not_all_runs_measured_is_not_shown(made: Make) -> None:
    comparison = compare_runs([made(BASELINE, 1, None, None), made(NEQ, 1, 100, 50)])
    assert [(row.joules, row.joules_percent) for row in comparison.rows] == [(None, None)] * 2
    assert notes_on_energy(comparison) == ["energy is not shown: 1 of 2 runs measured it"]
    without = compare_runs([made(BASELINE, 3, None), made(NEQ, 3, None)])
    assert notes_on_energy(without) == []


def test_what_was_measured_in_different_ways_is_shown_and_not_compared(made: Make) -> None:
    runs = [made(BASELINE, 1, 100, 100), made(NEQ, 1, 100, 50, energy=NVML), made(NEQ, 2, 10, 50, energy=NVML)]
    comparison = compare_runs(runs)
    assert [row.joules.mean for row in comparison.rows if row.joules] == [200, 105]
    assert [row.joules_percent for row in comparison.rows] == [None, None]
    assert comparison.energy is None
    (note,) = notes_on_energy(comparison)
    assert note.startswith(
        "energy is not compared, for it was not measured in one way: cpu: RAPL package-0, Fake CPU (in "
    )
    assert "gpu: NVML total energy, Fake; cpu: not measured (in " in note
    assert note.endswith("neq1 and 1 more)")


def test_a_run_that_went_on_elsewhere_was_measured_in_two_ways(made: Make) -> None:
    changed = {"cpu": "RAPL package-0, Other CPU"}
    moved = made(NEQ, 1, 100, 50, resumed=[{"at": "now", "changed": {}}, {"changed": {"energy": changed}}])
    assert ways(moved) == ("cpu: RAPL package-0, Fake CPU", "cpu: RAPL package-0, Other CPU")
    comparison = compare_runs([made(BASELINE, 1, 100, 100), moved])
    assert comparison.energy is None
    assert "Fake CPU and then cpu: RAPL package-0, Other CPU (in " in notes_on_energy(comparison)[0]
    # Runs that all moved in the same way are no better: an epoch here is not one there.
    assert compare_runs([moved], moved).rows[0].joules_percent is None


def test_a_run_with_an_epoch_that_is_not_known_has_no_sum(made: Make) -> None:
    runs = [made(BASELINE, 1, 100, 100), made(NEQ, 1, 100, math.nan), made(NEQ, 2, 60, 30)]
    comparison = compare_runs(runs)
    neq = comparison.rows[1]
    assert neq.joules is not None
    assert (neq.joules.mean, neq.joules.n) == (90, 1)
    assert notes_on_energy(comparison) == ["energy of 1 of 3 runs is not known of every epoch, and left out"]


@pytest.mark.parametrize("energy", [None, "much", ["cpu"], {"cpu": 7, "gpu": None}, {}])
def test_damaged_environments_tell_no_way(made: Make, energy: Any) -> None:
    run = made(BASELINE, 1, 100, energy=energy, resumed=["?", {"changed": 3}, {"changed": {"energy": 4}}])
    assert ways(run) == ()
    comparison = compare_runs([run, made(NEQ, 1, 50)])
    assert comparison.rows[1].joules_percent is None
    assert "a way not told (in " in notes_on_energy(comparison)[0]


def test_an_inspection_tells_energy_up_to_its_epoch(made: Make, make_run: Make) -> None:
    run = made(NEQ, 1, 100, 50, 25, energy=NVML)
    found = inspect_run(run, epoch=2)
    assert (found.joules, found.co2_grams) == (150, None)
    assert found.energy == ("gpu: NVML total energy, Fake; cpu: not measured",)
    grams = make_run("grams", metrics=[{"joules": 1.0, "co2_grams": 0.5}, {"joules": math.nan, "co2_grams": math.nan}])
    found = inspect_run(grams, epoch=1)
    assert (found.joules, found.co2_grams) == (1, 0.5)
    assert math.isnan(inspect_run(grams).joules or 0)
    assert inspect_run(made(NEQ, 2, None)).joules is None
