"""Accelerate's loop with a Freezer and a Recorder: a run that its checkpoint goes on with is the uninterrupted one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from neq_cli import Freezer, NEq, Recorder

accelerate = pytest.importorskip("accelerate")


def train(folder: Path, epochs: int, checkpoint: Path | None = None) -> tuple[list[Tensor], Freezer]:
    """Train up to so many epochs, from a checkpoint where one is given; return the weights and the Freezer."""
    torch.manual_seed(0)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    data = torch.utils.data.TensorDataset(torch.randn(64, 8), torch.randint(3, (64,)))
    model, optimizer, loader = accelerator.prepare(model, optimizer, torch.utils.data.DataLoader(data, 8))
    freezer = Freezer(model, optimizer, [data.tensors[0][:16]], NEq(0.01))
    accelerator.register_for_checkpointing(freezer)
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
    options = {"name": "mine", "metric": "train_loss", "lower_is_better": True, "resume": checkpoint is not None}
    with Recorder(freezer, folder / "run", **options) as recorder:
        while freezer.epoch < epochs:
            for inputs, targets in loader:
                with accelerator.accumulate(model):
                    loss = nn.functional.cross_entropy(model(inputs), targets)
                    accelerator.backward(loss)
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
            freezer.step()
            recorder.epoch(train_loss=loss)
            accelerator.save_state(str(folder / f"checkpoint{freezer.epoch}"))
    return [one.detach().clone() for one in accelerator.unwrap_model(model).parameters()], freezer


def test_a_run_that_is_gone_on_with_is_the_uninterrupted_one(tmp_path: Path) -> None:
    straight, straight_freezer = train(tmp_path / "straight", 5)
    train(tmp_path / "resumed", 3)
    found, freezer = train(tmp_path / "resumed", 5, tmp_path / "resumed" / "checkpoint2")
    assert all(torch.equal(one, other) for one, other in zip(found, straight, strict=True))
    assert any(not rows.all() for rows in freezer.trainable.values())
    for name, rows in straight_freezer.trainable.items():
        assert torch.equal(freezer.trainable[name], rows)
        assert torch.equal(freezer.dynamics[name].velocity, straight_freezer.dynamics[name].velocity)
    for name in ("layers.csv", "recipe.yaml", *(f"neurons/epoch_000{epoch}.safetensors" for epoch in range(1, 6))):
        assert (tmp_path / "resumed/run" / name).read_bytes() == (tmp_path / "straight/run" / name).read_bytes(), name
