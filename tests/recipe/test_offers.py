"""What may stand in a recipe next: every key of its models, and values that neq takes."""

from __future__ import annotations

from typing import Any

import pytest

from neq_cli.recipe.keys import CHANGES, ModelSection
from neq_cli.recipe.load import load_recipe, read_document
from neq_cli.recipe.offers import offers
from neq_cli.recipe.optimizer_keys import OptimizerSection, SchedulerSection
from neq_cli.recipe.policy_keys import POLICIES
from neq_cli.recipe.values import Section


def offered(recipe: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    found = offers(recipe)
    assert len({offer.key for offer in found}) == len(found)
    return {offer.key: offer.values for offer in found}


def test_all_keys_are_offered_those_of_a_policy_by_its_kind() -> None:
    assert set(offered({"policy": {"kind": "nothing known"}})) == set(CHANGES)
    others = {key for key in CHANGES if not key.startswith("policy.")}
    for kind, model in POLICIES.items():
        assert set(offered({"policy": {"kind": kind}})) - others == {f"policy.{key}" for key in model.model_fields}
    assert offered({}) == offered({"policy": {"kind": "neq"}})


def test_arguments_that_the_recipe_has_are_offered_with_their_values() -> None:
    found = offered(read_document("resnet32-cifar10")[2].values)
    assert found["optimizer.momentum"] == ("0.9",)
    assert found["optimizer.weight_decay"] == ("0.0005",)
    assert found["scheduler.gamma"] == ("0.1",)
    assert "scheduler.milestones" in found
    assert found["epochs"][0] == "250"
    assert not {"optimizer.momentum", "scheduler.gamma"} & set(offered({}))


def test_a_typo_is_not_offered_again() -> None:
    recipe = {"epochz": 3, "data": {"nam": "digits"}, "policy": {"epsilom": 1}, "optimizer": {"momentun": 0.9}}
    assert set(offered(recipe)) - set(offered({})) == {"optimizer.momentun"}  # which only torch knows to be none


@pytest.mark.parametrize("recipe", [{"policy": value} for value in (None, 3, [], "neq", {"kind": []})])
def test_a_recipe_may_be_wrong(recipe: dict[str, Any]) -> None:
    assert "epochs" in offered(recipe)


def test_words_are_all_that_a_key_takes() -> None:
    found = offered({})
    assert found["policy.kind"] == tuple(POLICIES)
    assert found["backward"] == ("exact", "truncated", "dense")
    assert found["compile"] == ("true", "false")
    assert found["channels_last"] == ("true", "false", "auto")
    assert found["ema"] == ("null", "0.999")


@pytest.mark.parametrize("kind", POLICIES)
def test_every_value_that_is_offered_is_taken(kind: str) -> None:
    """With what its kind of policy asks for, and the other of two sources left out."""
    needed = {"stochastic": ["policy.p=0.5"], "budget": ["policy.flops=0.5"], "entrypoint": ["policy.entrypoint=a:b"]}
    begun = [f"policy.kind={kind}", *needed.get(kind, [])]
    count = 0
    for key, values in offered({"policy": {"kind": kind}}).items():
        for value in values:
            if (key, value) == ("policy.kind", kind) or (key in ("model.name", "data.name") and value == "null"):
                continue
            if key != "policy.kind":
                load_recipe("digits", [*begun, f"{key}={value}"])
                count += 1
    assert count > 80


def test_names_of_data_are_in_the_catalogue() -> None:
    from neq_cli.training.data.catalogue import CATALOGUE

    assert set(offered({})["data.name"]) - {"null"} <= set(CATALOGUE)


@pytest.mark.parametrize("section", [ModelSection, OptimizerSection, SchedulerSection])
def test_names_that_are_offered_are_torchs(section: type[Section]) -> None:
    from neq_cli.training.checks import check_section

    name = section.__name__.removesuffix("Section").lower()
    needed = {"multistep": {"milestones": [1]}, "step": {"step_size": 1}, "onecycle": {"interval": "step"}}
    names = [value for value in offered({})[f"{name}.name"] if value != "null"]
    assert len(names) > 3
    for value in names:
        assert check_section(name, section.model_validate({"name": value, **needed.get(value, {})})) == []
