"""A policy's answer becomes the sets in force: it is checked, and what must train does, whatever it says."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from neq_cli.errors import FreezingError
from neq_cli.freezing.anatomy import Anatomy
from neq_cli.freezing.equilibrium import Dynamics
from neq_cli.freezing.model.layers import Layer, everything


def settle(
    chosen: Mapping[str, Tensor], policy: str, anatomy: Anatomy, dynamics: Mapping[str, Dynamics]
) -> dict[str, Tensor]:
    """Return the new sets: those of the ``policy`` (its class' name), but for what must train.

    Those are layers that it left out, those that are never frozen, neurons whose similarity is unknown, and what is
    tied to any of these. Raises FreezingError where it has ``chosen`` for an unknown layer, in a wrong shape or type.
    """
    if not isinstance(chosen, Mapping):
        kind = type(chosen).__name__
        raise FreezingError(f"policy {policy}: answered {kind}; it must be a mapping of layers to bool tensors")
    layers = anatomy.neurons.layers
    trainable = everything(layers)
    for name, mask in chosen.items():
        _check(name, mask, policy, layers)
        if name not in anatomy.never_frozen:
            # A neuron whose similarity is unknown cannot be said to be still.
            trainable[name] = mask.detach().cpu() | dynamics[name].delta_phi.isnan()
    return anatomy.neurons.tied(trainable)


def _check(name: str, mask: object, policy: str, layers: Mapping[str, Layer]) -> None:
    if name not in layers:
        raise FreezingError(f"policy {policy}: chose for a layer {name!r} that the model does not have")
    neurons = layers[name].neurons
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (neurons,):
        got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise FreezingError(
            f"policy {policy}: answered {got} for layer {name!r}; it must be a bool tensor of [{neurons}]"
        )
