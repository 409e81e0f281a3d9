"""The JSON Schema of recipes, with the jsonschema library as judge: it takes what neq takes, refuses what it can."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from neq_cli import __version__
from neq_cli.recipe.keys import Recipe
from neq_cli.recipe.load import dump_recipe, load_recipe, shipped_directory, shipped_names
from neq_cli.recipe.policy_keys import POLICIES
from neq_cli.recipe.schema import is_schema, recipe_schema, schema_text
from neq_cli.recipe.validate import validate
from neq_cli.recipe.yaml import read_yaml

SCHEMA = recipe_schema()
JUDGE = Draft202012Validator(SCHEMA)
SMALLEST = """
model: {name: resnet18}
data: {name: CIFAR10}
epochs: 3
optimizer: {name: sgd}
"""


def values_of(text: str) -> dict[str, Any]:
    read = read_yaml(text)
    assert read.problems == []
    assert isinstance(read.value, dict)
    return read.value


def with_keys(text: str) -> dict[str, Any]:
    """The smallest recipe with some keys in place of its own."""
    return {**values_of(SMALLEST), **values_of(text)}


def test_it_is_a_schema_of_its_draft_and_says_of_what() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == Draft202012Validator.META_SCHEMA["$id"]
    assert SCHEMA["$id"] == f"urn:neq:recipe:{__version__}"
    assert __version__ in SCHEMA["title"]
    assert json.loads(schema_text()) == SCHEMA
    assert is_schema(schema_text())


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"$id": 3}', '{"$id": "urn:neq:run:1"}', "[" * 100_000])
def test_other_files_are_no_schema_of_recipes(text: str) -> None:
    assert not is_schema(text)


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_recipes_fit_as_written_and_with_every_default(name: str) -> None:
    file = shipped_directory() / f"{name}.yaml"
    JUDGE.validate(values_of(file.read_text()))
    JUDGE.validate(values_of(dump_recipe(load_recipe(str(file)).recipe)))


GOOD = [
    "optimizer: {name: sgd, lr: 1e-3, momentum: 0.9, weight_decay: 5e-4, betas: [0.9, 0.999]}",
    "optimizer: {}",
    "scheduler: {name: multistep, milestones: [100, 150], gamma: 0.1, warmup_epochs: 5}",
    "optimizer: {groups: [{parameters: ['*.bias'], weight_decay: 0}, {parameters: [fc], lr: null}]}",
    "model: {entrypoint: 'package.nets:Nets.make', kwargs: {anything: [1, {deep: x}]}}",
    "model: {entrypoint: 'nets:größe'}",
    "model: {name: null, entrypoint: 'a:b'}",
    "model: {name: timm/vit_tiny, entrypoint: null, weights: DEFAULT, fresh: ['head.*']}",
    "data: {name: digits, mean: [0.5], std: [1e-1], value_range: [0, 4095], workers: 0}",
    "task: my_tasks:depth",
    "task: segmentation",
    "policy: {}",
    "policy: {epsilon: 1e-3}",
    "policy: {epsilon: 1, mu: 0, scope: front, share: 0.8, thaw_at_lr_drop: 10, front_mode: inference}",
    "policy: {kind: baseline}",
    "policy: {kind: stochastic, p: 0.5}",
    "policy: {kind: stochastic, p: 1, matched_p: 0.3}",
    "policy: {kind: stochastic, p: 'match:runs/digits/20260131-120000-s1'}",
    "policy: {kind: front, start: 0, level: 1}",
    "policy: {kind: budget, flops: 0.5, mu: 0.9}",
    "policy: {kind: entrypoint, entrypoint: 'my_policies:coin_toss', kwargs: {share: 0.5}}",
    "channels_last: true",
    "channels_last: auto",
    "ema: null",
    "clip_grad_norm: 1e-3",
    "seed: 4294967295",
    "device: cuda:1",
]
BAD = [
    "epochs: ten",
    "epochs: 0",
    "epochs: 2.5",
    "epochs: '3'",
    "epochs: true",
    "optimzer: {lr: 1}",
    "model: resnet18",
    "model: {}",
    "model: {name: resnet18, entrypoint: 'a:b'}",
    "model: {name: null}",
    "model: {entrypoint: a.b}",
    "model: {entrypoint: 'a:b:c'}",
    "model: {entrypoint: ':make'}",
    "model: {name: resnet18, weight: DEFAULT}",
    "data: {name: digits, augment: mirror}",
    "data: {name: digits, std: [0.0]}",
    "data: {name: digits, mean: []}",
    "data: {name: digits, value_range: [0, 1, 2]}",
    "optimizer: {name: sgd, kwargs: {momentum: 0.9}}",
    "optimizer: {lr: '1e-3'}",
    "optimizer: {groups: [{weight_decay: 0}]}",
    "optimizer: {groups: [{parameters: [fc], momentum: 0.9}]}",
    "scheduler: {warmup_epochs: -1}",
    "scheduler: {kwargs: {}}",
    "task: depth",
    "policy: neq",
    "policy: null",
    "policy: {kind: nek}",
    "policy: {kind: null}",
    "policy: {epsilom: 0.1}",
    "policy: {p: 0.5}",
    "policy: {kind: baseline, epsilon: 0.1}",
    "policy: {kind: neq, mu: 1}",
    "policy: {kind: stochastic}",
    "policy: {kind: stochastic, p: 1.5}",
    "policy: {kind: stochastic, p: match}",
    "policy: {kind: stochastic, p: 'match:'}",
    "policy: {kind: budget}",
    "policy: {kind: entrypoint, entrypoint: x}",
    "channels_last: maybe",
    "seed: 4294967296",
    "device: cuda 1",
    "exclude: conv1",
    "recorded: true",
]


@pytest.mark.parametrize("text", GOOD)
def test_what_neq_takes_fits(text: str) -> None:
    values = with_keys(text)
    assert validate(values)[1] == {}
    JUDGE.validate(values)


@pytest.mark.parametrize("text", BAD)
def test_what_neq_refuses_does_not(text: str) -> None:
    values = with_keys(text)
    assert validate(values)[1]
    assert not JUDGE.is_valid(values)


def test_a_missing_key_is_found() -> None:
    for key in values_of(SMALLEST):
        values = {name: value for name, value in values_of(SMALLEST).items() if name != key}
        assert validate(values)[1]
        assert not JUDGE.is_valid(values)


BASES = {
    "": SMALLEST,
    "model": SMALLEST,
    "data": SMALLEST,
    "optimizer": SMALLEST,
    "optimizer.groups.0": SMALLEST.replace("{name: sgd}", "{groups: [{parameters: [fc]}]}"),
    "scheduler": SMALLEST + "scheduler: {}",
    "policy": SMALLEST + "policy: {}",
    **{f"policy:{kind}": SMALLEST + f"policy: {{kind: {kind}}}" for kind in POLICIES},
    "policy:stochastic": SMALLEST + "policy: {kind: stochastic, p: 0.5}",
    "policy:budget": SMALLEST + "policy: {kind: budget, flops: 0.5}",
    "policy:entrypoint": SMALLEST + "policy: {kind: entrypoint, entrypoint: 'a:b'}",
}
POOL = """
- null
- true
- ''
- text
- 'a:b'
- 'a.b:c.d'
- ':b'
- match
- match:runs/x
- '1'
- auto
- cpu
- cuda:1
- none
- paper
- layer
- fp16
- segmentation
- -1
- 0
- 1
- 2
- 4294967295
- 4294967296
- -0.5
- 0.0
- 1e-3
- 0.5
- 1.0
- 1.5
- []
- [0.5]
- [0, 0.5]
- [0.5, 0.2, 0.1]
- [text]
- [true]
- {}
- {a: 1}
- {name: x}
- {kind: baseline}
- [{parameters: [x]}]
- [{}]
"""


def variants() -> Iterator[tuple[str, str, Any, dict[str, Any]]]:
    """Yield recipes with every value of a pool at every key: (section, key, value, recipe)."""
    names = {name for model in POLICIES.values() for name in model.model_fields}
    for place, text in BASES.items():
        base = values_of(text)
        section: Any = base
        for key in place.partition(":")[0].split(".") if place else ():
            section = section[int(key)] if isinstance(section, list) else section[key]
        keys = names if place.startswith("policy") else _keys(place)
        for key in sorted({*keys, "kwargs", "unknown"}):
            before = deepcopy(section)
            for value in read_yaml(POOL).value:
                section[key] = value
                yield place, key, value, base
            section.clear()
            section |= before


def _keys(place: str) -> list[str]:
    found = SCHEMA
    for key in place.split(".") if place else ():
        found = found["items"] if key == "0" else found["properties"][key]
    return list(found["properties"])


def unsayable(key: str, value: Any) -> bool:
    """Whether JSON Schema cannot refuse a value: 1.0 is whole to it, and no number is compared with another."""
    return (isinstance(value, float) and value.is_integer()) or (key == "value_range" and value == [0.5, 0.2])


def test_every_value_at_every_key_is_judged_as_neq_judges_it() -> None:
    counts = {True: 0, False: 0}
    wrong = []
    for place, key, value, recipe in variants():
        taken, fits = not validate(recipe)[1], JUDGE.is_valid(recipe)
        counts[taken] += 1
        if taken and not fits:
            wrong.append(f"refused, which neq takes: {place}.{key}: {value!r}")
        elif fits and not taken and not unsayable(key, value):
            wrong.append(f"taken, which neq refuses: {place}.{key}: {value!r}")
    assert not wrong, "\n".join(wrong)
    assert min(counts.values()) > 500, "the pool is worth nothing where all of it is taken, or refused"


def nodes(schema: Any) -> Iterator[dict[str, Any]]:
    """Yield the schemas within a schema."""
    if isinstance(schema, dict):
        yield schema
        for key, inside in schema.items():
            if key in ("properties",):
                for node in inside.values():
                    yield from nodes(node)
            elif key in ("items", "if", "then"):
                yield from nodes(inside)
            elif key in ("anyOf", "oneOf", "allOf"):
                for node in inside:
                    yield from nodes(node)


def test_defaults_and_examples_fit_where_they_are_offered() -> None:
    offered = 0
    for node in nodes(SCHEMA):
        for value in [*node.get("examples", ()), *([node["default"]] if "default" in node else ())]:
            Draft202012Validator(node).validate(value)
            offered += 1
    assert offered > 80


def test_every_key_is_told_as_its_model_tells_it() -> None:
    properties = SCHEMA["properties"]
    assert list(properties) == list(Recipe.model_fields)
    assert properties["epochs"] == {
        "type": "integer",
        "exclusiveMinimum": 0,
        "description": "passes over the training data",
        "examples": [250],
    }
    assert properties["seed"]["default"] == 1
    assert properties["backward"]["enum"] == ["exact", "truncated", "dense"]
    assert properties["exclude"]["default"] == []
    assert properties["policy"]["properties"]["kind"]["enum"] == list(POLICIES)
    assert properties["task"]["examples"] == ["classification", "segmentation"]
    undescribed = [node for node in nodes(SCHEMA) if "default" in node and not node.get("description")]
    assert {json.dumps(node.get("default")) for node in undescribed} <= {f'"{kind}"' for kind in POLICIES}


def test_patterns_mean_the_same_in_the_editors_language() -> None:
    """JavaScript's \\w is ASCII's alone, as Python's is under re.ASCII."""
    patterns = [node["pattern"] for node in nodes(SCHEMA) if "pattern" in node]
    assert len(patterns) > 4
    for pattern in patterns:
        assert re.search(pattern, "nets:größe", re.ASCII) or "[A-Z" not in pattern
        assert not re.search(pattern, "nets größe", re.ASCII)


def test_it_is_written_without_torch() -> None:
    code = "import sys\nfrom neq_cli.recipe.schema import schema_text\nschema_text()\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
