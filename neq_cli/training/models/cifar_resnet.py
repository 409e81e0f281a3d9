"""Residual networks for 32x32 images (He et al. 2015, section 4.2), with parameter-free (option A) shortcuts only.

By hand: torchvision has ResNets for large images only.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

DEPTHS = (8, 20, 32, 44, 56, 110)
NAMES = tuple(f"resnet{depth}" for depth in DEPTHS)


class OptionAShortcut(nn.Module):
    """Identity where shapes agree; otherwise every second pixel, with zeros for the channels that are new."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        new = out_channels - in_channels
        self.padding = (new // 2, new - new // 2)

    def forward(self, inputs: Tensor) -> Tensor:
        sampled = inputs[:, :, :: self.stride, :: self.stride]
        return functional.pad(sampled, (0, 0, 0, 0, *self.padding)) if any(self.padding) else sampled


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the shortcut around them."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = OptionAShortcut(in_channels, out_channels, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.relu(self.bn1(self.conv1(inputs)))
        residual: Tensor = self.bn2(self.conv2(hidden))
        out: Tensor = self.relu(residual + self.shortcut(inputs))
        return out


class CifarResNet(nn.Module):
    """6n + 2 layers: one convolution, three stages of n blocks with width, 2 width and 4 width channels, one linear."""

    def __init__(self, depth: int, num_classes: int = 10, in_channels: int = 3, width: int = 16) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6n + 2 with n of 1 or more, not {depth}")
        for name, count in (("num_classes", num_classes), ("in_channels", in_channels), ("width", width)):
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"{name} is {count!r}; it must be a whole number above 0")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(width, width, blocks, stride=1)
        self.layer2 = _stage(width, 2 * width, blocks, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # He et al. 2015b: the variance that ReLU layers keep from one to the next.
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [batch, num_classes] of images [batch, in_channels, height, width]."""
        hidden = self.relu(self.bn1(self.conv1(images)))
        hidden = self.layer3(self.layer2(self.layer1(hidden)))
        logits: Tensor = self.fc(self.avgpool(hidden).flatten(1))
        return logits


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))


def cifar_resnet(depth: int, *, num_classes: int = 10, in_channels: int = 3, width: int = 16) -> CifarResNet:
    """Return a CIFAR ResNet with random weights (depth 6n + 2)."""
    return CifarResNet(depth, num_classes, in_channels, width)
