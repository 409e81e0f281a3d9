"""The shipped recipes: what they say, what `neq init` copies of them."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from neq_cli.errors import NeqError
from neq_cli.recipe import load
from neq_cli.recipe.keys import Recipe, warnings
from neq_cli.recipe.load import load_recipe
from neq_cli.recipe.schema import schema_text
from neq_cli.recipe.schema_file import FIRST_LINE
from neq_cli.recipe.shipped import copy_recipe, list_recipes

NAMES = [
    "cifar10-folder",
    "deeplabv3_resnet50-coco",
    "detection",
    "digits",
    "digits-baseline",
    "digits-stochastic",
    "entrypoint",
    "finetune-folder",
    "language-model",
    "regression",
    "resnet18-imagenet",
    "resnet32-cifar10",
    "resnet32-cifar10-adam",
    "resnet32-cifar10-front",
    "segmentation-folder",
    "swin_b-imagenet",
]


def shipped(name: str) -> Recipe:
    return load_recipe(name).recipe


def test_all_are_listed_with_a_description_of_one_line() -> None:
    listed = list_recipes()
    assert [recipe.name for recipe in listed] == NAMES
    for recipe in listed:
        assert recipe.path.is_file()
        assert 0 < len(recipe.description) <= 100
        assert recipe.description.isprintable()


@pytest.mark.parametrize("name", NAMES)
def test_none_warns(name: str) -> None:
    assert warnings(shipped(name)) == ()


PAPER: dict[str, Any] = {  # section 4.1
    "epochs": 250,
    "batch_size": 100,
    "scheduler": {"name": "multistep", "warmup_epochs": 0, "interval": "epoch", "milestones": [100, 150], "gamma": 0.1},
    "policy": {
        "kind": "neq",
        "epsilon": 0.001,
        "mu": 0.5,
        "definition": "paper",
        "scope": "neuron",
        "share": 1.0,
        "thaw_at_lr_drop": None,
        "front_mode": "train",
    },
    "precision": "fp32",
    "label_smoothing": 0.0,
    "clip_grad_norm": None,
    "ema": None,
    "gradient_accumulation": 1,
    "exclude": [],
}


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("resnet32-cifar10", {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 5 * 10**-4}),
        ("resnet32-cifar10-adam", {"name": "adam", "lr": 0.001, "betas": [0.9, 0.999], "weight_decay": 5 * 10**-4}),
    ],
)
def test_the_papers_recipes(name: str, optimizer: dict[str, Any]) -> None:
    found = shipped(name).model_dump()
    assert {key: found[key] for key in PAPER} == PAPER
    assert found["optimizer"] == {**optimizer, "groups": []}
    assert (found["model"]["name"], found["data"]["name"]) == ("resnet32", "CIFAR10")
    assert (found["data"]["probe_size"], found["data"]["augment"]) == (50, "cifar")


@pytest.mark.parametrize("other", ["digits-baseline", "digits-stochastic"])
def test_the_digits_recipes_differ_in_their_policy_only(other: str) -> None:
    digits, others = shipped("digits").model_dump(), shipped(other).model_dump()
    differing = {key for key in digits if digits[key] != others[key]}
    assert differing == {"description", "policy"}
    assert others["policy"]["kind"] == other.partition("-")[2]


def test_an_installed_package_has_them_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = load.shipped_directory()
    monkeypatch.setattr(load, "__file__", str(tmp_path / "neq_cli" / "recipe" / "load.py"))
    assert load.shipped_directory() == tmp_path / "recipes"
    inside = tmp_path / "neq_cli" / "recipes"
    inside.mkdir(parents=True)
    (inside / "digits.yaml").write_bytes((checkout / "digits.yaml").read_bytes())
    (inside / "._digits.yaml").write_bytes(b"what macOS keeps beside a file")
    assert load.shipped_directory() == inside
    assert load.find_recipe("digits") == inside / "digits.yaml"
    assert load.shipped_names() == ["digits"]


def test_a_copy_is_the_same_recipe(tmp_path: Path) -> None:
    (copy,) = copy_recipe("digits", tmp_path / "new" / "folder")
    assert copy == tmp_path / "new" / "folder" / "digits.yaml"
    assert load_recipe(str(copy)).recipe == shipped("digits")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("entrypoint", "entrypoint_model.py"),
        ("regression", "regression_task.py"),
        ("language-model", "language_model.py"),
        ("detection", "detection_task.py"),
    ],
)
def test_a_copy_brings_the_python_file_it_needs(name: str, file: str, tmp_path: Path) -> None:
    copies = copy_recipe(name, tmp_path)
    assert [copy.name for copy in copies] == [f"{name}.yaml", file]
    entrypoint = shipped(name).model.entrypoint or ""
    module, _, function = entrypoint.partition(":")
    source = copies[1].read_text()
    assert module == copies[1].stem
    assert f"def {function}(" in source
    assert importlib.util.spec_from_file_location(module, copies[1]) is not None
    compile(source, file, "exec")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    mine = tmp_path / "entrypoint_model.py"
    mine.write_text("mine")
    with pytest.raises(NeqError, match=r"entrypoint_model\.py: is there already"):
        copy_recipe("entrypoint", tmp_path)
    assert mine.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [mine], "and nothing else is written"


def test_a_schema_is_laid_beside_a_copy_which_names_it_first(tmp_path: Path) -> None:
    copy, laid = copy_recipe("digits", tmp_path, schema=True)
    assert (copy.name, laid.name) == ("digits.yaml", "neq.schema.json")
    assert laid.read_text() == schema_text()
    original = load.shipped_directory() / "digits.yaml"
    assert copy.read_bytes() == FIRST_LINE.encode() + original.read_bytes()
    assert f"$schema={laid.name}\n" in FIRST_LINE
    assert load_recipe(str(copy)).recipe == shipped("digits")


def test_problems_of_a_copy_are_found_in_its_own_lines(tmp_path: Path) -> None:
    copy = copy_recipe("digits", tmp_path, schema=True)[0]
    text = copy.read_text().replace("epochs:", "epochz:")
    copy.write_text(text)
    with pytest.raises(NeqError) as caught:
        load_recipe(str(copy))
    line = text.splitlines().index(next(line for line in text.splitlines() if line.startswith("epochz:"))) + 1
    # A missing key is found where the recipe's keys begin, below the line that names the schema.
    assert str(caught.value).splitlines() == [
        f"{copy}:2: epochs: missing; write epochs: 250",
        f"{copy}:{line}: epochz: unknown key; did you mean 'epochs'?",
    ]


def test_a_schema_that_is_there_stays(tmp_path: Path) -> None:
    laid = copy_recipe("digits", tmp_path, schema=True)[1]
    assert [path.name for path in copy_recipe("digits-baseline", tmp_path, schema=True)] == ["digits-baseline.yaml"]
    laid.write_text('{"$id": "urn:neq:recipe:0.0.1"}')
    assert [path.name for path in copy_recipe("digits-stochastic", tmp_path, schema=True)] == ["digits-stochastic.yaml"]
    assert laid.read_text() == '{"$id": "urn:neq:recipe:0.0.1"}'


@pytest.mark.parametrize("kind", ["text", "folder", "broken link"])
def test_what_is_no_schema_is_neither_overwritten_nor_named_as_one(tmp_path: Path, kind: str) -> None:
    there = tmp_path / "neq.schema.json"
    if kind == "text":
        there.write_text("{}")
    elif kind == "folder":
        there.mkdir()
    else:
        there.symlink_to(tmp_path / "nowhere")
    with pytest.raises(NeqError, match=r"neq\.schema\.json: is there already, and no schema of neq's; .*--no-schema"):
        copy_recipe("digits", tmp_path, schema=True)
    assert list(tmp_path.iterdir()) == [there]
    copy_recipe("digits", tmp_path)


def test_copies_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(NeqError, match=r"dgits: no recipe of that name; .*did you mean 'digits'\?"):
        copy_recipe("dgits", tmp_path)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(NeqError, match="file: cannot be written to: "):
        copy_recipe("digits", file)
