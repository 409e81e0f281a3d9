"""What share of a model its neurons are, and why the rest is none of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from neq_cli.freezing.anatomy import Anatomy
from neq_cli.freezing.flops import forward_cost
from neq_cli.freezing.model.layers import Layer

PRODUCTS = "products outside layers, such as attention's"
FIXED = "does not train"


@dataclass(frozen=True)
class Part:
    """What there is one reason for: numbers of parameters, multiply-adds of one sample's forward pass, and names."""

    reason: str
    parameters: int
    flops: float
    names: tuple[str, ...]


@dataclass(frozen=True)
class Coverage:
    """How much of a model are neurons. FLOPs are multiply-adds of one sample's forward pass.

    ``outside``: what is none of theirs, by reason, the largest first. ``never_frozen``: neurons, but always trained.
    """

    parameters: int
    flops: float
    outside: tuple[Part, ...]
    never_frozen: tuple[Part, ...]

    @property
    def parameters_of_neurons(self) -> int:
        return self.parameters - sum(part.parameters for part in self.outside)

    @property
    def flops_of_neurons(self) -> float:
        return self.flops - sum(part.flops for part in self.outside)

    def to_dict(self, most_names: int = 50) -> dict[str, Any]:
        """Return it in plain values, with so many names for each reason at most."""
        plain = asdict(self)
        for part in (*plain["outside"], *plain["never_frozen"]):
            part["names"] = list(part["names"][:most_names])
        return {**plain, "outside": list(plain["outside"]), "never_frozen": list(plain["never_frozen"])}

    def __str__(self) -> str:
        """Tell it in one line."""
        freezing = self.parameters_of_neurons - sum(part.parameters for part in self.never_frozen)
        told = (
            f"{_share(self.parameters_of_neurons, self.parameters)} of {self.parameters:,} parameters and "
            f"{_share(self.flops_of_neurons, self.flops)} of the forward pass are neurons'; "
            f"{_share(freezing, self.parameters)} of the parameters may freeze"
        )
        rest = [f"{_share(part.parameters, self.parameters)} {part.reason}" for part in self.outside if part.parameters]
        return f"{told}; outside neurons: {', '.join(rest)}" if rest else told


def coverage_of(anatomy: Anatomy, parameters: Mapping[str, Tensor]) -> Coverage:
    """Return what of a model's ``parameters``, by name, are neurons. They may be on the meta device."""
    neurons, trace = anatomy.neurons, anatomy.trace
    fixed = {layer.weight: forward_cost(layer, trace) for layer in neurons.fixed.values()}
    owned = _owned(neurons.layers.values(), parameters)
    outside = _Reasons()
    for name, parameter in parameters.items():
        if rest := parameter.numel() - owned.get(name, 0):
            outside.add(neurons.outside.get(name, FIXED), name, rest, fixed.get(name, 0))
    if trace.products:
        outside.add(PRODUCTS, "", 0, sum(trace.products.values()) / 2)
    never = _Reasons()
    for name, reason in anatomy.never_frozen.items():
        own = _owned([neurons.layers[name]], parameters)
        never.add(reason, name, sum(own.values()), anatomy.costs[name])
    whole = anatomy.flops(dict.fromkeys(neurons.layers, 1.0)).forward
    return Coverage(sum(one.numel() for one in parameters.values()), whole, outside.parts(), never.parts())


def _owned(layers: Iterable[Layer], parameters: Mapping[str, Tensor]) -> dict[str, int]:
    """Return how many elements of each parameter are the layers'; what several share is counted once."""
    masks: dict[str, Tensor] = {}
    for rows in (rows for layer in layers for rows in layer.rows):
        if rows.parameter not in masks:
            count = rows.layout.count(parameters[rows.parameter])
            masks[rows.parameter] = torch.zeros(count, dtype=torch.bool, device="cpu")
        masks[rows.parameter][rows.start : rows.start + rows.count] = True
    return {name: parameters[name].numel() // len(mask) * int(mask.sum()) for name, mask in masks.items()}


class _Reasons:
    """Parts that are being put together, by reason."""

    def __init__(self) -> None:
        self._found: dict[str, Part] = {}

    def add(self, reason: str, name: str, parameters: int, flops: float) -> None:
        before = self._found.get(reason, Part(reason, 0, 0.0, ()))
        names = (*before.names, name) if name else before.names
        self._found[reason] = Part(reason, before.parameters + parameters, before.flops + flops, names)

    def parts(self) -> tuple[Part, ...]:
        return tuple(sorted(self._found.values(), key=lambda part: (-part.parameters, -part.flops)))


def _share(part: float, whole: float) -> str:
    if not whole:
        return "none"
    percent = 100 * part / whole
    # Nothing is rounded up to all of it.
    return "100 %" if part == whole else f"{min(percent, 99.9):.1f} %" if percent >= 0.05 else f"{percent:.1g} %"
