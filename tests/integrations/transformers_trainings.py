"""Small trainings by transformers' Trainer; run as a program with an order in JSON, one in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from frozen import Sets
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from neq_cli import NEq, read_run
from neq_cli.freezing.backward.dispatch import Dispatch
from neq_cli.integrations.transformers import NEqCallback

ROWS = 24
PROGRAM = Path(__file__)
ROOT = PROGRAM.parents[2]


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
    """Ends the training in the middle of a step: by an exception, or as the power does, there by one process alone."""

    def __init__(self, step: int, *, by_kill: bool = False, process: int = 0) -> None:
        self.step, self.by_kill, self.process = step, by_kill, process

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            if not self.by_kill:
                raise KeyboardInterrupt
            if args.process_index == self.process:
                os.kill(os.getpid(), signal.SIGKILL)


def trainer(folder: Path, *callbacks: TrainerCallback, net: nn.Module | None = None, **changes: Any) -> Trainer:
    return Trainer(
        net or model(),
        arguments(folder, **changes),
        train_dataset=rows(),
        eval_dataset=rows(8, 1),
        callbacks=[*callbacks],
    )


def assert_same(found: Any, expected: Any, place: str = "") -> None:
    """Nested values, tensors to the bit."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for key in expected:
            assert_same(found[key], expected[key], f"{place}/{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), place
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{place}/{number}")
    elif isinstance(expected, Tensor):
        assert found.dtype == expected.dtype, place
        assert found.shape == expected.shape, place
        assert found.detach().cpu().numpy().tobytes() == expected.detach().cpu().numpy().tobytes(), place
    elif isinstance(expected, float) and np.isnan(expected):
        assert np.isnan(found), place
    else:
        assert found == expected, place


def recorded(path: Path) -> dict[str, Any]:
    """Return every file of a run but its times and where it was trained."""
    run = read_run(path)
    assert str(run.status) == "finished"
    metrics = {name: column.tolist() for name, column in run.metrics.items() if not name.endswith("_seconds")}
    neurons = {file.name: file.read_bytes() for file in sorted((path / "neurons").iterdir())}
    texts = {name: (path / name).read_text() for name in ("recipe.yaml", "layers.csv", "dispatch.json")}
    texts["notes"] = json.loads((path / "environment.json").read_text())["notes"]
    return {"metrics": metrics, "neurons": neurons, **texts}


def run_program(*orders: dict[str, Any], launch: Sequence[str] = (), fails: bool = False) -> int:
    """Run this file as a program, in several processes where it is launched so; return how it ended."""
    paths = [*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT), str(ROOT / "tests")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, *launch, str(PROGRAM), json.dumps(orders)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert fails or done.returncode in (0, -signal.SIGKILL), done.stderr[-3000:]
    return done.returncode


def main(orders: list[dict[str, Any]]) -> None:
    """Train as ordered, one after the other; what each came to lies in its folder."""
    torch.set_num_threads(1)
    for order in orders:
        folder = Path(order["folder"])
        own = callback(run_directory=folder / "run")
        if "freeze" in order:
            own.policy = Sets(order["freeze"])
        how = {name: order[name] for name in ("by_kill", "process") if name in order}
        stops = [Stops(order["stop"], **how)] if "stop" in order else []
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
