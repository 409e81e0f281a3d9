from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from neq_cli.runs.compare.comparison import compare_runs
from neq_cli.runs.compare.configurations import disagreements, labels, model_and_data, policy_label, settings, written
from neq_cli.runs.store.run import Run


@pytest.fixture
def pair(make_run: Callable[..., Run], recipe: Any) -> Callable[..., list[Run]]:
    """Two runs that differ in the keys given."""
    made = 0

    def make(**changes: Any) -> list[Run]:
        nonlocal made
        made += 2
        return [make_run(f"{made}", recipe(), epochs=1), make_run(f"{made}-changed", recipe(**changes), epochs=1)]

    return make


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 2},
        {"description": "another"},
        {"device": "cpu"},
        {"data": {"name": "CIFAR10", "root": "/elsewhere"}},
        {"data": {"name": "CIFAR10", "workers": 9}},
        {"data": {"name": "CIFAR10", "download": False}},
    ],
)
def test_seed_and_surroundings_are_no_configuration(pair: Callable[..., list[Run]], changes: dict[str, Any]) -> None:
    first, second = pair(**changes)
    assert first.recipe != second.recipe
    assert settings(first) == settings(second)
    assert disagreements([first, second]) == {}


@pytest.mark.parametrize(
    ("changes", "key", "values"),
    [
        ({"epochs": 4}, "epochs", ["3.0", "4.0"]),
        ({"model": {"name": "resnet20"}}, "model.name", ['"resnet32"', '"resnet20"']),
        ({"model": {"name": "resnet32", "kwargs": {"num_classes": 7}}}, "model.kwargs.num_classes", ["not set", "7.0"]),
        ({"data": {"name": "SVHN"}}, "data.name", ['"CIFAR10"', '"SVHN"']),
        ({"data": {"name": "CIFAR10", "image_size": 64}}, "data.image_size", ["not set", "64.0"]),
        ({"task": "my.pkg:task"}, "task", ['"classification"', '"my.pkg:task"']),
    ],
)
def test_data_model_task_and_epochs_must_agree(
    pair: Callable[..., list[Run]], changes: dict[str, Any], key: str, values: list[str]
) -> None:
    first, second = pair(**changes)
    found = disagreements([first, second])
    assert {name: list(each) for name, each in found.items()} == {key: values}
    assert list(found[key].values()) == [[first], [second]]


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"name": "CIFAR10", "probe_size": 7}},
        {"policy": {"kind": "neq", "epsilon": 0.005}},
        {"optimizer": {"name": "sgd", "lr": 0.2}},
        {"precision": "bf16"},
        {"batch_size": 7},
    ],
)
def test_other_keys_make_other_configurations_that_compare(
    pair: Callable[..., list[Run]], changes: dict[str, Any]
) -> None:
    first, second = pair(**changes)
    assert settings(first) != settings(second)
    assert disagreements([first, second]) == {}


def test_recorded_content_of_the_data_must_agree_where_it_is_recorded(make_run: Callable[..., Run]) -> None:
    runs = [
        make_run(str(index), epochs=1, environment=environment)
        for index, environment in enumerate([{"data": {"train": 50000}}, {"data": {"train": 100}}, {}])
    ]
    assert disagreements([runs[0], runs[2]]) == {}
    assert list(disagreements(runs)["environment.data.train"]) == ["50000", "100"]


def test_whole_numbers_and_floats_are_one_setting(pair: Callable[..., list[Run]]) -> None:
    first, second = pair(optimizer={"name": "sgd", "lr": 0.1, "betas": [1, 2]})
    assert settings(first) != settings(second)
    second.recipe["optimizer"]["betas"] = [1.0, 2.0]
    whole = pair(optimizer={"name": "sgd", "lr": 0.1, "betas": [1, 2]})[1]
    assert settings(whole) == settings(second)


@pytest.mark.parametrize(
    ("policy", "label"),
    [
        ({"kind": "baseline"}, "Baseline"),
        ({"kind": "neq"}, "NEq eps=0.001 mu=0.5"),
        ({"kind": "neq", "epsilon": 1e-7, "mu": 0.0, "definition": "reference"}, "NEq eps=1e-07 mu=0 reference"),
        ({"kind": "neq", "epsilon": 0.123456789}, "NEq eps=0.123456789 mu=0.5"),
        ({"kind": "stochastic", "p": 0.2}, "Stochastic p=0.2"),
        ({"kind": "stochastic", "p": "match:runs/x", "matched_p": 0.37812}, "Stochastic* p=0.378"),
        ({"kind": "stochastic", "p": "match:runs/x"}, "Stochastic* p=match"),
        ({"kind": "entrypoint", "entrypoint": "my.pkg:policy"}, "my.pkg:policy"),
    ],
)
def test_names_of_policies(make_run: Callable[..., Run], recipe: Any, policy: dict[str, Any], label: str) -> None:
    assert policy_label([make_run(recipe=recipe(policy=policy), epochs=1)]) == label


