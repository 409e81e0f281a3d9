"""A policy that freezes what a test wrote down, whatever was observed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from neq_cli.freezing import Observation


class Scripted:
    """The share of each layer's neurons that trains in each epoch; 0 freezes it whole."""

    def __init__(self, shares: list[Mapping[str, float]]) -> None:
        self.shares = shares

    def choose(self, observations: Mapping[str, Observation], epoch: int) -> Mapping[str, Tensor]:
        shares = self.shares[(epoch - 1) % len(self.shares)]
        generator = torch.Generator().manual_seed(epoch)
        return {
            name: torch.rand(len(seen.trainable), generator=generator).argsort() < share * len(seen.trainable)
            for name, seen in observations.items()
            if (share := shares.get(name, shares.get("", 1.0))) < 1
        }

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass
