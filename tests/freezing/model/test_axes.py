"""Axes that a layer's class chooses for itself: found whatever its neurons happen to put out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d

from neq_cli import Baseline, Freezer
from neq_cli.freezing.anatomy import anatomy_of


class Shifted(nn.Linear):
    """Takes more than its input."""

    def forward(self, inputs: Tensor, shift: float) -> Tensor:
        return super().forward(inputs) + shift


class Mixed(nn.Linear):
    """Puts out a mixture of its neurons."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs).softmax(-1)


class Transposing(nn.LayerNorm):
    """Normalises over channels and puts out [samples, channels, positions], as channels-first code does."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs.transpose(1, 2)).transpose(1, 2)


class Standardised(nn.Conv2d):
    """The same axis as ever, from a weight that it changes first."""

    def forward(self, inputs: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(inputs, weight, self.bias)


class NormAndActivation(nn.BatchNorm2d):
    """Normalisation and activation in one."""

    def __init__(self, channels: int, activation: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__(channels)
        self.activation = activation

    def forward(self, inputs: Tensor) -> Tensor:
        return self.activation(super().forward(inputs))


class NormAndActivation1d(nn.BatchNorm1d):
    def forward(self, inputs: Tensor) -> Tensor:
        return torch.relu(super().forward(inputs))


class OverSeveralDimensions(nn.LayerNorm):
    def forward(self, inputs: Tensor) -> Tensor:
        return torch.relu(super().forward(inputs))


class Upwards(nn.ConvTranspose2d):
    """Its neurons run along dimension 1 of its weight, group by group."""

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.relu(super().forward(inputs))


class LowRank(nn.Linear):
    """More parameters than a neuron's own, every row of which reaches all neurons."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) + inputs @ self.down.T @ self.up.T


class Silent(nn.Linear):
    """Puts out nothing at all."""

    def forward(self, inputs: Tensor) -> Tensor:
        return 0 * super().forward(inputs)


class Logarithm(nn.Linear):
    """Takes positive inputs only."""

    def forward(self, inputs: Tensor) -> Tensor:
        if bool((inputs <= 0).any()):
            raise ValueError("must be positive")
        return super().forward(inputs.log())


def test_axes_found_by_experiment() -> None:
    cases: list[tuple[nn.Module, tuple[int, ...], int | None]] = [
        (LayerNorm2d(4), (4, 4, 4), -3),
        (Transposing(5), (5, 5), -2),
        (Standardised(2, 3, 1), (2, 4, 4), -3),
        (Mixed(4, 3), (4,), None),
    ]
    for module, shape, axis in cases:
        net = nn.Sequential(module)
        before = [parameter.detach().clone() for parameter in net.parameters()]
        anatomy = anatomy_of(net, torch.randn(2, *shape))
        assert anatomy.trace.axes == {"0": axis}, module
        if axis is not None:
            assert (anatomy.neurons.layers["0"].axis, anatomy.neurons.layers["0"].axis_dimensions) == (axis, 1)
        assert all(torch.equal(old, new) for old, new in zip(before, net.parameters(), strict=True))
        assert all(isinstance(parameter, nn.Parameter) for parameter in net[0]._parameters.values())


