from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

from neq_cli import Freezer, Stochastic
from neq_cli.freezing.anatomy import Anatomy, anatomy_of
from neq_cli.freezing.backward.dispatch import Dispatch, Kernel, KernelChoice
from neq_cli.freezing.backward.sliced import BackwardMode
from neq_cli.freezing.flops import Flops
from neq_cli.training.models.cifar_resnet import cifar_resnet


def dense(anatomy: Anatomy) -> Flops:
    return anatomy.flops(dict.fromkeys(anatomy.neurons.layers, 1.0))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.grouped = nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2)
        self.spread = nn.LayerNorm((4, 8, 8))
        self.head = nn.Linear(256, 10)
        self.spare = nn.Linear(7, 7)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.relu(self.norm(self.conv(images)))
        return self.head(self.spread(self.up(self.grouped(hidden))).flatten(1))


# Multiply-adds of one forward pass on one 3x8x8 image.
CONV = 6 * 8 * 8 * (3 * 3 * 3)  # 6 x 8 x 8 outputs, each of 3 channels x 3 x 3
GROUPED = 8 * 4 * 4 * (3 * 3 * 3)  # 8 x 4 x 4 outputs, each of half of 6 channels
UP = 8 * 4 * 4 * (2 * 2 * 2)  # 8 x 4 x 4 inputs, each into half of 4 channels x 2 x 2
HEAD = 256 * 10
NORM, SPREAD = 2 * 6 * 8 * 8, 2 * 4 * 8 * 8  # two for each output element
BY_HAND = {"conv": CONV, "norm": NORM, "grouped": GROUPED, "up": UP, "spread": SPREAD, "head": HEAD, "spare": 0}


def test_paper_accounting_by_hand() -> None:
    assert (CONV, GROUPED, UP, HEAD, NORM, SPREAD) == (10368, 3456, 1024, 2560, 768, 512)
    flops = dense(anatomy_of(Small(), torch.randn(5, 3, 8, 8)))
    assert {name: layer.paper for name, layer in flops.layers.items()} == {n: 2 * cost for n, cost in BY_HAND.items()}
    assert flops.paper == flops.paper_dense == 2 * (10368 + 3456 + 1024 + 2560 + 768 + 512)


def test_executed_accounting_by_hand() -> None:
    flops = dense(anatomy_of(Small(), torch.randn(5, 3, 8, 8)))
    # The images need no gradient: the first convolution computes its weight's only.
    expected = {name: 2 * cost for name, cost in BY_HAND.items()} | {"conv": CONV}
    assert {name: layer.executed for name, layer in flops.layers.items()} == expected
    assert flops.other == 0
    assert flops.executed == flops.executed_dense == sum(expected.values())


def test_a_frozen_share_removes_that_share_of_the_layers_whole_cost() -> None:
    class Some:
        def choose(self, observations: Any, epoch: int) -> dict[str, Tensor]:
            return {
                "conv": torch.tensor([True, False, False, False, True, False]),
                "norm": torch.zeros(6, dtype=torch.bool),
                "up": torch.tensor([True, True, True, False]),
                "head": torch.zeros(10, dtype=torch.bool),  # the output layer: never heeded
            }

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: Any) -> None:
            pass

    net = Small()
    freezer = Freezer(net, torch.optim.SGD(net.parameters(), lr=0.1), [torch.randn(2, 3, 8, 8)], Some())
    before = freezer.flops()
    assert before.paper == before.paper_dense
    freezer.step()
    flops = freezer.flops()
    expected = {
        "conv": 2 * CONV * 2 / 6,
        "norm": 0,
        "grouped": 2 * GROUPED,
        "up": 2 * UP * 3 / 4,
        "spread": 2 * SPREAD,
        "head": 2 * HEAD,
        "spare": 0,
    }
    assert {name: layer.paper for name, layer in flops.layers.items()} == pytest.approx(expected)
    assert flops.paper == pytest.approx(sum(expected.values()))
    assert flops.paper_dense == before.paper_dense
    # Exact: the input gradients are whole, but for the images', and norm computes none of its own.
    executed = {
        "conv": CONV * 2 / 6,
        "norm": NORM,
        "grouped": 2 * GROUPED,
        "up": UP * (1 + 3 / 4),
        "spread": 2 * SPREAD,
        "head": 2 * HEAD,
        "spare": 0,
    }
    assert {name: layer.executed for name, layer in flops.layers.items()} == pytest.approx(executed)
    assert flops.executed == pytest.approx(sum(executed.values()))
    assert flops.executed_dense == before.executed == before.executed_dense
    trainable = freezer.trainable
    # Truncated: a frozen neuron computes no input gradient either; normalisation stays exact.
    truncated = freezer.anatomy.flops(trainable, "truncated")
    changed = {**executed, "up": UP * (3 / 4 + 3 / 4)}
    assert {name: layer.executed for name, layer in truncated.layers.items()} == pytest.approx(changed)
    # Dense computes everything and discards what is frozen.
    assert freezer.anatomy.flops(trainable, "dense").executed == flops.executed_dense
    assert truncated.paper == freezer.anatomy.flops(trainable, "dense").paper == flops.paper


