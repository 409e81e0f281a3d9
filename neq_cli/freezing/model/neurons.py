"""Whose every parameter is: which layers have neurons, what several of them share, and what belongs to none."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from neq_cli.errors import FreezingError
from neq_cli.freezing.families import is_registered
from neq_cli.freezing.model.layers import NOTHING_FOUND, STOCK_LAYERS, Found, Layer, Rows
from neq_cli.freezing.model.module_layers import Owner, is_sparse, layers_of

SPARSE = "its gradients are sparse"


@dataclass(frozen=True)
class Neurons:
    """Every layer of a model: those with trainable neurons, those without, and the parameters outside neurons."""

    layers: dict[str, Layer]
    fixed: dict[str, Layer]  # weights that do not train: they own no neurons, but take part in the forward pass
    outside: dict[str, str]  # trainable parameters outside neurons -> why they always train
    ties: tuple[frozenset[str], ...]  # layers that share rows: a row trains if any of them says so
    always_trainable: dict[str, str]  # layers that share a parameter with something that always trains -> why
    found: Found = NOTHING_FOUND  # what only a look at the running model told

    def tied(self, trainable: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return these sets with every row that several layers share trained where one of them trains it."""
        sets = dict(trainable)
        for tie in self.ties:
            together = torch.stack([sets[name] for name in tie]).any(0)
            sets |= {name: together.clone() for name in tie}
        return sets


def find_neurons(model: nn.Module, optimized: Iterable[Tensor] | None = None, found: Found = NOTHING_FOUND) -> Neurons:
    """Find the layers of ``model`` and who owns which parameter.

    ``optimized`` are the parameters that the optimiser updates (default: all that require gradients); a parameter
    outside it belongs to no neuron. ``found``: what a look at the running model told.
    """
    if any(isinstance(parameter, nn.UninitializedParameter) for parameter in model.parameters()):
        raise FreezingError("model: has lazy layers that no call gave a shape; mend the model, or use all of them")
    made_for_inference = next((name for name, p in model.named_parameters() if p.is_inference()), None)
    if made_for_inference is not None:
        raise FreezingError(
            f"model: parameter {made_for_inference!r} was made in torch.inference_mode, where nothing trains; "
            "build the model outside of it"
        )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    chosen = {id(p) for p in (model.parameters() if optimized is None else optimized) if p.requires_grad}
    candidates = [
        layer
        for prefix, module in model.named_modules()
        for layer in layers_of(Owner(prefix, module, lambda p: names[id(p)], lambda p: id(p) in chosen), found)
    ]
    layers = {layer.name: layer for layer in candidates if layer.rows}
    fixed = {layer.name: layer for layer in candidates if not layer.rows}
    parameters = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in chosen}
    owned = {rows.parameter for layer in layers.values() for rows in layer.rows}
    outside = {name: _why_outside(model, name, found) for name in parameters if name not in owned}
    _check_overlaps(layers)
    ties, always_trainable = _ties(model, layers)
    return Neurons(layers, fixed, outside, ties, always_trainable, found)


def _check_overlaps(layers: Mapping[str, Layer]) -> None:
    """Raise FreezingError where a registered family claims a parameter that another layer divides in another way.

    Divided in the same way, it is tied, and no mistake.
    """
    for layer in (one for one in layers.values() if is_registered(one.module)):
        for other in (one for one in layers.values() if one is not layer):
            for rows, others in itertools.product(layer.rows, other.rows):
                if rows.parameter == others.parameter and (rows.layout, rows.start) != (others.layout, others.start):
                    raise FreezingError(
                        f"families: {layer.kind} {layer.name!r} and {other.kind} {other.name!r} hold rows of "
                        f"{rows.parameter!r} along different dimensions; register families that divide it alike"
                    )


def _why_outside(model: nn.Module, name: str, found: Found) -> str:
    if not model.get_parameter(name).numel():
        return "has no elements"
    module = name.rpartition(".")[0]
    owner = model.get_submodule(module)
    if is_sparse(owner):
        return SPARSE
    if isinstance(owner, (*STOCK_LAYERS, ParametrizationList)):
        return "belongs to a parametrised weight"
    kind = f"parameter of {type(owner).__name__}"
    return f"{kind}, tried in vain: families.register takes what you know of it" if module in found.in_vain else kind


def _ties(model: nn.Module, layers: dict[str, Layer]) -> tuple[tuple[frozenset[str], ...], dict[str, str]]:
    """Return groups of layers with shared rows, and layers that share a parameter with something outside neurons."""
    owners: dict[str, list[tuple[Layer, Rows]]] = {}
    for layer in layers.values():
        for rows in layer.rows:
            owners.setdefault(rows.parameter, []).append((layer, rows))
    using_modules = _modules_using(model)
    ties: list[frozenset[str]] = []
    always: dict[str, str] = {}
    for parameter, owned in owners.items():
        names = frozenset(layer.name for layer, _ in owned)
        modules = {id(layer.module) for layer, _ in owned}
        if using_modules[parameter] > modules:
            always |= dict.fromkeys(names, f"{parameter} is shared with a module that has no neurons")
        elif len(modules) > 1 and len({(rows.layout, rows.start) for _, rows in owned}) > 1:
            always |= dict.fromkeys(names, f"{parameter} is shared along different dimensions")
        elif len(modules) > 1:
            ties.append(names)
    return _merge(ties), always


def _modules_using(model: nn.Module) -> dict[str, set[int]]:
    """Return for each parameter's name the identities of all modules that register it."""
    first_name = {id(parameter): name for name, parameter in model.named_parameters()}
    using: dict[str, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            using.setdefault(first_name[id(parameter)], set()).add(id(module))
    return using


def _merge(groups: Iterable[frozenset[str]]) -> tuple[frozenset[str], ...]:
    """Join groups that overlap."""
    merged: list[frozenset[str]] = []
    for group in groups:
        apart = [other for other in merged if not other & group]
        merged = [*apart, group.union(*(other for other in merged if other & group))]
    return tuple(merged)
