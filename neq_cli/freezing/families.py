"""Families of layers beyond torch's own, by their class: how modules of one kind hold neurons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm
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


def is_registered(module: nn.Module) -> bool:
    """Return whether a user said how modules of its class hold neurons."""
    return any(kind in _registered for kind in type(module).__mro__)


def family_of(module: nn.Module) -> Family | None:
    """Return the family of a module that is none of torch's own layers; None where its class has none."""
    for kind in type(module).__mro__:
        if kind in _registered:
            return _registered[kind]
        if found := _BY_NAME.get((kind.__module__, kind.__name__)):
            return found
    return None


def originals_of(module: nn.Module, layout: RowLayout) -> tuple[nn.Parameter, ...]:
    """Return the parameters that a parametrised ``weight`` is computed from row by row, its own shape's first.

    Those of ``weight_norm`` and ``spectral_norm``, old and new; none where it is computed in another way. A length that
    is not each row's own, and spectral norm's one largest singular value, are shared by all rows.
    """
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, (WeightNorm, SpectralNorm)) and hook.name == "weight":
            if isinstance(hook, SpectralNorm):
                return (module.get_parameter("weight_orig"),)
            return _direction_and_length(module, "weight_v", "weight_g", hook.dim, layout)
    if is_parametrized(module, "weight"):
        found: Any = module.get_submodule("parametrizations.weight")
        if len(found) == 1 and isinstance(found[0], _SpectralNorm):
            return (found.original,)
        if len(found) == 1 and isinstance(found[0], _WeightNorm):
            return _direction_and_length(found, "original1", "original0", found[0].dim, layout)
    return ()


def shares_among_rows(module: nn.Module) -> str | None:
    """Return what all rows of a parametrised weight have in common, in words; None where each stands alone."""
    made: list[Any] = list(module._forward_pre_hooks.values())
    if is_parametrized(module, "weight"):
        made += module.get_submodule("parametrizations.weight").children()
    if any(isinstance(one, (SpectralNorm, _SpectralNorm)) for one in made):
        return "spectral norm divides all rows by one largest singular value"
    own = 1 if isinstance(module, nn.modules.conv._ConvTransposeNd) else 0
    if any(isinstance(one, (WeightNorm, _WeightNorm)) and one.dim != own for one in made):
        return "weight norm takes its lengths across rows"
    return None


def _direction_and_length(
    module: nn.Module, direction: str, length: str, dimension: int, layout: RowLayout
) -> tuple[nn.Parameter, ...]:
    own = layout in (RowLayout("leading"), RowLayout("transposed")) and dimension == int(layout.kind == "transposed")
    return tuple(module.get_parameter(key) for key in (direction, length)[: 1 + own])