def test_a_layer_called_twice_and_tokens_count_every_call_and_token() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.norm, self.head = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.norm(self.shared(self.shared(tokens))).mean(1))

    flops = dense(anatomy_of(Twice(), torch.randn(2, 5, 4)))
    assert flops.layers["shared"].paper == 2 * 2 * (5 * 4 * 4)
    assert flops.layers["norm"].paper == 2 * 2 * (5 * 4)
    assert flops.layers["head"].paper == 2 * 4 * 3


def test_attention_by_hand() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.attention(tokens, tokens, tokens)[0])

    flops = dense(anatomy_of(Attention(), torch.randn(2, 5, 8)))
    projections = 5 * 8 * 24, 5 * 8 * 8, 5 * 8 * 3
    assert flops.paper == 2 * sum(projections)  # the products of attention itself: 0
    products = 2 * (2 * 5 * 5 * 4)  # queries by keys, and weights by values: 2 heads, 5 x 5 pairs, 4 numbers each
    assert flops.other == 2 * products
    assert flops.executed == projections[0] + 2 * projections[1] + 2 * projections[2] + 2 * products


def test_layers_that_do_not_train_only_pass_the_error_on() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 2))
    net[0].requires_grad_(False)
    net[2].requires_grad_(False)
    flops = dense(anatomy_of(net, torch.randn(1, 4)))
    assert {name: layer.paper for name, layer in flops.layers.items()} == {"0": 0, "1": 60, "2": 0, "3": 28}
    # Below 1 nothing trains, so that neither 0 nor 1 computes an input gradient.
    assert {name: layer.executed for name, layer in flops.layers.items()} == {"0": 0, "1": 30, "2": 42, "3": 28}


class TransposedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 5, 3, stride=2), nn.Conv2d(5, 2, 1)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images)


COUNTED: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "convolutions": (TransposedNet, 8),
    "resnet": (lambda: cifar_resnet(8), 32),
    "vit": (lambda: VisionTransformer(16, 4, 2, 2, 12, 24, num_classes=5), 16),
    "swin": (lambda: SwinTransformer([2, 2], 8, [2], [2], [2, 2], num_classes=5), 16),
}


