"""A Freezer's state as it is saved and loaded: every fault in one is found, and named, before anything changes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neq_cli.errors import FreezingError
from neq_cli.freezing.equilibrium import Dynamics
from neq_cli.freezing.model.layers import STOCK_LAYERS, Layer
from neq_cli.freezing.policies import Policy

STATE_VERSION = 1
MOST_EPOCHS = 10**9
_KINDS = {
    "phi": torch.float64,
    "delta_phi": torch.float64,
    "velocity": torch.float64,
    "trainable": torch.bool,
}


@dataclass(frozen=True)
class State:
    """What the next ``step()`` of a Freezer depends on; by layer or, ``previous``, by the name of a tensor."""

    epoch: int
    dynamics: Mapping[str, Dynamics]
    trainable: Mapping[str, Tensor]
    previous: Mapping[str, Tensor | None]
    policy: Mapping[str, Any]
    computed: Mapping[str, int]
    at_rest: int

    def to_dict(self) -> dict[str, Any]:
        """Return it as nested dictionaries of tensors and plain values only."""
        return {
            "version": STATE_VERSION,
            "epoch": self.epoch,
            "layers": {
                name: {
                    "phi": moved.phi,
                    "delta_phi": moved.delta_phi,
                    "velocity": moved.velocity,
                    "trainable": self.trainable[name],
                }
                for name, moved in self.dynamics.items()
            },
            "previous": dict(self.previous),
            "policy": self.policy,
            "computed": dict(self.computed),
            "at_rest": self.at_rest,
        }

    @staticmethod
    def of(state: Mapping[str, Any], layers: Iterable[str]) -> State:
        """Return what ``to_dict`` returned, after ``check_state`` found no fault; what is by layer are copies."""
        copies = {name: {key: state["layers"][name][key].cpu().clone() for key in _KINDS} for name in layers}
        return State(
            state["epoch"],
            {name: Dynamics(one["phi"], one["delta_phi"], one["velocity"]) for name, one in copies.items()},
            {name: one["trainable"] for name, one in copies.items()},
            state["previous"],
            state.get("policy", {}),  # an empty dictionary is lost where a state was flattened
            state.get("computed", {}),
            state.get("at_rest", 0),  # states of before have none
        )


def load_policy(policy: Policy, state: Mapping[str, Any]) -> None:
    """Have ``policy`` take over ``state``. Raises FreezingError where it does not, and leaves it as it was."""
    before = policy.state_dict()
    try:
        policy.load_state_dict(state)
    except Exception as error:
        policy.load_state_dict(before)
        kind, reason = type(policy).__name__, " ".join(f"{type(error).__name__}: {error}".split())
        raise FreezingError(f"freezer state: policy {kind} does not take it over ({reason[:300]})") from error


def fixed_tensors(model: nn.Module) -> frozenset[str]:
    """Return the names of all tensors that keep their form: not buffers of modules that may let them grow."""
    stock = [
        f"{prefix}.{key}" if prefix else key
        for prefix, module in model.named_modules()
        if isinstance(module, STOCK_LAYERS)
        for key in module._buffers
    ]
    return frozenset([*(name for name, _ in model.named_parameters()), *stock])


def check_state(
    state: object, layers: Mapping[str, Layer], previous: Mapping[str, Tensor | None], fixed: Collection[str]
) -> None:
    """Raise FreezingError unless ``state`` is one of a Freezer with these layers and these earlier tensors.

    Those that are not ``fixed``, buffers, may have been born or have changed their form since.
    """
    state = _mapping(state, "it")
    if type(state.get("version")) is not int or state["version"] != STATE_VERSION:
        raise FreezingError(f"freezer state: version {_short(state.get('version'))} is not version {STATE_VERSION}")
    _whole_number(state.get("epoch"), MOST_EPOCHS, "epoch")
    _whole_number(state.get("at_rest", 0), MOST_EPOCHS, "at_rest")
    _check_layers(_mapping(state.get("layers"), "layers"), layers)
    _check_previous(_mapping(state.get("previous"), "previous"), previous, fixed)
    _mapping(state.get("policy", {}), "policy")
    for name, rows in _mapping(state.get("computed", {}), "computed").items():
        if name not in layers:
            raise FreezingError(f"freezer state: computed: {_short(name)} is no layer of this model")
        _whole_number(rows, layers[name].neurons, f"computed: {name}")


def _check_layers(found: Mapping[str, Any], layers: Mapping[str, Layer]) -> None:
    odd = sorted(_short(name) for name in found if name not in layers) + [
        _short(name) for name in layers if name not in found
    ]
    if odd:
        raise FreezingError(f"freezer state: belongs to another model; layer {odd[0]} differs")
    for name, layer in layers.items():
        tensors = _mapping(found[name], f"layer {name!r}")
        for key, dtype in _KINDS.items():
            tensor = _tensor(tensors.get(key), f"layer {name!r}: {key}")
            if tensor.shape != (layer.neurons,):
                raise FreezingError(
                    f"freezer state: belongs to another model; layer {name!r} differs: {key} is {list(tensor.shape)}, "
                    f"the layer has {layer.neurons} neurons"
                )
            if tensor.dtype != dtype:
                raise FreezingError(f"freezer state: layer {name!r}: {key} is {tensor.dtype}; it must be {dtype}")


def _check_previous(found: Mapping[str, Any], previous: Mapping[str, Tensor | None], fixed: Collection[str]) -> None:
    for name, other in found.items():
        if name not in fixed and other is not None:
            _tensor(other, f"previous: {_short(name)}")
    for name, tensor in previous.items():
        if name not in fixed or (tensor is None and found.get(name) is None):
            continue
        if tensor is None:
            raise FreezingError(f"freezer state: belongs to another model; {name!r} differs: there is none here")
        other = _tensor(found.get(name), f"previous: {name!r}", missing=f"belongs to another model; {name!r} differs")
        if other.shape != tensor.shape or other.dtype != tensor.dtype:
            raise FreezingError(
                f"freezer state: belongs to another model; {name!r} differs: {other.dtype} {list(other.shape)}, "
                f"here {tensor.dtype} {list(tensor.shape)}"
            )


def _mapping(value: object, place: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise FreezingError(f"freezer state: {place} is {_short(value)}; it must be a mapping")
    return value


def _whole_number(value: object, most: int, place: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise FreezingError(f"freezer state: {place} is {_short(value)}; it must be a whole number from 0 to {most}")


def _tensor(value: object, place: str, *, missing: str | None = None) -> Tensor:
    if value is None and missing:
        raise FreezingError(f"freezer state: {missing}")
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta or value.is_quantized:
        raise FreezingError(f"freezer state: {place} is {_short(value)}; it must be a tensor with values")
    return value


def _short(value: object) -> str:
    """Return ``value`` in one line of bounded length; of what may be large, its type."""
    if value is None:
        return "missing"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > MOST_EPOCHS:
        return "a huge number"  # Python refuses to write some of them out
    return repr(value)[:60] if isinstance(value, (bool, int, float, str)) else type(value).__name__
