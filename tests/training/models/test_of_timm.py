"""timm's models by name: arguments, weights out of a cache made here, sizes. Nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from neq_cli.errors import RecipeValueError
from neq_cli.recipe import ModelSection
from neq_cli.training.checks import check_section
from neq_cli.training.models.build import build_model, build_on_meta, find_builder, kwargs_problems
from neq_cli.training.models.builder import ImageDefaults
from neq_cli.training.models.weights import load_weights

timm = pytest.importorskip("timm", reason="timm is not installed")


def section(name: str, weights: str | None = None, **kwargs: Any) -> ModelSection:
    return ModelSection(name=f"timm/{name}", weights=weights, kwargs=kwargs)


def problems(section: ModelSection) -> list[str]:
    return [f"{problem.key}: {problem.message}" for problem in check_section("model", section)]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_name_is_what_create_model_makes_of_it() -> None:
    torch.manual_seed(4)
    model = build_model(section("test_vit", img_size=32, pretrained=False), 7)
    torch.manual_seed(4)
    expected = timm.create_model("test_vit", img_size=32, num_classes=7)
    assert type(model) is type(expected)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    others = expected.state_dict()
    assert all(torch.equal(tensor, others[name]) for name, tensor in model.state_dict().items())


def test_classes_are_the_recipes_before_they_are_the_datas() -> None:
    assert build_model(section("test_resnet", num_classes=9), 7).num_classes == 9
    with pytest.raises(RecipeValueError, match=r"model.kwargs.num_classes: 3 outputs for data of 10 classes"):
        build_model(section("test_resnet", num_classes=3), 10)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet10t", "convnext_atto", "swinv2_cr_tiny_ns_224"])
def test_on_the_meta_device_it_is_the_same_network_without_numbers(name: str) -> None:
    assert problems(section(name)) == []
    outline = build_on_meta(section(name), 5)
    assert all(tensor.is_meta for tensor in (*outline.parameters(), *outline.buffers()))
    expected = {key: tensor.shape for key, tensor in build_model(section(name), 5).named_parameters()}
    assert {key: tensor.shape for key, tensor in outline.named_parameters()} == expected


@pytest.mark.parametrize(
    ("name", "kwargs", "says"),
    [
        ("test_vitt", {}, "model.name: timm has no model 'test_vitt'; did you mean 'test_vit'?"),
        ("", {}, "model.name: timm has no model ''; timm.list_models() has their names"),
        ("test_vit.r160", {}, "model.name: timm/test_vit has no weights 'r160'; did you mean 'r160_in1k'?"),
        (
            "test_vit",
            {"img_sze": 8},
            "model.kwargs.img_sze: unknown argument 'img_sze' of timm/test_vit; did you mean 'img_size'?",
        ),
        ("test_vit", {"img_sze": None}, "did you mean 'img_size'?"),  # which timm would leave out
        ("convmixer_768_32", {"num_clases": 3}, "did you mean 'num_classes'?"),  # whose **kwargs go nowhere
        (
            "test_vit",
            {"pretrained": True},
            "model.kwargs.pretrained: is not for a recipe's kwargs; say model.weights=DEFAULT for timm's weights",
        ),
        ("test_vit", {"checkpoint_path": "x"}, "or give a file as model.checkpoint"),
        ("test_vit", {"embed_dim": 7}, "model.kwargs.embed_dim: timm/test_vit cannot be built: "),
    ],
)
def test_what_timm_does_not_have_is_one_line(name: str, kwargs: dict[str, Any], says: str) -> None:
    (line,) = problems(section(name, **kwargs))
    assert says in line
    assert "\n" not in line
    with pytest.raises(RecipeValueError) as raised:
        build_model(section(name, **kwargs), 10)
    assert str(raised.value) == line


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("test_vit", {"drop_path_rate": 0.1, "pretrained": False}),
        ("test_efficientnet", {"bn_eps": 1e-3, "drop_rate": 0.2}),  # bn_eps stands in no signature
        ("test_resnet", {"in_chans": 1, "global_pool": "max"}),
    ],
)
def test_what_timm_takes_is_taken(name: str, kwargs: dict[str, Any]) -> None:
    assert problems(section(name, **kwargs)) == []
    build_model(section(name, **kwargs), 3)


def test_bn_eps_arrives() -> None:
    model = build_model(section("test_efficientnet", bn_eps=0.125), 3)
    assert {module.eps for module in model.modules() if isinstance(module, nn.BatchNorm2d)} == {0.125}


@pytest.mark.slow
def test_one_of_every_family_takes_num_classes_and_no_other_spelling() -> None:
    families = {timm.model_entrypoint(name).__module__: name for name in timm.list_models()}
    for name in families.values():
        assert "num_classes" in find_builder(section(name)).accepted, name
        found = kwargs_problems(section(name, num_clases=3), find_builder(section(name)))
        assert found == [
            ("num_clases", f"unknown argument 'num_clases' of timm/{name}; did you mean 'num_classes'?")
        ], name


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache, on a machine without a network."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def publish(cache: Path, repository: str, content: dict[str, Tensor], name: str = "model.safetensors") -> None:
    """Put a file of weights where `hf download` would."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    save_file(content, snapshot / name) if name.endswith("safetensors") else torch.save(content, snapshot / name)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_weights_come_out_of_the_cache_and_a_head_of_other_classes_stays(cache: Path, file: str) -> None:
    torch.manual_seed(1)
    source = timm.create_model("test_resnet")
    publish(cache, "timm/test_resnet.r160_in1k", source.state_dict(), file)
    wanted = section("test_resnet", "DEFAULT")
    torch.manual_seed(2)
    model = build_model(wanted, 10)
    before, drawn = state(model), torch.get_rng_state()
    heads = [name for name in before if name.startswith("fc.")]
    assert load_weights(model, wanted) == (
        f"model.weights: 2 of {len(before)} tensors start from scratch: fc.weight, fc.bias",
    )
    assert torch.equal(torch.get_rng_state(), drawn)
    assert "load_state_dict" not in vars(type(model))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name] if name in heads else source.state_dict()[name]), name