@pytest.mark.parametrize("fixed", ["nothing", "front", "middle", "weights", "biases"])
@pytest.mark.parametrize("name", COUNTED)
def test_executed_agrees_with_torchs_counter(name: str, fixed: str) -> None:
    make, size = COUNTED[name]
    net = make()
    parameters = dict(net.named_parameters())
    names = list(parameters)
    for parameter in {
        "nothing": [],
        "front": names[: len(names) // 2],
        "middle": names[len(names) // 2 : 2 * len(names) // 3],
        "weights": [key for key in names if key.endswith("weight")],
        "biases": [key for key in names if key.endswith("bias")],
    }[fixed]:
        parameters[parameter].requires_grad_(False)
    anatomy = anatomy_of(net, torch.randn(3, 3, size, size))
    flops = dense(anatomy)
    kinds = {**anatomy.neurons.layers, **anatomy.neurons.fixed}
    ours = sum(layer.executed for name, layer in flops.layers.items() if kinds[name].cost != "norm") + flops.other
    with sdpa_kernel(SDPBackend.MATH):
        loss = net.eval()(torch.randn(1, 3, size, size)).sum()
        with FlopCounterMode(display=False) as counter:
            loss.backward()
    assert ours == counter.get_total_flops() / 2  # it counts a multiply-add as two


# While neurons are frozen.


class Sliced(Dispatch):
    """Computes the trainable rows and no others."""

    def choose(self, kind: str, kernels: Sequence[Kernel], run: Callable[[Kernel], object], *_: Any) -> KernelChoice:
        return KernelChoice("sliced", {})


class Share:
    """Freezes this share of the neurons of the layers that ``chosen`` picks, the last ones of each."""

    def __init__(self, share: float, chosen: Callable[[str], bool] = lambda name: True) -> None:
        self.share, self.chosen = share, chosen

    def choose(self, observations: Mapping[str, Any], epoch: int) -> dict[str, Tensor]:
        counts = {name: len(seen.trainable) for name, seen in observations.items() if self.chosen(name)}
        return {name: torch.arange(count) < round(count * (1 - self.share)) for name, count in counts.items()}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        pass


class Segmenter(nn.Module):
    """An encoder, a decoder, and the connections between them."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.norm, self.dilated = nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, padding=2, dilation=2)
        self.up, self.mix, self.head = nn.ConvTranspose2d(16, 8, 2, stride=2), nn.Conv2d(16, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        first = torch.relu(self.down(images))
        deep = torch.relu(self.dilated(torch.relu(self.norm(self.deep(first)))))
        return self.head(torch.relu(self.mix(torch.cat([first, self.up(deep)], 1))))


def fcn() -> nn.Module:
    class Logits(nn.Module):
        """The counter sees one tensor; the auxiliary head's is added."""

        def __init__(self) -> None:
            super().__init__()
            build = torchvision.models.segmentation.fcn_resnet50
            self.inner = build(weights=None, weights_backbone=None, num_classes=4, aux_loss=True)

        def forward(self, images: Tensor) -> Tensor:
            outputs = self.inner(images)
            return outputs["out"] + outputs["aux"]

    return Logits()


FROZEN_MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "convolutions": (TransposedNet, 8),
    "resnet": (lambda: cifar_resnet(8), 32),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=5), 64),
    "vit": (COUNTED["vit"][0], 16),
    "swin": (COUNTED["swin"][0], 16),
    "segmenter": (Segmenter, 16),
    "fcn": (fcn, 32),
}


def counted(model: nn.Module, images: Tensor) -> float:
    """Return the multiply-adds of a real backward pass, as PyTorch's counter sees them, two FLOPs each."""
    with sdpa_kernel(SDPBackend.MATH):
        loss = model(images).sum()
        with FlopCounterMode(display=False) as counter:
            loss.backward()
    return counter.get_total_flops() / 2


def executed(freezer: Freezer) -> float:
    """Return what we count, without normalisation, which the counter does not see."""
    flops, layers = freezer.flops(), {**freezer.anatomy.neurons.layers, **freezer.anatomy.neurons.fixed}
    return sum(one.executed for name, one in flops.layers.items() if layers[name].cost != "norm") + flops.other


