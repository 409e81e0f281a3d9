from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import Inception3, MaxVit, VisionTransformer
from torchvision.models.inception import BasicConv2d
from torchvision.models.inception import InceptionA as A
from torchvision.models.inception import InceptionAux as Auxiliary
from torchvision.models.inception import InceptionB as B
from torchvision.models.inception import InceptionC as C
from torchvision.models.inception import InceptionD as D
from torchvision.models.inception import InceptionE as E

from neq_cli import Freezer, Stochastic

NAMES = torchvision.models.list_models(module=torchvision.models)
# The cheapest model of every family, in every test run; all of them with `pytest -m slow`.
CHEAPEST = {
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "resnet18",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
    "vgg11",
    "vit_b_32",
}
# Pixels of a side: the least that each family takes in training mode, auxiliary heads included; 32 where not listed.
SIZES = {"alexnet": 64, "googlenet": 64, "inception_v3": 299, "maxvit_t": 224, "squeezenet1_0": 64, "squeezenet1_1": 64}


def build(name: str) -> tuple[nn.Module, int]:
    size = SIZES.get(name, 32)
    arguments: dict[str, Any] = {"weights": None, "num_classes": 5}
    if name.startswith("vit_"):
        size = arguments["image_size"] = 2 * int(name.rpartition("_")[2])  # four patches
    if name in ("googlenet", "inception_v3"):
        arguments["init_weights"] = False  # minutes of SciPy
    return torchvision.models.get_model(name, **arguments), size


def build_narrowed(name: str) -> tuple[nn.Module, int]:
    """Build a model with all its layers; where nearly all time goes into their width or the images', narrower ones."""
    if name not in ("alexnet", "inception_v3", "maxvit_t", "vgg11", "vit_b_32"):
        return build(name)
    size = SIZES.get(name, 64)
    if name == "vit_b_32":
        return VisionTransformer(size, 32, 12, 12, 96, 128, num_classes=5), size
    if name == "maxvit_t":
        size, channels = 64, [16, 32, 64, 128]
        return MaxVit((size, size), 16, 2, channels, [2, 2, 5, 2], 16, 0.2, num_classes=5), size
    with torch.device("meta"):
        if name == "inception_v3":
            blocks = [partial(block, conv_block=Narrow) for block in (A, B, C, D, E, Auxiliary)]
            model = Inception3(5, inception_blocks=[Narrow, *blocks], init_weights=False)
            model.fc, model.AuxLogits.fc = nn.Linear(256, 5), nn.Linear(96, 5)
        else:  # their linear layers hold nine tenths of the weights, half a gigabyte
            model, size = build(name)
            linear = [number for number, layer in enumerate(model.classifier) if isinstance(layer, nn.Linear)]
            inputs = model.classifier[linear[0]].in_features
            for number, width in zip(linear, (24, 16, 5), strict=True):
                model.classifier[number] = nn.Linear(inputs, width)
                inputs = width
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, -0.1, 0.1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    return model, size


class Narrow(BasicConv2d):
    """A convolution of Inception with an eighth of the channels."""

    def __init__(self, inputs: int, outputs: int, **options: Any) -> None:
        super().__init__(inputs if inputs == 3 else inputs // 8, outputs // 8, **options)


def layers_by_hand(model: nn.Module) -> dict[str, list[str]]:
    """Return the layers and their parameters; in all of these models neurons run along dimension 0."""
    layers: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        own = [f"{name}.{key}" for key, _ in module.named_parameters(recurse=False)]
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.LayerNorm)) and own:
            layers[name] = own
        elif isinstance(module, nn.MultiheadAttention):
            layers[f"{name}.in_proj"] = own
        # Scales of channels, and of attention heads, by hand.
        layers |= {one: [one] for one in own if one.endswith((".layer_scale", ".logit_scale"))}
    return layers


