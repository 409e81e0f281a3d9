from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neq_cli.errors import RecipeError, TrainingError
from neq_cli.jobs.prepare import prepared
from neq_cli.recipe.load import load_recipe
from neq_cli.training.checks import check_section
from neq_cli.training.machine.graph import WARM_UP, GraphedStep


class Recorded:
    """Stands in for a CUDA graph: as there, capturing runs nothing, and replaying knows only the captured memory."""

    captures = 0

    def __init__(self, step: Callable[[], Tensor], loss: Tensor) -> None:
        self.step = step
        self.loss = loss

    def replay(self) -> None:
        self.loss.copy_(self.step())


def capture(step: Callable[[], Tensor]) -> tuple[Recorded, Tensor]:
    Recorded.captures += 1
    loss = torch.zeros(())
    return Recorded(step, loss), loss


def training(model: nn.Module) -> Callable[[Tensor, Any], Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def test_every_batch_is_trained_on_once_whatever_is_captured() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [4] * (WARM_UP + 3) + [2, 4]  # one batch of another shape among the replays
    batches = [tuple(torch.randn(size, 3, generator=generator) for _ in range(2)) for size in sizes]
    eager = nn.Linear(3, 3)
    graphed = copy.deepcopy(eager)
    eager_step, graphed_step = training(eager), GraphedStep(training(graphed), capture=capture)
    Recorded.captures = 0
    for inputs, targets in batches:
        assert torch.equal(eager_step(inputs, targets), graphed_step(inputs, targets))
    assert torch.equal(eager.weight, graphed.weight)
    assert Recorded.captures == 1


def test_targets_that_are_no_tensor_are_refused() -> None:
    step = GraphedStep(lambda inputs, targets: inputs.sum(), capture=capture)
    with pytest.raises(TrainingError, match="cuda_graph: targets must be one tensor, not list; set it to false"):
        step(torch.ones(1), [1])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("precision=fp16", "cuda_graph=true: fp16 has to look at every step's gradients"),
        ("gradient_accumulation=2", "cuda_graph=true: a captured step is one batch"),
    ],
)
def test_what_cannot_be_captured_is_refused(override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("digits", ["cuda_graph=true", override], checks=[check_section])
    assert message in str(caught.value)


def test_it_needs_a_cuda_device() -> None:
    with pytest.raises(RecipeError, match="cuda_graph=true: needs a CUDA device, and the run is on cpu"):
        prepared(load_recipe("digits", ["cuda_graph=true", "device=cpu"]))
