"""Recipes trained by a call, and runs that show themselves in a notebook; no torch where a run is only read."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import neq_cli
from neq_cli.errors import RecipeError, RunDirectoryError
from neq_cli.runs.store.run import read_run

SHORT = ("epochs=2", "data.probe_size=20", "model.kwargs.width=8")


NETS = """from torch import nn


def make(width=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(NETS)
    Path("small.yaml").write_text(
        "model: {entrypoint: 'nets:make'}\ndata: {name: digits}\nepochs: 1\nbatch_size: 500\n"
        "optimizer: {name: sgd, lr: 0.1}\npolicy: {kind: neq, epsilon: 0.1}\n"
    )
    return "small.yaml"


def test_a_call_trains_what_the_command_does(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = neq_cli.train(recipe, *SHORT, output="run", progress="off")
    assert (run.epochs, str(run.status), run.setting("model.kwargs.width")) == (2, "finished", 8)
    assert run.metrics["epoch"].tolist() == [1, 2]
    assert run.metrics["test_top1"].tolist() == run.column("test_top1").tolist()
    assert run.neurons(2)["1"]["phi"].shape == (8,)
    assert [row.layer for row in run.layers(1)] == ["1", "3"]
    again = neq_cli.train(recipe, *SHORT[1:], "epochs=3", output=Path("run"), resume=True, progress="off")
    assert again.epochs == 3
    straight = neq_cli.train(recipe, *SHORT[1:], "epochs=3", output="straight", progress="plain")
    assert "epoch 3/3" in capsys.readouterr().err
    for name, column in straight.metrics.items():
        if not name.endswith(("_seconds", "_second")):
            np.testing.assert_array_equal(again.metrics[name], column, err_msg=name)


def test_mistakes_are_the_same_as_on_the_command_line(recipe: str) -> None:
    with pytest.raises(RecipeError, match="epoch=3: unknown key; did you mean 'epochs'"):
        neq_cli.train(recipe, "epoch=3")
    Path("taken").mkdir()
    Path("taken/file").touch()
    with pytest.raises(RunDirectoryError, match="taken"):
        neq_cli.train(recipe, output="taken")


class Texts(HTMLParser):
    """Collects tags and texts."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "


def test_a_run_shows_itself(recipe: str) -> None:
    run = neq_cli.train(recipe, *SHORT, output="run", progress="off")
    found = Texts()
    found.feed(run._repr_html_())
    assert found.tags.count("svg") == found.tags.count("polyline") == 2
    assert f"{run.column('test_top1')[-1]:.2f} final, {run.column('test_top1').max():.2f} best" in found.text
    assert "finished, epoch 2 of 2" in found.text
    share = 100 * run.column("flops_paper").mean() / run.column("flops_paper_dense").mean()
    assert f"{share:.1f}" in found.text


def test_nothing_that_a_run_says_is_markup(recipe: str) -> None:
    neq_cli.train(recipe, *SHORT, output="run", progress="off")
    recipe_file, status = Path("run/recipe.yaml"), Path("run/status.json")
    recipe_file.write_text(recipe_file.read_text().replace("nets:make", "<script>"))
    status.write_text(json.dumps({**json.loads(status.read_text()), "state": "failed", "reason": "<b>"}))
    found = Texts()
    found.feed(read_run(Path("run"))._repr_html_())
    assert not {"script", "b"} & set(found.tags)
    assert "<script>" in found.text


def test_reading_needs_no_torch(recipe: str) -> None:
    neq_cli.train(recipe, *SHORT, output="run", progress="off")
    code = (
        "import sys, neq_cli\n"
        "run = neq_cli.read_run('run')\n"
        "print(len(run.metrics), len(run._repr_html_()), 'torch' in sys.modules)\n"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert printed.stdout.split()[-1] == "False"
