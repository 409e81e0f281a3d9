"""Families of layers beyond torch's own: found by their class, or by what they look like and, then, by what they do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.weight_norm import WeightNorm

from neq_cli.errors import FreezingError
from neq_cli.freezing.model.layouts import Cost, RowLayout


@dataclass(frozen=True)
class Family:
    """How modules of one kind hold neurons.

    ``parameters``: how each that has rows falls into them, by its name in the module, the weight that outputs are
    recognised by first. ``axis``: of the output, counts neurons; whether it does is tried on the probe, and where
    another does that one is taken. ``cost``: what a forward pass is like.
    """

    parameters: Mapping[str, RowLayout]
    axis: int = -1
    cost: Cost = "norm"


_BY_INPUTS = Family({"weight": RowLayout("transposed"), "bias": RowLayout("flat")}, cost="transposed")
# By their names, so that nothing is imported for them.
_BY_NAME = {("transformers.pytorch_utils", "Conv1D"): _BY_INPUTS}
_registered: dict[type[nn.Module], Family] = {}


def register(kind: type[nn.Module], family: Family) -> None:
    """Have modules of the class ``kind``, and of its subclasses, hold neurons as ``family`` says.

    Raises FreezingError where ``kind`` is registered already, with another family.
    """
    if _registered.get(kind, family) != family:
        raise FreezingError(f"families: {kind.__name__} is registered already, with another family; register it once")
    if not family.parameters:
        raise FreezingError(f"families: {kind.__name__}: no parameter holds neurons; name one")
    _registered[kind] = family


def family_of(module: nn.Module) -> Family | None:
    """Return the family of a module that is none of torch's own layers; None where it has none."""
    for kind in type(module).__mro__:
        if kind in _registered:
            return _registered[kind]
        if found := _BY_NAME.get((kind.__module__, kind.__name__)):
            return found
    return _scale(module)


def _scale(module: nn.Module) -> Family | None:
    """Return the family of what looks like a scale of one axis: a norm of its own, a layer scale, a PReLU.

    It holds nothing but one or two vectors of one length; whether each element of them belongs to one place of an axis
    of the output is tried on the probe.
    """
    parameters = {key: one for key, one in module._parameters.items() if one is not None}
    sizes = {one.shape for one in parameters.values()}
    alone = not module._modules and 1 <= len(parameters) <= 2 and len(sizes) == 1
    if not alone or len(shape := next(iter(sizes))) != 1 or shape[0] < 2:
        return None
    return Family(dict.fromkeys(parameters, RowLayout("flat")))


def normed_weight(module: nn.Module) -> tuple[nn.Parameter, ...]:
    """Return direction and length of a weight under ``weight_norm``, old or new, if each row has its own; else none."""
    made = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, WeightNorm)]
    if len(made) == 1 and (made[0].name, made[0].dim) == ("weight", 0):
        return module.get_parameter("weight_v"), module.get_parameter("weight_g")
    if is_parametrized(module, "weight"):
        found: Any = module.get_submodule("parametrizations.weight")
        if len(found) == 1 and isinstance(found[0], _WeightNorm) and found[0].dim == 0:
            return found.original1, found.original0
    return ()
