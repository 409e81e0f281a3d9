"""A small training loop that is recorded and tracked as a test wants, and what W&B's files of a run hold."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Iterator, Sequence
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


_BLOCK, _HEADER, _IDENT = 32768, 7, 7  # bytes
_FIRST, _MIDDLE, _LAST, _FULL = 2, 3, 4, 1


def wandb_records(path: Path) -> Iterator[Any]:
    """Yield the records of a .wandb file: LevelDB's log format behind seven bytes, a torn end left out."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, whole = path.read_bytes(), _IDENT, b""
    assert content[:4] == b":W&B"
    while place + _HEADER <= len(content):
        left = _BLOCK - place % _BLOCK
        if left < _HEADER:
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", content, place)
        piece = content[place + _HEADER : place + _HEADER + size]
        if len(piece) < size or kind not in (_FULL, _FIRST, _MIDDLE, _LAST):
            return
        whole = piece if kind in (_FULL, _FIRST) else whole + piece
        place += _HEADER + size
        if kind in (_FULL, _LAST):
            yield Record.FromString(whole)


def wandb_files(run: Path) -> list[Path]:
    """The .wandb files of a run, the newest last: its folders are named by the second."""
    found = (run / "tracking/wandb").glob("offline-run-*/*.wandb")
    return sorted(found, key=lambda path: path.parent.name)


def wandb_history(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for record in wandb_records(path):
        if record.WhichOneof("record_type") == "history":
            rows.append({})
            for item in record.history.item:
                *outer, last = list(item.nested_key) or [item.key]
                place = rows[-1]
                for key in outer:
                    place = place.setdefault(key, {})
                place[last] = json.loads(item.value_json)
    return rows
