"""What is wrong with what was given, files and folders too, is one line and exit code 2; 1 is for what went wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from neq_cli.cli import main

RECIPE = """\
model: {{name: resnet8, kwargs: {{width: 2}}}}
data: {{name: {name}, root: images, probe_size: 2, workers: 0}}
task: {task}
epochs: 1
batch_size: 8
optimizer: {{lr: 0.1}}
channels_last: false
device: cpu
"""

MODULE = """
import torch
from torch.utils.data import TensorDataset

def labelled(label=1, shape=(3, 8, 8)):
    images, labels = torch.zeros(20, *shape), torch.arange(20) % 2
    labels[15] = label
    dataset = TensorDataset(images, labels)
    dataset.num_classes = 2
    return dataset, dataset

class Uneven(list):
    num_classes = 2

def uneven():
    images = [(torch.zeros(3, 8, 8 + (index == 17)), index % 2) for index in range(20)]
    return Uneven(images), Uneven(images)
"""


def picture(place: Path, size: tuple[int, int] = (8, 8), mode: str = "RGB", value: int = 0) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(place)
    return place


def labelled(root: Path = Path("images"), count: int = 40) -> None:
    for part in ("train", "test"):
        for name in ("a", "b"):
            for number in range(count):
                picture(root / part / name / f"{number:02}.png", value=number)


def masked() -> None:
    for part in ("train", "val"):
        for number in range(40):
            picture(Path("images") / part / "images" / f"{number:02}.png")
            picture(Path("images") / part / "masks" / f"{number:02}.png", mode="L", value=number % 2)


def spoilt(place: str) -> None:
    """Leave a file that is no picture where one was."""
    assert Path(place).is_file()
    Path(place).write_text("junk")


def wide(place: str, mode: str = "RGB") -> Callable[[], object]:
    return lambda: picture(Path("images") / place, (9, 8), mode)


def other(place: str, **values: Any) -> Callable[[], object]:
    return lambda: picture(Path("images") / place, **values)


def nothing() -> None:
    pass


def wide_pair(name: str) -> None:
    for kind, mode in (("images", "RGB"), ("masks", "L")):
        picture(Path("images/train") / kind / name, (9, 8), mode)


OWN = "data={{entrypoint: 'mistaken:{}', probe_size: 2{}}}"
DIFFERS = ": 3x8x9, but the first image is 3x8x8; set data.image_size, and store all images with the same channels"
NO_PICTURE = ": cannot be used (UnidentifiedImageError: cannot identify image file"
CHANNELS = OWN.format("labelled", ", kwargs: {shape: [2, 8, 8]}, channels: 3")

# Of forty pictures in each of two folders every fifth is looked at before anything is trained: 03 is none of those.
MISTAKES: dict[str, tuple[Callable[[], object], str, str]] = {
    "sizes": (
        wide("train/a/00.png"),
        "",
        "mine.yaml:2: data.image_size: images/train/a/05.png: 8x8 pixels (height x width), but others have 8x9; give "
        "one size for all, such as data.image_size=8",
    ),
    "a size among many": (wide("train/a/03.png"), "", f"images/train/a/03.png{DIFFERS}"),
    "a size among the tested": (wide("test/a/03.png"), "", f"images/test/a/03.png{DIFFERS}"),
    "no picture": (lambda: spoilt("images/train/a/03.png"), "", f"images/train/a/03.png{NO_PICTURE}"),
    "no picture among the tested": (lambda: spoilt("images/test/b/03.png"), "", f"images/test/b/03.png{NO_PICTURE}"),
    "depths": (
        other("train/a/03.png", mode="I;16"),
        "",
        "images/train/a/03.png: more than 8 bits (float32), but others have 8 bits; store all images alike",
    ),
    "an empty class": (
        lambda: Path("images/train/c").mkdir(),
        "",
        "mine.yaml:2: data.root: 'images/train' has no images for the classes 'c'",
    ),
    "classes that differ": (
        other("train/c/0.png"),
        "",
        "mine.yaml:2: data.root: 'images/train' and 'images/test' differ in classes: 'c'; every class needs a folder",
    ),
    "no folder": (nothing, "data.root=nowhere", "command line: data.root=nowhere: no folder 'nowhere'"),
    "too few images": (
        nothing,
        "data.probe_size=80",
        "command line: data.probe_size=80: 80 probe images of 80 training images leave none",
    ),
    "a label": (
        nothing,
        OWN.format("labelled", ", kwargs: {label: 7}"),
        "image 15 of mistaken:labelled: label 7, but there are 2 classes, from 0 on",
    ),
    "a label below all": (
        nothing,
        OWN.format("labelled", ", kwargs: {label: -1}"),
        "image 15 of mistaken:labelled: label -1, but there are 2 classes, from 0 on",
    ),
    "sizes of one's own": (nothing, OWN.format("uneven", ""), f"image 17 of mistaken:uneven{DIFFERS}"),
    "channels of one's own": (
        nothing,
        CHANNELS,
        f"command line: {CHANNELS}: the first image of mistaken:labelled cannot be used (ValueError: 2 channels, and "
        "data.channels=3 is for images of 1 or 3",
    ),
    "weights": (
        lambda: Path("w.pt").write_text("junk"),
        "model.checkpoint=w.pt",
        "command line: model.checkpoint=w.pt: ",
    ),
    "other weights": (
        lambda: _weights("w.safetensors"),
        "model.checkpoint=w.safetensors",
        "command line: model.checkpoint=w.safetensors: ",
    ),
}

MASKED: dict[str, tuple[Callable[[], object], str]] = {
    "sizes": (
        lambda: wide_pair("00.png"),
        "mine.yaml:2: data.image_size: images/train/images/02.png: 8x8 pixels (height x width), but others have 8x9",
    ),
    "a size among many": (
        lambda: wide_pair("03.png"),
        "images/train/images/03.png: 8x9 pixels (height x width), but the first image is 8x8; set data.image_size",
    ),
    "a mask of another size": (
        wide("train/masks/03.png", "L"),
        "images/train/masks/03.png: 8x9 pixels (height x width), but its image is 8x8; make them alike",
    ),
    "a coloured mask": (
        other("val/masks/03.png"),
        "mine.yaml:2: data.root: images/val/masks/03.png: cannot be used (ValueError: a colour image (RGB)",
    ),
    "no mask": (
        lambda: Path("images/train/masks/03.png").unlink(),
        "mine.yaml:2: data.root: images/train/images/03.png: has no mask",
    ),
    "a number that is no class": (
        other("train/masks/03.png", mode="L", value=7),
        "images/train/masks/03.png: class 7 in row 0, column 0, but there are 2 classes",
    ),
}


def _weights(name: str) -> None:
    from safetensors.numpy import save_file

    save_file({"other": np.zeros(3, np.float32)}, name)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "mistaken", raising=False)
    Path("mistaken.py").write_text(MODULE)


def ended(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str]]:
    with pytest.raises(SystemExit) as left:
        main([*arguments])
    _, said = capsys.readouterr()
    assert "Traceback" not in said
    assert isinstance(left.value.code, int)
    return left.value.code, said.splitlines()


def train(capsys: pytest.CaptureFixture[str], *changes: str) -> tuple[int, list[str]]:
    return ended(capsys, "train", "mine.yaml", *changes, "-o", "run", "--progress", "off")


@pytest.mark.parametrize("name", MISTAKES)
def test_images_with_labels(capsys: pytest.CaptureFixture[str], name: str) -> None:
    make, change, says = MISTAKES[name]
    Path("mine.yaml").write_text(RECIPE.format(name="image_folder", task="classification"))
    labelled()
    make()
    code, lines = train(capsys, *([change] if change else []))
    assert lines[0].startswith(says)
    assert (code, len(lines)) == (2, 1)


@pytest.mark.parametrize("name", MASKED)
def test_images_with_masks(capsys: pytest.CaptureFixture[str], name: str) -> None:
    make, says = MASKED[name]
    Path("mine.yaml").write_text(RECIPE.format(name="segmentation_folder", task="segmentation"))
    Path("mistaken.py").write_text("from torch import nn\ndef make(): return nn.Conv2d(3, 2, 1)\n")
    model = ["model={entrypoint: 'mistaken:make'}"]
    if name == "a number that is no class":
        model.append("data.kwargs={num_classes: 2}")
    masked()
    make()
    code, lines = train(capsys, *model)
    assert lines[0].startswith(says)
    assert (code, len(lines)) == (2, 1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["inspect", "nowhere"], "nowhere"),
        (["compare", "images"], "images"),
        (["predict", "nowhere", "images"], "nowhere"),
        (["evaluate", "images"], "images"),
        (["export", "images", "-o", "x.safetensors"], "images"),
        (["train", "mine.yaml", "-o", "images"], "images"),
        (["train", "mine.yaml", "-o", "mine.yaml/run"], "mine.yaml/run"),
        (["sweep", "mine.yaml", "epochs=1,1"], "command line: epochs=1,1: '1' is given twice"),
        (["bench", "mine.yaml", "--fractions", "2"], "neq bench: --fractions: '2' is not a share from 0 to 1"),
        (["report", "images", "-o", "x.html"], "images"),
        (["init", "nothing"], "nothing"),
        (["trian", "mine.yaml"], "neq: No such command 'trian'"),
    ],
)
def test_what_commands_are_given(capsys: pytest.CaptureFixture[str], arguments: Sequence[str], says: str) -> None:
    Path("mine.yaml").write_text(RECIPE.format(name="digits", task="classification"))
    labelled(count=1)
    code, lines = ended(capsys, *arguments)
    assert lines[0].startswith(says)
    assert (code, len(lines)) == (2, 1)


def test_what_goes_wrong_while_it_trains_is_none_of_these(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text(RECIPE.format(name="digits", task="classification"))
    code, lines = train(capsys, "optimizer.lr=1e30")
    assert code == 1
    assert lines[-1].startswith("epoch 1, step ")
