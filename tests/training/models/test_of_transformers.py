"""transformers' models by type, class and checkpoint, all made here. Nothing is downloaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neq_cli.errors import RecipeValueError
from neq_cli.recipe import ModelSection, Recipe
from neq_cli.training.checks import check_section
from neq_cli.training.models.build import build_model, build_on_meta, find_builder
from neq_cli.training.models.builder import ImageDefaults
from neq_cli.training.models.outputs import main_output
from neq_cli.training.models.weights import load_weights

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SMALL = {
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


def section(name: str, weights: str | None = None, **kwargs: Any) -> ModelSection:
    return ModelSection(name=f"transformers/{name}", weights=weights, kwargs=kwargs)


def problems(section: ModelSection, task: str = "classification") -> list[str]:
    found = check_section("model", section)
    if not found:
        data = {"name": "CIFAR10"} if task == "classification" else {"name": "VOCSegmentation"}
        recipe = {"model": section.model_dump(), "data": data, "task": task, "epochs": 1, "optimizer": {"name": "sgd"}}
        found = check_section("", Recipe.model_validate(recipe))
    return [f"{problem.key}: {problem.message}" for problem in found]


def test_a_type_is_the_class_that_transformers_has_for_the_task() -> None:
    torch.manual_seed(4)
    model = build_model(section("vit", **SMALL), 7, "classification")
    torch.manual_seed(4)
    configuration = transformers.ViTConfig(num_labels=7, **SMALL)
    expected = transformers.ViTForImageClassification(configuration)
    assert type(model) is type(expected)
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert main_output(model(torch.zeros(2, 3, 8, 8))).shape == (2, 7)
    segmented = build_model(section("segformer"), 5, "segmentation")
    assert type(segmented) is transformers.SegformerForSemanticSegmentation
    assert main_output(segmented(torch.zeros(1, 3, 64, 32))).shape == (1, 5, 16, 8)


def test_a_class_is_built_whatever_the_task() -> None:
    model = build_model(section("ViTForImageClassification", **SMALL), 7, "my_tasks:make")
    assert model.config.num_labels == 7
    shape = {"vocab_size": 11, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 6}
    model = build_model(section("GPT2LMHeadModel", **shape), 7, "my_tasks:make")
    assert main_output(model(torch.zeros(1, 6, dtype=torch.long))).shape == (1, 6, 11)


@pytest.mark.parametrize(
    ("name", "task"), [("vit", "classification"), ("resnet", "classification"), ("segformer", "segmentation")]
)
def test_on_the_meta_device_it_is_the_same_network_without_numbers(name: str, task: str) -> None:
    outline = build_on_meta(section(name), 5, task)
    assert all(tensor.is_meta for tensor in (*outline.parameters(), *outline.buffers()))
    expected = {key: tensor.shape for key, tensor in build_model(section(name), 5, task).named_parameters()}
    assert {key: tensor.shape for key, tensor in outline.named_parameters()} == expected


@pytest.mark.parametrize(
    ("name", "kwargs", "task", "says"),
    [
        ("vitt", {}, "classification", "model.name: transformers has no model 'vitt'; did you mean 'vit'?"),
        ("", {}, "classification", "model.name: transformers has no model ''; it is a type such as vit, a class such"),
        ("vit", {}, "segmentation", "model.name: transformers has no segmentation model of type 'vit'; it has beit,"),
        ("gpt2", {}, "classification", "model.name: transformers has no classification model of type 'gpt2'; it has"),
        ("./none", {}, "classification", "model.name: no folder 'none'; give one that holds a config.json"),
        (
            "vit",
            {"hidden_siz": 8},
            "classification",
            "model.kwargs.hidden_siz: unknown argument 'hidden_siz' of transformers/vit, which takes those of "
            "ViTConfig; did you mean 'hidden_size'?",
        ),
        ("vit", {"dtype": "float16"}, "classification", "model.kwargs.dtype: is not for a recipe's kwargs; say precis"),
        (
            "vit",
            {"hidden_act": "reluu"},
            "classification",
            "model.kwargs.hidden_act: transformers/vit cannot be built: ",
        ),
        ("vit", {"num_labels": 3}, "classification", "model.kwargs.num_labels: 3 outputs for data of 10 classes; lea"),
    ],
)
def test_what_transformers_does_not_have_is_one_line(name: str, kwargs: dict[str, Any], task: str, says: str) -> None:
    (line,) = problems(section(name, **kwargs), task)
    assert line.startswith(says)
    assert "\n" not in line


def test_a_type_with_a_task_of_the_users_own_wants_a_class() -> None:
    with pytest.raises(
        RecipeValueError, match=r"'my:task' is none that neq knows; name a class, such as transformers/"
    ):
        build_model(section("vit"), 7, "my:task")


def test_what_configurations_take_without_naming_it_is_taken() -> None:
    kwargs = {**SMALL, "num_labels": 12, "attn_implementation": "eager", "problem_type": "single_label_classification"}
    assert problems(section("vit", **kwargs)) == []
    model = build_model(section("vit", **kwargs), 10, "classification")
    assert model.config.num_labels == 12
    assert model.config._attn_implementation == "eager"
    assert build_model(section("resnet", out_features=["stage4"]), 3, "classification").config.num_labels == 3


def save(folder: Path, labels: int = 7) -> nn.Module:
    """Save a network with random weights, as `save_pretrained` does, and the settings of its images."""
    torch.manual_seed(8)
    network = transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=labels, **SMALL))
    network.save_pretrained(folder)
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 1], "size": {"height": 8, "width": 8}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    assert isinstance(network, nn.Module)
    return network


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_folder_gives_its_network_images_and_if_asked_its_weights(tmp_path: Path) -> None:
    source = save(tmp_path)
    wanted = section(str(tmp_path), "DEFAULT")
    assert problems(wanted) == []
    torch.manual_seed(1)
    model = build_model(wanted, 10, "classification")
    before, drawn = state(model), torch.get_rng_state()
    heads = ["classifier.weight", "classifier.bias"]
    assert load_weights(model, wanted, "classification") == (
        f"model.weights: 2 of {len(before)} tensors start from scratch: {', '.join(heads)}",
    )
    assert torch.equal(torch.get_rng_state(), drawn)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name] if name in heads else source.state_dict()[name]), name
    defaults = find_builder(wanted, "classification").image_defaults(wanted)
    assert defaults == ImageDefaults(8, (0.1, 0.2, 0.3), (0.4, 0.5, 1.0), 3)
    same = build_model(wanted, 7, "classification")
    assert load_weights(same, wanted, "classification") == ()


def test_a_checkpoint_in_half_precision_trains_in_full(tmp_path: Path) -> None:
    save(tmp_path).half().save_pretrained(tmp_path)
    wanted = section(str(tmp_path), "DEFAULT")
    model = build_model(wanted, 7, "classification")
    load_weights(model, wanted, "classification")
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}


def test_kwargs_change_the_checkpoints_configuration(tmp_path: Path) -> None:
    save(tmp_path)
    assert "did you mean 'num_hidden_layers'" in problems(section(str(tmp_path), num_hiden_layers=2))[0]
    model = build_model(section(str(tmp_path), num_hidden_layers=2), 7, "classification")
    assert model.config.num_hidden_layers == 2


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hugging Face cache with owner/network, on a machine without a network."""
    place = tmp_path / "cache"
    folder = place / "models--owner--network"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    save(folder / "snapshots" / "abc")
    for module in ("huggingface_hub.constants", "transformers.utils.hub"):
        owner = pytest.importorskip(module)
        for name in ("HF_HUB_CACHE", "TRANSFORMERS_CACHE"):
            if hasattr(owner, name):
                monkeypatch.setattr(owner, name, str(place))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return place


