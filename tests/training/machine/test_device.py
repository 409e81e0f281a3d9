"""Where a run computes, its seeds, and what it records of the machine."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from neq_cli import __version__
from neq_cli.training.machine import device
from neq_cli.training.machine.device import describe_device, environment, resolve_device, seed_everything


@pytest.fixture(autouse=True)
def settings_put_back() -> Iterator[None]:
    benchmark = torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu"), (True, False, "cuda")],
)
def test_auto_takes_cuda_then_mps_then_the_cpu(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert resolve_device("auto") == torch.device(expected)


def test_a_named_device_is_taken_as_it_is() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("cuda:1") == torch.device("cuda", 1)


def test_a_device_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert describe_device(torch.device("cpu")) == "cpu (2 threads)"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert describe_device(torch.device("cpu")) == "cpu (1 thread)"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    assert describe_device(torch.device("cuda:1")) == "cuda:1 (NVIDIA H100 80GB HBM3)"
    assert describe_device(torch.device("mps")) == "mps"


def test_one_seed_seeds_everything() -> None:
    def draw(seed: int) -> tuple[float, float, float]:
        seed_everything(seed, deterministic=False)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    first = draw(3)
    assert draw(3) == first
    assert all(one != other for one, other in zip(draw(4), first, strict=True))


@pytest.mark.parametrize("deterministic", [True, False])
def test_deterministic_refuses_kernels_whose_bits_vary(deterministic: bool) -> None:
    seed_everything(1, deterministic=deterministic)
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert torch.backends.cudnn.benchmark != deterministic
    assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == deterministic


def test_the_environment_is_plain_and_names_versions_and_the_commit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert environment(torch.device("cpu"))["git"] is None
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b.c")
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    about = environment(torch.device("cpu"))
    assert about["git"] == {"commit": head, "dirty": False}
    (tmp_path / "new").touch()
    assert environment(torch.device("cpu"))["git"] == {"commit": head, "dirty": True}
    assert about["neq"] == __version__
    assert about["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert json.loads(json.dumps(about)) == about


def test_a_machine_without_git_trains_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: object, **options: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(device.subprocess, "run", missing)
    assert environment(torch.device("cpu"))["git"] is None
