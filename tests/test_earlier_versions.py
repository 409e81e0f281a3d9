"""Run directories that earlier versions left behind are read, shown and gone on with as they were then.

``data/VERSION/finished`` and ``interrupted`` were written by that version: `neq train digits model.name=resnet8
model.kwargs.width=2 epochs=4 deterministic=true device=cpu policy.epsilon=0.3 batch_size=16`, the second ended by
SIGTERM in epoch 3. Names of machines are taken out, nothing else.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from safetensors.numpy import load_file

DATA = Path(__file__).with_name("data")
VERSIONS = sorted(path.name for path in DATA.iterdir())

Start = Callable[..., Any]


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of what a version left."""
    return Path(shutil.copytree(DATA / request.param, tmp_path / request.param))


def said(neq: Start, *arguments: object) -> str:
    process = neq(*arguments)
    assert process.wait(60) == 0, process.text
    text: str = process.result
    return text


def rows(run: Path, table: str = "metrics.csv") -> list[dict[str, str]]:
    with (run / table).open(newline="") as file:
        return list(csv.DictReader(file))


def without_new_keys(now: Any, before: Any) -> Any:
    """Return what ``now`` says of the keys of ``before``; others have come since."""
    if not isinstance(before, dict):
        return now
    return {key: without_new_keys(now[key], value) for key, value in before.items()}


def test_runs_are_inspected(version: Path, neq: Start) -> None:
    layers = [row for row in rows(version / "finished", "layers.csv") if row["epoch"] == "4"]
    report = json.loads(said(neq, "inspect", version / "finished", "--json"))
    assert report["epochs_done"] == 4
    assert [layer["name"] for layer in report["layers"]] == [row["layer"] for row in layers]
    # After epoch 4: what its neuron file says of the epoch to come.
    neurons = load_file(version / "finished" / "neurons" / "epoch_0004.safetensors")
    frozen = sum(int((~one.astype(bool)).sum()) for name, one in neurons.items() if name.endswith("/trainable"))
    assert report["frozen"] == frozen > 0
    assert "interrupted" in said(neq, "inspect", version / "interrupted")


def test_runs_are_compared_and_exported(version: Path, neq: Start) -> None:
    (row,) = json.loads(said(neq, "compare", version / "finished", "--json"))["rows"]
    assert row["approach"] == "NEq eps=0.3 mu=0.5"
    last = rows(version / "finished")[-1]
    assert row["final"]["mean"] == pytest.approx(float(last["test_top1"]))
    said(neq, "export", version / "finished", "-o", version / "weights.safetensors")
    exported, kept = (
        load_file(path) for path in (version / "weights.safetensors", version / "finished" / "weights.safetensors")
    )
    assert exported.keys() == kept.keys()
    assert all((exported[name] == kept[name]).all() for name in kept)


def test_runs_are_evaluated_and_predict_without_what_they_did_not_tell(version: Path, neq: Start) -> None:
    evaluation = json.loads(said(neq, "evaluate", version / "finished", "--weights", "final", "--json"))
    last = rows(version / "finished")[-1]
    assert evaluation["epoch"] == 4
    assert evaluation["metrics"]["loss"] == pytest.approx(float(last["test_loss"]), rel=1e-4)
    image = version / "grey.png"
    Image.new("L", (8, 8), 128).save(image)
    (prediction,) = json.loads(said(neq, "predict", version / "finished", image, "--json"))
    assert [one["name"] == str(one["class"]) for one in prediction["classes"]] == [True] * 5


def test_an_interrupted_run_is_gone_on_with(version: Path, neq: Start) -> None:
    run = version / "interrupted"
    before = {name: (run / name).read_bytes() for name in ("metrics.csv", "layers.csv")}
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    process = neq("train", run / "recipe.yaml", "--resume", "-o", run)
    assert process.wait(120) == 0, process.text
    after = {name: (run / name).read_bytes() for name in before}
    recipe["data"] |= {"mean": [0.3058], "std": [0.3764]}  # what was used then, and was left open, is written since
    assert without_new_keys(yaml.safe_load((run / "recipe.yaml").read_text()), recipe) == recipe
    assert all(after[name].startswith(before[name]) for name in before)
    assert [row["epoch"] for row in rows(run)] == ["1", "2", "3", "4"]
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