def tensors_in(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else [value for value in outputs if isinstance(value, Tensor)]


def assert_half_of_every_layer_freezes(model: nn.Module, size: int) -> None:
    parameters = dict(model.named_parameters())
    layers = layers_by_hand(model)
    # Weight decay moves every weight that is not held, also where an untrained network passes no gradient on.
    # One parameter at a time: foreach would hold a second gradient of the largest models.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1, foreach=False)
    freezer = Freezer(model, optimizer, [torch.randn(2, 3, size, size)], Stochastic(0.5))
    assert {layer: found.neurons for layer, found in freezer.layers.items()} == {
        layer: len(parameters[own[0]]) for layer, own in layers.items()
    }
    assert set(freezer.anatomy.neurons.outside) == set(parameters) - {own for names in layers.values() for own in names}
    assert not freezer.anatomy.neurons.fixed
    flops = freezer.flops()
    assert 0 < flops.paper == flops.paper_dense

    observations = freezer.step()
    always = set(freezer.anatomy.never_frozen)
    assert 1 <= len(always) < 12  # the output layer, and auxiliary heads
    for layer, seen in observations.items():
        assert int((~seen.trainable).sum()) == (0 if layer in always else len(seen.trainable) // 2), layer
        # Nothing was trained yet: every neuron the probe reaches is what it was.
        assert layer in always or torch.allclose(seen.phi, torch.ones_like(seen.phi)), layer

    before = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    model.train()
    sum(output.float().square().mean() for output in tensors_in(model(torch.randn(2, 3, size, size)))).backward()
    gradients = {own[0]: parameters[own[0]].grad for own in layers.values()}
    optimizer.step()
    for layer, own in layers.items():
        trainable = observations[layer].trainable
        for key in own:
            changed = (parameters[key] != before[key]).flatten(1) if parameters[key].dim() > 1 else None
            rows = (parameters[key] != before[key]) if changed is None else changed.any(1)
            assert not rows[~trainable].any(), key
            if key == own[0]:
                update = 0.1 * (gradients[key] + 0.1 * before[key])
                # By chance a gradient may just undo the decay.
                moving = (update.abs() > 1e-6).reshape(len(update), -1).any(1)
                assert rows[trainable & moving].all(), key
    assert freezer.flops().paper < flops.paper


def gradients(model: nn.Module, images: Tensor) -> dict[str, Tensor | None]:
    torch.manual_seed(0)  # dropout and stochastic depth
    sum(output.square().mean() for output in tensors_in(model(images))).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


class Plain:
    """A model in double precision, a batch, and its gradients by PyTorch alone: with them go those by each kernel."""

    def __init__(self, name: str) -> None:
        model, size = build_narrowed(name)
        self.model = model.double()
        # One batch through both: nothing but the order of sums may differ.
        self.images = torch.randn(2, 3, size, size, dtype=torch.float64)
        self.dense = gradients(copy.deepcopy(model).train(), self.images)


@pytest.fixture(scope="module")
def plain(request: pytest.FixtureRequest) -> Plain:
    return Plain(request.param)


def assert_gradients_are_the_plain_ones(plain: Plain, kernel: str) -> None:
    model, dense = plain.model, plain.dense
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freezer = Freezer(model, optimizer, [plain.images[:1]], Stochastic(0.5))
    freezer.step()
    found = gradients(model.train(), plain.images)
    frozen = {own: layer for layer, names in layers_by_hand(model).items() for own in names}
    largest = max(float(gradient.abs().max()) for gradient in dense.values() if gradient is not None)
    for name, expected in dense.items():
        if expected is None:  # no batch reaches it
            assert found[name] is None
            continue
        own = found[name]
        if name in frozen:
            trainable = freezer.trainable[frozen[name]]
            assert not own[~trainable].any(), name
            own, wanted = own[trainable], expected[trainable]
        else:
            wanted = expected
        # Sums of up to 2^16 terms. A bias before a normalisation has a gradient of nothing but rounding.
        bound = 2**16 * torch.finfo(torch.float64).eps * (float(expected.abs().max()) + 1e-3 * largest)
        assert (own - wanted).abs().max() <= bound, name
    for name, use in freezer.kernels().items():
        norm = freezer.layers[name].cost == "norm"
        assert use.kernel in ({"dense"} if norm else {kernel, "sliced"}), (name, use)
    freezer.detach()


def test_the_cheapest_models_are_of_all_families() -> None:
    families = {torchvision.models.get_model_builder(name).__module__ for name in NAMES}
    assert len(CHEAPEST) == len(families)
    assert {torchvision.models.get_model_builder(name).__module__ for name in CHEAPEST} == families


@pytest.mark.parametrize("name", sorted(CHEAPEST))
def test_one_model_of_every_family(name: str) -> None:
    assert_half_of_every_layer_freezes(*build_narrowed(name))


# MNASNet has MobileNet's kinds of layers and VGG AlexNet's.
QUICK = {"alexnet", "mobilenet_v3_small", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1"}


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("plain", sorted(QUICK), indirect=True)
def test_gradients_by_each_kernel(plain: Plain, kernel: str) -> None:
    assert_gradients_are_the_plain_ones(plain, kernel)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("plain", sorted(CHEAPEST - QUICK), indirect=True)
def test_gradients_of_every_family(plain: Plain, force: Callable[[str], None]) -> None:
    force("sliced")
    assert_gradients_are_the_plain_ones(plain, "sliced")


@pytest.mark.slow
@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("plain", sorted(CHEAPEST - QUICK), indirect=True)
def test_gradients_of_every_family_by_each_kernel(plain: Plain, kernel: str) -> None:
    assert_gradients_are_the_plain_ones(plain, kernel)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_model(name: str) -> None:
    torch.set_num_threads(2)
    assert_half_of_every_layer_freezes(*build(name))
    gc.collect()  # the largest take most of 16 GB
