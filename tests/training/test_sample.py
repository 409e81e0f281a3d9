"""Model, data and task are tried on one sample before anything is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neq_cli.errors import NeqError
from neq_cli.recipe import Recipe
from neq_cli.training.data.parts import load_data
from neq_cli.training.loop.tasks import Classification
from neq_cli.training.sample import check_together


class Task(Classification):
    """Of a vector of ten; ``fails`` names the method that does."""

    fails = ""

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        if self.fails == "loss":
            raise ValueError("no loss")
        return super().loss(outputs, targets)


class Listed(list[Any]):
    def collate(self, items: list[Any]) -> Any:
        return [one for one, _ in items], [other for _, other in items]


def vectors() -> tuple[list[Any], list[Any]]:
    items = [(torch.arange(10.0) + number, number % 2) for number in range(8)]
    return items, items


def listed() -> tuple[Listed, Listed]:
    return Listed(vectors()[0]), Listed(vectors()[0])


def recipe(data: str = "vectors", **changes: Any) -> Recipe:
    values = {
        "model": {"entrypoint": "torch.nn:Identity"},
        "data": {"entrypoint": f"{__name__}:{data}", "probe_size": 2},
        "task": f"{__name__}:Task",
        "epochs": 1,
        "batch_size": 2,
        "optimizer": {"name": "sgd", "lr": 0.1},
    }
    return Recipe.model_validate(values | changes)


def together(chosen: Recipe, model: nn.Module, task: Task) -> Any:
    return check_together(chosen, model, load_data(chosen.data, 1, own_task=True), task)


def test_one_item_of_the_probe_is_the_sample() -> None:
    model = nn.Sequential(nn.BatchNorm1d(10), nn.Dropout(), nn.Linear(10, 2))
    before, state = {key: value.clone() for key, value in model.state_dict().items()}, torch.get_rng_state()
    sample = together(recipe(), model, Task())
    assert [part.shape for part in sample.batch] == [(1, 10), (1,)]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    anatomy = sample.anatomy(model, ())
    assert anatomy.costs["2"] == 10 * 2


@pytest.mark.parametrize(
    ("chosen", "inputs", "fails", "message"),
    [
        (
            recipe(),
            9,
            "",
            r"model: cannot be called with an item of .*:vectors: RuntimeError: mat1 and mat2 .* \(.*\)$",
        ),
        (recipe(), 10, "loss", r"task: cannot be tested on an item of .*:vectors: ValueError: no loss \(.*py:\d+\)$"),
        (
            recipe("listed", cuda_graph=True),
            *(10, ""),
            r"cuda_graph: captures batches whose inputs and targets are a tensor each, and those of .*:listed are not",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(chosen: Recipe, inputs: int, fails: str, message: str) -> None:
    task = Task()
    task.fails = fails
    with pytest.raises(NeqError, match=message) as raised:
        together(chosen, nn.Linear(inputs, 2), task)
    assert "\n" not in str(raised.value)
