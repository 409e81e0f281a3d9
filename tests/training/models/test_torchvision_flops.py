"""`neq flops` of every model that torchvision lists: a count, or one line that says why there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from neq_cli.errors import NeqError
from neq_cli.freezing.anatomy import anatomy_of
from neq_cli.recipe import Recipe
from neq_cli.recipe.keys import ModelSection
from neq_cli.training.estimate import estimate_flops
from neq_cli.training.models.build import build_model, build_on_meta, find_builder

NAMES = torchvision.models.list_models()
KINDS = {name: torchvision.models.get_model_builder(name).__module__.split(".")[2] for name in NAMES}
REFUSALS = {
    "detection": "detects objects; take it by model.entrypoint, with a task, as the recipe 'detection' does",
    "video": "takes clips, and recipes train on images; in a training loop of your own, Freezer takes it",
    "optical_flow": "takes pairs of images, and recipes train on single ones",
    "quantization": "is made for inference with integers; take the model without 'quantized_'",
}
COUNTED = [name for name in NAMES if KINDS[name] not in REFUSALS]
# One of each family, and all RegNets; the others with `pytest -m slow`.
QUICK = {
    *(name for name in NAMES if name.startswith("regnet")),
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "mnasnet0_5",
    "mobilenet_v2", "mobilenet_v3_small", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "vgg11",
    "vit_b_32", "lraspp_mobilenet_v3_large",
}  # fmt: skip
SIZES = {"inception_v3": 299}


def recipe_of(name: str) -> Recipe:
    values: dict[str, Any] = {
        "model": {"name": name},
        "data": {"name": "image_folder", "image_size": SIZES.get(name, 224)},
        "epochs": 1,
        "batch_size": 8,
        "optimizer": {"name": "sgd", "lr": 0.1},
        "policy": {"kind": "baseline"},
    }
    if KINDS[name] == "segmentation":
        values |= {"task": "segmentation"}
        values["data"] |= {"name": "segmentation_folder", "kwargs": {"num_classes": 21}}
    return Recipe.model_validate(values)


def counted_by_hand(model: nn.Module, inputs: Tensor) -> int | None:
    """Return the paper's FLOPs from what modules put out; None where parameters are used otherwise than by modules.

    Twice the multiply-adds, weights times output elements, and four for each output element of a norm.
    """
    total = 0

    def count(module: nn.Module, arguments: Any, output: Tensor) -> None:
        nonlocal total
        norm = isinstance(module, nn.BatchNorm2d)
        total += output.numel() * (4 if norm else 2 * module.weight[0].numel())

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
            module.register_forward_hook(count)
        elif any(True for _ in module.parameters(recurse=False)):
            return None
        if isinstance(module, (nn.BatchNorm2d, nn.Dropout)):
            module.eval()  # one sample is enough then
    model(inputs)
    return total


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in COUNTED])
def test_every_model_that_recipes_train_is_counted(name: str) -> None:
    estimate = estimate_flops(recipe_of(name))
    assert estimate.flops_executed > 0
    assert estimate.flops_paper == sum(layer["flops_paper"] for layer in estimate.layers.values())
    size = SIZES.get(name, 224)
    with torch.device("meta"):
        model = build_on_meta(recipe_of(name).model, 21 if KINDS[name] == "segmentation" else None)
        by_hand = counted_by_hand(model.train(), torch.empty(1, 3, size, size))
    assert by_hand in (None, estimate.flops_paper)
    assert by_hand is not None or not name.startswith(("regnet", "resnet", "densenet", "googlenet", "mobilenet"))


@pytest.mark.parametrize("name", [name for name in NAMES if KINDS[name] in REFUSALS])
def test_every_other_model_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(NeqError) as error:
        estimate_flops(recipe_of(name))
    assert str(error.value) == f"model.name: '{name}' {REFUSALS[KINDS[name]]}"


def test_no_kind_of_model_is_left_out() -> None:
    assert set(KINDS.values()) >= set(REFUSALS)
    assert len(COUNTED) >= 86
    for name in COUNTED:
        find_builder(ModelSection(name=name))


@pytest.mark.parametrize("name", [name for name in NAMES if KINDS[name] == "video"])
def test_a_freezer_takes_what_takes_clips(name: str) -> None:
    """As the line says that refuses them in recipes."""
    shape = (16, 112, 112) if name.endswith("_18") else (16, 224, 224)
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None)
        anatomy = anatomy_of(model, torch.empty(1, 3, *shape))
    assert 1 <= len(anatomy.never_frozen) <= 2
    assert anatomy.flops(dict.fromkeys(anatomy.neurons.layers, 1.0)).paper > 1e9


class Tied(nn.Module):
    """Reads a weight while it is built, and has one twice."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        weight = nn.Parameter(torch.randn(4, 4))
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.first.weight = weight
        self.second.weight = weight
        self.head = nn.Linear(4, num_classes)
        self.rates = [rate.item() for rate in torch.linspace(0, 1, 3)]
        self.register_buffer("table", torch.arange(4).float())

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.second(self.first(images.flatten(1)[:, :4] + self.table)))


class ReadsWeights(Tied):
    def __init__(self, num_classes: int = 3) -> None:
        super().__init__(num_classes)
        self.largest = self.head.weight.max().item()


@pytest.mark.parametrize("kind", ["Tied", "ReadsWeights"])
def test_a_model_without_numbers_is_that_model(kind: str) -> None:
    section = ModelSection(entrypoint=f"{__name__}:{kind}")
    state = torch.get_rng_state()
    model = build_on_meta(section, 5)
    if kind == "Tied":
        assert torch.equal(state, torch.get_rng_state())
    assert model.first.weight is model.second.weight
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    expected = {name: (p.shape, p.requires_grad) for name, p in build_model(section, 5).named_parameters()}
    assert {name: (p.shape, p.requires_grad) for name, p in model.named_parameters()} == expected
    assert not nn.Linear(2, 2).weight.is_meta  # nothing stays behind
