"""A small training loop that is recorded and tracked, and stopped, rewound and gone on with as a test wants."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neq_cli import Freezer, NEq, Recorder


class TrackedLoop:
    """Trains a small network, an epoch at a time; ``states[t]`` is all that epoch t + 1 depends on."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.inputs, self.targets = torch.randn(32, 4), torch.randint(0, 3, (32,))
        self._make()
        self.states = [self._state()]

    def _make(self) -> None:
        torch.manual_seed(2)
        self.model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.freezer = Freezer(self.model, self.optimizer, [self.inputs[:8]], NEq(0.05))

    def _state(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "freezer": self.freezer}
        return {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}  # type: ignore[attr-defined]

    def rewind(self, epoch: int) -> None:
        """Go back to where ``epoch`` epochs were trained, as a new process would."""
        state = self.states[epoch]
        self._make()
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.freezer.load_state_dict(state["freezer"])
        del self.states[epoch + 1 :]

    def train(self) -> dict[str, float]:
        for _ in range(3):
            self.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.model(self.inputs), self.targets)
            loss.backward()
            self.optimizer.step()
        self.freezer.step()
        self.states.append(self._state())
        right = (self.model(self.inputs).argmax(1) == self.targets).float().mean()
        return {"lr": 0.1, "train_loss": loss.item(), "test_top1": 100 * float(right)}

    def record(self, path: Path, last: int, track: Sequence[str], *, resume: bool = False, fails: bool = False) -> None:
        """Train up to the ``last`` epoch, recorded and tracked; ``fails``: then the loop raises RuntimeError."""
        options: dict[str, Any] = {"name": "mine", "metric": "test_top1", "seed": 1, "settings": {"depth": {"of": 2}}}
        with Recorder(self.freezer, path, **options, resume=resume, track=track) as recorder:
            while self.freezer.epoch < last:
                recorder.epoch(**self.train())
            if fails:
                raise RuntimeError("the loop's own")
