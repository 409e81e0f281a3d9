"""Sets put in force as a test wants them: by a policy that answers with what it was given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from neq_cli import Freezer
from neq_cli.freezing.backward.sliced import BackwardMode


class Sets:
    """A policy that answers with the sets it was given, or freezes a share of every layer, at random by epoch."""

    def __init__(self, sets: Mapping[str, Tensor] | float) -> None:
        self.sets = sets

    def choose(self, observations: Mapping[str, Any], epoch: int) -> Mapping[str, Tensor]:
        if isinstance(self.sets, Mapping):
            return self.sets
        generator = torch.Generator().manual_seed(epoch)
        draws = {name: torch.rand(len(seen.trainable), generator=generator) for name, seen in observations.items()}
        return {name: draw >= self.sets for name, draw in draws.items()}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        pass


def freeze(
    model: nn.Module,
    inputs: Any,
    sets: Mapping[str, Tensor] | float,
    mode: BackwardMode = "exact",
    *,
    optimizer: torch.optim.Optimizer | None = None,
    **options: Any,
) -> Freezer:
    """Return a Freezer on ``model``, looked at with ``inputs``, that holds these sets (or a share, drawn at random)."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    freezer = Freezer(model, optimizer, [inputs], Sets({}), backward=mode, **options)
    if not isinstance(sets, Mapping):
        generator = torch.Generator().manual_seed(1)
        draws = {name: torch.rand(layer.neurons, generator=generator) for name, layer in freezer.layers.items()}
        sets = {name: draw >= sets for name, draw in draws.items()}
    freezer.policy = Sets(sets)
    freezer.step()
    return freezer
