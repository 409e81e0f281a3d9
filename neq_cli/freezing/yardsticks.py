"""Policies to compare equilibrium with: neurons at random, layers by a schedule, and a budget of FLOPs that is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neq_cli.freezing.policies import Observation, Scope, check_mu, check_scope, looked_at

if TYPE_CHECKING:
    from neq_cli.freezing.anatomy import Anatomy


class Stochastic:
    """Freezes at random, drawn anew each epoch; the yardstick for ``NEq`` of the same scope.

    ``neuron``: int(p * n) of every layer's n neurons. ``layer``: whole layers, in random order, that come to the share
    p of the paper's FLOPs of all that may freeze. ``front``: a front of random length, from nothing to twice p of those
    FLOPs (or from 2p - 1 to all of them); parameters outside neurons that lie there freeze with it. Layers are whole,
    so that for both p is met in the mean: the layer at the border joins with the chance that makes it so.
    """

    def __init__(self, p: float, seed: int = 0, *, scope: Scope = "neuron") -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"p is {p}; it must lie in [0, 1]")
        check_scope(scope)
        self.p, self.scope = p, scope
        self.generator = torch.Generator().manual_seed(seed)
        self._anatomy: Anatomy | None = None

    def look(self, anatomy: Anatomy, learning_rate: float) -> None:
        """Take in where layers lie, and what they cost."""
        self._anatomy = anatomy

    def choose(self, observations: Mapping[str, Observation], epoch: int) -> Mapping[str, Tensor]:
        if self.scope == "neuron":
            return {name: self._draw(len(observation.trainable)) for name, observation in observations.items()}
        anatomy = looked_at(self._anatomy, "Stochastic")
        names = anatomy.may_freeze
        if self.scope == "layer":
            order = torch.randperm(len(names), generator=self.generator).tolist()
            frozen = self._up_to(self.p, [names[number] for number in order], anatomy)
        else:
            low, high = max(0.0, 2 * self.p - 1), min(1.0, 2 * self.p)
            frozen = self._up_to(low + (high - low) * self._chance(), names, anatomy)
        return whole_layers(observations, frozen)

    def _draw(self, neurons: int) -> Tensor:
        trainable = torch.ones(neurons, dtype=torch.bool, device="cpu")
        order = torch.randperm(neurons, generator=self.generator, device="cpu")
        trainable[order[: frozen_count(self.p, neurons)]] = False
        return trainable

    def _up_to(self, share: float, names: Sequence[str], anatomy: Anatomy) -> set[str]:
        """Return the first of these layers that come to ``share`` of their FLOPs, in the mean."""
        costs = anatomy.costs
        left, frozen = share * sum(costs[name] for name in names), set()
        chance = self._chance()  # always drawn, so that the next epoch's draws do not depend on it
        for name in names:
            if costs[name] > left and chance * costs[name] >= left:
                break
            frozen.add(name)
            if costs[name] > left:
                break
            left -= costs[name]
        return frozen

    def _chance(self) -> float:
        return float(torch.rand((), generator=self.generator, dtype=torch.float64))

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.generator.set_state(state["generator"])


class Front:
    """Freezes the leading layers by a schedule, as FreezeOut (Brock et al. 2017) and Composer's LayerFreezing do.

    After the share ``start`` of the ``epochs`` the first layers freeze, and linearly more, until in the last epoch the
    share ``level`` of those that may freeze is frozen. Parameters outside neurons that lie there freeze with them.
    """

    scope: Scope = "front"

    def __init__(self, start: float, level: float, epochs: int) -> None:
        if not 0 <= start < 1:
            raise ValueError(f"start is {start}; it must lie in [0, 1)")
        if not 0 < level <= 1:
            raise ValueError(f"level is {level}; it must lie in (0, 1]")
        if epochs < 1:
            raise ValueError(f"epochs is {epochs}; it must be at least 1")
        self.start, self.level, self.epochs = start, level, epochs
        self._anatomy: Anatomy | None = None

    def look(self, anatomy: Anatomy, learning_rate: float) -> None:
        """Take in where layers lie."""
        self._anatomy = anatomy

    def choose(self, observations: Mapping[str, Observation], epoch: int) -> Mapping[str, Tensor]:
        names = looked_at(self._anatomy, "Front").may_freeze
        return whole_layers(observations, names[: self.layers(epoch + 1, len(names))])

    def layers(self, epoch: int, count: int) -> int:
        """Return how many of ``count`` layers are frozen in ``epoch``, which counts from 1."""
        first = self.start * self.epochs  # epochs that train everything
        passed = min(1.0, max(0.0, (epoch - first) / max(self.epochs - first, 1e-9)))
        return int(self.level * passed * count + 1e-9)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class Budget:
    """Freezes the neurons that move least, |velocity| (Eq. 4) from below, until ``flops`` of the paper's FLOPs train.

    ``flops``: a share of those with nothing frozen. Where more than that never freezes, all that may is frozen.
    ``mu`` as in ``NEq``.
    """

    def __init__(self, flops: float, mu: float = 0.5) -> None:
        if not 0 < flops <= 1:
            raise ValueError(f"flops is {flops}; it must lie in (0, 1]")
        check_mu(mu)
        self.flops, self.mu = flops, mu
        self._anatomy: Anatomy | None = None

    def look(self, anatomy: Anatomy, learning_rate: float) -> None:
        """Take in what layers cost."""
        self._anatomy = anatomy

    def choose(self, observations: Mapping[str, Observation], epoch: int) -> Mapping[str, Tensor]:
        anatomy = looked_at(self._anatomy, "Budget")
        names, costs = anatomy.may_freeze, anatomy.costs
        sizes = [len(observations[name].velocity) for name in names]
        if not sum(sizes):
            return {}
        speeds = torch.cat([observations[name].velocity.abs() for name in names])
        unknown = torch.cat([observations[name].delta_phi.isnan() for name in names])
        each = torch.cat(
            [torch.full((n,), costs[name] / n, dtype=torch.float64) for name, n in zip(names, sizes, strict=True)]
        )
        order = torch.where(unknown, torch.inf, speeds).argsort(stable=True)
        excess = (1 - self.flops) * sum(costs.values())
        # Neurons freeze while what they cost before them has not come to the excess.
        saved = each[order].cumsum(0) - each[order]
        frozen = torch.zeros(len(order), dtype=torch.bool)
        frozen[order] = saved < excess * (1 - 1e-9)
        frozen &= ~unknown
        return {name: ~part for name, part in zip(names, torch.split(frozen, sizes), strict=True)}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


def whole_layers(observations: Mapping[str, Observation], frozen: set[str] | Sequence[str]) -> dict[str, Tensor]:
    """Return the sets in which these layers are ``frozen`` whole and all others train."""
    return {
        name: torch.full_like(observation.trainable, name not in frozen) for name, observation in observations.items()
    }


def frozen_count(p: float, neurons: int) -> int:
    """Return how many of a layer's neurons ``Stochastic`` freezes."""
    return int(p * neurons)
