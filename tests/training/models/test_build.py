"""Building the recipe's network, and whether it fits the data."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from neq_cli.errors import NeqError
from neq_cli.recipe import ModelSection
from neq_cli.training.models.build import (
    build_model,
    check_fit,
    find_builder,
    kwargs_problems,
    try_builder,
)
from neq_cli.training.models.of_torchvision import torchvision_names


def section(name: str | None = None, **values: Any) -> ModelSection:
    return ModelSection(name=name, **values)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "modelsmodule", raising=False)
    (tmp_path / "modelsmodule.py").write_text(
        "from torch import nn\n"
        "def make(num_classes, width=2): return nn.Linear(width, num_classes)\n"
        "def fixed(): return nn.Linear(1, 3)\n"
        "def open_ended(**kwargs): return nn.Linear(1, kwargs.get('outputs', 1))\n"
        "def wrong(): return 'a string'\n"
        "def fails(): raise ZeroDivisionError('by zero')\n"
        "def leaves(): raise SystemExit(0)\n"
        "def empty(): return nn.Flatten()\n"
    )
    return "modelsmodule"


def test_names_are_torchvisions_and_the_cifar_ones() -> None:
    assert {"resnet18", "vit_b_16", "swin_v2_t", "convnext_tiny"} <= set(torchvision_names())
    assert find_builder(section("ResNet18")).name == "resnet18"
    assert type(build_model(section("resnet20"))).__name__ == "CifarResNet"


def test_an_unknown_name_is_told_with_a_suggestion() -> None:
    with pytest.raises(NeqError, match=r"^model.name: no torchvision model 'resnet81'; did you mean 'resnet"):
        build_model(section("resnet81"))


def test_every_torchvision_builder_takes_num_classes_and_its_class_arguments_only() -> None:
    for name in torchvision_names():
        builder = find_builder(section(name))
        assert "num_classes" in builder.accepted, name
        problems = kwargs_problems(section(name, kwargs={"num_clases": 3}), builder)
        assert problems == [("num_clases", f"unknown argument 'num_clases' of {name}; did you mean 'num_classes'?")], (
            name
        )


@pytest.mark.parametrize("kwargs", [{"weights": "DEFAULT"}, {"progress": True}])
def test_what_neq_sets_itself_is_refused(kwargs: dict[str, Any]) -> None:
    with pytest.raises(NeqError, match=r"is set by neq; remove it"):
        build_model(section("resnet18", kwargs=kwargs))


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("resnet18", {"block": 1}, "model.kwargs.block: resnet18 sets it itself; remove it"),
        (
            "resnet18",
            {"groups": 2},
            "model.kwargs.groups: resnet18 cannot be built: ValueError: BasicBlock only supports groups=1 and "
            "base_width=64",
        ),
        (
            "resnet20",
            {"width": "wide"},
            "model.kwargs.width: resnet20 cannot be built: ValueError: width is 'wide'; it must be a whole number "
            "above 0",
        ),
    ],
)
def test_a_builder_that_refuses_its_arguments(name: str, kwargs: dict[str, Any], message: str) -> None:
    wrong = section(name, kwargs=kwargs)
    with pytest.raises(NeqError) as built:
        build_model(wrong)
    with pytest.raises(NeqError) as tried:
        try_builder(wrong, find_builder(wrong))
    assert str(built.value) == str(tried.value) == message


def test_trying_a_builder_leaves_no_trace() -> None:
    state = torch.get_rng_state()
    for name in ("resnet18", "regnet_y_400mf", "swin_t", "googlenet", "resnet20"):
        try_builder(section(name), find_builder(section(name)))
    assert torch.equal(state, torch.get_rng_state())


def test_the_class_count_of_the_data_is_passed_on_where_the_recipe_is_silent() -> None:
    assert build_model(section("resnet8"), 7).fc.out_features == 7
    assert build_model(section("resnet8", kwargs={"num_classes": 9}), 7).fc.out_features == 9
    assert build_model(section("squeezenet1_1"), 4)(torch.zeros(1, 3, 32, 32)).shape == (1, 4)
    with pytest.raises(NeqError, match=r"model.kwargs.num_classes: 3 outputs for data of 10 classes"):
        build_model(section("resnet8", kwargs={"num_classes": 3}), 10)


def test_the_same_seed_gives_the_same_weights() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.cat([p.detach().flatten() for p in build_model(section("squeezenet1_1"), 3).parameters()])

    first = weights(1)
    assert torch.equal(first, weights(1))
    assert not torch.equal(first, weights(2))


def test_published_weights_bring_their_input_normalisation() -> None:
    assert build_model(section("googlenet", weights="DEFAULT"), 3).transform_input is True
    assert build_model(section("googlenet"), 3).transform_input is False
    chosen = section("googlenet", weights="DEFAULT", kwargs={"transform_input": False})
    assert build_model(chosen, 3).transform_input is False


def test_entrypoints_are_called_with_what_they_take(module: str) -> None:
    assert build_model(section(entrypoint=f"{module}:make"), 5).out_features == 5
    assert build_model(section(entrypoint=f"{module}:make", kwargs={"num_classes": 6, "width": 4}), 5).in_features == 4
    assert build_model(section(entrypoint=f"{module}:fixed"), 3).out_features == 3
    assert build_model(section(entrypoint=f"{module}:open_ended", kwargs={"outputs": 2}), 2).out_features == 2


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("make", {"widht": 1}, "model.kwargs.widht: unknown argument 'widht' of {m}:make; did you mean 'width'?"),
        ("wrong", {}, "model.entrypoint: '{m}:wrong' returned a str, not a torch.nn.Module"),
        ("fails", {}, "model.entrypoint: {m}:fails cannot be built: ZeroDivisionError: by zero ("),
        ("leaves", {}, "model.entrypoint: {m}:leaves cannot be built: SystemExit: 0 ("),
        ("empty", {}, "model: {m}:empty has no parameters; there is nothing to train"),
    ],
)
def test_entrypoints_that_fail(module: str, name: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(NeqError) as raised:
        build_model(section(entrypoint=f"{module}:{name}", kwargs=kwargs), 3)
    assert str(raised.value).startswith(message.format(m=module))
    assert "\n" not in str(raised.value)


def data(channels: int = 3, size: int = 8, classes: int = 4) -> Any:
    probe = [(torch.zeros(channels, size, size), 0)]
    return SimpleNamespace(name="pictures", probe=probe, num_classes=classes, masked=False)


def test_a_model_that_fits_is_left_as_it_was() -> None:
    model = build_model(section("resnet8", kwargs={"width": 4}), 4)
    model.bn1.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check_fit(model, data())
    assert model.training
    assert not model.bn1.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class Mistaken(nn.Module):
    """Whose own code is wrong, whatever the image."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(192, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.haed(images.flatten(1))  # type: ignore[no-any-return, operator]


