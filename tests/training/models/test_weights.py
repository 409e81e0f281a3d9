"""Weights to start from: files and torchvision's."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import ResNet18_Weights, WeightsEnum, mobilenet_v3_large, resnet18, resnet50

from neq_cli.errors import NeqError
from neq_cli.recipe import ModelSection
from neq_cli.training.models.build import build_model
from neq_cli.training.models.weights import find_weights, load_weights


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(ModelSection(name="resnet8", kwargs={"width": 2}), 3)


def checkpoint(path: Path) -> ModelSection:
    return ModelSection(name="resnet8", checkpoint=str(path))


def same(first: nn.Module, second: nn.Module) -> bool:
    other = second.state_dict()
    return all(torch.equal(tensor, other[name]) for name, tensor in first.state_dict().items())


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_a_checkpoint_is_loaded(tmp_path: Path, suffix: str) -> None:
    source, target = small(1), small(2)
    path = tmp_path / f"weights{suffix}"
    save = save_file if suffix == ".safetensors" else torch.save
    save(source.state_dict(), path)
    assert not same(source, target)
    assert load_weights(target, checkpoint(path)) == ()
    assert same(source, target)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state, "epoch": 3},
        lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
        lambda state: {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
    ],
)
def test_what_training_scripts_wrap_weights_in_is_taken_off(tmp_path: Path, wrap: Any) -> None:
    source, target = small(1), small(2)
    torch.save(wrap(source.state_dict()), tmp_path / "w.pt")
    load_weights(target, checkpoint(tmp_path / "w.pt"))
    assert same(source, target)


def test_paths_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTS", str(tmp_path))
    torch.save(small(1).state_dict(), tmp_path / "w.pt")
    target = small(2)
    load_weights(target, ModelSection(name="resnet8", checkpoint="$WEIGHTS/w.pt"))
    assert same(small(1), target)


def test_a_checkpoint_that_does_not_fit_names_the_tensors(tmp_path: Path) -> None:
    state = dict(small(1).state_dict())
    state["fc.weight"] = torch.zeros(5, 8)
    state["extra"] = state.pop("bn1.weight")
    torch.save(state, tmp_path / "w.pt")
    target = small(2)
    with pytest.raises(NeqError) as raised:
        load_weights(target, checkpoint(tmp_path / "w.pt"))
    assert str(raised.value) == (
        f"model.checkpoint: '{tmp_path}/w.pt' does not fit the model: tensors 1 missing (bn1.weight); "
        "1 not in the model (extra); 1 of another shape (fc.weight [5, 8] for [3, 8])"
    )
    assert same(small(2), target)


def test_many_tensors_are_cut_short(tmp_path: Path) -> None:
    torch.save({"only": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(NeqError, match=r"missing \(conv1.weight, .* and \d+ more\); 1 not in the model \(only\)"):
        load_weights(small(), checkpoint(tmp_path / "w.pt"))


class Pickled:
    """Something that weights_only refuses."""


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("w.bin", None, "is none of .safetensors, .pt, .pth"),
        ("none.pt", None, "no file '"),
        ("w.pt", b"not a checkpoint", "model.checkpoint: '.*/w.pt' "),
        ("w.safetensors", b"short", "cannot be read \\(SafetensorError"),
        ("code.pt", Pickled(), "holds more than plain tensors, or is damaged; save a plain state_dict"),
        ("list.pt", [torch.zeros(1)], "holds no state_dict of tensors"),
        ("numbers.pt", {"a": 1}, "holds no state_dict of tensors"),
    ],
)
def test_unusable_files_are_one_line(tmp_path: Path, name: str, content: Any, says: str) -> None:
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / name)
    with pytest.raises(NeqError, match=says) as raised:
        load_weights(small(), checkpoint(tmp_path / name))
    assert "\n" not in str(raised.value)


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    state = resnet18().state_dict()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, *args, **kwargs: dict(state))
    return state


def test_torchvision_weights_go_where_they_fit_and_the_rest_is_told(published: dict[str, torch.Tensor]) -> None:
    section = ModelSection(name="resnet18", weights="DEFAULT")
    model = build_model(section, 10)
    own_head = model.fc.weight.clone()
    notes = load_weights(model, section)
    assert notes == ("model.weights: 2 of 122 tensors start from scratch: fc.weight, fc.bias",)
    assert torch.equal(model.fc.weight, own_head)
    for name, tensor in model.state_dict().items():
        assert name.startswith("fc.") or torch.equal(tensor, published[name])


def test_with_the_original_classes_all_of_them_fit(published: dict[str, torch.Tensor]) -> None:
    section = ModelSection(name="resnet18", weights="ResNet18_Weights.IMAGENET1K_V1")
    model = build_model(section, 1000)
    assert load_weights(model, section) == ()
    assert torch.equal(model.fc.weight, published["fc.weight"])


def test_no_weights_asked_for_nothing_happens() -> None:
    model = small(1)
    assert load_weights(model, ModelSection(name="resnet8")) == ()
    assert same(model, small(1))


def test_weights_are_found_by_name() -> None:
    assert find_weights(ModelSection(name="resnet18", weights="DEFAULT")) is ResNet18_Weights.IMAGENET1K_V1


@pytest.mark.parametrize(
    ("name", "weights", "says"),
    [
        ("resnet18", "IMAGENET1K_V9", "has no weights 'IMAGENET1K_V9'; did you mean 'IMAGENET1K_V1'\\?"),
        ("resnet18", "zzz", "resnet18 has no weights 'zzz'; IMAGENET1K_V1, DEFAULT"),
        ("resnet8", "DEFAULT", "resnet8 has no weights by name; give a file as model.checkpoint, or null"),
    ],
)
def test_unknown_weights_are_told(name: str, weights: str, says: str) -> None:
    with pytest.raises(NeqError, match="^model.weights: .*" + says):
        find_weights(ModelSection(name=name, weights=weights))


def test_a_failed_download_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise URLError("unreachable")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", fail)
    section = ModelSection(name="resnet18", weights="DEFAULT")
    with pytest.raises(
        NeqError,
        match=r"'DEFAULT' of resnet18 is not in '.*checkpoints', and could not be fetched \(URLError: .*unreachable"
        r".*\); where there is no network, put https://.*/resnet18-\w+\.pth into '.*checkpoints', or give a file",
    ):
        load_weights(build_model(section), section)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", full)
    with pytest.raises(
        NeqError, match=r"No space left on device\); set TORCH_HOME to a folder with room, or give a file"
    ):
        load_weights(build_model(section), section)


def test_tensors_named_fresh_keep_their_random_numbers(tmp_path: Path) -> None:
    source, target, before = small(1), small(2), small(2)
    state = {name: tensor for name, tensor in source.state_dict().items() if not name.startswith("fc")}
    torch.save(state | {"fc.weight": torch.zeros(9, 8)}, tmp_path / "w.pt")
    section = ModelSection(name="resnet8", checkpoint=str(tmp_path / "w.pt"), fresh=["fc.*"])
    assert load_weights(target, section) == ("model.fresh: 2 tensors start from scratch: fc.weight, fc.bias",)
    for name, tensor in target.state_dict().items():
        expected = before if name.startswith("fc") else source
        assert torch.equal(tensor, expected.state_dict()[name])


def test_a_head_is_fresh_though_published_weights_would_fit_it(monkeypatch: pytest.MonkeyPatch) -> None:
    section = ModelSection(name="resnet18", weights="DEFAULT", fresh=["fc.*"])
    torch.manual_seed(1)
    model, published = build_model(section), build_model(section).state_dict()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: published)
    head = model.fc.weight.detach().clone()
    (note,) = load_weights(model, section)
    assert note == "model.weights: 2 of 122 tensors start from scratch: fc.weight, fc.bias"
    assert torch.equal(model.fc.weight, head)
    assert not torch.equal(head, published["fc.weight"])
    assert torch.equal(model.conv1.weight, published["conv1.weight"])
    with pytest.raises(NeqError, match=r"^model.fresh: no tensor of the model matches 'head\.\*'"):
        load_weights(model, section.model_copy(update={"fresh": ["head.*"]}))


def test_a_glob_that_matches_nothing_is_told(tmp_path: Path) -> None:
    torch.save(small(1).state_dict(), tmp_path / "w.pt")
    section = ModelSection(name="resnet8", checkpoint=str(tmp_path / "w.pt"), fresh=["haed.*"])
    with pytest.raises(NeqError, match=r"^model.fresh: no tensor of the model matches 'haed\.\*'"):
        load_weights(small(2), section)


@pytest.mark.parametrize(
    ("name", "builder"), [("fcn_resnet50", resnet50), ("lraspp_mobilenet_v3_large", mobilenet_v3_large)]
)
def test_a_backbone_has_a_classifiers_weights(monkeypatch: pytest.MonkeyPatch, name: str, builder: Any) -> None:
    torch.manual_seed(3)
    classifier = builder(weights=None).state_dict()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: classifier)
    section = ModelSection(name=name, weights_backbone="DEFAULT")
    model = build_model(section, 5)
    head = {key: tensor.clone() for key, tensor in model.state_dict().items() if not key.startswith("backbone.")}
    assert load_weights(model, section) == ()
    for key, tensor in model.state_dict().items():
        stem = key.removeprefix("backbone.")
        expected = head[key] if key in head else classifier.get(stem, classifier.get(f"features.{stem}"))
        assert torch.equal(tensor, expected), key


@pytest.mark.parametrize(
    ("name", "weights", "says"),
    [
        ("resnet18", "DEFAULT", "resnet18 has no backbone of its own; remove it"),
        ("fcn_resnet50", "IMAGENET1K_V3", "fcn_resnet50's backbone has no weights 'IMAGENET1K_V3'; did you mean"),
    ],
)
def test_backbone_weights_that_cannot_be(name: str, weights: str, says: str) -> None:
    with pytest.raises(NeqError, match=says):
        load_weights(nn.Identity(), ModelSection(name=name, weights_backbone=weights))
