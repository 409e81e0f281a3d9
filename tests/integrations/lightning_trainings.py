"""Small trainings by Lightning's Trainer, the same each time: what its tests train, and how they compare."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from neq_cli import NEq, read_run
from neq_cli.integrations.lightning import NEqCallback

GENERATOR = torch.Generator().manual_seed(0)
INPUTS, TARGETS = torch.randn(40, 4, generator=GENERATOR), torch.randint(0, 3, (40,), generator=GENERATOR)
PROBE = [INPUTS[:4], INPUTS[4:8]]


class Net(pl.LightningModule):
    """Logs a loss of training, and two metrics of validation."""

    def __init__(self, *, of_epochs: bool = True) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.of_epochs = of_epochs
        self.net = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))

    def forward(self, inputs: Tensor) -> Any:
        return self.net(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, on_epoch=self.of_epochs, on_step=not self.of_epochs)
        self.log("frozen", 7.0)  # a column of another meaning
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        outputs = self(batch[0])
        self.log("val_top1", 100 * (outputs.argmax(1) == batch[1]).float().mean())
        self.log("val_loss", nn.functional.cross_entropy(outputs, batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)]


class Shuffled(torch.utils.data.Sampler[int]):
    """Another order each epoch, the same in every run: Lightning tells the epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        return iter(torch.randperm(40, generator=torch.Generator().manual_seed(self.epoch)).tolist())

    def __len__(self) -> int:
        return 40


class SeededByBatch(Callback):
    """Dropout as it is in an uninterrupted run: Lightning saves no random state."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(100 * trainer.current_epoch + batch_idx)


def batches(size: int = 8) -> DataLoader[Any]:
    return DataLoader(TensorDataset(INPUTS, TARGETS), batch_size=size, sampler=Shuffled())


def trainer_of(path: Path, *callbacks: Any, epochs: int = 3, save: bool = False, **options: Any) -> pl.Trainer:
    if save:
        saving = ModelCheckpoint(path / "saved", save_top_k=-1, save_last=True, filename="{epoch}")
        callbacks = (*callbacks, saving)
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": save,
        "max_epochs": epochs,
        "default_root_dir": path,
    }
    return pl.Trainer(callbacks=[SeededByBatch(), *callbacks], **{**settings, **options})


def fit(trainer: pl.Trainer, module: pl.LightningModule, *, checkpoint: Path | None = None) -> None:
    trainer.fit(module, batches(), batches(), ckpt_path=checkpoint)


def files_of(path: Path) -> dict[str, Any]:
    """Return all that a run holds but its times, and what tells of its machine and of its interruptions."""
    run = read_run(path)
    metrics = {name: column.tobytes() for name, column in run.metrics.items() if not name.endswith("_seconds")}
    neurons = {file.name: file.read_bytes() for file in sorted((path / "neurons").iterdir())}
    dispatch = json.loads((path / "dispatch.json").read_text())
    parts = {name: (path / name).read_text() for name in ("layers.csv", "recipe.yaml")}
    return {**parts, "metrics": metrics, "neurons": neurons, "dispatch": dispatch, "status": str(run.status)}


def same(one: Any, other: Any) -> bool:
    """Return whether nested states are the same, to the bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


class Held(Callback):
    """Compares frozen rows, and their optimiser state, with what they were when they froze."""

    def __init__(self, callback: NEqCallback) -> None:
        self.callback, self.compared, self.moved = callback, 0, 0
        self.seen: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        seen = [freezer.epoch for freezer in self.callback.freezers]
        if seen != self.seen:
            self.seen, self.before = seen, {name: one.detach().clone() for name, one in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        for freezer in self.callback.freezers:
            for layer, trainable in freezer.trainable.items():
                for kind in ("weight", "bias"):
                    name = f"{layer}.{kind}"
                    now = dict(pl_module.named_parameters())[name]
                    assert torch.equal(now[~trainable], self.before[name][~trainable]), name
                    self.compared += int((~trainable).sum())
                    self.moved += int((now[trainable] != self.before[name][trainable]).sum())


class Resumable:
    """Batches that go on where a checkpoint was saved within an epoch, as Lightning asks such loaders to."""

    def __init__(self) -> None:
        self.sampler, self.begun = Shuffled(), 0

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[Any]:
        orders = torch.tensor(list(self.sampler)).split(8)
        self.begun %= 5
        while self.begun < 5:
            order = orders[self.begun]
            self.begun += 1
            yield INPUTS[order], TARGETS[order]

    def state_dict(self) -> dict[str, int]:
        return {"begun": self.begun}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.begun = state["begun"]


class Killed(Callback):
    """Ends one process as the power does: in the middle of an epoch, or once it is observed and not yet saved."""

    def __init__(self, place: str, epoch: int, process: int) -> None:
        self.place, self.epoch, self.process = place, epoch, process

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.kill(trainer, "batch" if batch_idx == 1 else "")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.kill(trainer, "observed")

    def kill(self, trainer: Any, place: str) -> None:
        if (place, trainer.current_epoch + 1, trainer.global_rank) == (self.place, self.epoch, self.process):
            os.kill(os.getpid(), signal.SIGKILL)


class PhiByHand(Callback):
    """Eq. 1 of the first layer, which sees the probe's inputs, against the whole probe in this process."""

    def __init__(self, callback: NEqCallback) -> None:
        self.callback = callback

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.before = self.outputs(pl_module)

    def outputs(self, module: Any) -> Tensor:
        layer = module.net[0]
        return torch.cat(PROBE).double() @ layer.weight.detach().double().T + layer.bias.detach().double()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        now = self.outputs(pl_module)
        phi = (now * self.before).sum(0) / (now.norm(dim=0) * self.before.norm(dim=0))
        found = self.callback.freezers[0].dynamics["net.0"].phi
        torch.testing.assert_close(found, phi, rtol=1e-5, atol=1e-6)
        self.before = now


def main(order: dict[str, Any]) -> None:
    """Train as ordered; what each process came to lies in the order's folder."""
    torch.use_deterministic_algorithms(True)
    path = Path(order["path"])
    callback = NEqCallback(PROBE, NEq(0.2), run_directory=path / "run", begin_anew=order.get("begin_anew", False))
    several = order.get("processes", 1) > 1
    others = [PhiByHand(callback)] if several else []
    if "kill" in order:
        others.append(Killed(*order["kill"]))
    options = {"strategy": "ddp", "devices": order["processes"]} if several else {}
    trainer = trainer_of(path, callback, *others, save=True, epochs=order["epochs"], **options)
    module = Net()
    trained = torch.compile(module, backend="aot_eager") if order.get("compiled") else module
    trainer.fit(trained, batches(), batches(), ckpt_path=order.get("checkpoint"))
    parts = {"module": module, "optimizer": trainer.optimizers[0], "callback": callback}
    torch.save({name: part.state_dict() for name, part in parts.items()}, path / f"process{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
