"""The models: defaults, strictness, what is refused across types, warnings."""

import math
import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from neq_cli.recipe import DataSection, OptimizerSection, ParameterGroup, SchedulerSection
from neq_cli.recipe.keys import CHANGES, Recipe, warnings
from neq_cli.recipe.policy_keys import POLICIES, BaselinePolicy, NEqPolicy, StochasticPolicy, match_with, matched_run
from neq_cli.recipe.validate import validate
from neq_cli.recipe.values import Change

SMALLEST = {"model": {"name": "resnet18"}, "data": {"name": "CIFAR10"}, "epochs": 3, "optimizer": {"name": "sgd"}}


def recipe(**keys: Any) -> Recipe:
    return Recipe.model_validate({**SMALLEST, **keys})


def problem_places(**keys: Any) -> list[tuple[Any, ...]]:
    with pytest.raises(ValidationError) as caught:
        recipe(**keys)
    return [error["loc"] for error in caught.value.errors()]


def test_the_smallest_recipe_has_the_papers_defaults() -> None:
    found = recipe()
    assert isinstance(found.policy, NEqPolicy)
    assert (found.policy.epsilon, found.policy.mu, found.policy.definition) == (0.001, 0.5, "paper")
    assert (found.batch_size, found.data.probe_size) == (100, 50)
    assert found.data.cache == "auto"
    assert found.scheduler.name == "constant"


def test_a_policy_without_a_kind_is_neq() -> None:
    assert recipe(policy={"epsilon": 0.01}).policy == NEqPolicy(epsilon=0.01)


@pytest.mark.parametrize("kind", ["baseline", "neq"])
def test_a_policy_of_each_kind(kind: str) -> None:
    assert type(recipe(policy={"kind": kind}).policy) is POLICIES[kind]


def test_policies_with_required_keys() -> None:
    assert recipe(policy={"kind": "stochastic", "p": 1}).policy == StochasticPolicy(p=1.0)
    assert recipe(policy={"kind": "stochastic", "p": "match:runs/x"}).policy == StochasticPolicy(p="match:runs/x")
    assert problem_places(policy={"kind": "stochastic"})[0][-1] == "p"
    assert problem_places(policy={"kind": "entrypoint"})[0][-1] == "entrypoint"