def test_with_the_original_classes_all_of_them_come(cache: Path) -> None:
    source = timm.create_model("test_resnet")
    publish(cache, "timm/test_resnet.r160_in1k", source.state_dict())
    wanted = section("test_resnet", "r160_in1k")
    model = build_model(wanted, 1000)
    assert load_weights(model, wanted) == ()
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_weights_are_fitted_to_other_sizes_and_channels_as_timm_does(cache: Path) -> None:
    source = timm.create_model("test_vit")
    publish(cache, "timm/test_vit.r160_in1k", source.state_dict())
    wanted = section("test_vit", "DEFAULT", img_size=64, in_chans=1)
    model = build_model(wanted, 10)
    load_weights(model, wanted)
    overlay = {"file": str(next(cache.rglob("model.safetensors")))}
    kwargs = {"img_size": 64, "in_chans": 1, "num_classes": 10}
    expected = timm.create_model("test_vit", pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).state_dict()
    assert expected["pos_embed"].shape != source.pos_embed.shape
    for name, tensor in model.state_dict().items():
        assert name.startswith("head.") or torch.equal(tensor, expected[name]), name


def test_weights_that_are_not_there_tell_where_they_were_looked_for_and_how_to_get_them(cache: Path) -> None:
    wanted = section("test_vit", "DEFAULT")
    with pytest.raises(RecipeValueError) as raised:
        load_weights(build_model(wanted, 10), wanted)
    assert str(raised.value) == (
        f"model.weights: 'DEFAULT' of timm/test_vit is not in '{cache}', and could not be fetched "
        "(LocalEntryNotFoundError); where there is a network, `hf download timm/test_vit.r160_in1k` puts it there, "
        "or give a file as model.checkpoint"
    )


