"""A policy chooses who trains next epoch: here the baseline and the paper's rule; its yardsticks in yardsticks.py."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from neq_cli.errors import FreezingError
from neq_cli.freezing.equilibrium import Definition, Dynamics, at_equilibrium

if TYPE_CHECKING:
    from neq_cli.freezing.anatomy import Anatomy

Scope = Literal["neuron", "layer", "front"]
"""What freezes: single neurons, whole layers, or the whole layers before which nothing trains."""
FrontMode = Literal["train", "inference"]
"""How a frozen front runs: as the rest does, or as at inference."""
SCOPES: tuple[Scope, ...] = get_args(Scope)


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

    A policy may also have ``mu`` and ``definition``, which the Freezer then computes the velocity with, and ``scope``:
    where that is ``front``, parameters outside neurons that lie before all that trains stand still with the front, and
    with ``front_mode`` ``inference`` the front runs as at inference. One that has ``look(anatomy, learning_rate)`` is
    told before each choice of the model, an ``Anatomy``, and of the largest learning rate that the optimiser has then.
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

    ``share``: a layer of which at least this share is at equilibrium freezes whole. The others, by ``scope``, freeze
    their own neurons at equilibrium (``neuron``: the paper's) or train wholly (``layer``). ``front``: as ``layer``, and
    only layers freeze before which no layer trains; parameters outside neurons that lie there freeze with them.

    ``thaw_at_lr_drop``: when the learning rate has fallen by this factor from its highest since the last such time,
    everything trains for one epoch. What lies in a frozen front never changes, and nothing else would thaw it.

    ``front_mode``: ``inference`` runs a frozen front as at inference, which changes what the layers above see: batch
    normalisation by its running statistics, which stand still, and folded into the convolution before it; dropout and
    stochastic depth off. An approximation; once the front thaws all is as it was when it froze.
    """

    def __init__(
        self,
        epsilon: float = 1e-3,
        mu: float = 0.5,
        definition: Definition = "paper",
        *,
        scope: Scope = "neuron",
        share: float = 1.0,
        thaw_at_lr_drop: float | None = None,
        front_mode: FrontMode = "train",
    ) -> None:
        if not epsilon >= 0:
            raise ValueError(f"epsilon is {epsilon}; it must be at least 0")
        check_mu(mu)
        if definition not in ("paper", "reference"):
            raise ValueError(f"definition is {definition!r}; choose 'paper' or 'reference'")
        check_scope(scope)
        if not 0 < share <= 1:
            raise ValueError(f"share is {share}; it must lie in (0, 1]")
        if thaw_at_lr_drop is not None and not thaw_at_lr_drop > 1:
            raise ValueError(f"thaw_at_lr_drop is {thaw_at_lr_drop}; it must be a factor above 1, or None")
        if front_mode not in ("train", "inference"):
            raise ValueError(f"front_mode is {front_mode!r}; choose 'train' or 'inference'")
        if mu > 0.5:
            warnings.warn(f"mu={mu} lies above 0.5, where the velocity is not sure to settle", stacklevel=2)
        self.epsilon, self.mu, self.definition = epsilon, mu, definition
        self.scope, self.share, self.thaw_at_lr_drop = scope, share, thaw_at_lr_drop
        self.front_mode = front_mode
        self._anatomy: Anatomy | None = None
        self._highest: float | None = None  # learning rate since the last thaw
        self._thaws = False

    def look(self, anatomy: Anatomy, learning_rate: float) -> None:
        """Take in where layers lie, and whether the learning rate has fallen far enough for everything to train."""
        self._anatomy, self._thaws = anatomy, False
        if self.thaw_at_lr_drop is None:
            return
        if self._highest is None or learning_rate > self._highest:
            self._highest = learning_rate
        # A schedule multiplies by tenths, which are rounded.
        elif learning_rate * self.thaw_at_lr_drop <= self._highest * (1 + 1e-9) and learning_rate < self._highest:
            self._thaws, self._highest = True, learning_rate

    def choose(self, observations: Mapping[str, Observation], epoch: int) -> Mapping[str, Tensor]:
        if self._thaws:
            return {}
        still = {
            name: at_equilibrium(observation.velocity, self.epsilon, self.definition)
            for name, observation in observations.items()
        }
        if self.scope == "neuron" and self.share == 1:
            return {name: ~neurons for name, neurons in still.items()}
        whole = {
            name
            for name, neurons in still.items()
            if int(neurons.sum()) >= self.share * len(neurons) * (1 - 1e-9)
            and not bool(observations[name].delta_phi.isnan().any())  # of those nobody knows
        }
        if self.scope == "front":
            whole &= looked_at(self._anatomy, "NEq(scope='front')").front(whole)
        return {
            name: torch.zeros_like(neurons) if name in whole else ~neurons | (self.scope != "neuron")
            for name, neurons in still.items()
        }

    def state_dict(self) -> dict[str, Any]:
        return {} if self._highest is None else {"highest_learning_rate": self._highest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        highest = state.get("highest_learning_rate")
        self._highest = None if highest is None else float(highest)


def looked_at(anatomy: Anatomy | None, policy: str) -> Anatomy:
    """Return ``anatomy``, or raise FreezingError where the ``policy`` has not been told of a model."""
    if anatomy is None:
        raise FreezingError(f"{policy}: has not been told of the model; call look() before choose()")
    return anatomy


def check_mu(mu: float) -> None:
    """Raise ValueError unless ``mu`` damps."""
    if not 0 <= mu < 1:
        raise ValueError(f"mu is {mu}; it must lie in [0, 1), and [0, 0.5] is the safe range")


def check_scope(scope: object) -> None:
    """Raise ValueError unless ``scope`` is one."""
    if scope not in SCOPES:
        raise ValueError(f"scope is {scope!r}; choose {', '.join(map(repr, SCOPES))}")
