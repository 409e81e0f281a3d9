"""A policy chooses who trains next epoch: the baseline, the paper's rule and its random counterpart."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from neq_cli.freezing.equilibrium import Definition, Dynamics, at_equilibrium


@dataclass(frozen=True)
class Observation:
    """One layer after an epoch; tensors of [neurons] on the CPU.

    ``phi`` (Eq. 1), ``delta_phi`` (Eq. 3) and ``velocity`` (Eq. 4) are float32; ``trainable`` is bool: a policy sees
    the set in force during the epoch, ``Freezer.step`` returns the set for the next one.
    """

    phi: Tensor
    delta_phi: Tensor
    velocity: Tensor
    trainable: Tensor


def observe(dynamics: Mapping[str, Dynamics], trainable: Mapping[str, Tensor]) -> dict[str, Observation]:
    """Return layers that move so, with these sets, as policies and users see them; all are copies."""
    return {
        name: Observation(moved.phi.float(), moved.delta_phi.float(), moved.velocity.float(), trainable[name].clone())
        for name, moved in dynamics.items()
    }


@runtime_checkable
class Policy(Protocol):
    """Chooses after each epoch who trains in the next one.

    A policy may also have ``mu`` and ``definition``, which the Freezer then computes the velocity with.
    """

    def choose(self, observations: Mapping[str, Observation], epoch: int) -> Mapping[str, Tensor]:
        """Return who trains in epoch + 1: bool, [neurons], per layer. A layer left out is wholly trainable."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the next choices depend on."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""


class Baseline:
    """Freezes nothing."""

    def choose(self, observations: Mapping[str, Observation], epoch: int) -> Mapping[str, Tensor]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class NEq:
    """Freezes the neurons at equilibrium: |velocity| < epsilon (Eq. 6). They thaw as soon as that fails.

    ``mu`` damps the velocity (Eq. 4); 0 to 0.5 is the safe range, up to 1 is allowed with a warning.
    ``definition``: ``paper``, or ``reference`` for what the authors' published code computes.
    """

    def __init__(self, epsilon: float = 1e-3, mu: float = 0.5, definition: Definition = "paper") -> None:
        if not epsilon >= 0:
            raise ValueError(f"epsilon is {epsilon}; it must be at least 0")
        if not 0 <= mu < 1:
            raise ValueError(f"mu is {mu}; it must lie in [0, 1), and [0, 0.5] is the safe range")
        if definition not in ("paper", "reference"):
            raise ValueError(f"definition is {definition!r}; choose 'paper' or 'reference'")
        if mu > 0.5:
            warnings.warn(f"mu={mu} lies above 0.5, where the velocity is not sure to settle", stacklevel=2)
        self.epsilon, self.mu, self.definition = epsilon, mu, definition

    def choose(self, observations: Mapping[str, Observation], epoch: int) -> Mapping[str, Tensor]:
        return {
            name: ~at_equilibrium(observation.velocity, self.epsilon, self.definition)
            for name, observation in observations.items()
        }

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class Stochastic:
    """Freezes int(p * n) of every layer's n neurons, drawn anew each epoch; the yardstick for ``NEq``."""

    def __init__(self, p: float, seed: int = 0) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"p is {p}; it must lie in [0, 1]")
        self.p = p
        self.generator = torch.Generator().manual_seed(seed)

    def choose(self, observations: Mapping[str, Observation], epoch: int) -> Mapping[str, Tensor]:
        return {name: self._draw(len(observation.trainable)) for name, observation in observations.items()}

    def _draw(self, neurons: int) -> Tensor:
        trainable = torch.ones(neurons, dtype=torch.bool, device="cpu")
        order = torch.randperm(neurons, generator=self.generator, device="cpu")
        trainable[order[: frozen_count(self.p, neurons)]] = False
        return trainable

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.generator.set_state(state["generator"])


def frozen_count(p: float, neurons: int) -> int:
    """Return how many of a layer's neurons ``Stochastic`` freezes."""
    return int(p * neurons)
