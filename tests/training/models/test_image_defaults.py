"""What a recipe leaves out of its images, from a model that says what it is configured for; of a library made here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from neq_cli.errors import RecipeError, RecipeValueError
from neq_cli.recipe import ModelSection, Recipe
from neq_cli.recipe.load import load_recipe
from neq_cli.training.models import build
from neq_cli.training.models.builder import Builder, ImageDefaults
from neq_cli.training.models.image_defaults import with_image_defaults

COLOUR = ImageDefaults(48, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
DEFAULTS = {
    "colour": COLOUR,
    "grey": ImageDefaults(48, (0.1,), (0.2,)),
    "size": ImageDefaults(32),
    "nothing": ImageDefaults(),
    "half": ImageDefaults(None, (0.1, 0.2, 0.3), None),
}


@dataclass(frozen=True)
class Shelved(Builder):
    defaults: ImageDefaults

    def image_defaults(self, section: ModelSection) -> ImageDefaults:
        return self.defaults


@pytest.fixture(autouse=True)
def shelf(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library whose models are called shelf/NAME."""

    def find(name: str, task: str | None) -> Builder:
        if name not in DEFAULTS:
            raise RecipeValueError("model.name", f"no '{name}' on the shelf")
        return Shelved(name, lambda: nn.Conv2d(3, 10, 1), DEFAULTS[name])

    monkeypatch.setattr(build, "LIBRARIES", {**build.LIBRARIES, "shelf": find})


def recipe(model: str = "colour", name: str | None = "CIFAR10", **data: Any) -> Recipe:
    values = {"model": {"name": f"shelf/{model}"}, "data": {"name": name, **data}, "epochs": 1}
    return Recipe.model_validate({**values, "optimizer": {"name": "sgd"}})


def taken(recipe: Recipe) -> tuple[Any, Any, Any]:
    data = with_image_defaults(recipe)[0].data
    return data.image_size, data.mean, data.std


def test_what_the_recipe_leaves_out_is_the_models() -> None:
    completed, notes = with_image_defaults(recipe())
    assert taken(recipe()) == (48, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert notes == (
        "data: image_size 48, mean [0.1, 0.2, 0.3], std [0.4, 0.5, 0.6], which shelf/colour is configured for; "
        "the recipe may give others",
    )
    again, silent = with_image_defaults(completed)
    assert (again, silent) == (completed, ())
    assert Recipe.model_validate(completed.model_dump()) == completed


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (recipe(image_size=8), (8, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])),
        (
            recipe(mean=[0.5] * 3),
            (48, [0.5] * 3, None),
        ),  # a mean and a deviation of two places would not belong together
        (recipe(std=[0.5] * 3), (48, None, [0.5] * 3)),
        (recipe(name="MNIST"), (48, None, None)),  # in grey
        (recipe("grey"), (48, None, None)),
        (recipe("grey", name="MNIST"), (48, [0.1], [0.2])),
        (recipe("size"), (None, None, None)),  # what CIFAR-10 has anyway
        (recipe("size", name="image_folder"), (32, None, None)),
        (recipe("size", name="COCO", base_size=40), (32, None, None)),
        (recipe("size", name="COCO", base_size=31), (None, None, None)),  # too small to be cut
        (recipe("nothing"), (None, None, None)),
        (recipe("half"), (None, None, None)),
        (recipe("size", name="FakeData", kwargs={"image_size": [3, 8, 8]}), (None, None, None)),
        (recipe("colour", name=None, entrypoint="mine:data"), (None, None, None)),  # may come prepared
    ],
)
def test_what_the_recipe_says_stays_and_what_does_not_fit_is_left(wanted: Recipe, expected: tuple[Any, ...]) -> None:
    assert taken(wanted) == expected


def test_models_of_neqs_own_and_torchvisions_say_nothing_but_their_channels() -> None:
    for name in ("resnet8", "resnet18"):
        model = {"model": ModelSection(name=name)}
        assert with_image_defaults(recipe().model_copy(update=model)) == (
            recipe(channels=3).model_copy(update=model),
            (),
        )


