"""A recipe in short is what the run, once it is built, says of itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from neq_cli.errors import NeqError
from neq_cli.recipe import Recipe
from neq_cli.training.session import prepare
from neq_cli.training.summary import summarise

Make = Callable[..., Recipe]


@pytest.fixture
def make() -> Make:
    """``make(data=..., model=..., ...)``: a recipe for a small network."""

    def made(**changes: Any) -> Recipe:
        plain: dict[str, Any] = {
            "model": {"name": "resnet8", "kwargs": {"in_channels": 1, "width": 4}},
            "data": {"name": "digits", "workers": 0},
            "epochs": 3,
            "batch_size": 50,
            "optimizer": {"name": "sgd", "lr": 0.1},
            "device": "cpu",
            "channels_last": False,
        }
        return Recipe.model_validate({**plain, **changes})

    return made


def images(root: Path, classes: int = 3) -> Path:
    for part in ("train", "test"):
        for number in range(classes):
            folder = root / part / f"class{number}"
            folder.mkdir(parents=True)
            for count in range(30):
                Image.fromarray(np.full((8, 8, 3), count, np.uint8)).save(folder / f"{count}.png")
    return root


def test_it_says_what_the_run_does(make: Make) -> None:
    recipe = make()
    found, session = summarise(recipe), prepare(recipe, "mine")
    model, freezer = session.trainer.model, session.trainer.freezer
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (found.layers, found.neurons) == (len(freezer.layers), sum(one.neurons for one in freezer.layers.values()))
    head = sum(parameter.numel() for parameter in model.fc.parameters())
    assert found.of_neurons == 1
    assert found.may_freeze == pytest.approx(1 - head / found.parameters)
    assert found.steps == len(session.trainer.loaders.train) == 27
    assert found.not_opened is None
    assert found.policy == session.started.policy
    assert found.data == "digits: 1388 training, 50 probe, 359 test images of 1x8x8, 10 classes"


def test_the_share_is_the_policys_and_the_exclusions(make: Make) -> None:
    assert summarise(make(policy={"kind": "baseline"})).may_freeze == 0
    whole, part = (summarise(make(exclude=names)).may_freeze for names in ([], ["conv1"]))
    assert whole is not None
    assert part == pytest.approx(whole - 4 * 9 / summarise(make()).parameters)  # type: ignore[operator]


def test_a_folder_tells_the_size_of_the_head(make: Make, tmp_path: Path) -> None:
    data = {"name": "image_folder", "root": str(images(tmp_path / "mine")), "workers": 0, "probe_size": 10}
    found = summarise(make(data=data, model={"name": "resnet8"}))
    assert "3 classes" in found.data
    assert (
        found.parameters
        == summarise(make(model={"name": "resnet8", "kwargs": {"num_classes": 3}}, data=data)).parameters
    )
    with pytest.raises(NeqError, match="2 outputs for data of 3 classes"):
        summarise(make(data=data, model={"name": "resnet8", "kwargs": {"num_classes": 2}}))
    with pytest.raises(NeqError, match="81 images per step, but image_folder mine has 80 to train on"):
        summarise(make(data=data, model={"name": "resnet8"}, batch_size=81))


def test_data_that_is_not_here_is_told_and_not_fetched(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", None)
    found = summarise(make(model={"name": "resnet8"}, data={"name": "cifar10", "root": str(tmp_path)}))
    assert found.data == "CIFAR10: images of 3x32x32, 10 classes"
    assert found.not_opened == "not here; training fetches it first"
    # The stem and three blocks of two convolutions, each with its norm, and the output layer.
    assert (found.steps, found.neurons) == (None, 2 * (16 * 3 + 32 * 2 + 64 * 2) + 10)
    missing = {"name": "image_folder", "root": str(tmp_path / "missing")}
    found = summarise(make(model={"name": "resnet8"}, data=missing))
    assert (found.data, found.neurons, found.may_freeze) == ("image_folder", None, None)
    assert str(found.not_opened).startswith(f"no folder '{tmp_path}/missing'; an image folder holds")


def test_a_model_that_does_not_take_the_data_is_refused(make: Make) -> None:
    with pytest.raises(NeqError, match="its first convolution expects 3 channels and the data has 1"):
        summarise(make(model={"name": "resnet8"}))
