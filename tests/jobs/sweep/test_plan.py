"""What a sweep is checked for before anything is trained: all points at once, each by its name."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from neq_cli.errors import RecipeError, RunDirectoryError
from neq_cli.jobs.sweep.plan import folded, plan_sweep
from neq_cli.recipe import NEqPolicy, Problem
from neq_cli.recipe.load import LoadedRecipe, load_recipe
from neq_cli.runs.views.live.sweep_state import FINISHED, PENDING
from neq_cli.training.checks import check_section


def problems(folder: Path, *arguments: str) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        plan_sweep(str(folder / "small.yaml"), arguments, folder / "sweep", [check_section])
    assert not (folder / "sweep").exists()
    return tuple(line.replace(f"{folder}/", "") for line in caught.value.problems)


def test_kinds_of_policy_may_vary_though_keys_depend_on_them(folder: Path) -> None:
    plan = plan_sweep(str(folder / "small.yaml"), ["policy.kind=baseline,neq", "seed=1,2"])
    assert [run.loaded.recipe.policy.model_dump() for run in plan.runs] == [
        *[{"kind": "baseline"}] * 2,
        *[NEqPolicy(epsilon=0.05).model_dump()] * 2,
    ]
    policies = "policy={kind: baseline},{kind: stochastic, p: 0.2},{kind: neq, epsilon: 0.01}"
    plan = plan_sweep(str(folder / "small.yaml"), [policies])
    assert [run.loaded.recipe.policy.kind for run in plan.runs] == ["baseline", "stochastic", "neq"]
    assert plan.files.root == Path("sweeps/small/policy")
    stochastic = (folder / "small.yaml").read_text().replace("{kind: neq, epsilon: 0.05}", "{kind: stochastic, p: 0.4}")
    (folder / "other.yaml").write_text(stochastic)
    plan = plan_sweep(str(folder / "other.yaml"), ["policy.kind=baseline,neq,stochastic"])
    assert [run.loaded.recipe.policy.model_dump() for run in plan.runs] == [
        {"kind": "baseline"},
        NEqPolicy().model_dump(),
        {"kind": "stochastic", "p": 0.4, "scope": "neuron", "matched_p": None},
    ]


def test_a_stochastic_run_matches_the_neq_run_that_differs_in_the_policy_alone(folder: Path) -> None:
    def matched_flops(loaded: LoadedRecipe) -> None:
        assert loaded.recipe.policy.kind != "stochastic"  # what it matches is yet to be trained

    policies = "policy={kind: stochastic, p: match},{epsilon: 0.01},{kind: baseline}"
    axes = ["backward=exact,dense", policies, "seed=1,2"]
    plan = plan_sweep(str(folder / "small.yaml"), axes, folder / "it's #1: here", [check_section], matched_flops)
    runs = {
        (run.loaded.recipe.backward, run.loaded.recipe.policy.kind, run.loaded.recipe.seed): run for run in plan.runs
    }
    assert len(runs) == 12
    for (backward, kind, seed), run in runs.items():
        other = runs[backward, "neq", seed].run
        assert run.after is (other if kind == "stochastic" else None)
        if kind == "stochastic":
            assert run.loaded.recipe.policy.p == f"match:{other.path}"
            assert run.run.labels == (backward, "kind=stochastic p=match", str(seed))
    # A name does not depend on where the sweep lies.
    elsewhere = plan_sweep(str(folder / "small.yaml"), axes)
    assert [run.point.name for run in elsewhere.runs] == [run.point.name for run in plan.runs]


def test_a_match_with_no_or_several_runs_to_match_is_refused(folder: Path) -> None:
    lines = problems(folder, "policy={kind: stochastic, p: match},{kind: baseline}", "seed=1,2")
    assert tuple(re.sub("-[0-9a-f]{8},", "-HASH,", line) for line in lines) == (
        "policy=kind-stochastic-p-match-HASH,seed=1 and 1 more: policy.p: match: no NEq run in this sweep to match; "
        "add {kind: neq} to policy=, or give match:RUN_DIR",
    )
    (line,) = problems(folder, "policy={kind: stochastic, p: match},{kind: neq},{kind: neq, epsilon: 0.1}")
    assert line.endswith("policy.p: match: 2 NEq runs to match; sweep them one by one, or give match:RUN_DIR")
    lines = problems(folder, "policy={kind: stochastic, p: match},{kind: baseline, epsilom: 1}", "backward=exat")
    assert [sum(what in line for line in lines) for what in ("no NEq run in", "'exat' is not", "unknown key")] == [
        1,
        1,
        1,
    ]


def test_combinations_that_make_no_sense_are_refused_by_name(folder: Path) -> None:
    assert problems(folder, "policy.kind=baseline,neq", "policy.epsilon=0.1,0.2", "seed=1,2") == (
        "policy.epsilon=0.1,policy.kind=baseline,seed=1 and 1 more: command line: policy.epsilon=0.1: policy baseline "
        "has no such key; policy neq has",
        "policy.epsilon=0.2,policy.kind=baseline,seed=1 and 1 more: command line: policy.epsilon=0.2: policy baseline "
        "has no such key; policy neq has",
        "policy.kind: kinds with keys of their own are swept as policy='{kind: baseline},{kind: stochastic, p: 0.5}'",
    )


def test_all_points_are_checked_and_what_all_share_is_said_once(folder: Path) -> None:
    lines = problems(folder, "model.name=resnet8,resnet9", "seed=1,2")
    assert len(lines) == 1
    assert lines[0].startswith("model.name=resnet9,seed=1 and 1 more: command line: model.name=resnet9: ")
    assert "did you mean" in lines[0]
    lines = problems(folder, "optimizer.lr=fast", "seed=1,-1,2")
    assert lines[0].startswith("command line: optimizer.lr=fast: 'fast' is not a number")
    assert lines[1].startswith("seed=-1: command line: seed=-1: -1 is not a whole number")
    assert len(lines) == 2


def test_what_only_torch_knows_is_checked_once_for_what_points_share(folder: Path) -> None:
    asked: list[str] = []

    def check(name: str, section: object) -> list[Problem]:
        asked.append(name)
        return [Problem("model.name", "not today")] if name == "model" else []

    with pytest.raises(RecipeError, match="not today") as caught:
        plan_sweep(str(folder / "small.yaml"), ["seed=1,2,3", "optimizer.lr=0.1,0.2"], checks=[check])
    assert len(caught.value.problems) == 1
    assert asked.count("model") == 1
    assert asked.count("optimizer") == 2


def test_the_same_recipe_twice_is_told(folder: Path) -> None:
    assert problems(folder, "policy={kind: neq},{kind: neq, epsilon: 0.001}", "seed=1")[0].endswith(
        "; remove one of the values"
    )
    assert "the same recipe as optimizer.lr=1," in problems(folder, "optimizer.lr=1,1.0", "seed=1,2")[0]


def test_warnings_are_told_once_with_their_points(folder: Path) -> None:
    plan = plan_sweep(str(folder / "small.yaml"), ["policy.mu=0.5,0.9", "seed=1,2"])
    assert len(plan.warnings) == 1
    assert plan.warnings[0].startswith("policy.mu=0.9,seed=1 and 1 more: policy.mu: 0.9 is above 0.5")


def run(folder: Path, name: str, *overrides: str, epochs: int = 2, state: str = "finished") -> Path:
    """A run as far as the plan looks at it."""
    path = folder / "sweep" / "runs" / name
    path.mkdir(parents=True)
    (path / "recipe.yaml").write_text(load_recipe(str(folder / "small.yaml"), overrides).resolved_yaml())
    (path / "status.json").write_text(json.dumps({"state": state}))
    with (path / "metrics.csv").open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["epoch", "test_top1", "neurons", "frozen", "epoch_seconds"])
        rows.writerows([epoch, 50, 10, 5, 1.5] for epoch in range(1, epochs + 1))
    record = {"schema": 1, "recipe": "small", "axes": {}, "runs": {}}
    (folder / "sweep" / "sweep.json").write_text(json.dumps(record))
    return path


def test_only_what_is_trained_to_its_end_is_finished(folder: Path) -> None:
    run(folder, "seed=1", "seed=1")
    run(folder, "seed=2", "seed=2", epochs=1, state="running")
    run(folder, "seed=3", "seed=3", epochs=1)  # status.json says more than there is
    (folder / "sweep" / "runs" / "seed=4").mkdir()
    plan = plan_sweep(str(folder / "small.yaml"), ["seed=1,2,3,4,5"], folder / "sweep")
    assert [(one.run.state, one.run.epochs_done) for one in plan.runs] == [
        (FINISHED, 2), (PENDING, 1), (PENDING, 1), (PENDING, 0), (PENDING, 0),
    ]  # fmt: skip
    more = plan_sweep(str(folder / "small.yaml"), ["seed=1", "epochs=3"], folder / "sweep")
    assert more.runs[0].run.state == PENDING


def test_epochs_of_a_run_by_steps_are_those_passed(folder: Path) -> None:
    rows = [[row, row / 4, 50, 10, 5, 1.5] for row in range(1, 10)]  # up to 2.25 epochs
    for name, state, known in (("seed=1", "running", rows), ("seed=2", "finished", rows[:8])):
        path = run(folder, name, name, "epochs=3" if state == "running" else "epochs=2", state=state)
        with (path / "metrics.csv").open("w", newline="") as file:
            header = ["epoch", "passed_epochs", "test_top1", "neurons", "frozen", "epoch_seconds"]
            csv.writer(file, lineterminator="\n").writerows([header, *known])
    plan = plan_sweep(str(folder / "small.yaml"), ["seed=1", "epochs=3"], folder / "sweep")
    assert [(one.run.state, one.run.epochs_done, one.run.passed_epochs) for one in plan.runs] == [(PENDING, 2, 2.25)]
    plan = plan_sweep(str(folder / "small.yaml"), ["seed=2", "epochs=2"], folder / "sweep")
    assert [(one.run.state, one.run.epochs_done) for one in plan.runs] == [(FINISHED, 2)]
    with pytest.raises(
        RecipeError, match=r"2, but epoch 2\.25 of .*seed=1 is trained, on the way to 3; give at least 3,"
    ):
        plan_sweep(str(folder / "small.yaml"), ["seed=1", "epochs=2"], folder / "sweep")


def test_runs_of_another_recipe_are_refused_all_at_once(folder: Path) -> None:
    for seed in (1, 2, 3):
        run(folder, f"seed={seed}", f"seed={seed}", "batch_size=32" if seed == 3 else "optimizer.lr=0.5")
    with pytest.raises(RecipeError) as caught:
        plan_sweep(str(folder / "small.yaml"), ["seed=1,2,3"], folder / "sweep")
    runs, lines = folder / "sweep" / "runs", caught.value.problems
    place = f"{folder}/small.yaml"
    assert lines == (
        f"seed=1: {place}:6: optimizer.lr: 0.1, but {runs}/seed=1 was begun with 0.5; leave it, or give another "
        "folder with -o",
        f"seed=2: {place}:6: optimizer.lr: 0.1, but {runs}/seed=2 was begun with 0.5; leave it, or give another "
        "folder with -o",
        f"seed=3: {place}:5: batch_size: 64, but {runs}/seed=3 was begun with 32; leave it, or give another "
        "folder with -o",
    )


def test_folders_that_hold_something_else_are_refused(folder: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"no sweep.json, but other files.*; choose another with -o"):
        plan_sweep(str(folder / "small.yaml"), ["seed=1"], folder)
    path = run(folder, "seed=1", "seed=1")
    (path / "recipe.yaml").unlink()
    with pytest.raises(RecipeError, match=r"^seed=1: .*no recipe.yaml, but other files"):
        plan_sweep(str(folder / "small.yaml"), ["seed=1,2"], folder / "sweep")
    (folder / "other.yaml").write_text((folder / "small.yaml").read_text())
    with pytest.raises(RunDirectoryError, match=r"a sweep of small, not of other; choose another with -o"):
        plan_sweep(str(folder / "other.yaml"), ["seed=1"], folder / "sweep")


def test_lines_said_of_some_of_all_and_of_the_only_one() -> None:
    said = [("a", ["one", "all"]), ("b", ["all"]), ("c", ["one", "all"])]
    assert folded(said, 3) == ("a and 1 more: one", "all")
    assert folded([("a", ["one"])], 1) == ("a: one",)
    assert folded([], 3) == ()
