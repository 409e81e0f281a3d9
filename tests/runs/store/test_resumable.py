"""Which runs are found, and what may change between two starts of one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neq_cli.errors import RunDirectoryError
from neq_cli.recipe import Recipe
from neq_cli.recipe.keys import MAY_CHANGE
from neq_cli.recipe.load import dump_recipe
from neq_cli.runs.store.resumable import candidates, differences, merged, newest_unfinished, stored_recipe
from neq_cli.runs.store.writer import RunWriter

PLAIN: dict[str, Any] = {
    "model": {"name": "resnet8", "kwargs": {"num_classes": 10}},
    "data": {"name": "digits"},
    "epochs": 250,
    "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
}


def changed(**keys: Any) -> Recipe:
    """Return the plain recipe with keys replaced: ``data__root="x"`` stands for data.root."""
    plain = json.loads(json.dumps(PLAIN))
    for key, value in keys.items():
        *sections, last = key.split("__")
        place = plain
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return Recipe.model_validate(plain)


def lines(stored: Recipe, wanted: Recipe) -> list[str]:
    return [f"{problem.key}: {problem.message}" for problem in differences(stored, wanted, Path("runs/x"))]


OTHERS = {
    "description": "another", "epochs": 300, "batch_size": 50, "device": "cpu", "eval_every": 2,
    "checkpoint_minutes": 1.0, "probe_snapshot": "cpu", "stop_when_frozen": 3,
    "compile": True, "cuda_graph": True, "channels_last": True, "deterministic": True,
    "data.root": "/elsewhere", "data.download": False, "data.workers": 0, "data.cache": "none",
    "energy": True, "grams_per_kwh": 56.0, "track": ["tensorboard"],
    "parallel": "fsdp", "fsdp.blocks": ["layers.*"],
}  # fmt: skip


@pytest.mark.parametrize("key", MAY_CHANGE)
def test_what_may_change(key: str) -> None:
    wanted = changed(**{key.replace(".", "__"): OTHERS[key]})
    assert wanted != changed()
    assert lines(changed(), wanted) == []
    assert merged(changed(), wanted) == wanted


REFUSED = {
    "optimizer__lr": (0.5, "optimizer.lr: 0.5, but runs/x was begun with 0.1; leave it"),
    "optimizer__name": ("adam", "optimizer.name: 'adam', but runs/x was begun with 'sgd'; leave it"),
    "optimizer__momentum": (None, "optimizer.momentum: left out, but runs/x was begun with 0.9; write it again"),
    "optimizer__nesterov": (True, "optimizer.nesterov: true, but runs/x was begun without it; leave it"),
    "model__kwargs__num_classes": (9, "model.kwargs.num_classes: 9, but runs/x was begun with 10; leave it"),
    "model__kwargs__width": (4, "model.kwargs.width: 4, but runs/x was begun without it; leave it"),
    "model__kwargs": ({}, "model.kwargs.num_classes: left out, but runs/x was begun with 10; write it again"),
    "model__weights": ("DEFAULT", "model.weights: 'DEFAULT', but runs/x was begun with null; leave it"),
    "model__checkpoint": ("w.pt", "model.checkpoint: 'w.pt', but runs/x was begun with null; leave it"),
    "data__augment": ("crop", "data.augment: 'crop', but runs/x was begun with 'none'; leave it"),
    "seed": (2, "seed: 2, but runs/x was begun with 1; leave it"),
    "precision": ("bf16", "precision: 'bf16', but runs/x was begun with 'fp32'; leave it"),
    "backward": ("dense", "backward: 'dense', but runs/x was begun with 'exact'; leave it"),
    "exclude": (["fc"], 'exclude: ["fc"], but runs/x was begun with []; leave it'),
    "gradient_accumulation": (2, "gradient_accumulation: 2, but runs/x was begun with 1; leave it"),
    "sync_batchnorm": (True, "sync_batchnorm: true, but runs/x was begun with false; leave it"),
    "policy__mu": (0.25, "policy.mu: 0.25, but runs/x was begun with 0.5; leave it"),
    "policy__kind": ("baseline", "policy.kind: 'baseline', but runs/x was begun with 'neq'; leave it"),
    "scheduler": (
        {"name": "step", "step_size": 3},
        "scheduler.name: 'step', but runs/x was begun with 'constant'; leave it",
    ),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_refused_by_name(key: str) -> None:
    value, sentence = REFUSED[key]
    assert lines(changed(), changed(**{key: value})) == [f"{sentence}, or train anew without --resume"]


def test_all_problems_at_once_and_the_run_need_not_be_named() -> None:
    wanted = changed(seed=2, optimizer__lr=1.0, policy__epsilon=0.5, data__workers=0)
    problems = differences(changed(), wanted)
    assert [problem.key for problem in problems] == ["optimizer.lr", "policy.epsilon", "seed"]
    assert "but the run was begun with 0.1;" in problems[0].message


def test_the_same_in_other_words() -> None:
    assert lines(changed(optimizer__name="SGD"), changed(optimizer__name="sgd", optimizer__nesterov=None)) == []
    assert lines(changed(), changed(optimizer__lr=0.1, data__mean=None)) == []
    assert lines(changed(model__kwargs__x=float("nan")), changed(model__kwargs__x=float("nan"))) == []


def test_what_was_decided_stays_decided() -> None:
    match = {"kind": "stochastic", "p": "match:runs/y"}
    stored = changed(channels_last=True, policy={**match, "matched_p": 0.4})
    assert lines(stored, changed(policy=match)) == []
    assert merged(stored, changed(policy=match, epochs=300)) == stored.model_copy(update={"epochs": 300})
    assert lines(stored, changed(policy={**match, "p": "match:/moved/y"})) == []
    assert [problem.key for problem in differences(stored, changed(policy={**match, "p": "match:runs/z"}))] == [
        "policy.p"
    ]
    assert lines(stored, changed(policy={**match, "matched_p": 0.5})) == [
        "policy.matched_p: 0.5, but runs/x was begun with 0.4; leave it, or train anew without --resume"
    ]
    assert [problem.key for problem in differences(stored, changed(policy={**match, "p": 0.4}))] == ["policy.p"]
    assert merged(changed(channels_last=True), changed(channels_last=False)).channels_last is False
    # Another kind of policy has nothing to take over.
    assert merged(stored, changed()).policy == changed().policy


@pytest.mark.parametrize(
    ("name", "argument"), [("cosine", "T_max"), ("CosineAnnealingLR", "T_max"), ("Polynomial", "total_iters")]
)
def test_epochs_of_a_schedule_that_was_laid_out_for_them(name: str, argument: str) -> None:
    stored = changed(scheduler={"name": name, "warmup_epochs": 5})
    longer = changed(scheduler={"name": name, "warmup_epochs": 5}, epochs=300)
    assert lines(stored, longer) == [
        f"epochs: 300, but runs/x was begun with 250, and the schedule '{name}' is laid out for 245; "
        f"give scheduler.{argument}=245, or train anew without --resume"
    ]
    # As the message says, it can be continued; and from then on with the length given.
    given = changed(scheduler={"name": name, "warmup_epochs": 5, argument: 245}, epochs=300)
    assert lines(stored, given) == []
    assert merged(stored, given) == given
    assert lines(given, given.model_copy(update={"epochs": 400})) == []
    assert [problem.key for problem in differences(given, longer)] == ["epochs"]
    other = changed(scheduler={"name": name, "warmup_epochs": 5, argument: 100}, epochs=300)
    assert lines(stored, other) == [
        f"scheduler.{argument}: 100, but runs/x was begun with 245; leave it, or train anew without --resume"
    ]
    assert lines(stored, stored) == []


def test_lengths_of_schedules_are_those_that_training_fills_in() -> None:
    from neq_cli.errors import RecipeValueError
    from neq_cli.training.loop import schedules

    known = 0
    for name in ["constant", *schedules._SHORT, *schedules._SCHEDULERS]:
        with suppress(RecipeValueError):  # one that cannot be used
            argument = changed_by_epochs(name)
            schedule = {"name": name}
            said = [
                problem.message
                for problem in differences(changed(scheduler=schedule), changed(scheduler=schedule, epochs=300))
            ]
            assert len(said) == (argument is not None), name
            assert all(f"; give scheduler.{argument}=250," in message for message in said)
            known += len(said)
    assert known >= 7


@pytest.mark.parametrize("name", ["cosine", "onecycle"])
def test_a_schedule_by_the_step_cannot_be_made_longer(name: str) -> None:
    schedule = {"name": name, "interval": "step"}
    assert lines(changed(scheduler=schedule), changed(scheduler=schedule, epochs=300)) == [
        f"epochs: 300, but runs/x was begun with 250, and the schedule '{name}' is laid out for 250 epochs; leave it, "
        "or train anew without --resume"
    ]


def changed_by_epochs(name: str) -> str | None:
    """Return the setting of a schedule that differs between runs of 250 and 300 epochs."""
    import torch

    from neq_cli.recipe import SchedulerSection
    from neq_cli.training.loop import schedules

    schedules.find_scheduler(name)
    made = [
        vars(schedules.build_scheduler(section, torch.optim.SGD([torch.zeros(1)], lr=0.1), epochs) or object)
        for epochs in (250, 300)
        for section in [SchedulerSection.model_validate({"name": name, **NEEDED.get(name.removesuffix("lr"), {})})]
    ]
    return next((key for key in ("T_max", "total_iters") if made[0].get(key) != made[1].get(key)), None)


NEEDED = {"multistep": {"milestones": [5]}, "step": {"step_size": 5}, "exponential": {"gamma": 0.5}}
NEEDED["cosine_warm_restarts"] = NEEDED["cosineannealingwarmrestarts"] = {"T_0": 5}


def begin(
    root: Path, name: str, started: str | None, state: str = "interrupted", folder: str = "digits", **keys: Any
) -> Path:
    path = root / folder / name
    with RunWriter.create(path, dump_recipe(changed(**keys)), {}):
        pass
    if started is None:
        (path / "status.json").unlink()
    else:
        (path / "status.json").write_text(json.dumps({"state": state, "started": f"{started}+00:00"}))
    return path


def test_candidates_are_the_runs_of_name_and_seed_newest_first(tmp_path: Path) -> None:
    old = begin(tmp_path, "z", "2026-01-01T00:00:00")
    same_second = begin(tmp_path, "20260301-000000-s1-10", "2026-03-01T00:00:00", "failed")
    second = begin(tmp_path, "20260301-000000-s1-9", "2026-03-01T00:00:00", "running")
    new = begin(tmp_path, "a", "2026-04-01T00:00:00", "finished")
    unknown = begin(tmp_path, "b", None)
    os.utime(unknown, (1_769_904_000, 1_769_904_000))  # 2026-02-01
    begin(tmp_path, "seed", "2026-05-01T00:00:00", seed=2)
    begin(tmp_path, "other", "2026-05-01T00:00:00", folder="other")
    found = candidates("digits", 1, tmp_path)
    assert [(candidate.path, candidate.state) for candidate in found] == [
        (new, "finished"), (same_second, "failed"), (second, "running"), (unknown, "unknown"), (old, "interrupted"),
    ]  # fmt: skip
    assert found[0].recipe == changed()
    best = newest_unfinished("digits", 1, tmp_path)
    assert best is not None
    assert best.path == same_second


def test_the_newest_finished_one_where_all_are_and_none_without_any(tmp_path: Path) -> None:
    assert newest_unfinished("digits", 1, tmp_path) is None
    assert candidates("digits", 1, tmp_path) == []
    begin(tmp_path, "old", "2026-01-01T00:00:00", "finished", folder="my-digits")
    new = begin(tmp_path, "new", "2026-01-02T00:00:00", "finished", folder="my-digits")
    best = newest_unfinished("my digits", 1, tmp_path)  # as the folder's name is made from the recipe's
    assert best is not None
    assert best.path == new


def test_what_is_damaged_or_foreign_is_left_out(tmp_path: Path) -> None:
    good = begin(tmp_path, "good", "2026-01-01T00:00:00")
    for number, (name, content) in enumerate(
        [
            ("recipe.yaml", "seed: 1\nepochs: x\n"),
            ("recipe.yaml", "seed: 1\n"),
            ("recipe.yaml", "- 1"),
            ("recipe.yaml", "a: &a [1]\n" + "b: [" + "*a, " * 99_999 + "]"),
            ("recipe.yaml", "seed: !!python/object/apply:os.system ['touch /tmp/x']"),
            ("status.json", "{"),
            ("status.json", '{"state": "\\u001b[31m"}'),
            ("status.json", "[" * 100_000),
        ]
    ):
        (begin(tmp_path, str(number), "2026-02-01T00:00:00") / name).write_text(content)
    begin(tmp_path, ".trash", "2026-03-01T00:00:00")
    oldest = begin(tmp_path, "oldest", "0001-01-01T00:00:00")
    (tmp_path / "digits" / "empty").mkdir()
    (tmp_path / "digits" / "file").touch()
    (tmp_path / "digits" / "loop").symlink_to(tmp_path / "digits" / "loop")
    assert [candidate.path for candidate in candidates("digits", 1, tmp_path)] == [good, oldest]


def test_the_stored_recipe_is_the_one_that_was_written(tmp_path: Path) -> None:
    recipe = changed(model={"entrypoint": "no.such.module:make", "kwargs": {"a": "1e-3", "b": [1, None, "on", 1e-9]}})
    assert stored_recipe(begin(tmp_path, "run", None, model=recipe.model.model_dump())) == recipe


def test_a_recipe_of_the_last_release_has_defaults_for_new_keys(tmp_path: Path) -> None:
    path = begin(tmp_path, "run", None)
    plain = yaml.safe_load((path / "recipe.yaml").read_text())
    for key in ("checkpoint_minutes", "sync_batchnorm", "cuda_graph"):
        del plain[key]
    (path / "recipe.yaml").write_text(yaml.safe_dump(plain))
    assert stored_recipe(path) == changed()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("", "not a mapping"),
        ("seed: 1\n", r"model: missing; write model: .* \(and 3 more\); the file is damaged"),
        ("model: {name: x}\ndata: {name: x}\noptimizer: {}\nepochs: 1\nneurones: 2\n", "neurones: unknown key"),
        ("model: {name: x}\ndata: {name: x}\noptimizer: {}\nepochs: '\x1b[31m'\n", "not YAML"),
        ('model: {name: x}\ndata: {name: x}\noptimizer: {}\nepochs: "\\e[31m"\n', "epochs: .*is not a whole number"),
        ("[" * 5000, "not YAML"),
    ],
)
def test_a_damaged_recipe_is_one_line(tmp_path: Path, content: str, what: str) -> None:
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(RunDirectoryError, match=what) as caught:
        stored_recipe(tmp_path)
    assert str(caught.value).isprintable()
    assert str(caught.value).startswith(str(tmp_path / "recipe.yaml"))


def test_a_missing_recipe_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"recipe.yaml: missing"):
        stored_recipe(tmp_path)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["neq", "sgd", "a:b"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["name", "kind", "kwargs", "groups", "parameters", "lr", "p", "x"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keys=st.dictionaries(st.sampled_from([*Recipe.model_fields, "", "x.y"]), VALUES, max_size=3))
def test_any_recipe_is_read_or_refused(tmp_path: Path, keys: dict[str, Any]) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**PLAIN, **keys}, allow_unicode=True))
    with suppress(RunDirectoryError):
        recipe = stored_recipe(tmp_path)
        assert differences(recipe, recipe) == []
        for problem in differences(changed(), recipe) + differences(recipe, changed()):
            assert problem.message.isprintable()
            assert len(problem.message) < 400


@pytest.fixture
def imports(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    import builtins

    seen: list[str] = []
    real = builtins.__import__
    monkeypatch.setattr(
        builtins, "__import__", lambda name, *rest, **named: seen.append(name) or real(name, *rest, **named)
    )
    return lambda: seen


def test_nothing_that_a_run_names_is_imported(tmp_path: Path, imports: Callable[[], list[str]]) -> None:
    begin(tmp_path, "run", None, model={"entrypoint": "evil.one:make"}, task="evil.two:task")
    (candidate,) = candidates("digits", 1, tmp_path)
    assert differences(candidate.recipe, changed())
    assert not [name for name in imports() if name.startswith("evil")]


FOUND = {"data__mean": [0.3], "data__std": [0.4], "data__channels": 1, "data__image_size": 224}


def test_what_a_run_found_of_its_images_holds_where_the_recipe_leaves_it_open() -> None:
    stored = changed(**FOUND)
    assert lines(stored, changed()) == []
    assert merged(stored, changed()) == stored
    assert lines(stored, changed(**FOUND)) == []
    for key, other in {"data__mean": [0.5], "data__std": [0.5], "data__channels": 3, "data__image_size": 32}.items():
        (line,) = lines(stored, changed(**{**FOUND, key: other}))
        assert line.startswith(f"{key.replace('__', '.')}: ")


def test_a_run_of_before_that_did_not_tell_what_it_found_is_gone_on_with() -> None:
    stored = changed()
    assert lines(stored, changed(data__channels=3)) == []  # as the model takes them, now and then
    assert merged(stored, changed(data__channels=3)).data.channels == 3
    (line,) = lines(stored, changed(data__mean=[0.3]))
    assert line.startswith("data.mean: [0.3], but runs/x was begun with null; leave it")
