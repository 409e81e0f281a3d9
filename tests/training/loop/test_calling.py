"""What of a batch are inputs and targets, and how a model gets them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neq_cli.training.loop.calling import forward_of, parts_of, probe_call
from neq_cli.training.loop.tasks import Classification

ONE, TWO, THREE = (torch.tensor(float(number)) for number in (1, 2, 3))


@pytest.mark.parametrize(
    ("batch", "parts"),
    [
        ([ONE, TWO], (ONE, TWO)),
        ((ONE, TWO, THREE), (ONE, (TWO, THREE))),
        ([ONE], (ONE, ONE)),
        (ONE, (ONE, ONE)),
        ({"tokens": ONE}, ({"tokens": ONE}, {"tokens": ONE})),
        (([ONE, TWO], [{"boxes": THREE}]), ([ONE, TWO], [{"boxes": THREE}])),
    ],
)
def test_the_parts_of_a_batch(batch: Any, parts: Any) -> None:
    assert parts_of(batch) == parts


class Sum(nn.Module):
    def forward(self, one: Tensor, other: Tensor | None = None) -> Tensor:
        return one if other is None else one + other


class Wrapper(nn.Module):
    """As DistributedDataParallel does, which says nothing of what the model inside takes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        return self.module(*inputs, **keywords)


def test_a_mapping_is_passed_by_keywords_through_a_wrapper_too() -> None:
    model = Sum()
    forward = forward_of(Classification(), model)
    inputs = {"one": ONE, "other": TWO, "name": "not taken"}
    assert [float(forward(called, inputs, None)) for called in (model, Wrapper(model))] == [3, 3]
    assert float(forward(model, THREE, None)) == 3
    assert probe_call(Classification()) is None


class Called(Classification):
    def call(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        found: Tensor = model(inputs, targets)
        return found


def test_a_task_may_say_how_the_model_is_called() -> None:
    assert float(forward_of(Called(), Sum())(Sum(), ONE, TWO)) == 3
    call = probe_call(Called())
    assert call is not None
    assert float(call(Sum(), [ONE, TWO])) == 3
