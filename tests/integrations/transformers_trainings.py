"""Small trainings by transformers' Trainer; run as a program with an order in JSON, one in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from frozen import Sets
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from neq_cli import NEq
from neq_cli.freezing.backward.dispatch import Dispatch
from neq_cli.integrations.transformers import NEqCallback

ROWS = 24


def rows(count: int = ROWS, seed: int = 0) -> list[dict[str, Any]]:
    """Return sentences of numbers whose label is in them, with a column that no model takes."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        words = torch.randint(2, 30, (6,), generator=generator)
        found.append({"input_ids": words, "labels": int(words[0] > 15), "text": f"row {number}"})
    return found


def model() -> nn.Module:
    torch.manual_seed(3)
    sizes = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(**sizes, intermediate_size=24, max_position_embeddings=8))


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """Return those of 3 epochs of 6 steps on the CPU."""
    own: dict[str, Any] = {
        "per_device_train_batch_size": 4, "num_train_epochs": 3, "learning_rate": 3e-3, "report_to": [], "seed": 5,
        "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no",
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(str(folder / "out"), **{**own, **changes})


def callback(**changes: Any) -> NEqCallback:
    """Return one whose sets move in these few epochs; kernels by rule, as timings are not the same twice."""
    own: dict[str, Any] = {"probe": rows(10, seed=9), "policy": NEq(0.02), "dispatch": Dispatch(fixed=True)}
    return NEqCallback(**{**own, **changes})


class Stops(TrainerCallback):
    """Ends the training in the middle of a step: by an exception, or as the power does."""

    def __init__(self, step: int, *, by_kill: bool = False) -> None:
        self.step, self.by_kill = step, by_kill

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            if self.by_kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt


def trainer(folder: Path, *callbacks: TrainerCallback, net: nn.Module | None = None, **changes: Any) -> Trainer:
    return Trainer(
        net or model(),
        arguments(folder, **changes),
        train_dataset=rows(),
        eval_dataset=rows(8, 1),
        callbacks=[*callbacks],
    )


def main(orders: list[dict[str, Any]]) -> None:
    """Train as ordered, one after the other; what each came to lies in its folder."""
    torch.set_num_threads(1)
    for order in orders:
        folder = Path(order["folder"])
        own = callback(run_directory=folder / "run")
        if "freeze" in order:
            own.policy = Sets(order["freeze"])
        stops = [Stops(order["stop"], by_kill=order.get("by_kill", False))] if "stop" in order else []
        made = trainer(folder, own, *stops, **order["arguments"])
        try:
            made.train(resume_from_checkpoint=order.get("resume"))
        except KeyboardInterrupt:
            continue
        frozen = {name: (~seen.trainable).tolist() for name, seen in own.observations.items()}
        rank = os.environ.get("RANK", "0")
        torch.save({"weights": made.model.state_dict(), "frozen": frozen}, folder / f"came_to_{rank}.pt")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