def test_matched_p_is_folded_over_the_runs(make_run: Callable[..., Run], recipe: Any) -> None:
    policies = [{"kind": "stochastic", "p": f"match:{p}", "matched_p": p} for p in (0.37, 0.38, 0.39)]
    runs = [make_run(str(i), recipe(policy=policy), epochs=1) for i, policy in enumerate(policies)]
    assert len({str(settings(run)) for run in runs}) == 1
    assert policy_label(runs) == "Stochastic* p=0.38 ± 0.01"


def test_labels_tell_rows_apart_by_the_keys_that_differ(make_run: Callable[..., Run], recipe: Any) -> None:
    recipes = [
        recipe(policy={"kind": "baseline"}, optimizer={"name": "sgd", "lr": 0.1}),
        recipe(optimizer={"name": "sgd", "lr": 0.1}),
        recipe(optimizer={"name": "sgd", "lr": 0.2}),
        recipe(policy={"kind": "entrypoint", "entrypoint": "a:b", "kwargs": {"k": 1}}),
        recipe(policy={"kind": "entrypoint", "entrypoint": "a:b", "kwargs": {"k": 2}}),
    ]
    runs = [[make_run(str(index), each, epochs=1)] for index, each in enumerate(recipes)]
    assert labels(runs) == [
        "Baseline, optimizer.lr=0.1",
        "NEq eps=0.001 mu=0.5, optimizer.lr=0.1",
        "NEq eps=0.001 mu=0.5, optimizer.lr=0.2",
        "a:b, policy.kwargs.k=1, optimizer.lr=0.1",
        "a:b, policy.kwargs.k=2, optimizer.lr=0.1",
    ]
    assert labels(runs[:2]) == ["Baseline", "NEq eps=0.001 mu=0.5"]


def test_model_and_data_by_entrypoint(make_run: Callable[..., Run], recipe: Any) -> None:
    made = recipe(model={"entrypoint": "my.nets:make"}, data={"entrypoint": "my.data:load"})
    assert model_and_data(make_run(recipe=made, epochs=1)) == "my.nets:make on my.data:load"


@pytest.mark.parametrize(
    ("setting", "shown"),
    [
        ("2.0", "2"),
        ("0.001", "0.001"),
        ("[15.0, 22.5]", "[15, 22.5]"),
        ('["fc.*", true]', "[fc.*, True]"),
        ('"cosine"', "cosine"),
    ],
)
def test_settings_are_written_as_people_do(setting: str, shown: str) -> None:
    assert written(setting) == shown


USED = {"mean": [0.5], "std": [0.25], "image_shape": [1, 8, 8]}
OPEN = {"name": "digits", "mean": None, "std": None}
"""How runs of before wrote what they left to the data."""
WRITTEN = {"name": "digits", "mean": [0.5], "std": [0.25], "channels": 1}
FOUND = ["data.channels", "data.mean", "data.std"]


@pytest.mark.parametrize(
    ("first", "second", "one"),
    [
        # A run of before that told what it used, one that wrote it into its recipe, and one that was asked for it.
        ((OPEN, {"data": USED}), (WRITTEN, {"data": USED, "found": FOUND}), True),
        ((OPEN, {"data": USED}), (WRITTEN, {"data": USED}), True),
        ((WRITTEN, {"data": USED, "found": FOUND}), (WRITTEN, {"data": USED}), True),
        ((OPEN, {"data": USED}), ({**WRITTEN, "mean": [0.4]}, {"data": {**USED, "mean": [0.4]}}), False),
        # A run of before that did not tell: it is as one that found the same data, not as one that was asked.
        ((OPEN, {"data": {"image_shape": [1, 8, 8]}}), (WRITTEN, {"data": USED, "found": FOUND}), True),
        ((OPEN, {}), (WRITTEN, {"data": USED, "resumed": [{"changed": {"found": FOUND}}]}), True),
        ((OPEN, {}), (WRITTEN, {"data": USED, "found": ["data.mean", "data.std"]}), True),  # channels are the model's
        ((OPEN, {"data": {"image_shape": [1, 8, 8]}}), (WRITTEN, {"data": USED}), False),
        ((OPEN, {"data": {"image_shape": [3, 8, 8]}}), (WRITTEN, {"data": USED, "found": FOUND}), False),
        # Images that are cut to a size, and others that keep their own.
        (
            ({**OPEN, "augment": "imagenet"}, {"data": {**USED, "image_shape": [1, 224, 224]}}),
            (
                {**WRITTEN, "augment": "imagenet", "image_size": 224},
                {"data": {**USED, "image_shape": [1, 224, 224]}, "found": [*FOUND, "data.image_size"]},
            ),
            True,
        ),
        ((OPEN, {"data": USED}), ({**WRITTEN, "image_size": 8}, {"data": USED, "found": FOUND}), False),
    ],
)
def test_images_that_were_prepared_alike_are_one_configuration_however_that_was_written(
    make_run: Callable[..., Run], recipe: Any, first: Any, second: Any, one: bool
) -> None:
    runs = [
        make_run(str(seed), recipe(data=data, seed=seed), epochs=1, environment=environment)
        for seed, (data, environment) in enumerate([first, second, first], 1)
    ]
    rows = compare_runs(runs, allow_differences=True).rows
    assert sorted(len(row.runs) for row in rows) == ([3] if one else [1, 2])
    assert (disagreements(runs) == {}) is one