def test_whole_numbers_are_taken_for_numbers_and_nothing_else_is_coerced() -> None:
    assert recipe(clip_grad_norm=1).clip_grad_norm == 1.0
    for value in ("3", 3.0, True, None, [3]):
        assert problem_places(epochs=value) == [("epochs",)]
    for value in ("0.1", True, [0.1]):
        assert problem_places(clip_grad_norm=value) == [("clip_grad_norm",)]
    assert problem_places(compile=1) == [("compile",)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_are_finite(value: float) -> None:
    assert problem_places(optimizer={"lr": value}) == [("optimizer", "lr")]
    assert problem_places(policy={"epsilon": value}) == [("policy", "neq", "epsilon")]


@pytest.mark.parametrize(
    ("keys", "allowed"),
    [
        ({"epochs": 0}, False),
        ({"epochs": 1}, True),
        ({"seed": -1}, False),
        ({"seed": 2**32 - 1}, True),
        ({"seed": 2**32}, False),
        ({"label_smoothing": 0.99}, True),
        ({"label_smoothing": 1.0}, False),
        ({"ema": 0.0}, False),
        ({"policy": {"mu": 0.9}}, True),
        ({"policy": {"mu": 1.0}}, False),
        ({"policy": {"mu": -0.1}}, False),
        ({"policy": {"kind": "stochastic", "p": 1.01}}, False),
        ({"policy": {"kind": "stochastic", "p": "match:"}}, False),
        ({"task": "classification"}, True),
        ({"task": "my_tasks:depth"}, True),
        ({"task": "my_tasks"}, False),
        ({"model": {"entrypoint": "a.b:c.d"}}, True),
        ({"model": {"entrypoint": "a.b"}}, False),
        ({"model": {"entrypoint": "a/b:c"}}, False),
        ({"device": "cuda:1"}, True),
        ({"device": "cuda 1"}, False),
        ({"data": {"name": "digits", "mean": []}}, False),
        ({"data": {"name": "digits", "std": [0.0]}}, False),
        *(({"data": {"name": "digits", "cache": cache}}, True) for cache in ("auto", "memory", "device", "none")),
        ({"data": {"name": "digits", "cache": "disk"}}, False),
        ({"data": {"name": "digits", "cache": True}}, False),
    ],
)
def test_limits(keys: dict[str, Any], allowed: bool) -> None:
    if allowed:
        recipe(**keys)
    else:
        problem_places(**keys)


@pytest.mark.parametrize("section", ["model", "data"])
def test_name_or_entrypoint_is_asked_for_at_the_section(section: str) -> None:
    assert problem_places(**{section: {}}) == [(section,)]
    assert problem_places(**{section: {"name": "x", "entrypoint": "a:b"}}) == [(section,)]


def test_mean_and_std_have_one_value_per_channel_each() -> None:
    DataSection(name="digits", mean=[0.1, 0.2], std=[1.0, 2.0])
    assert problem_places(data={"name": "digits", "mean": [0.1], "std": [1.0, 2.0]}) == [("data",)]


def test_arguments_of_optimizer_and_scheduler_stand_beside_the_name() -> None:
    optimizer = OptimizerSection.model_validate({"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": None})
    assert optimizer.kwargs == {"momentum": 0.9}, "null stands for the class's own default"
    scheduler = SchedulerSection.model_validate({"name": "step", "step_size": 3, "warmup_epochs": 2})
    assert scheduler.kwargs == {"step_size": 3}
    assert problem_places(optimizer={"kwargs": {"momentum": 0.9}}) == [("optimizer",)]


def test_a_validated_recipe_does_not_change() -> None:
    with pytest.raises(ValidationError):
        recipe().epochs = 4


def test_every_key_says_what_it_means() -> None:
    sections = [Recipe, *POLICIES.values(), ParameterGroup, DataSection, OptimizerSection, SchedulerSection]
    for section in sections:
        for name, field in section.model_fields.items():
            has_own_docstring = hasattr(field.annotation, "model_fields") or name in ("policy", "kind")
            assert field.description or has_own_docstring, f"{section.__name__}.{name}"


def test_every_key_says_whether_it_may_change_and_whether_it_names_a_configuration() -> None:
    leaves: list[str] = []

    def visit(section: Any, prefix: str) -> None:
        for name, field in section.model_fields.items():
            if hasattr(field.annotation, "model_fields"):
                visit(field.annotation, f"{name}.")
            elif name != "policy":
                assert [type(said) for said in field.metadata].count(Change) == 1, f"{prefix}{name}"
                leaves.append(f"{prefix}{name}")

    visit(Recipe, "")
    for policy in POLICIES.values():
        visit(policy, "policy.")
    assert set(CHANGES) == set(leaves)
    assert CHANGES["data.root"] == Change(may_change=True, names_configuration=False)
    assert CHANGES["policy.epsilon"] == Change(may_change=False, names_configuration=True)


def test_policies_of_different_kinds_say_the_same_of_the_same_key() -> None:
    said: dict[str, set[Any]] = {}
    for policy in POLICIES.values():
        for name, field in policy.model_fields.items():
            said.setdefault(name, set()).update(item for item in field.metadata if isinstance(item, Change))
    assert all(len(changes) == 1 for changes in said.values())


def test_a_match_is_read_as_it_is_written() -> None:
    assert matched_run(match_with("runs/a:b")) == "runs/a:b"
    assert [matched_run(p) for p in (0.5, None, "match", "matching:x", "runs/match:x")] == [None] * 5
    unmatched = StochasticPolicy(p="match:runs/x")
    assert (unmatched.share, unmatched.run_to_match) == (None, "runs/x")
    matched = StochasticPolicy(p="match:runs/x", matched_p=0.3)
    assert (matched.share, matched.run_to_match) == (0.3, None)
    assert (StochasticPolicy(p=0.5).share, StochasticPolicy(p=0.5).run_to_match) == (0.5, None)


def test_warnings() -> None:
    assert warnings(recipe()) == ()
    assert warnings(recipe(policy={"kind": "baseline"})) == ()
    (mu,) = warnings(recipe(policy={"mu": 0.9}))
    assert mu.startswith("policy.mu: 0.9 is above 0.5")
    assert warnings(recipe(energy=True, grams_per_kwh=56.0)) == ()
    (grams,) = warnings(recipe(grams_per_kwh=56.0))
    assert grams == "grams_per_kwh: does nothing without energy; add energy: true"


def test_blocks_without_a_model_that_is_divided_are_told() -> None:
    assert warnings(recipe(parallel="fsdp", fsdp={"blocks": ["layers.*"]})) == ()
    (blocks,) = warnings(recipe(fsdp={"blocks": ["layers.*"]}))
    assert blocks == "fsdp.blocks: do nothing with parallel ddp; add parallel: fsdp"
    assert problem_places(fsdp={"blocks": []}) == [("fsdp", "blocks")]
    assert problem_places(parallel="tensor") == [("parallel",)]
    (epsilon,) = warnings(recipe(policy={"epsilon": 0.0}))
    assert epsilon.startswith("policy.epsilon: 0 freezes nothing")
    assert warnings(recipe(policy={"epsilon": 0.0, "definition": "reference"})) == (), (
        "its rule is |velocity| <= epsilon"
    )
    (warm_up,) = warnings(recipe(scheduler={"warmup_epochs": 4}))
    assert warm_up.startswith("scheduler.warmup_epochs: 4 epochs")
    assert warnings(recipe(policy=BaselinePolicy(), scheduler={"warmup_epochs": 3})) == ()


def test_recipes_are_read_without_torch() -> None:
    modules = "describe document entrypoints keys load policy_keys reference shipped validate values yaml"
    imports = "; ".join(f"import neq_cli.recipe.{module}" for module in modules.split())
    work = "neq_cli.recipe.shipped.list_recipes(); neq_cli.recipe.reference.recipe_reference()"
    code = f"import sys; {imports}; {work}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("policy", "key", "message"),
    [
        ({"share": 0}, "share", "0 is not a number above 0 and at most 1; write one such as 0.8"),
        ({"share": 1.5}, "share", "1.5 is not a number above 0 and at most 1"),
        ({"scope": "block"}, "scope", "'block' is not one of neuron, layer, front"),
        ({"thaw_at_lr_drop": 1}, "thaw_at_lr_drop", "1 is not a number above 1, or null; write one such as 10"),
        ({"kind": "front", "start": 1}, "start", "1 is not a number from 0 to below 1"),
        ({"kind": "front", "level": 0}, "level", "0 is not a number above 0 and at most 1"),
        ({"kind": "budget"}, "flops", "missing"),
        ({"kind": "budget", "flops": 2}, "flops", "2 is not a number above 0 and at most 1"),
        ({"kind": "stochastic", "p": 0.5, "scope": "all"}, "scope", "'all' is not one of neuron, layer, front"),
    ],
)
def test_policies_out_of_range(policy: dict[str, Any], key: str, message: str) -> None:
    plain = {"model": {"name": "resnet8"}, "data": {"name": "digits"}, "epochs": 1, "optimizer": {}, "policy": policy}
    _, problems = validate(plain)
    assert list(problems) == [("policy", key)]
    assert problems["policy", key].message.startswith(message)


def test_scopes_that_hardly_mean_what_they_say_are_warned_of() -> None:
    front = {"kind": "neq", "scope": "front"}
    (line,) = warnings(recipe(policy=front))
    assert line.startswith("policy.share: 1 with scope front, so that a layer freezes only once every one")
    assert warnings(recipe(policy={**front, "share": 0.8})) == ()
    assert warnings(recipe(policy={**front, "share": 0.8, "front_mode": "inference"})) == ()
    (line,) = warnings(recipe(policy={"kind": "neq", "front_mode": "inference"}))
    assert line == "policy.front_mode: inference does nothing with scope neuron; use scope front"
    (line,) = warnings(recipe(policy={"kind": "neq", "thaw_at_lr_drop": 10}))
    assert line.startswith("policy.thaw_at_lr_drop: nothing thaws by it")
    assert warnings(recipe(policy={"kind": "neq", "thaw_at_lr_drop": 10}, scheduler={"name": "cosine"})) == ()
