from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neq_cli.errors import NeqError
from neq_cli.runs.compare.comparison import compare_runs, to_json
from neq_cli.runs.store.run import Run, read_run

BASELINE = {"kind": "baseline"}
NEQ = {"kind": "neq", "epsilon": 0.001}


@pytest.fixture
def seeded(make_run: Callable[..., Run], recipe: Any) -> Callable[..., Run]:
    """``seeded(policy, seed, finals)``: a run whose test_top1 ends like that, with further metrics and recipe keys."""
    made = 0

    def make(policy: dict[str, Any], seed: int, *top1: float, epochs: int | None = None, **changes: Any) -> Run:
        nonlocal made
        made += 1
        environment = changes.pop("environment", None)
        metrics = [{"test_top1": value, **changes.pop("metrics", {})} for value in top1]
        planned = epochs or len(top1)
        plain = recipe(policy=policy, seed=seed, epochs=planned, **changes)
        return make_run(f"run{made}", plain, metrics=metrics, environment=environment, finish=len(top1) == planned)

    return make


def test_rows_by_hand(make_run: Callable[..., Run], recipe: Any) -> None:
    def run(name: str, policy: dict[str, Any], seed: int, rows: list[tuple[float, float, float, float]]) -> Run:
        keys = ("test_top1", "flops_paper", "flops_executed", "epoch_seconds")
        metrics = [dict(zip(keys, row, strict=True)) for row in rows]
        return make_run(name, recipe(policy=policy, seed=seed, epochs=len(rows)), metrics=metrics)

    runs = [
        run("n2", NEQ, 2, [(70, 100, 180, 3), (92, 60, 140, 4)]),
        run("n1", NEQ, 1, [(95, 100, 200, 1), (90, 40, 180, 2)]),
        run("b1", BASELINE, 1, [(80, 100, 200, 5), (91, 100, 200, 5)]),
        run("b2", BASELINE, 2, [(80, 100, 200, 7), (95, 100, 200, 7)]),
    ]
    comparison = compare_runs(runs)
    baseline, neq = comparison.rows
    assert (comparison.baseline, baseline.approach, neq.approach) == ("Baseline", "Baseline", "NEq eps=0.001 mu=0.5")
    assert (baseline.is_baseline, neq.is_baseline) == (True, False)
    assert (neq.seeds, [Path(path).name for path in neq.runs]) == ((1, 2), ["n1", "n2"])
    # Per run 70 and 80, then their mean and deviation; 75 of 100.
    assert (neq.flops_paper.mean, neq.flops_paper.std, neq.flops_paper.n) == (75, statistics.stdev([70, 80]), 2)
    assert (neq.flops_paper_percent, neq.flops_executed.mean, neq.flops_executed_percent) == (75, 175, 87.5)
    assert (baseline.flops_paper_percent, baseline.final_difference) == (100, None)
    assert (neq.final.mean, neq.best.mean) == (91, 93.5)
    assert neq.final.std == pytest.approx(math.sqrt(2))
    assert (baseline.final.mean, baseline.best.mean) == (93, 93)
    assert neq.final_difference is not None
    assert (neq.final_difference.mean, neq.final_difference.test, neq.final_difference.pairs) == (-2, "paired", 2)
    assert neq.final_difference.why_no_p == "n too small"
    assert neq.best_difference is not None
    assert neq.best_difference.mean == 0.5
    assert (neq.seconds.mean, neq.seconds.std) == (5, statistics.stdev([3, 7]))
    assert neq.matched_p is None


def test_p_value_of_three_pairs(seeded: Callable[..., Run]) -> None:
    runs = [seeded(BASELINE, seed, top1) for seed, top1 in ((1, 90.0), (2, 91.0), (3, 92.0))]
    runs += [seeded(NEQ, seed, top1) for seed, top1 in ((3, 93.0), (1, 92.0), (2, 91.5))]
    comparison = compare_runs(runs)
    found = comparison.rows[1].final_difference
    assert found is not None
    # By seed: 2, 0.5, 1.
    assert (found.p_value, found.test, found.pairs) == (0.25, "paired", 3)
    assert found.mean == pytest.approx(3.5 / 3)
    assert "3 pairs cannot give a p below 0.25" in comparison.notes


