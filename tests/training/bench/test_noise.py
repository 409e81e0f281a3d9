"""What the bench takes its batch from: every shipped recipe has one on a machine without any data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from neq_cli.errors import NeqError
from neq_cli.recipe import Recipe
from neq_cli.recipe.load import load_recipe, shipped_names
from neq_cli.training.bench.measure import bench
from neq_cli.training.bench.noise import find_data
from neq_cli.training.bench.options import BenchOptions
from neq_cli.training.bench.timed_step import TimedStep

CPU = torch.device("cpu")
OWN_CODE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

def images():
    part = TensorDataset(torch.rand(60, 1, 8, 8), torch.arange(60) % 10)
    return part, part

def missing():
    raise OSError("no such disk")

def reads_a_number():
    return Thirteen()

class Thirteen(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(2, 13, 1)

    def forward(self, images):
        assert images.sum().item() == images.sum().item()  # which the meta device cannot tell
        return self.layer(images).mean((2, 3))
"""
SHAPES = {
    "cifar10-folder": ((3, 32, 32), 10),
    "deeplabv3_resnet50-coco": ((3, 480, 480), 21),
    "digits": ((1, 8, 8), 10),
    "digits-baseline": ((1, 8, 8), 10),
    "digits-stochastic": ((1, 8, 8), 10),
    "entrypoint": ((1, 8, 8), 10),
    "finetune-folder": ((3, 224, 224), 1000),
    "resnet18-imagenet": ((3, 224, 224), 1000),
    "resnet32-cifar10": ((3, 32, 32), 10),
    "resnet32-cifar10-adam": ((3, 32, 32), 10),
    "resnet32-cifar10-front": ((3, 32, 32), 10),
    "segmentation-folder": ((3, 96, 96), 11),
    "swin_b-imagenet": ((3, 224, 224), 1000),
}
QUICK = ("cifar10-folder", "digits", "entrypoint")
WITH_DATA = ("detection", "language-model", "regression")
"""Those whose data only its own code can make up; tests/test_own_tasks.py benches them."""


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "noisy_code.py").write_text(OWN_CODE)
    monkeypatch.syspath_prepend(tmp_path)
    return "noisy_code"


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with nothing in the home folder."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    recipes = Path(__file__).parents[3] / "recipes"
    monkeypatch.syspath_prepend(recipes)  # where entrypoint.yaml's model lies


def recipe(**changes: Any) -> Recipe:
    values = {
        "model": {"name": "resnet8"},
        "data": {"name": "digits", "workers": 0},
        "epochs": 1,
        "batch_size": 4,
        "optimizer": {"name": "sgd", "lr": 0.1},
        "device": "cpu",
    }
    return Recipe.model_validate(values | changes)


def test_every_shipped_recipe_is_listed_here() -> None:
    assert sorted([*SHAPES, *WITH_DATA]) == sorted(shipped_names())


@pytest.mark.parametrize("name", SHAPES)
def test_a_shipped_recipe_needs_no_data(fresh: None, name: str) -> None:
    shape, classes = SHAPES[name]
    found, noise = find_data(load_recipe(name, ["batch_size=2"]).recipe)
    assert noise
    assert (found.image_shape, found.num_classes) == (shape, classes)
    image, label = found.train[0]
    assert image.shape == shape
    assert torch.as_tensor(label).shape == (shape[1:] if found.masked else ())
    assert found.masked == (name in ("deeplabv3_resnet50-coco", "segmentation-folder"))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in SHAPES]
)
def test_a_shipped_recipe_is_benched(fresh: None, name: str) -> None:
    changes = ["batch_size=2", "device=cpu", "channels_last=false"]
    if name == "deeplabv3_resnet50-coco":
        changes += ["data.image_size=64", "data.base_size=64"]
    if name == "swin_b-imagenet":
        changes += ["precision=fp32"]  # a CPU's fp16 is not for so large a model
    options = BenchOptions(fractions=(0.5,), modes=("exact",), orders=("random",), rounds=1)
    result = bench(load_recipe(name, changes).recipe, options)
    assert result["synthetic_data"] is True
    assert [one["frozen"] > 0 for one in result["measurements"]] == [True]


