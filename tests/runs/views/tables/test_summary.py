"""Five lines of a recipe, whatever is known of it."""

from __future__ import annotations

from typing import Any

from neq_cli.runs.views.tables.summary import summary_lines

RECIPE: dict[str, Any] = {
    "epochs": 3,
    "batch_size": 10,
    "gradient_accumulation": 1,
    "optimizer": {"name": "sgd"},
    "scheduler": {"name": "cosine"},
    "seed": 7,
}
KNOWN: dict[str, Any] = {
    "model": "resnet20",
    "data": "digits: 10 classes",
    "policy": "neq",
    "not_opened": None,
    "parameters": 12345,
    "layers": 1,
    "neurons": 1000,
    "of_neurons": 0.99999,
    "may_freeze": 0.5,
    "steps": 400,
}
UNKNOWN = dict.fromkeys(("parameters", "layers", "neurons", "of_neurons", "may_freeze", "steps"))


def test_all_is_known() -> None:
    assert summary_lines("mine.yaml", RECIPE, KNOWN) == [
        "ok       mine.yaml",
        "model    resnet20: 12,345 parameters",
        "data     digits: 10 classes",
        "neurons  1,000 in 1 layer, 99.9% of the parameters; 50.0% may freeze under the policy neq",
        "run      3 epochs of 400 batches of 10, 1,200 in all; sgd, cosine, seed 7",
    ]


def test_nothing_is_known_but_the_recipe() -> None:
    summary = {**KNOWN, **UNKNOWN, "not_opened": "no\nfolder"}
    assert summary_lines("mine.yaml", {**RECIPE, "epochs": 1, "gradient_accumulation": 4}, summary) == [
        "ok       mine.yaml",
        "model    resnet20",
        "data     digits: 10 classes; not opened: no\N{REPLACEMENT CHARACTER}folder",
        "neurons  not counted, as only the data tells what the model sees; policy neq",
        "run      1 epoch in batches of 10, 4 to an optimiser step; sgd, cosine, seed 7",
    ]


def test_edges() -> None:
    lines = summary_lines("a", RECIPE, {**KNOWN, "of_neurons": 1.0, "may_freeze": 0.0, "steps": 1})
    assert lines[3] == "neurons  1,000 in 1 layer, 100% of the parameters; none may freeze under the policy neq"
    assert lines[4] == "run      3 epochs of 1 batch of 10, 3 in all; sgd, cosine, seed 7"