def test_weights_of_another_network_are_one_line(cache: Path) -> None:
    publish(cache, "timm/test_vit.r160_in1k", {"only": torch.zeros(1)})
    wanted = section("test_vit", "DEFAULT")
    with pytest.raises(RecipeValueError, match=r"^model.weights: no tensor of 'DEFAULT' fits the model; remove it$"):
        load_weights(build_model(wanted, 10), wanted)
    publish(cache, "timm/test_resnet.r160_in1k", {"only": torch.zeros(1)})  # whose BatchNorm counts steps, too
    wanted = section("test_resnet", "DEFAULT")
    with pytest.raises(RecipeValueError, match=r"^model.weights: .*remove it$") as raised:
        load_weights(build_model(wanted, 10), wanted)
    assert "\n" not in str(raised.value)


def test_tensors_that_the_published_file_lacks_are_told(cache: Path) -> None:
    content = timm.create_model("test_vit").state_dict()
    del content["norm.weight"]
    publish(cache, "timm/test_vit.r160_in1k", content)
    wanted = section("test_vit", "DEFAULT")
    (note,) = load_weights(build_model(wanted, 10), wanted)
    assert note.endswith("tensors start from scratch: norm.weight, head.weight, head.bias")


def test_a_pickle_with_code_in_the_cache_is_not_run(cache: Path) -> None:
    publish(cache, "timm/test_vit.r160_in1k", {"a": Path()}, "pytorch_model.bin")  # type: ignore[dict-item]
    wanted = section("test_vit", "DEFAULT")
    with pytest.raises(RecipeValueError, match=r"^model.weights: .* holds more than plain tensors"):
        load_weights(build_model(wanted, 10), wanted)


@pytest.mark.parametrize(
    ("name", "weights", "says"),
    [
        ("test_vit", "r160", "timm/test_vit has no weights 'r160'; did you mean 'r160_in1k'?"),
        ("test_vit", "zzz", "timm/test_vit has no weights 'zzz'; DEFAULT, r160_in1k"),
        ("vit_base_patch16_224.mae", "augreg_in1k", "'augreg_in1k', but the name says 'mae'; say DEFAULT, or"),
        ("legacy_xception", "DEFAULT", "'DEFAULT' of timm/legacy_xception is not on the Hugging Face hub, but at http"),
    ],
)
def test_weights_that_timm_does_not_have(name: str, weights: str, says: str) -> None:
    assert f"model.weights: {says}" in problems(section(name, weights))[0]


@pytest.mark.parametrize(
    ("name", "weights", "kwargs", "expected"),
    [
        ("resnet10t", None, {}, ImageDefaults(176, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 3)),
        ("vit_tiny_patch16_224", None, {}, ImageDefaults(224, (0.5,) * 3, (0.5,) * 3, 3)),
        ("vit_tiny_patch16_224", None, {"img_size": 32}, ImageDefaults(32, (0.5,) * 3, (0.5,) * 3, 3)),
        ("vit_tiny_patch16_224", None, {"img_size": None}, ImageDefaults(224, (0.5,) * 3, (0.5,) * 3, 3)),
        ("vit_tiny_patch16_224", None, {"img_size": [32, 32]}, ImageDefaults(32, (0.5,) * 3, (0.5,) * 3, 3)),
        ("vit_tiny_patch16_224", None, {"img_size": [32, 48]}, ImageDefaults(None, (0.5,) * 3, (0.5,) * 3, 3)),
        # The published tags of one architecture differ.
        ("vit_base_patch16_224", "mae", {}, ImageDefaults(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 3)),
        (
            "vit_base_patch16_224.mae",
            "DEFAULT",
            {},
            ImageDefaults(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 3),
        ),
    ],
)
def test_images_are_those_of_timms_configuration(
    name: str, weights: str | None, kwargs: dict[str, Any], expected: ImageDefaults
) -> None:
    wanted = section(name, weights, **kwargs)
    assert find_builder(wanted).image_defaults(wanted) == expected
