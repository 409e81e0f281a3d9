"""`neq train --show-batch`: the batch that training would begin with, in a file, and nothing else is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from neq_cli.cli import main
from neq_cli.jobs.prepare import load, prepared
from neq_cli.jobs.show_batch import show_batch
from neq_cli.training import batch_picture

SMALL = ("model={name: resnet8, kwargs: {in_channels: 1, width: 4}}", "device=cpu", "channels_last=false")


@pytest.fixture(autouse=True)
def away_from_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["train", *arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize("mixup", [0, 0.4])
def test_it_is_the_batch_that_training_begins_with(monkeypatch: pytest.MonkeyPatch, mixup: float) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(
        batch_picture, "draw_batch", lambda batch, data: drawn.append(batch) or Image.new("RGB", (8, 8))
    )
    loaded = load("digits", [*SMALL, f"data.mixup={mixup}"])
    show_batch(loaded, Path("a.png"))
    loaders = prepared(loaded).trainer.loaders
    loaders.start_epoch(1)
    images, labels = next(iter(loaders.train))
    assert torch.equal(drawn[0][0], images)
    assert torch.equal(drawn[0][1], labels)


def test_the_file_alone_is_written_and_may_be_drawn_anew(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for seed in (1, 2):
        assert call("digits", "--show-batch", "a.png", f"seed={seed}") == 0
        assert capsys.readouterr() == ("a.png\n", "")
        pixels = np.asarray(Image.open("a.png"))
        assert pixels.shape[2] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_the_data_alone_is_built(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neq_cli.training.session.prepare", None)
    assert call("digits", "--show-batch", "a.png") == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["digits", "--show-batch", "a.jpg"], "a.jpg: must end in .png"),
        (["digits", "--show-batch", "taken.png"], "taken.png: already exists and was not written by neq"),
        (["digits", "--show-batch", "no/a.png"], "no/a.png: cannot be written: No such file or directory; choose"),
        (["digits", "--show-batch", "a.png", "--resume"], "leave out -o, --resume, --dry-run and torchrun"),
        (["digits", "--show-batch", "a.png", "-o", "x"], "leave out -o, --resume, --dry-run and torchrun"),
        (["digits", "--show-batch", "a.png", "batch_size=5000"], "command line: batch_size=5000: 5000 images per"),
        (["regression", "--show-batch", "a.png"], "--show-batch: the inputs of regression_task:friedman are no batch"),
        (
            ["cifar10-folder", "--show-batch", "a.png", "data.root=none"],
            "command line: data.root=none: no folder",
        ),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    Path("taken.png").write_bytes(b"somebody's")
    assert call(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert said in err
    assert [path.name for path in Path().iterdir()] == ["taken.png"]
