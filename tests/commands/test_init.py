"""``neq init``: shipped recipes listed, copied and named; a recipe for a folder of images, written once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from neq_cli.cli import main
from neq_cli.recipe.load import load_recipe

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def away_from_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def images() -> Path:
    for label in "ab":
        for number in range(8):
            Path(f"my images/{label}").mkdir(parents=True, exist_ok=True)
            Image.new("L", (12, 12), 10 * number).save(f"my images/{label}/{number}.png")
    return Path("my images")


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["init", *arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_without_a_name_recipes_are_listed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert call() == 0
    listed = capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["recipes"])
    assert capsys.readouterr() == listed
    assert "resnet32-cifar10 " in listed.out
    assert list(tmp_path.iterdir()) == []


def test_a_copy_may_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("digits", "mine.yaml") == 0
    assert call("entrypoint", "sub/other.yml") == 0
    assert capsys.readouterr() == (
        "mine.yaml\nneq.schema.json\nsub/other.yml\nsub/entrypoint_model.py\nsub/neq.schema.json\n",
        "",
    )
    assert load_recipe("mine.yaml").recipe == load_recipe("digits").recipe
    Path("folder.yaml").mkdir()
    assert call("digits", "folder.yaml", "--no-schema") == 0
    assert capsys.readouterr().out == "folder.yaml/digits.yaml\n"
    assert call("regression", "mine.yaml") == 2
    assert capsys.readouterr().err == "mine.yaml: is there already; move it away, or choose another name or folder\n"
    assert not Path("regression_task.py").exists()


@pytest.mark.parametrize(
    ("arguments", "written"),
    [([], "my-images.yaml"), (["other.yaml"], "other.yaml"), (["sub"], "sub/my-images.yaml")],
)
def test_a_recipe_for_a_folder(
    capsys: pytest.CaptureFixture[str], images: Path, arguments: list[str], written: str
) -> None:
    assert call("--data", str(images), *arguments, "--no-schema") == 0
    out, err = capsys.readouterr()
    assert out == f"{written}\n"
    assert err.splitlines()[0] == (
        "note: a folder for each class: 2 classes, 16 images to train on, none set apart to test"
    )
    recipe = load_recipe(written).recipe
    assert recipe.data.folder == images.absolute()
    assert recipe.model.name == "resnet20"


def test_the_schema_lies_beside_it(capsys: pytest.CaptureFixture[str], images: Path) -> None:
    assert call("--data", str(images), "--model", "resnet8") == 0
    assert capsys.readouterr().out == "my-images.yaml\nneq.schema.json\n"
    assert Path("my-images.yaml").read_text().startswith("# yaml-language-server: $schema=neq.schema.json\n")
    assert load_recipe("my-images.yaml").recipe.model.name == "resnet8"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "my images", "digits", "x.yaml"], "--data writes a recipe of its own, not 'digits'; give at most"),
        (["digits", "--model", "resnet8"], "neq init: --model is for --data; in a copy, change model.name"),
        (["--data", "missing"], "no folder '"),
        (["--data", "my images", "--model", "resnet81"], "--model: no torchvision model 'resnet81'; did you mean"),
        (["--data", "my images", "taken.yaml"], "taken.yaml: is there already; move it away"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    capsys: pytest.CaptureFixture[str], images: Path, arguments: list[str], said: str
) -> None:
    Path("taken.yaml").touch()
    assert call(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert said in err
    assert sorted(path.name for path in Path().iterdir()) == ["my images", "taken.yaml"]


@pytest.mark.parametrize("arguments", [["init"], ["init", "digits"], ["init", "--data", ".", "digits.yaml"]])
def test_what_needs_no_torch_imports_none(tmp_path: Path, arguments: list[str]) -> None:
    """Neither does a file that is there already, which is told before images are looked at."""
    taken = "--data" in arguments
    if taken:
        (tmp_path / "digits.yaml").touch()
    code = (
        f"import sys\nfrom neq_cli.cli import main\ntry: main({arguments!r})\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ("2 False" if taken else "0 False")