def test_a_recipe_is_completed_as_it_is_read_and_reads_the_same_again(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model: {name: shelf/colour}\ndata: {name: CIFAR10}\nepochs: 1\noptimizer: {name: sgd}\n")
    loaded = load_recipe(str(path), complete=with_image_defaults)
    assert loaded.recipe.data.image_size == 48
    assert len(loaded.notes) == 1
    (tmp_path / "resolved.yaml").write_text(loaded.resolved_yaml())
    again = load_recipe(str(tmp_path / "resolved.yaml"), complete=with_image_defaults)
    assert (again.recipe, again.notes) == (loaded.recipe, ())
    assert load_recipe(str(path), ["data.image_size=8"], complete=with_image_defaults).recipe.data.image_size == 8
    with pytest.raises(RecipeError, match=r"^command line: model.name=shelf/none: no 'none' on the shelf$"):
        load_recipe(str(path), ["model.name=shelf/none"], complete=with_image_defaults)


@pytest.mark.parametrize(
    ("model", "data", "expected"),
    [
        ({"name": "resnet8"}, {}, 3),
        ({"name": "resnet8", "kwargs": {"in_channels": 1}}, {}, 1),
        ({"name": "resnet8", "kwargs": {"in_channels": 1}}, {"channels": 1}, 1),
        ({"name": "resnet8", "kwargs": {"in_channels": 4}}, {}, "auto"),
        ({"name": "resnet18"}, {"name": "MNIST"}, 3),
        ({"name": "timm/resnet18"}, {}, 3),
        ({"name": "timm/resnet18", "kwargs": {"in_chans": 1}}, {}, 1),
        ({"name": "transformers/vit"}, {}, 3),
        ({"name": "transformers/vit", "kwargs": {"num_channels": 1}}, {}, 1),
        ({"entrypoint": "builtins:dict"}, {}, "auto"),
        ({"name": "resnet8"}, {"name": None, "entrypoint": "builtins:dict"}, "auto"),
    ],
)
def test_channels_are_those_that_the_model_takes(model: dict[str, Any], data: dict[str, Any], expected: Any) -> None:
    library = str(model.get("name")).partition("/")
    if library[1]:
        pytest.importorskip(library[0])
    wanted = Recipe.model_validate(
        {"model": model, "data": {"name": "image_folder", **data}, "epochs": 1, "optimizer": {"lr": 0.1}}
    )
    completed, _ = with_image_defaults(wanted)
    assert completed.data.channels == expected


@pytest.mark.parametrize(
    ("model", "channels", "says"),
    [
        ({"name": "resnet8"}, 1, "1, but resnet8 takes 3, by model.kwargs.in_channels; give both the same"),
        (
            {"name": "resnet18"},
            1,
            "1, but resnet18 takes 3, and no other number; timm/NAME with model.kwargs.in_chans takes any",
        ),
        (
            {"name": "timm/resnet18", "kwargs": {"in_chans": 1}},
            3,
            "3, but timm/resnet18 takes 1, by model.kwargs.in_chans; give both the same",
        ),
        (
            {"name": "transformers/vit"},
            1,
            "1, but transformers/vit takes 3, by model.kwargs.num_channels; give both the",
        ),
    ],
)
def test_other_channels_than_the_model_takes_are_refused(model: dict[str, Any], channels: int, says: str) -> None:
    library = model["name"].partition("/")
    if library[1]:
        pytest.importorskip(library[0])
    data = {"name": "image_folder", "channels": channels}
    wanted = Recipe.model_validate({"model": model, "data": data, "epochs": 1, "optimizer": {"lr": 0.1}})
    with pytest.raises(RecipeValueError) as raised:
        with_image_defaults(wanted)
    assert raised.value.key == "data.channels"
    assert raised.value.reason.startswith(says)
