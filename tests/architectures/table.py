"""All models by their names, and how they are made, fed, called and frozen."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from architectures import (
    diffusers_models,
    timm_models,
    torch_models,
    torchvision_models,
    transformers_models,
)
from architectures.case import Case
from torch import Tensor, nn

from neq_cli import Freezer

LIBRARIES = {
    "torch": torch_models.MODELS,
    "torchvision": torchvision_models.MODELS,
    "timm": timm_models.MODELS,
    "transformers": transformers_models.MODELS,
    "diffusers": diffusers_models.MODELS,
}
CASES = {f"{library}-{name}": case for library, models in LIBRARIES.items() for name, case in models.items()}

each_case = pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name, marks=() if case.quick else pytest.mark.slow) for name, case in CASES.items()],
)
quietly = pytest.mark.filterwarnings("ignore")  # of what these libraries would rather have us use


class Chosen:
    """A policy that asks a function of a layer's name and number of neurons who trains."""

    def __init__(self, chooses: Callable[[str, int], Tensor]) -> None:
        self.chooses = chooses

    def choose(self, observations: Mapping[str, Any], epoch: int) -> Mapping[str, Tensor]:
        return {name: self.chooses(name, len(seen.trainable)) for name, seen in observations.items()}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        pass


def halves(name: str, neurons: int) -> Tensor:
    """Freeze half of the neurons, drawn by the layer's name."""
    order = torch.randperm(neurons, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    return order >= neurons // 2


def layers(name: str, neurons: int) -> Tensor:
    """Freeze about half of the layers whole."""
    return torch.full((neurons,), zlib.crc32(name.encode()) % 2 == 0)


def nothing(name: str, neurons: int) -> Tensor:
    """Freeze all that may freeze."""
    return torch.zeros(neurons, dtype=torch.bool)


def make(case: Case, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Build a case's model, and give what its authors start at a constant different values.

    Layer scales of 1e-6 and gains of 0 would leave next to no gradient to compare.
    """
    torch.manual_seed(seed)
    model = case.make().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.numel() and parameter.min() == parameter.max():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def draw(case: Case, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(100 + seed)
    return map_tensors(lambda one: one.to(dtype) if one.is_floating_point() else one, case.item())


def map_tensors(function: Callable[[Tensor], Tensor], item: Any) -> Any:
    if isinstance(item, Tensor):
        return function(item)
    if isinstance(item, Mapping):
        return {key: map_tensors(function, one) for key, one in item.items()}
    if isinstance(item, (list, tuple)):
        return type(item)(map_tensors(function, one) for one in item)
    return item


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def freezer_of(
    case: Case,
    model: nn.Module,
    item: Any,
    optimizer: torch.optim.Optimizer | None = None,
    chooses: Callable[[str, int], Tensor] = halves,
) -> Freezer:
    optimizer = optimizer or torch.optim.SGD(trained(model), lr=0.01, weight_decay=0.1)
    return Freezer(model, optimizer, [item], Chosen(chooses), call=case.call)


def call(case: Case, model: nn.Module, item: Any) -> Any:
    if case.call is not None:
        return case.call(model, item)
    return model(**item) if isinstance(item, Mapping) else model(item)


def loss_of(case: Case, model: nn.Module, item: Any) -> Tensor:
    """Return one number that depends on all that the model puts out; random numbers inside are the same each time."""
    torch.manual_seed(1)
    if case.loss is not None:
        return case.loss(model, item)
    outputs = [output for output in tensors_in(call(case, model, item)) if output.is_floating_point()]
    generator = torch.Generator().manual_seed(2)
    return sum((output * torch.randn(output.shape, generator=generator).to(output)).sum() for output in outputs)


def tensors_in(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, (Mapping, list, tuple)):
        for one in outputs.values() if isinstance(outputs, Mapping) else outputs:
            yield from tensors_in(one)
