"""The paper's Eq. 1, 3, 4 and 6 say when a neuron is at equilibrium: pure functions on tensors of [neurons]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Definition = Literal["paper", "reference"]


def cosine(products: Tensor) -> Tensor:
    """Return the cosine of two vectors a, b from their sums (<a,b>, <a,a>, <b,b>): [3, ...] -> [...].

    Both zero: 1, since nothing changed. One zero: 0. Sums that are not finite: NaN.
    """
    dot, own, other = products
    lengths = own.sqrt() * other.sqrt()
    both_zero = (own == 0) & (other == 0)
    quotient = torch.where(lengths == 0, torch.zeros_like(dot), dot / lengths.clamp_min(torch.finfo(dot.dtype).tiny))
    # Rounding can leave a parallel pair a hair above one.
    quotient = torch.where(both_zero, torch.ones_like(dot), quotient).clamp(-1, 1)
    return torch.where(torch.isfinite(products).all(0), quotient, torch.full_like(dot, torch.nan))


@dataclass(frozen=True)
class Dynamics:
    """How a layer's neurons move, after one epoch; float64, [neurons]."""

    phi: Tensor
    delta_phi: Tensor
    velocity: Tensor

    @staticmethod
    def start(neurons: int) -> Dynamics:
        """Return epoch 0, a network compared with itself: phi = 1, nothing moves."""
        # On the CPU whatever torch.set_default_device says, here and wherever neurons are counted.
        still = torch.zeros(neurons, dtype=torch.float64, device="cpu")
        return Dynamics(torch.ones_like(still), still, still.clone())

    @staticmethod
    def unknown(neurons: int) -> Dynamics:
        """Return the dynamics of neurons never observed before: they train until there are two phi to compare."""
        unknown = torch.full((neurons,), torch.nan, dtype=torch.float64, device="cpu")
        return Dynamics(unknown, unknown.clone(), torch.zeros_like(unknown))

    def next(self, phi: Tensor, mu: float, definition: Definition = "paper") -> Dynamics:
        """Return the dynamics after the next epoch, whose similarity is ``phi``.

        Where phi, before or now, is NaN, delta_phi is NaN and the velocity restarts at 0.
        """
        delta_phi = phi - self.phi  # Eq. 3
        velocity = velocity_paper(delta_phi, self.velocity, mu)
        if definition == "reference":
            velocity = velocity_reference(delta_phi, self.delta_phi, self.velocity, mu)
        return Dynamics(phi, delta_phi, torch.where(delta_phi.isnan(), torch.zeros_like(velocity), velocity))


def velocity_paper(delta_phi: Tensor, previous_velocity: Tensor, mu: float) -> Tensor:
    """Return the velocity after Eq. 4: mu damps oscillation, so that one quiet epoch does not freeze."""
    return delta_phi - mu * previous_velocity


def velocity_reference(delta_phi: Tensor, previous_delta_phi: Tensor, previous_velocity: Tensor, mu: float) -> Tensor:
    """Return the velocity as the authors' published code computes it, which is not Eq. 4."""
    previous_delta_phi = torch.where(previous_delta_phi.isnan(), torch.zeros_like(delta_phi), previous_delta_phi)
    return delta_phi - previous_delta_phi + mu * previous_velocity


def at_equilibrium(velocity: Tensor, epsilon: float, definition: Definition = "paper") -> Tensor:
    """Return who is at equilibrium after Eq. 6: |velocity| < epsilon (the authors' code: <=); bool, [neurons]."""
    return velocity.abs() <= epsilon if definition == "reference" else velocity.abs() < epsilon
