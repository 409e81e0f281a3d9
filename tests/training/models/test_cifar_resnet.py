"""CIFAR ResNets against arithmetic and an independent computation."""

from __future__ import annotations

import pytest
import torch
from rounding import apart_behind_layers
from torch.nn import functional

from neq_cli.training.models.cifar_resnet import DEPTHS, BasicBlock, OptionAShortcut, cifar_resnet


def counted(depth: int, classes: int = 10, channels: int = 3, width: int = 16) -> int:
    """Parameters by hand: convolutions without bias, two per BatchNorm channel, a linear layer; shortcuts none."""
    blocks = (depth - 2) // 6
    total = 9 * channels * width + 2 * width
    into = width
    for out in (width, 2 * width, 4 * width):
        for _ in range(blocks):
            total += 9 * into * out + 9 * out * out + 4 * out
            into = out
    return total + into * classes + classes


def test_resnet32_has_464154_parameters() -> None:
    assert counted(32) == 464_154
    assert sum(parameter.numel() for parameter in cifar_resnet(32).parameters()) == 464_154


@pytest.mark.parametrize("depth", DEPTHS)
def test_every_depth_has_the_layers_its_name_says(depth: int) -> None:
    model = cifar_resnet(depth, num_classes=7, in_channels=1, width=4)
    assert sum(parameter.numel() for parameter in model.parameters()) == counted(depth, 7, 1, 4)
    weighted = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(weighted) == depth


@pytest.mark.parametrize("size", [8, 7])
def test_the_shortcut_takes_every_second_pixel_and_adds_empty_channels(size: int) -> None:
    inputs = torch.randn(2, 3, size, size)
    out = OptionAShortcut(3, 8, stride=2)(inputs)
    half = (size + 1) // 2
    assert out.shape == (2, 8, half, half)
    for row in range(half):
        for column in range(half):
            assert torch.equal(out[:, 2:5, row, column], inputs[:, :, 2 * row, 2 * column])
    assert not out[:, :2].any()
    assert not out[:, 5:].any()
    assert torch.equal(OptionAShortcut(3, 3, stride=1)(inputs), inputs)


def test_a_block_is_two_convolutions_and_its_shortcut() -> None:
    block = BasicBlock(4, 8, stride=2).eval().double()
    with torch.no_grad():
        for norm in (block.bn1, block.bn2):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    inputs = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    kept = inputs.clone()

    def normalised(norm: torch.nn.BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
        scale = (norm.weight / torch.sqrt(norm.running_var + norm.eps))[:, None, None]
        return (x - norm.running_mean[:, None, None]) * scale + norm.bias[:, None, None]

    hidden = functional.conv2d(inputs, block.conv1.weight, stride=2, padding=1)
    hidden = normalised(block.bn1, hidden).clamp(min=0)
    hidden = normalised(block.bn2, functional.conv2d(hidden, block.conv2.weight, padding=1))
    hidden[:, 2:6] += inputs[:, :, ::2, ::2]
    # 36 and 72 products, four roundings in each norm, and the sum.
    close = apart_behind_layers(120, magnitude=float(hidden.detach().abs().max()))
    torch.testing.assert_close(block(inputs), hidden.clamp(min=0), atol=close, rtol=0)
    assert torch.equal(inputs, kept)


def test_the_output_and_the_seed() -> None:
    torch.manual_seed(3)
    first = cifar_resnet(8, num_classes=5, in_channels=1)
    torch.manual_seed(3)
    second = cifar_resnet(8, num_classes=5, in_channels=1)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    assert first(torch.randn(2, 1, 8, 8)).shape == (2, 5)


@pytest.mark.parametrize(
    ("arguments", "says"), [({"depth": 10}, "depth must be 6n \\+ 2"), ({"depth": 8, "width": 0}, "width is 0")]
)
def test_impossible_shapes_are_refused(arguments: dict[str, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        cifar_resnet(**arguments)
