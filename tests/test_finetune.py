"""The recipe for one's own folder of images, as a new user takes it: from torch's cache to a prediction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import ResNet18_Weights, resnet18

from neq_cli.cli import main
from neq_cli.training.loop.checkpoint import load_state


def neq(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


SMALL = ("model.name=resnet18", "data.image_size=32", "data.probe_size=4", "data.workers=0", "device=cpu")
CLASSES = ("cat", "dog", "owl")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torch's, and no network."""

    def unreachable(*_: Any, **__: Any) -> None:
        raise URLError("unreachable")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("torch.hub.download_url_to_file", unreachable)
    folder = tmp_path / "cache" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Ten images of each class, in folders of their own right in the data's."""
    rng = np.random.default_rng(1)
    for number, name in enumerate(CLASSES):
        folder = tmp_path / "mine" / name
        folder.mkdir(parents=True)
        for image in range(10):
            pixels = rng.integers(0, 120, (40, 36, 3), dtype=np.uint8)
            pixels[..., number] += 120  # what tells the classes apart
            Image.fromarray(pixels).save(folder / f"{image}.png")
    return tmp_path / "mine"


def test_from_the_cache_to_a_prediction(
    cache: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(5)
    published = resnet18().state_dict()
    torch.save(published, cache / Path(ResNet18_Weights.DEFAULT.url).name)
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    changes = (*SMALL, f"data.root={images}", "batch_size=8", "epochs=2", "optimizer.lr=0")
    assert neq("train", "finetune-folder", *changes, "-o", run, "--progress", "off") == 0
    state = load_state(run / "checkpoints" / "last.safetensors")
    # The body, whose rate is 0, is what was in the cache, and its head trains.
    assert torch.equal(state["model"]["layer1.0.conv1.weight"], published["layer1.0.conv1.weight"])
    assert state["model"]["fc.weight"].shape == (3, 512)
    assert not torch.equal(state["model"]["fc.bias"], torch.zeros(3))
    body, head = state["optimizer"]["param_groups"]
    assert (body["initial_lr"], head["initial_lr"]) == (0.0, 0.02)
    environment = json.loads((run / "environment.json").read_text())
    assert (environment["data"]["validation"], environment["data"]["class_names"]) == (3, list(CLASSES))
    assert any(note.startswith("model.weights: 2 of 122 tensors start from scratch") for note in environment["notes"])
    capsys.readouterr()
    assert neq("evaluate", run, "--json") == 0
    assert json.loads(capsys.readouterr().out)["same_as_recorded"] is True
    assert neq("predict", run, images / "owl" / "0.png", "--json") == 0
    (prediction,) = json.loads(capsys.readouterr().out)
    assert {one["name"] for one in prediction["classes"]} == set(CLASSES)


def test_without_a_network_it_says_what_to_put_where(
    cache: Path, images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(images.parent)
    assert neq("train", "finetune-folder", *SMALL, f"data.root={images}", "batch_size=8") == 2
    said = capsys.readouterr().err
    assert f"put {ResNet18_Weights.DEFAULT.url} into '{cache}'" in said
    assert "Traceback" not in said
    assert not (images.parent / "runs").exists()
