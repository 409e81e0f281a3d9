"""Lightning's Trainer killed, in one process and in two: what goes on from its checkpoint is the uninterrupted run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from neq_cli import read_run

pytest.importorskip("lightning.pytorch", reason="needs lightning; pip install 'neq[lightning]'")

from integrations.lightning_trainings import Net, files_of, same

PROGRAM = Path(__file__).with_name("lightning_trainings.py")


def train(path: Path, epochs: int, **order: Any) -> subprocess.CompletedProcess[str]:
    """Train in processes of their own, as ``lightning_trainings.main`` does."""
    folders = [str(PROGRAM.parents[1]), str(PROGRAM.parents[2])]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    command = [sys.executable, str(PROGRAM), json.dumps({"path": str(path), "epochs": epochs, **order})]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def saved(path: Path, epoch: int) -> str:
    """Return the checkpoint after so many epochs."""
    return str(path / "saved" / f"epoch={epoch - 1}.ckpt")


def states(path: Path, processes: int = 1) -> list[dict[str, Any]]:
    return [torch.load(path / f"process{number}.pt", weights_only=True) for number in range(processes)]


def assert_same_sets(found: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """Weights, optimiser and frozen sets in every process, and all of the callback's state in the first."""
    layers = expected["callback"]["freezers"][0]["layers"]
    assert not all(bool(layer["trainable"].all()) for layer in layers.values()), "nothing froze"
    for process, state in enumerate(found):
        for name, _ in Net().named_parameters():  # each process has batch statistics of its own
            assert torch.equal(state["module"][name], expected["module"][name]), name
        assert same(state["optimizer"], expected["optimizer"])
        for part in ("layers", "epoch"):
            assert same(state["callback"]["freezers"][0][part], expected["callback"]["freezers"][0][part])
        if process == 0:
            assert same(state["callback"], expected["callback"])


def succeeds(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr


def test_one_order_begins_a_run_and_goes_on_with_it_wherever_it_was_killed(tmp_path: Path) -> None:
    """Before the first checkpoint and after it: Lightning's "last" is none where none has been saved."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    succeeds(train(straight, 4))
    order = {"checkpoint": "last", "begin_anew": True}
    assert train(killed, 4, **order, kill=["observed", 1, 0]).returncode == -signal.SIGKILL
    assert read_run(killed / "run").metrics["epoch"].tolist() == [1]
    assert not (killed / "saved").exists()
    assert train(killed, 4, **order, kill=["batch", 3, 0]).returncode == -signal.SIGKILL
    assert read_run(killed / "run").metrics["epoch"].tolist() == [1, 2]
    succeeds(train(killed, 4, **order))
    assert same(states(killed), states(straight))
    assert files_of(killed / "run") == files_of(straight / "run")


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an uninterrupted training by two processes."""
    path = tmp_path_factory.mktemp("straight")
    succeeds(train(path, 4, processes=2))
    return path


def test_two_processes_hold_the_same_sets_and_go_on_exactly(tmp_path: Path, by_two: Path) -> None:
    succeeds(train(tmp_path, 2, processes=2))
    succeeds(train(tmp_path, 4, processes=2, checkpoint=saved(tmp_path, 2)))
    first = states(by_two)[0]
    assert_same_sets(states(by_two, 2), first)
    assert_same_sets(states(tmp_path, 2), first)
    assert files_of(tmp_path / "run") == files_of(by_two / "run")


def test_either_of_two_processes_is_killed(tmp_path: Path, by_two: Path) -> None:
    """The second within an epoch, then the first when a row is written of which no checkpoint tells."""
    assert train(tmp_path, 4, processes=2, kill=["batch", 2, 1]).returncode != 0
    assert read_run(tmp_path / "run").metrics["epoch"].tolist() == [1]
    again = train(tmp_path, 4, processes=2, kill=["observed", 3, 0], checkpoint=saved(tmp_path, 1))
    assert again.returncode == -signal.SIGKILL
    assert read_run(tmp_path / "run").metrics["epoch"].tolist() == [1, 2, 3]
    assert not Path(saved(tmp_path, 3)).exists()
    succeeds(train(tmp_path, 4, processes=2, checkpoint=saved(tmp_path, 2)))
    assert_same_sets(states(tmp_path, 2), states(by_two)[0])
    assert files_of(tmp_path / "run") == files_of(by_two / "run")


@pytest.mark.slow
def test_a_module_that_is_compiled_goes_on_exactly(tmp_path: Path, by_two: Path) -> None:
    """By two processes, with the sets of the run that is not compiled."""
    succeeds(train(tmp_path, 2, processes=2, compiled=True))
    succeeds(train(tmp_path, 4, processes=2, compiled=True, checkpoint=saved(tmp_path, 2)))
    assert_same_sets(states(tmp_path, 2), states(tmp_path)[0])
    for found, expected in zip(states(tmp_path, 2), states(by_two, 2), strict=True):
        sets, others = (one["callback"]["freezers"][0]["layers"] for one in (found, expected))
        assert all(torch.equal(sets[name]["trainable"], others[name]["trainable"]) for name in others)
