"""What users' own code prints goes to stderr, whenever it does: stdout has the results alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Start = Callable[..., Any]

TALKING = """
import sys
import torch
from torch import nn
from nets import make as stock
from neq_cli import NEq

print("<import>")


def say(what):
    return lambda *_: print(f"<{what}>")


def make(num_classes=10):
    print("<build>")
    model = stock(num_classes)
    model.register_forward_hook(lambda module, *_: print("<train>" if module.training else "<eval>"))
    model.register_full_backward_hook(say("backward"))
    return model


class Images:
    classes = [str(number) for number in range(10)]

    def __len__(self):
        return 96

    def __getitem__(self, index):
        print("<image>")
        return torch.full((1, 8, 8), index / 96), index % 10


def images():
    print("<open>")
    return Images(), Images()


class Policy(NEq):
    def __init__(self):
        super().__init__(epsilon=0.1, mu=0.5)

    def choose(self, observations, epoch):
        print("<policy>")
        return super().choose(observations, epoch)
"""
CHANGES = (
    "model.entrypoint=talking:make",
    "data={entrypoint: 'talking:images', probe_size: 24, workers: 1, cache: none}",
    "policy={kind: entrypoint, entrypoint: 'talking:Policy'}",
    "epochs=2",
    "ema=null",
)


@pytest.fixture
def talking(folder: Path) -> Path:
    (folder / "talking.py").write_text(TALKING)
    return folder


def words(text: str) -> set[str]:
    return {word.partition(">")[0] for word in text.split("<")[1:]}


def test_while_training(neq: Start, talking: Path) -> None:
    process = neq("train", "rich.yaml", *CHANGES, "-o", "run")
    assert process.wait() == 0, process.text
    assert process.result == "run\n"
    assert words(process.text) == {"import", "build", "open", "train", "eval", "backward", "image", "policy"}


def test_while_training_goes_on(neq: Start, talking: Path) -> None:
    assert neq("train", "rich.yaml", *CHANGES, "-o", "run").wait() == 0
    process = neq("train", "rich.yaml", *CHANGES, "epochs=3", "-o", "run", "--resume")
    assert process.wait() == 0, process.text
    assert process.result == "run\n"


def test_on_a_display(neq: Start, talking: Path) -> None:
    process = neq("train", "rich.yaml", *CHANGES, "-o", "run", "--progress", "rich")
    assert process.wait() == 0, process.text
    assert process.result == "run\n"
    assert words(process.text) >= {"train", "eval", "policy"}


def test_in_the_runs_of_a_sweep(neq: Start, talking: Path) -> None:
    process = neq("sweep", "rich.yaml", *CHANGES, "seed=1", "-o", "here")
    assert process.wait(120) == 0, process.text
    assert process.result == "here/runs\n"
    assert words(process.text) <= {"import"}


def test_while_benched_and_counted(neq: Start, talking: Path) -> None:
    process = neq("bench", "rich.yaml", *CHANGES, "--rounds", 1, "--fractions", 0.5, "--modes", "exact", "--json")
    assert process.wait() == 0, process.text
    assert json.loads(process.result)["synthetic_data"] is False
    assert words(process.text) == {"import", "build", "open", "train", "eval", "backward", "image"}
    process = neq("flops", "rich.yaml", *CHANGES, "data.image_size=8", "--json")
    assert process.wait() == 0, process.text
    assert json.loads(process.result)["layers"]
    process = neq("validate", "rich.yaml", *CHANGES)
    assert process.wait() == 0, process.text
    assert "<" not in process.result
    process = neq("train", "rich.yaml", *CHANGES, "-o", "run", "--dry-run")
    assert process.wait() == 0, process.text
    assert "<" not in process.result
