"""NEqCallback in two processes, launched by torchrun and by accelerate: the same sets, also after one was killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from neq_cli import read_run

pytest.importorskip("transformers", reason="no transformers")
pytest.importorskip("accelerate", reason="no accelerate, which Trainer needs")

import transformers
from integrations.transformers_trainings import assert_same, recorded, run_program

pytestmark = pytest.mark.skipif(
    transformers.__version__.startswith("4."), reason="its Trainer cannot resume by gloo on a CPU"
)
CHANGES = {"save_strategy": "epoch", "ddp_backend": "gloo", "per_device_train_batch_size": 2}
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
# Its launcher of several processes has the name of GPUs; with --cpu alone it starts one.
ACCELERATE = [
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no",
]  # fmt: skip


def came_to(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"came_to_{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an uninterrupted training by two processes."""
    folder = tmp_path_factory.mktemp("straight")
    run_program({"folder": str(folder), "arguments": CHANGES}, launch=TORCHRUN)
    return folder


def test_two_processes_hold_the_same_sets_and_resume(tmp_path: Path, straight: Path) -> None:
    order = {"folder": str(tmp_path), "arguments": CHANGES}
    (tmp_path / "frozen").mkdir()
    # DistributedDataParallel waits for the gradient of every parameter.
    changes = {**CHANGES, "ddp_find_unused_parameters": False}
    whole = {"folder": str(tmp_path / "frozen"), "arguments": changes, "freeze": 1}
    run_program({**order, "stop": 15}, {**order, "resume": True}, whole, launch=TORCHRUN)
    first, second = came_to(straight)
    assert any(any(flags) for flags in first["frozen"].values())
    assert second["frozen"] == first["frozen"]
    assert_same(second["weights"], first["weights"])
    assert_same(came_to(tmp_path), [first, second])
    frozen = came_to(tmp_path / "frozen")[0]["frozen"]
    assert {name for name, flags in frozen.items() if not all(flags)} == {"classifier"}
    assert_same(recorded(tmp_path / "run"), recorded(straight / "run"))


def test_launched_by_accelerate_and_one_of_them_killed(tmp_path: Path, straight: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    order = {"folder": str(tmp_path), "arguments": CHANGES}
    assert run_program({**order, "stop": 15, "by_kill": True, "process": 1}, launch=ACCELERATE, fails=True)
    assert read_run(tmp_path / "run").metrics["epoch"].tolist() == [1, 2]
    assert not list(tmp_path.glob("came_to_*"))
    run_program({**order, "resume": True}, launch=ACCELERATE)
    assert_same(came_to(tmp_path), came_to(straight))
    assert_same(recorded(tmp_path / "run"), recorded(straight / "run"))
