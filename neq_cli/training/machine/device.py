"""Where a run computes, what that machine is, and the seeds of everything random."""

from __future__ import annotations

import os
import platform
import random
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from neq_cli import __version__

_RECORDED_PACKAGES = ("torch", "torchvision", "numpy", "safetensors", "pydantic")


def resolve_device(name: str, local_rank: int | None = None) -> torch.device:
    """Return the torch device: ``auto`` takes CUDA, then MPS, then the CPU.

    ``local_rank``: of several processes on the machine, each takes the CUDA device of this number.
    """
    if local_rank is not None and (name == "cuda" or (name == "auto" and torch.cuda.is_available())):
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def describe_device(device: torch.device, processes: int = 1) -> str:
    """Return the device in a few words: "cuda (NVIDIA H100 80GB HBM3)", "cpu (2 threads) in 4 processes"."""
    together = f" in {processes} processes" if processes > 1 else ""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)}){together}"
    threads = torch.get_num_threads()
    return (f"cpu ({threads} thread{'s' * (threads > 1)})" if device.type == "cpu" else str(device)) + together


def seed_everything(seed: int, *, deterministic: bool) -> None:
    """Seed torch on every device, Python and NumPy; ``deterministic`` refuses kernels whose bits may vary."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        # cuBLAS wants this from the environment, before its first call.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic


def environment(device: torch.device) -> dict[str, Any]:
    """Return what a reader needs to know to run it again: versions, device, code, command line."""
    return {
        "neq": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in _RECORDED_PACKAGES},
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "device": describe_device(device),
        "processor": processor_name(),
        "git": _git_state(Path.cwd()),
        "argv": sys.argv,
    }


def machine(device: torch.device, processes: int) -> dict[str, Any]:
    """Return the part of a run's ``environment`` that the speed of kernels depends on, as the run has it written."""
    return {
        "neq": __version__,
        "torch": version("torch"),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "device": describe_device(device, processes),
        "processor": processor_name(),
    }


def processor_name() -> str:
    """Return the processor's name, or its kind where the system does not tell."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_state(folder: Path) -> dict[str, Any] | None:
    """Return commit and dirty flag of the working directory, None where it is no git checkout."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