@pytest.mark.parametrize(
    ("data", "model", "shape", "classes", "name"),
    [
        ({"name": "digits"}, {}, (1, 8, 8), 10, "digits"),
        ({"name": "cifar100"}, {}, (3, 32, 32), 100, "CIFAR100"),
        ({"name": "ImageNet", "augment": "imagenet"}, {}, (3, 224, 224), 1000, "ImageNet"),
        ({"name": "image_folder", "image_size": 16}, {"kwargs": {"num_classes": 7}}, (3, 16, 16), 7, "image_folder"),
        ({"name": "image_folder", "image_size": 32}, {}, (3, 32, 32), 10, "image_folder"),  # a CIFAR ResNet's own
        ({"name": "image_folder", "augment": "imagenet"}, {"name": "resnet18"}, (3, 224, 224), 1000, "image_folder"),
        ({"name": "image_folder", "image_size": 64}, {"name": "regnet_y_400mf"}, (3, 64, 64), 1000, "image_folder"),
    ],
)
def test_shape_and_classes_are_those_of_keys_and_model(
    data: dict[str, Any], model: dict[str, Any], shape: tuple[int, ...], classes: int, name: str
) -> None:
    chosen = recipe(data=data | {"root": "nowhere"}, model={"name": "resnet8"} | model, batch_size=300)
    found, noise = find_data(chosen)
    assert noise
    assert (found.name, found.image_shape, found.num_classes, len(found.train)) == (name, shape, classes, 300)
    images, labels = zip(*(found.train[index] for index in range(100)), strict=True)
    assert images[0].shape == shape
    assert 0 <= min(labels) <= max(labels) < classes
    batch = torch.stack(images)
    # Pixels have mean 0 and deviation 1; of n of them the mean is within 5 / sqrt(n), the deviation too.
    assert abs(float(batch.mean())) < 5 / batch.numel() ** 0.5
    assert abs(float(batch.std()) - 1) < 5 / batch.numel() ** 0.5 + 1 / 256


def test_data_of_ones_own_whose_size_is_given_is_noise_too(own_code: str) -> None:
    section = {"entrypoint": f"{own_code}:missing", "image_size": 12, "workers": 0}
    found, noise = find_data(recipe(data=section, model={"entrypoint": f"{own_code}:reads_a_number"}))
    assert noise
    assert (found.name, found.image_shape, found.num_classes) == (f"{own_code}:missing", (2, 12, 12), 13)


def test_data_that_alone_tells_its_size_is_opened(own_code: str) -> None:
    chosen = recipe(data={"entrypoint": f"{own_code}:images", "probe_size": 5, "workers": 0})
    chosen = chosen.model_copy(update={"model": recipe(model={"name": "resnet8", "kwargs": {"in_channels": 1}}).model})
    found, noise = find_data(chosen)
    assert not noise
    assert len(found.train) == 55
    assert TimedStep(chosen, CPU, found).inputs.shape == (4, 1, 8, 8)
    with pytest.raises(NeqError, match="no such disk"):
        find_data(recipe(data={"entrypoint": f"{own_code}:missing"}))


def test_a_model_that_takes_no_such_image_is_one_line() -> None:
    with pytest.raises(NeqError, match=r"^model: does not take an image of image_folder, 3x8x8: "):
        find_data(recipe(data={"name": "image_folder", "image_size": 8}, model={"name": "inception_v3"}))


def test_masks_are_noise_too() -> None:
    data = {"name": "COCO", "image_size": 32}
    model = {"name": "lraspp_mobilenet_v3_large", "kwargs": {"num_classes": 21}}
    chosen = recipe(data=data, model=model, task="segmentation")
    step = TimedStep(chosen, CPU, find_data(chosen)[0])
    assert step.targets.shape == (4, 32, 32)
    assert 0 < step.loss().item() < 10
