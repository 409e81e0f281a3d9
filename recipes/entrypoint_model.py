"""A model for `entrypoint.yaml`: any function that returns a torch.nn.Module will do."""

from torch import nn


def small_network(channels: int = 16, num_classes: int = 10) -> nn.Module:
    """Return a small convolutional network for 8x8 grey images."""
    return nn.Sequential(
        nn.Conv2d(1, channels, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, 2 * channels, kernel_size=3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(2 * channels),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * channels, num_classes),
    )