def with_frozen(model: nn.Module, size: int, policy: Any, mode: BackwardMode) -> Freezer:
    images = torch.randn(1, 3, size, size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freezer = Freezer(model.eval(), optimizer, [images], policy, backward=mode, dispatch=Sliced())
    freezer.step()
    return freezer


@pytest.mark.parametrize("mode", ["exact", "truncated", "dense"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", FROZEN_MODELS)
def test_what_is_executed_while_neurons_are_frozen(name: str, share: float, mode: BackwardMode) -> None:
    make, size = FROZEN_MODELS[name]
    model = make()
    freezer = with_frozen(model, size, Share(share), mode)
    before = executed(freezer)
    really = counted(model, torch.randn(1, 3, size, size))
    if (name, share, mode) == ("swin", 1.0, "exact"):
        # Only a position table asks for gradients of the first attention, and for one of its products' four: that is
        # not counted. 16 windows of 4 tokens, 2 heads: the attention weights' gradient, from values of 4 numbers.
        really -= 16 * 2 * (4 * 4) * 4
    assert really == pytest.approx(before)
    assert executed(freezer) == pytest.approx(before)  # the trainable rows were computed, as announced
    flops = freezer.flops()
    if mode == "dense" or share == 0.0:
        assert flops.executed == flops.executed_dense
    else:
        assert flops.executed < flops.executed_dense


@pytest.mark.parametrize("mode", ["exact", "truncated"])
@pytest.mark.parametrize("first", [1, 3, 6, 9])
@pytest.mark.parametrize("name", ["resnet", "segmenter", "vit"])
def test_a_frozen_prefix(name: str, first: int, mode: BackwardMode) -> None:
    """No input gradient is computed below the trainable parameter nearest the input, and none is counted."""
    make, size = FROZEN_MODELS[name]
    model = make()
    order = anatomy_of(make(), torch.randn(1, 3, size, size)).trace.order
    freezer = with_frozen(model, size, Share(1.0, lambda layer: layer in order[:first]), mode)
    assert counted(model, torch.randn(1, 3, size, size)) == pytest.approx(executed(freezer))
    flops = freezer.flops()
    frozen = [layer for layer in order[:first] if not freezer.trainable[layer].any()]
    # A vision transformer's class token lies after its first convolution only: all blocks pass errors on to it.
    reached = frozen[1:] if name == "vit" and mode == "exact" else []
    for layer in frozen:
        assert bool(flops.layers[layer].executed) == (layer in reached), layer


@pytest.mark.parametrize("layer", ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.1.conv1", "layer3.0.conv2"])
def test_blocked_layers_cut_off_what_lies_below(layer: str) -> None:
    model = cifar_resnet(14)
    freezer = with_frozen(model, 32, Share(1.0, lambda name: name == layer), "truncated")
    assert counted(model, torch.randn(1, 3, 32, 32)) == pytest.approx(executed(freezer))
    assert freezer.flops().layers[layer].executed == 0


def test_rows_that_were_computed_count_not_those_that_train() -> None:
    class Rounded(Dispatch):
        def choose(
            self, kind: str, kernels: Sequence[Kernel], run: Callable[[Kernel], object], *_: Any
        ) -> KernelChoice:
            return KernelChoice("rounded", {})

    model = nn.Sequential(nn.Conv2d(3, 40, 3), nn.Flatten(), nn.Linear(40 * 16, 2))
    images = torch.randn(1, 3, 6, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freezer = Freezer(model, optimizer, [images], Share(0.75), dispatch=Rounded())
    freezer.step()
    cost = 40 * 4 * 4 * 27  # the images need no gradient: the weight's only
    assert freezer.flops().layers["0"].executed == cost * 10 / 40  # 10 neurons train
    counted_flops = counted(model, images)
    assert freezer.flops().layers["0"].executed == cost * 16 / 40  # 16 rows were computed
    assert executed(freezer) == counted_flops
    freezer.policy = Share(0.5)
    freezer.step()
    assert freezer.flops().layers["0"].executed == cost * 20 / 40  # not known yet


# The paper's Table 2.


def on_meta(build: Callable[..., nn.Module], size: int, **arguments: Any) -> Anatomy:
    with torch.device("meta"):
        return anatomy_of(build(**arguments), torch.empty(1, 3, size, size))


MODELS: dict[str, tuple[Callable[[], Anatomy], str]] = {
    "ResNet-32": (lambda: on_meta(cifar_resnet, 32, depth=32), "138.94M"),
    "ResNet-18": (lambda: on_meta(torchvision.models.resnet18, 224), "3.64G"),
    "Swin-B": (lambda: on_meta(torchvision.models.swin_b, 224), "30.28G"),
    "ViT-B/16": (lambda: on_meta(torchvision.models.vit_b_16, 224), "33.71G"),
    "DeepLabv3-ResNet50": (
        lambda: on_meta(
            torchvision.models.segmentation.deeplabv3_resnet50,
            480,
            weights_backbone=None,
            num_classes=21,
            aux_loss=True,
        ),
        "305.06G",
    ),
}


def printed(flops: float) -> str:
    return f"{flops / 1e9:.2f}G" if flops >= 1e9 else f"{flops / 1e6:.2f}M"


@pytest.mark.parametrize("name", MODELS)
def test_dense_models_cost_what_the_paper_says(name: str) -> None:
    make, expected = MODELS[name]
    flops = dense(make())
    assert printed(flops.paper) == expected
    assert flops.paper == flops.paper_dense


@pytest.mark.parametrize(("p", "expected"), [(0.2, "112.99M"), (0.5, "69.75M")])
def test_stochastic_freezing_of_resnet32_costs_what_the_paper_says(p: float, expected: str) -> None:
    # What 250 epochs have in force: all neurons in epoch 1; then all but int(p n) of every layer's n, and all of the
    # output layer's.
    anatomy = MODELS["ResNet-32"][0]()
    shares = {name: 1 - int(p * layer.neurons) / layer.neurons for name, layer in anatomy.neurons.layers.items()}
    shares["fc"] = 1.0
    assert list(anatomy.never_frozen) == ["fc"]
    mean = (dense(anatomy).paper + 249 * anatomy.flops(shares).paper) / 250
    assert printed(mean) == expected


def test_a_freezer_with_the_stochastic_policy_has_the_same_in_force() -> None:
    net = cifar_resnet(32)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    freezer = Freezer(net, optimizer, [torch.randn(1, 3, 32, 32)], Stochastic(0.5))
    anatomy = MODELS["ResNet-32"][0]()
    shares = {name: 1 - int(0.5 * layer.neurons) / layer.neurons for name, layer in anatomy.neurons.layers.items()}
    assert printed(freezer.flops().paper) == "138.94M"  # epoch 1
    freezer.step()
    assert freezer.flops().paper == pytest.approx(anatomy.flops({**shares, "fc": 1.0}).paper)
    frozen = {name: int((~trainable).sum()) for name, trainable in freezer.trainable.items()}
    assert frozen == {name: 0 if name == "fc" else layer.neurons // 2 for name, layer in freezer.layers.items()}


def test_auxiliary_heads_that_train_are_counted_also_where_eval_mode_skips_them() -> None:
    with_heads, without = (
        on_meta(torchvision.models.googlenet, 224, init_weights=False, aux_logits=auxiliary)
        for auxiliary in (True, False)
    )
    # Each: 1x1 convolution to 128 channels at 4x4 with its batch norm, 2048 -> 1024 and 1024 -> 1000.
    by_hand = sum(2 * (16 * 128 * channels + 2 * 16 * 128 + 2048 * 1024 + 1024 * 1000) for channels in (512, 528))
    assert dense(with_heads).paper - dense(without).paper == by_hand


def test_the_forward_pass_in_multiply_adds() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(96, 3)
    )
    # 3x3 kernels over 1 and 4 channels, at 6x6 and 4x4 positions; 2 for each of 4x6x6 normalised elements; 96x3.
    assert dense(anatomy_of(net, torch.zeros(1, 1, 6, 6))).forward == 4 * 36 * 9 + 2 * 4 * 36 + 6 * 16 * 36 + 96 * 3


def test_attentions_products_belong_to_the_forward_pass() -> None:
    attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    tokens, width = 5, 8
    linear = tokens * (3 * width * width + width * width + 2 * width * 16) + 2 * 2 * tokens * width
    products = 2 * tokens * tokens * width
    assert dense(anatomy_of(attention, torch.zeros(1, tokens, width))).forward == linear + products


class OfAList(nn.Module):
    """Takes images that differ in size."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 2)

    def forward(self, images: list[Tensor]) -> Tensor:
        return torch.stack([self.last(self.first(image[None]).mean((2, 3))[0]) for image in images])


def test_flops_are_those_of_the_sample_given() -> None:
    model = OfAList()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    items = [([torch.rand(3, 8, 8), torch.rand(3, 6, 10)], [0, 1])]
    sample = ([torch.rand(3, 5, 4)], [0])
    freezer = Freezer(model, optimizer, items, call=lambda model, item: model(item[0]), sample=sample)
    # A multiply-add each for 4 x 27 weights at 5 x 4 places, and 4 x 2; twice that is back-propagation.
    assert freezer.flops().paper_dense == 2 * (4 * 27 * 20 + 8)
    freezer.step()
    assert freezer.flops().paper_dense == 2 * (4 * 27 * 20 + 8)
