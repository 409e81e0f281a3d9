"""Which element of which parameter is whose neuron's, counted here and not by neq's own layouts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neq_cli import Freezer


def row_of_each(rows: Any, shape: torch.Size) -> Tensor:
    """Return for each element of a parameter of this ``shape`` the number of the row that it lies in."""
    kind, groups = rows.layout.kind, rows.layout.groups
    if kind == "flat":
        return torch.arange(shape.numel()).view(shape)
    places = torch.meshgrid(*(torch.arange(size) for size in shape), indexing="ij")
    if kind == "leading":
        return places[0]
    if kind == "transposed":  # inputs by outputs, group after group of inputs
        return places[0] // (shape[0] // groups) * shape[1] + places[1]
    if kind == "gates":  # gate after gate, each of all units
        return places[0] % (shape[0] // groups)
    if kind == "stacked":  # experts by outputs
        return places[0] * shape[1] + places[1]
    assert kind == "stacked_transposed", f"say here how elements fall into rows of the kind {kind!r}"
    return places[0] * shape[2] + places[2]


def owners(freezer: Freezer) -> dict[str, list[tuple[str, Tensor]]]:
    """Return by parameter the layers that own some of it, each with the neuron of each element, -1 where none."""
    found: dict[str, list[tuple[str, Tensor]]] = {}
    for name, layer in freezer.layers.items():
        for rows in layer.rows:
            number = row_of_each(rows, freezer.model.get_parameter(rows.parameter).shape) - rows.start
            neuron = number + rows.first
            neuron = torch.where((number >= 0) & (number < rows.count), neuron, -1)
            found.setdefault(rows.parameter, []).append((name, neuron))
    return found


def frozen_elements(freezer: Freezer) -> dict[str, Tensor]:
    """Return which elements of each parameter are frozen: those of a frozen neuron, if no other trains them."""
    frozen = {}
    owned_by = owners(freezer)
    for parameter, value in freezer.model.named_parameters():
        owned, trains = torch.zeros(value.shape, dtype=torch.bool), torch.zeros(value.shape, dtype=torch.bool)
        for name, neuron in owned_by.get(parameter, []):
            owned |= neuron >= 0
            trains |= (neuron >= 0) & freezer.trainable[name][neuron.clamp(min=0)]
        frozen[parameter] = owned & ~trains
    return frozen