def test_a_mistake_in_the_models_own_code_is_not_laid_to_the_images_size() -> None:
    with pytest.raises(NeqError, match=r"AttributeError: 'Mistaken' object has no attribute 'haed'") as raised:
        check_fit(Mistaken(), data())
    assert "data.image_size" not in str(raised.value)
    assert re.search(rf"\({re.escape(__file__)}:[0-9]+\)$", str(raised.value))


@pytest.mark.parametrize(
    ("model", "pictures", "says"),
    [
        (
            build_model(ModelSection(name="resnet8"), 4),
            data(channels=1),
            "does not take an image of pictures, 1x8x8: RuntimeError: .*first convolution expects 3 channels "
            r"and the data has 1 \(model.kwargs.in_channels, in_chans or num_channels, whichever the model has, "
            r"or data.channels=3\)",
        ),
        (build_model(ModelSection(name="alexnet"), 4), data(size=8), "does not take .* try another data.image_size"),
        (build_model(ModelSection(name="resnet8"), 3), data(), "model: 3 outputs for the 4 classes of pictures"),
        (nn.Conv2d(3, 4, 1), data(), r"gives an output of shape \[1, 4, 8, 8\]; classification needs \[1, 4\]"),
        (nn.Sequential(nn.Flatten(), nn.LSTM(192, 4)), data(), "the model returned a tuple"),
    ],
)
def test_a_model_that_does_not_fit_is_one_line(model: nn.Module, pictures: Any, says: str) -> None:
    with pytest.raises(NeqError, match=says) as raised:
        check_fit(model, pictures)
    assert "\n" not in str(raised.value)
    assert model.training


def masked(height: int = 8, width: int = 6) -> Any:
    probe = [(torch.zeros(3, height, width), torch.zeros(height, width, dtype=torch.uint8))]
    return SimpleNamespace(name="pictures", probe=probe, num_classes=4, masked=True)


def test_outputs_smaller_than_the_masks_are_told_where_segmentation_scales_them() -> None:
    assert check_fit(nn.Conv2d(3, 4, 1), masked(), "segmentation") == ()
    assert check_fit(nn.Conv2d(3, 4, 2, stride=2), masked(), "segmentation") == (
        "task: the model's outputs are smaller than the masks, and scaled up to them, bilinearly: 4x3 for masks of 8x6",
    )


def test_outputs_that_are_no_class_are_told() -> None:
    model = build_model(ModelSection(name="resnet8"), 10)
    (note,) = check_fit(model, data(), "classification", "num_classes")
    assert note == (
        "model: 10 outputs for the 4 classes of pictures: the others are never right, and count in the loss until that "
        "is learnt; model.kwargs.num_classes=4 leaves them out"
    )
    (note,) = check_fit(nn.Conv2d(3, 6, 1), masked(), "segmentation", "num_labels")
    assert note.startswith("model: 6 outputs for the 4 classes of pictures: ")
    assert note.endswith("; model.kwargs.num_labels=4 leaves them out")
    (note,) = check_fit(model, data(), "classification")
    assert note.endswith("; give the model one for each class")
    assert check_fit(model, data(), "mine:task") == ()  # which may be a distillation, or anything


@pytest.mark.parametrize(
    ("model", "task"),
    [
        (nn.Conv2d(3, 4, 2, stride=2), "mine:task"),  # which may do otherwise
        (nn.Conv2d(3, 4, 1, padding=1), "segmentation"),  # larger
        (nn.Sequential(nn.Flatten(), nn.Linear(144, 4)), "segmentation"),
    ],
)
def test_outputs_that_are_no_pixels_of_the_masks_are_refused(model: nn.Module, task: str) -> None:
    with pytest.raises(NeqError, match=r"gives an output of shape .*; segmentation needs \[1, 4, 8, 6\]$"):
        check_fit(model, masked(), task)
