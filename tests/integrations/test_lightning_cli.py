"""LightningCLI makes the callback from a YAML file: the run is that of a Trainer with the callback made in Python."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import indent
from typing import Any

import pytest
import torch

from neq_cli import NEq, read_run

pytest.importorskip("lightning.pytorch", reason="needs lightning; pip install 'neq[lightning]'")
pytest.importorskip("jsonargparse", reason="LightningCLI needs jsonargparse[signatures]")

from integrations.lightning_trainings import PROBE, Net, batches, same, trainer_of
from lightning.pytorch.cli import LightningCLI

from neq_cli.integrations.lightning import NEqCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # Lightning's advice on workers, devices and logging
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
VERSION = tuple(map(int, importlib.metadata.version("jsonargparse").split(".")[:2]))
PROJECT = """
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
from integrations.lightning_trainings import INPUTS, batches

from neq_cli import NEq, Policy

class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return batches()

    def held_out(self):
        return [INPUTS[:4], INPUTS[4:8]]

def of_the_data(trainer):
    return trainer.datamodule.held_out()

def first_rows(rows: int) -> Iterable[Any]:
    return list(INPUTS[:rows].split(4))

class FirstRows:
    def __init__(self, rows: int = 40) -> None:
        self.rows = rows

    def __iter__(self):
        return iter(INPUTS[: self.rows].split(4))

class Mine(NEq):
    def choose(self, observations, epoch):  # without types, by which jsonargparse would know it
        return super().choose(observations, epoch)

def mine(epsilon: float) -> Policy:
    return Mine(epsilon)
"""
CONFIG = """
seed_everything: 3
trainer:
  max_epochs: 3
  accelerator: cpu
  devices: 1
  deterministic: true
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  callbacks:
    - class_path: integrations.lightning_trainings.SeededByBatch
    - class_path: neq_cli.integrations.lightning.NEqCallback
      init_args:
        probe:
{probe}
        policy:
{policy}
        every: 4
        run_directory: run
        settings: {{lr: 0.1}}
        exclude: [net.1]
"""
NEQ = "{class_path: neq_cli.NEq, init_args: {epsilon: 0.2}}"


@pytest.fixture(autouse=True)
def _taken_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lightning leaves a seed in the environment, and ``deterministic`` on."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    yield
    torch.use_deterministic_algorithms(False)


def by_yaml(monkeypatch: pytest.MonkeyPatch, path: Path, probe: str, policy: str = NEQ) -> NEqCallback:
    """Train as a configuration says, and return its callback."""
    monkeypatch.chdir(path)
    monkeypatch.syspath_prepend(str(path))
    monkeypatch.delitem(sys.modules, "cli_project", raising=False)
    (path / "cli_project.py").write_text(PROJECT)
    fill = " " * 10
    (path / "config.yaml").write_text(CONFIG.format(probe=indent(probe, fill), policy=indent(policy, fill)))
    data = importlib.import_module("cli_project").Data
    cli = LightningCLI(Net, data, args=["fit", "--config", "config.yaml"], save_config_callback=None)
    callbacks: list[Any] = cli.trainer.callbacks  # type: ignore[attr-defined]
    (callback,) = [one for one in callbacks if isinstance(one, NEqCallback)]
    return callback


@pytest.fixture
def in_python(tmp_path: Path) -> NEqCallback:
    callback = NEqCallback(PROBE, NEq(0.2), every=4, exclude=["net.1"])
    trainer_of(tmp_path, callback, deterministic=True).fit(Net(), batches())
    return callback


@pytest.mark.parametrize(
    ("probe", "policy"),
    [
        pytest.param("cli_project.of_the_data", NEQ, id="a function of the Trainer"),
        pytest.param("{class_path: cli_project.first_rows, init_args: {rows: 8}}", NEQ, id="a function's result"),
        pytest.param(
            "{class_path: cli_project.FirstRows, init_args: {rows: 8}}",
            NEQ,
            id="an iterable",
            marks=pytest.mark.skipif(VERSION < (4, 51), reason="an earlier jsonargparse makes none"),
        ),
        pytest.param(
            "cli_project.of_the_data",
            "{class_path: cli_project.mine, init_args: {epsilon: 0.2}}",
            id="a policy of one's own",
        ),
    ],
)
def test_a_configuration_trains_what_python_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_python: NEqCallback, probe: str, policy: str
) -> None:
    found = by_yaml(monkeypatch, tmp_path, probe, policy)
    assert found.freezers[0].epoch == 3  # steps 4, 8 and 12 of 15
    layers = in_python.state_dict()["freezers"][0]["layers"]
    assert any(not bool(layer["trainable"].all()) for layer in layers.values()), "nothing froze"
    assert same(found.state_dict()["freezers"][0]["layers"], layers)
    run = read_run(tmp_path / "run")
    assert run.metrics["step"].tolist() == [4, 8, 12]
    assert (run.recipe["seed"], run.recipe["settings"]) == (3, {"lr": 0.1})