def test_a_name_of_the_hub_is_taken_from_the_cache(cache: Path, tmp_path: Path) -> None:
    wanted = section("owner/network", "DEFAULT")
    assert problems(wanted) == []
    model = build_model(wanted, 7, "classification")
    assert load_weights(model, wanted, "classification") == ()
    source = save(tmp_path / "again").state_dict()
    assert all(torch.equal(tensor, source[name]) for name, tensor in model.state_dict().items())
    assert find_builder(wanted).image_defaults(wanted).mean == (0.1, 0.2, 0.3)


def test_a_name_that_is_not_in_the_cache_tells_where_it_was_looked_for_and_how_to_get_it(cache: Path) -> None:
    assert problems(section("owner/other")) == [
        f"model.name: no configuration of 'owner/other' in '{cache}', nor a folder of that name; "
        "`hf download owner/other` fetches it"
    ]


def test_weights_that_are_missing_are_one_line(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    wanted = section(str(tmp_path), "DEFAULT")
    with pytest.raises(
        RecipeValueError, match=rf"^model.weights: the weights in '{tmp_path}' cannot be read \("
    ) as raised:
        load_weights(build_model(wanted, 7, "classification"), wanted, "classification")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "weights", "says"),
    [
        (
            "vit",
            "DEFAULT",
            "transformers/vit names no weights; name a checkpoint, such as transformers/google/vit-base",
        ),
        ("FOLDER", "augreg", "is not known; say DEFAULT"),
    ],
)
def test_weights_that_no_name_has(tmp_path: Path, name: str, weights: str, says: str) -> None:
    save(tmp_path)
    (line,) = problems(section(name.replace("FOLDER", str(tmp_path)), weights))
    assert line.startswith("model.weights: ")
    assert says in line


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    save(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForImageClassification": "m.M"},
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\n")
    (line,) = problems(section(str(tmp_path)))
    assert line.startswith(f"model.name: 'transformers/{tmp_path}' is no model of transformers' own (")
    assert not (tmp_path / "run").exists()
    shutil.rmtree(tmp_path)