def test_other_seeds_are_tested_unpaired_and_said_so(seeded: Callable[..., Run]) -> None:
    runs = [seeded(BASELINE, seed, 90.0 + seed) for seed in (1, 2, 3)]
    runs += [seeded(NEQ, seed, 80.0 + seed) for seed in (4, 5, 6)]
    comparison = compare_runs(runs)
    found = comparison.rows[1].final_difference
    assert found is not None
    assert (found.test, found.mean) == ("unpaired", -7)
    assert found.p_value == pytest.approx(0.1)
    assert any("unpaired" in note for note in comparison.notes)


def test_a_seed_twice_counts_twice_but_is_not_paired(seeded: Callable[..., Run]) -> None:
    runs = [seeded(BASELINE, seed, 90.0) for seed in (1, 2, 3)]
    runs += [seeded(NEQ, seed, 91.0) for seed in (1, 1, 2)]
    comparison = compare_runs(runs)
    row = comparison.rows[1]
    assert (row.seeds, row.final.n) == ((1, 1, 2), 3)
    assert row.final_difference is not None
    assert row.final_difference.test == "unpaired"
    assert any("seed 1 more than once" in note for note in comparison.notes)


def test_a_run_given_twice_counts_once(seeded: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    run = seeded(BASELINE, 1, 90.0)
    monkeypatch.chdir(run.path.parent)
    (row,) = compare_runs([run, read_run(Path(run.path.name))], baseline=run).rows
    assert row.final.n == 1


def test_unfinished_runs_are_marked_and_have_no_p(seeded: Callable[..., Run]) -> None:
    runs = [seeded(BASELINE, seed, 90.0, 91.0) for seed in (1, 2, 3)]
    runs += [seeded(NEQ, seed, 92.0, 93.0) for seed in (1, 2)] + [seeded(NEQ, 3, 94.0, epochs=2)]
    row = compare_runs(runs).rows[1]
    assert row.unfinished == ("1/2",)
    assert row.final_difference is not None
    assert (row.final_difference.p_value, row.final_difference.why_no_p) == (None, "unfinished")
    assert row.final_difference.mean == pytest.approx((2 + 2 + 3) / 3)
    assert row.final_difference.interval is None
    assert row.final_difference.is_noise
    finished = compare_runs([*runs[:-1], seeded(NEQ, 3, 93.0, 94.0)]).rows[1].final_difference
    assert finished is not None
    assert finished.interval is not None


def test_epochs_without_a_test_are_left_out(seeded: Callable[..., Run]) -> None:
    runs = [seeded(BASELINE, 1, 90.0, math.nan), seeded(BASELINE, 2, math.nan, math.nan)]
    comparison = compare_runs(runs)
    assert (comparison.rows[0].final.mean, comparison.rows[0].final.n) == (90, 1)
    assert any("1 of 2 runs never measured test_top1" in note for note in comparison.notes)
    assert compare_runs([*runs, seeded(NEQ, 1, math.nan, math.nan)]).rows[1].final_difference is None


def test_baseline_chosen_by_hand(seeded: Callable[..., Run]) -> None:
    runs = [seeded(BASELINE, 1, 90.0), seeded(NEQ, 1, 91.0)]
    for given in (runs, runs[:1]):  # named twice, or only as the baseline
        comparison = compare_runs(given, baseline=runs[1])
        assert [row.is_baseline for row in comparison.rows] == [True, False]
        assert comparison.baseline == "NEq eps=0.001 mu=0.5"
        assert comparison.rows[1].final_difference is not None
        assert comparison.rows[1].final_difference.mean == -1


def test_without_a_baseline_there_are_no_differences(seeded: Callable[..., Run]) -> None:
    comparison = compare_runs([seeded(NEQ, 1, 90.0), seeded({"kind": "stochastic", "p": 0.2}, 1, 90.0)])
    assert comparison.baseline is None
    assert {(row.flops_paper_percent, row.final_difference) for row in comparison.rows} == {(None, None)}
    assert any("--baseline" in note for note in comparison.notes)


def test_two_baselines_are_none(seeded: Callable[..., Run]) -> None:
    comparison = compare_runs([seeded(BASELINE, 1, 90.0), seeded(BASELINE, 1, 90.0, batch_size=7)])
    assert comparison.baseline is None
    assert any("2 configurations freeze nothing" in note for note in comparison.notes)
    assert [row.approach for row in comparison.rows] == ["Baseline, batch_size=100", "Baseline, batch_size=7"]


def test_runs_that_answer_different_questions_are_refused(seeded: Callable[..., Run]) -> None:
    runs = [
        seeded(BASELINE, 1, 90.0),
        seeded(NEQ, 1, 90.0, 91.0, model={"name": "resnet20"}),
        seeded(NEQ, 2, 90.0, 91.0, model={"name": "resnet20"}, data={"name": "CIFAR10", "root": "elsewhere"}),
    ]
    with pytest.raises(NeqError) as caught:
        compare_runs(runs)
    first, *keys = str(caught.value).splitlines()
    one, two = runs[0].path, runs[1].path
    assert "--allow-differences" in first
    assert sorted(keys) == [
        f"epochs: 1 in {one}, 2 in {two} and 1 more",
        f"model.name: resnet32 in {one}, resnet20 in {two} and 1 more",
    ]
    comparison = compare_runs(runs, allow_differences=True)
    assert [row.approach for row in comparison.rows] == [
        "Baseline, model.name=resnet32, epochs=1",
        "NEq eps=0.001 mu=0.5, model.name=resnet20, epochs=2",
    ]
    assert comparison.rows[1].seeds == (1, 2)


def test_runs_of_different_metrics_are_refused(seeded: Callable[..., Run]) -> None:
    runs = [seeded(BASELINE, 1, 90.0), seeded(NEQ, 1, 90.0)]
    metrics = runs[1].path / "metrics.csv"
    metrics.write_text(metrics.read_text().replace("test_top1", "test_miou"))
    runs[1] = read_run(runs[1].path)
    with pytest.raises(NeqError, match=r"metric: test_top1 in .*, test_miou in "):
        compare_runs(runs)
    assert compare_runs(runs, allow_differences=True).rows[1].final_difference is None


def test_matched_runs_are_one_row(seeded: Callable[..., Run]) -> None:
    matched = [{"kind": "stochastic", "p": f"match:runs/{p}", "matched_p": p} for p in (0.37, 0.39)]
    comparison = compare_runs([seeded(policy, seed, 90.0) for seed, policy in enumerate(matched)])
    (row,) = comparison.rows
    assert row.matched_p is not None
    assert (row.matched_p.mean, row.matched_p.n) == (pytest.approx(0.38), 2)
    assert row.approach == "Stochastic* p=0.38 ± 0.014"
    assert not any("matched to different runs" in note for note in comparison.notes)
    swept = [{**each, "p": f"match:runs/a,seed={seed}", "matched_p": seed / 4} for seed, each in enumerate(matched, 1)]
    notes = compare_runs([seeded(policy, seed, 90.0) for seed, policy in enumerate(swept)]).notes
    assert not any("matched to different runs" in note for note in notes)
    far = seeded({"kind": "stochastic", "p": "match:runs/far", "matched_p": 0.8}, 5, 90.0)
    assert any("0.37 to 0.8" in note for note in compare_runs([*[read_run(Path(p)) for p in row.runs], far]).notes)


def test_how_far_matched_runs_are_from_their_target_is_said(make_run: Callable[..., Run], recipe: Any) -> None:
    policy = {"kind": "stochastic", "p": "match:runs/a", "matched_p": 0.4}

    def run(seed: int, target: object, planned: int = 2) -> Run:
        metrics = [{"flops_paper": 2000.0}, {"flops_paper": 1030.0}]
        environment = {"matched_flops": target}
        whole = recipe(policy=policy, seed=seed, epochs=planned)
        return make_run(f"{seed}", whole, metrics=metrics, environment=environment)

    def said(*runs: Run) -> list[str]:
        return [note for note in compare_runs(runs).notes if "matched to" in note]

    beside = "paper FLOPs {} beside those that p was matched to"
    assert said(run(1, 1500)) == ["Stochastic* p=0.4: " + beside.format("+1.00%")]
    assert said(run(2, 1500), run(3, 1530)) == ["Stochastic* p=0.4 ± 0: " + beside.format("-0.98% to +1.00%")]
    # Of a run that is not whole, or was never told, nothing is known.
    assert not any(said(run(seed, target)) for seed, target in enumerate((None, "much", 0, True), 4))
    assert not said(run(8, 1500, planned=3))


def test_different_devices_are_said(seeded: Callable[..., Run]) -> None:
    runs = [seeded(BASELINE, 1, 90.0), seeded(NEQ, 1, 90.0)]
    assert not any("device" in note for note in compare_runs(runs).notes)
    environment = runs[1].path / "environment.json"
    environment.write_text(environment.read_text().replace('"cpu"', '"cuda (H100)"'))
    assert "seconds are of different devices: cpu, cuda (H100)" in compare_runs([runs[0], read_run(runs[1].path)]).notes


def test_folders_that_may_hold_different_images_are_said(seeded: Callable[..., Run]) -> None:
    def notes(name: str, *environments: dict[str, Any]) -> str:
        runs = [
            seeded(BASELINE, seed, 90.0, data={"name": name, "root": f"/data/{seed}"}, environment=environment)
            for seed, environment in enumerate(environments)
        ]
        return " ".join(compare_runs(runs).notes)

    recorded = {"data": {"train": 50000}}
    assert "make sure that /data/0 and /data/1 hold the same" in notes("image_folder", recorded, {})
    assert "make sure" not in notes("image_folder", recorded, recorded)
    assert "make sure" not in notes("CIFAR10", {}, {})


def test_json_is_plain_and_has_stable_keys(seeded: Callable[..., Run]) -> None:
    plain = to_json(compare_runs([seeded(NEQ, 1, 91.0), seeded(BASELINE, 1, 90.0)]))
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert list(plain) == ["schema", "baseline", "rows", "notes", "energy"]
    row = plain["rows"][1]
    assert list(row) == [
        "approach", "runs", "seeds", "is_baseline", "unfinished", "flops_paper", "flops_paper_percent",
        "flops_executed", "flops_executed_percent", "metric", "final", "final_difference", "best", "best_difference",
        "seconds", "flops_training", "flops_training_percent", "goal", "matched_p",
        "lower_is_better", "unit", "joules", "joules_percent", "flops_paper_difference", "flops_executed_difference",
        "seconds_difference",
    ]  # fmt: skip
    assert row["unit"] == "epoch"
    assert row["final"] == {"mean": 91.0, "std": None, "n": 1}
    assert row["final_difference"] == {
        "mean": 1.0, "p_value": None, "test": "paired", "pairs": 1, "why_no_p": "n too small", "interval": None,
        "least_p": None,
    }  # fmt: skip


def test_what_it_takes_to_the_baselines_accuracy(make_run: Any, recipe: Any) -> None:
    def run(name: str, policy: dict[str, Any], seed: int, *rows: tuple[float, float, float]) -> Run:
        keys = ("test_top1", "epoch_seconds", "flops_executed")
        metrics = [{**dict(zip(keys, row, strict=True)), "flops_forward": 10.0} for row in rows]
        made: Run = make_run(name, recipe(policy=policy, seed=seed, epochs=len(rows)), metrics=metrics)
        return made

    nan = math.nan
    runs = [
        run("b1", BASELINE, 1, (60, 5, 20), (91, 5, 20), (90, 5, 20)),
        run("b2", BASELINE, 2, (60, 5, 20), (70, 5, 20), (92, 5, 20)),
        run("n1", NEQ, 1, (60, 5, 20), (nan, 3, 10), (95, 2, 0)),
        run("n2", NEQ, 2, (90.9, 5, 20), (90.9, 3, 10), (80, 4, 0)),
    ]
    baseline, neq = compare_runs(runs).rows
    assert baseline.goal is not None
    assert neq.goal is not None
    # The baseline's last values are 90 and 92: the goal is 91. One of its runs is there after 10 s, the other after 15.
    assert (baseline.goal.target, baseline.goal.reached, baseline.goal.seconds.mean) == (91, 2, 12.5)
    assert baseline.goal.flops_percent == pytest.approx(100 * (60 + 90) / 2 / 90)
    # One of NEq's gets there, after 5 + 3 + 2 s and 30 + 20 + 10 multiply-adds of the baseline's 90.
    assert (neq.goal.reached, neq.goal.seconds.mean, neq.goal.seconds.n) == (1, 10, 1)
    assert neq.goal.flops_percent == pytest.approx(100 * 60 / 90)
    # NEq trains for 10 and 12 s, the baseline for 15: after 11 s each has measured this last.
    assert (neq.goal.equal_seconds, baseline.goal.equal_seconds) == (11, 11)
    assert baseline.goal.at_equal_time.mean == (91 + 70) / 2
    assert neq.goal.at_equal_time.mean == (95 + 90.9) / 2
    assert neq.flops_training_percent == pytest.approx(100 * 60 / 90)
    assert (neq.flops_training.mean, baseline.flops_training.mean) == (60, 90)


def test_runs_of_before_do_not_tell_their_forward_pass(seeded: Callable[..., Run]) -> None:
    row = compare_runs([seeded(NEQ, 1, 91.0), seeded(BASELINE, 1, 90.0)]).rows[1]
    assert row.goal is not None
    assert (row.goal.reached, math.isnan(row.goal.flops_percent)) == (1, True)
    assert row.flops_training_percent is not None
    assert math.isnan(row.flops_training_percent)


def test_without_a_baseline_there_is_no_goal(seeded: Callable[..., Run]) -> None:
    assert [row.goal for row in compare_runs([seeded(NEQ, 1, 91.0)]).rows] == [None]


def test_a_run_that_ended_by_its_own_recipe_is_not_unfinished(make_run: Any, recipe: Any) -> None:
    metrics = [{"test_top1": 90.0}, {"test_top1": 91.0}]
    metrics = [{**row, "flops_forward": 1.0, "flops_executed": 2.0} for row in metrics]
    early = make_run("early", recipe(policy=NEQ, epochs=5, stop_when_frozen=1), metrics=metrics, finish=True)
    whole = make_run("whole", recipe(policy=BASELINE, epochs=5), metrics=[*metrics, *metrics, metrics[1]])
    rows = compare_runs([early, whole]).rows
    assert [row.unfinished for row in rows] == [(), ()]
    assert rows[1].flops_training_percent == pytest.approx(40), "two of five epochs' work"


def test_nothing_to_compare() -> None:
    with pytest.raises(NeqError, match="at least one"):
        compare_runs([])


def test_where_lower_is_better_the_least_is_the_best(make_run: Callable[..., Run], recipe: Any) -> None:
    def run(name: str, policy: dict[str, Any], *errors: float, lower: bool = True) -> Run:
        metrics = [{"test_mae": error, "epoch_seconds": 5.0} for error in errors]
        made: Run = make_run(
            name, recipe(policy=policy, epochs=len(errors)), metrics=metrics, metric="test_mae", lower=lower
        )
        return made

    better, baseline = run("n", NEQ, 9.0, 2.0, 4.0), run("b", BASELINE, 8.0, 6.0, 5.0)
    first, second = compare_runs([better, baseline]).rows
    assert (first.lower_is_better, second.lower_is_better) == (True, True)
    assert (first.best.mean, second.best.mean) == (5, 2)
    assert second.final_difference is not None
    assert second.final_difference.mean == -1
    # The baseline ends at 5, which the other first comes below in its second epoch, after 10 s.
    assert second.goal is not None
    assert (second.goal.target, second.goal.reached, second.goal.seconds.mean) == (5, 1, 10)
    with pytest.raises(NeqError, match=r"metric: test_mae \(lower is better\) in .*, test_mae in "):
        compare_runs([better, run("other", BASELINE, 1.0, 1.0, 1.0, lower=False)])


def test_epochs_beside_observations(make_run: Any, make_observed: Any, recipe: Any) -> None:
    # The same training, seen after each of 2 epochs and after every fourth of one; it reaches 90 after 1.25 epochs.
    by_epoch = [{"test_top1": top1, "flops_forward": 500.0, "epoch_seconds": 40.0} for top1 in (80.0, 90.0)]
    by_step = [
        {"test_top1": 90.0 if row >= 5 else 80.0, "flops_forward": 500.0, "epoch_seconds": 10.0} for row in range(1, 9)
    ]
    found = compare_runs(
        [
            make_run("b", recipe(epochs=2, seed=1, policy=BASELINE), metrics=by_epoch, planned=2),
            make_observed("n", metrics=by_step, planned=8, recipe=recipe(epochs=2, seed=1)),
        ]
    )
    baseline, neq = found.rows
    assert (baseline.unit, neq.unit, found.units) == ("epoch", "observation", "epochs or observations")
    # 500 forward and 1500 executed on a sample in every epoch, however often neurons were looked at.
    assert (baseline.flops_training.mean, neq.flops_training.mean) == (4000, 4000)
    assert neq.flops_training_percent == 100
    assert baseline.goal is not None
    assert neq.goal is not None
    assert (baseline.goal.seconds.mean, neq.goal.seconds.mean) == (80, 50)
    assert (baseline.goal.flops_percent, neq.goal.flops_percent) == (100, 62.5)
    assert neq.unfinished == ()


def test_observations_that_do_not_tell_their_epochs_have_no_training_flops(make_observed: Any) -> None:
    rows = [{"flops_forward": 500.0, "passed_epochs": math.nan}] * 3
    (row,) = compare_runs([make_observed(metrics=rows, finish=False)]).rows
    assert math.isnan(row.flops_training.mean)
    assert row.unfinished == ("3/12",)


def test_flops_and_seconds_have_differences_too(make_run: Any, recipe: Any) -> None:
    def run(name: str, seed: int, policy: str, flops: float, seconds: float) -> Run:
        row = {"flops_paper": flops, "flops_executed": 2 * flops, "epoch_seconds": seconds}
        made: Run = make_run(name, recipe(policy={"kind": policy}, seed=seed), metrics=[row] * 3)
        return made

    runs = [run(f"b{seed}", seed, "baseline", 1000, 10 + seed) for seed in (1, 2)]
    runs += [run(f"n{seed}", seed, "neq", 600 + 100 * seed, 9 + 2 * seed) for seed in (1, 2)]
    baseline, neq = compare_runs(runs).rows
    assert (baseline.flops_paper_difference, baseline.seconds_difference) == (None, None)
    half = math.tan(0.475 * math.pi) * 50  # Student's t of one degree of freedom is Cauchy's, 50 the mean's error
    for found, factor in ((neq.flops_paper_difference, 1), (neq.flops_executed_difference, 2)):
        assert found is not None
        assert found.mean == -250 * factor
        assert found.interval == pytest.approx(((-250 - half) * factor, (-250 + half) * factor))
    assert neq.seconds_difference is not None
    assert neq.seconds_difference.mean == 1.5  # 33 and 39 seconds beside 33 and 36