def test_layers_whose_axis_is_unknown_never_freeze() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shifted, self.mixed, self.head = Shifted(4, 4), Mixed(4, 4), nn.Linear(4, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.head(self.mixed(self.shifted(inputs, 0.5)))

    anatomy = anatomy_of(Net(), torch.randn(2, 4))
    assert set(anatomy.never_frozen) == {"shifted", "mixed", "head"}
    assert "axis" in anatomy.never_frozen["shifted"]
    assert anatomy.never_frozen["head"] == "output layer"


def test_the_experiment_is_not_counted() -> None:
    # 2 inputs x 3 outputs x 16 positions; nothing else multiplies.
    trace = anatomy_of(nn.Sequential(Standardised(2, 3, 1)), torch.randn(2, 2, 4, 4)).trace
    assert trace.multiply_adds == {"0": 96}
    assert trace.products == {}


@pytest.mark.parametrize(
    ("make", "shape", "expected"),
    [
        (lambda: NormAndActivation(4), (4, 4, 4), (1, 1)),
        (lambda: NormAndActivation(4), (4, 1, 1), (1, 1)),
        (lambda: NormAndActivation(1), (1, 1, 1), (1, 1)),
        (lambda: NormAndActivation1d(5), (5,), (1, 1)),
        (lambda: NormAndActivation1d(5), (5, 5), (1, 1)),
        (lambda: OverSeveralDimensions((3, 4)), (2, 3, 4), (-2, 2)),
        (lambda: LayerNorm2d(4), (4, 1, 1), (-3, 1)),
        (lambda: LayerNorm2d(4), (4, 2, 4), (-3, 1)),
        (lambda: Upwards(4, 6, 2, groups=2), (4, 3, 3), (-3, 1)),
        (lambda: Upwards(6, 6, 1, bias=False), (6, 6, 6), (-3, 1)),
        (lambda: Standardised(2, 3, 1, bias=False), (2, 3, 3), (-3, 1)),
        (lambda: LowRank(4, 3), (4,), (-1, 1)),
        (lambda: LowRank(4, 3), (3, 4), (-1, 1)),
        (lambda: Silent(4, 3), (3, 4), (-1, 1)),
    ],
)
def test_axes_of_layers_of_all_kinds(make: Callable[[], nn.Module], shape: tuple[int, ...], expected: Any) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        layer = anatomy_of(nn.Sequential(make()), torch.randn(2, *shape)).neurons.layers["0"]
        assert (layer.axis, layer.axis_dimensions) == expected, seed


def test_an_input_that_is_not_like_noise_will_do() -> None:
    layer = anatomy_of(nn.Sequential(Logarithm(4, 3)), torch.rand(2, 3, 4) + 1).neurons.layers["0"]
    assert layer.axis == -1


def test_a_layer_that_only_its_bias_trains() -> None:
    net = nn.Sequential(LowRank(4, 3), nn.Linear(3, 2))
    net[0].weight.requires_grad_(False)
    assert set(anatomy_of(net, torch.randn(2, 4)).never_frozen) == {"1"}


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu6": nn.functional.relu6,
    "sigmoid": torch.sigmoid,
    "hardswish": nn.functional.hardswish,
    "silu": nn.functional.silu,
    "relu backwards": lambda inputs: torch.relu(-inputs),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("weight", [0.0, 1.0, -1.0])
@pytest.mark.parametrize("bias", [0.0, -60.0, 60.0, -1e5])
def test_neurons_that_put_nothing_out(activation: str, weight: float, bias: float, dtype: torch.dtype) -> None:
    """Dead, saturated, not yet begun: all of them, and neuron 0 alone."""
    for several in (slice(None), slice(0, 1)):
        norm = NormAndActivation(6, ACTIVATIONS[activation])
        net = nn.Sequential(nn.Conv2d(2, 6, 1), norm, nn.Flatten(), nn.Linear(24, 2)).to(dtype)
        with torch.no_grad():
            norm.weight[several] = weight
            norm.bias[several] = bias
        anatomy = anatomy_of(net, torch.randn(2, 2, 2, 2, dtype=dtype))
        assert anatomy.trace.axes == {"1": 1}
        assert set(anatomy.never_frozen) == {"3"}


def small_network() -> nn.Module:
    """As many families of networks begin a block: normalised and activated before the convolution."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        *(part for _ in range(4) for part in (NormAndActivation(8), nn.Conv2d(8, 8, 3, padding=1, bias=False))),
        LayerNorm2d(8),
        nn.Flatten(),
        nn.Linear(8 * 16, 3),
    )


def test_the_same_model_gives_the_same_layers_for_any_seed() -> None:
    for seed in range(40):
        torch.manual_seed(seed)
        net = small_network()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.5 * torch.randn_like(parameter))
        freezer = Freezer(net, torch.optim.SGD(net.parameters(), lr=0.1), [torch.randn(2, 1, 4, 4)], Baseline())
        assert set(freezer.anatomy.never_frozen) == {"11"}, seed
        axes = {name: layer.axis for name, layer in freezer.layers.items() if layer.cost == "norm"}
        assert axes == {"1": 1, "3": 1, "5": 1, "7": 1, "9": -3}, seed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnetv2_50", "densenet121", "inception_v3", "mobilenetv4_conv_small"])
def test_timm_s_models_give_the_same_layers_for_any_seed(name: str) -> None:
    timm = pytest.importorskip("timm")
    for seed in range(3):
        torch.manual_seed(seed)
        anatomy = anatomy_of(timm.create_model(name, num_classes=3), torch.randn(2, 3, 96, 96))
        assert set(anatomy.never_frozen.values()) == {"output layer"}, seed
