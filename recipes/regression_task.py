"""Data, network and task for `regression.yaml`: what is learnt is a number, and the smaller the error the better."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset


def friedman(size: int = 2000, noise: float = 1.0) -> tuple[TensorDataset, TensorDataset]:
    """Return training and test items (features [10], value): Friedman's first function, of five of the features."""
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(size + size // 4, 10, generator=generator)
    a, b, c, d, e = features[:, :5].T
    values = 10 * torch.sin(math.pi * a * b) + 20 * (c - 0.5) ** 2 + 10 * d + 5 * e
    values = values + noise * torch.randn(len(values), generator=generator)
    return TensorDataset(features[:size], values[:size]), TensorDataset(features[size:], values[size:])


def network(features: int = 10, width: int = 64) -> nn.Module:
    """Return a perceptron from [batch, features] to [batch, 1]."""
    return nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))


class Regression:
    """The squared error is learnt, the mean absolute error told; targets [batch] or [batch, values]."""

    metric = "test_mae"
    better = "lower"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean squared error."""
        return functional.mse_loss(outputs.view_as(targets), targets)

    def new_totals(self, device: torch.device) -> Tensor:
        """Return zeros [3]: loss times values, absolute errors, values."""
        return torch.zeros(3, device=device)

    def update(self, totals: Tensor, outputs: Tensor, targets: Tensor, loss: Tensor) -> None:
        """Add a batch."""
        errors = (outputs.detach().view_as(targets) - targets).abs()
        totals += torch.stack([loss.detach() * targets.numel(), errors.sum(), torch.ones_like(errors).sum()])

    def results(self, totals: Tensor) -> dict[str, float]:
        """Return the means."""
        squared, absolute, values = totals.tolist()
        return {"loss": squared / max(values, 1), "mae": absolute / max(values, 1)}
