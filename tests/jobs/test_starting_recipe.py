"""A recipe for a folder says why each value is there, reads back as it was meant, and trains."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from neq_cli.errors import NeqError
from neq_cli.jobs import starting_recipe as starting
from neq_cli.jobs.starting_recipe import starting_recipe
from neq_cli.recipe import Recipe
from neq_cli.recipe.keys import warnings
from neq_cli.recipe.load import load_text
from neq_cli.training.data import survey as surveys


def lay(path: Path, height: int, width: int, *, mode: str = "RGB", shade: int = 0) -> None:
    """Save noise around a shade, by which a network can tell classes apart."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    pixels = np.random.default_rng(height * width + shade).integers(0, 60, shape) + shade
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def lay_classes(root: Path, count: int, sizes: list[tuple[int, int]], mode: str = "RGB", classes: int = 2) -> Path:
    for label in range(classes):
        for number in range(count):
            height, width = sizes[number % len(sizes)]
            name = f"{number}.{'png' if number % 2 else 'jpg'}"
            lay(root / f"class {label}" / name, height, width, mode=mode, shade=150 * label)
    return root


def lay_masks(root: Path, count: int, height: int, width: int) -> Path:
    for number in range(count):
        lay(root / "images" / f"{number}.jpg", height + number, width, shade=100)
        (root / "masks").mkdir(exist_ok=True)
        mask = np.zeros((height + number, width), np.uint8)
        mask[height // 2 :] = 1
        Image.fromarray(mask).save(root / "masks" / f"{number}.png")
    return root


def made(folder: Path, model: str | None = None) -> Recipe:
    text = starting_recipe(folder, model, Path("mine.yaml")).text
    recipe = load_text(text, Path("mine.yaml"), "mine.yaml").recipe
    assert warnings(recipe) == ()
    return recipe


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "small, colour, of mixed sizes": lambda root: lay_classes(root, 20, [(20, 30), (24, 24), (33, 20)]),
    "grey, in parts": lambda root: {
        lay_classes(root / part, 12, [(12, 12)], mode="L").parent for part in ("train", "test")
    }.pop(),
    "of 16 bits": lambda root: lay_classes(root, 12, [(16, 16)]),
    "masks": lambda root: lay_masks(root, 14, 40, 36),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_trains(neq: Callable[..., Any], tmp_path: Path, layout: str) -> None:
    folder = LAYOUTS[layout](tmp_path / "my: images #1")
    if layout == "of 16 bits":
        for path in folder.rglob("*.*"):
            path.unlink()
            Image.fromarray(np.full((16, 16), 40_000, np.uint16)).save(path.with_suffix(".png"))
    written = neq("init", "--data", folder, "mine.yaml")
    assert written.wait(120) == 0, written.text
    assert written.result == "mine.yaml\nneq.schema.json\n"
    process = neq("train", "mine.yaml", "epochs=1", "device=cpu", "data.workers=0", "channels_last=false", "-o", "run")
    assert process.wait(120) == 0, process.text
    with (tmp_path / "run" / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["train_loss"]) > 0
    assert float(row["test_miou" if layout == "masks" else "test_top1"]) >= 0


def test_tables_train(neq: Callable[..., Any], tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    folder = lay_classes(tmp_path / "files", 12, [(16, 16)])
    files = sorted(folder.rglob("*.*"))
    table = datasets.Dataset.from_dict({"image": list(map(str, files)), "label": [path.parent.name for path in files]})
    (tmp_path / "set").mkdir()
    table.cast_column("image", datasets.Image()).class_encode_column("label").to_parquet(tmp_path / "set" / "a.parquet")
    assert neq("init", "--data", "set").wait(120) == 0
    process = neq("train", "set.yaml", "epochs=1", "device=cpu", "data.workers=0", "channels_last=false", "-o", "run")
    assert process.wait(120) == 0, process.text


@pytest.mark.parametrize(
    ("height", "width", "mode", "model", "size", "augment"),
    [
        (8, 8, "L", "resnet20", 8, "crop"),
        (32, 32, "RGB", "resnet20", 32, "cifar"),
        (32, 32, "L", "resnet20", 32, "crop"),
        (63, 90, "RGB", "resnet20", 60, "cifar"),
        (65, 90, "RGB", "resnet18", 64, "cifar"),
        (100, 130, "RGB", "resnet18", 96, "imagenet"),
        (200, 400, "RGB", "resnet18", 224, "imagenet"),
    ],
)
def test_model_and_sizes_follow_the_images(
    tmp_path: Path, height: int, width: int, mode: str, model: str, size: int, augment: str
) -> None:
    recipe = made(lay_classes(tmp_path / "images", 6, [(height, width)], mode=mode))
    assert (recipe.model.name, recipe.data.image_size, recipe.data.augment) == (model, size, augment)
    assert recipe.model.weights is None
    assert recipe.optimizer.name == "sgd"


@pytest.mark.parametrize(
    ("images", "batch", "probe", "epochs"),
    [(10, 2, 1, 60), (400, 32, 32, 60), (3000, 32, 50, 55), (60_000, 32, 50, 10)],
)
def test_batches_probe_and_epochs_follow_the_number_of_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: int, batch: int, probe: int, epochs: int
) -> None:
    folder = lay_classes(tmp_path / "images", 5, [(100, 100)])
    found = replace(surveys.survey(folder), train=images)
    monkeypatch.setattr(surveys, "survey", lambda folder: found)
    monkeypatch.setattr(starting, "summarised", lambda loaded: None)
    recipe = made(folder)
    trained = images - images // 5 - probe  # of 3000: 2350, 73 steps of 32, of which 4000 are 54.8 epochs
    assert (recipe.batch_size, recipe.data.probe_size, recipe.epochs) == (batch, probe, epochs)
    assert trained // batch >= 3, "an epoch has a few steps"


def test_a_model_by_name(tmp_path: Path) -> None:
    folder = lay_classes(tmp_path / "images", 6, [(100, 100)])
    recipe = made(folder, "vit_b_16")
    assert (recipe.model.name, recipe.data.image_size, recipe.optimizer.name) == ("vit_b_16", 224, "adamw")
    recipe = made(folder, "resnet8")
    assert (recipe.model.name, recipe.data.image_size, recipe.optimizer.name) == ("resnet8", 96, "sgd")
    with pytest.raises(NeqError, match=r"^--model: no torchvision model 'resnet81'; did you mean 'resnet8'"):
        made(folder, "resnet81")


def test_the_size_that_a_model_is_configured_for(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    assert made(lay_classes(tmp_path / "images", 6, [(20, 20)]), "timm/test_vit").data.image_size == 160


def test_published_weights_stand_there_to_be_chosen(tmp_path: Path) -> None:
    folder = lay_classes(tmp_path / "images", 6, [(100, 100)])
    text = starting_recipe(folder, None, Path("a.yaml")).text
    assert "\n  # weights: DEFAULT # " in text
    chosen = text.replace("  # weights: DEFAULT", "  weights: DEFAULT")
    assert load_text(chosen, Path("a.yaml"), "a.yaml").recipe.model.weights == "DEFAULT"
    assert "weights: DEFAULT" not in starting_recipe(folder, "resnet20", Path("a.yaml")).text


def test_every_value_has_its_reason(tmp_path: Path) -> None:
    text = starting_recipe(lay_classes(tmp_path / "images", 6, [(100, 100)]), None, Path("a.yaml")).text
    values = [line for line in text.splitlines() if ": " in line and not line.lstrip().startswith("#")]
    told = {line.split(":")[0].strip() for line in values if " # " in line}
    assert told >= {"validation", "image_size", "augment", "probe_size", "epochs", "batch_size", "optimizer", "policy"}
    assert max(map(len, text.splitlines())) <= 120 + len(str(tmp_path))


def test_too_few_images(tmp_path: Path) -> None:
    with pytest.raises(NeqError, match=r"^--data: '.*/images': 8 images to train on are too few; 10 are"):
        made(lay_classes(tmp_path / "images", 4, [(20, 20)]))
