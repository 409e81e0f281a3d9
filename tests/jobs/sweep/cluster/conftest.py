"""Sweeps whose runs are submitted: to submitit's local executor, or to what stands in for SLURM's commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from neq_cli.jobs.sweep.cluster.options import SlurmOptions
from neq_cli.jobs.sweep.cluster.run import submit_sweep
from neq_cli.jobs.sweep.plan import plan_sweep
from neq_cli.runs.views.live.sweep_state import SweepState, SweptRun
from neq_cli.runs.views.live.sweep_view import SilentSweep, run_line

ROOT = Path(__file__).parents[4]


class Told(SilentSweep):
    """Remembers what a user is told, and calls ``then`` with each line."""

    def __init__(self, then: Callable[[str], object] = lambda line: None) -> None:
        self.lines: list[str] = []
        self.then = then

    def begin(self, state: SweepState) -> None:
        self.state = state

    def changed(self, run: SweptRun, now: float) -> None:
        self.message(run_line(run, self.state, now))

    def message(self, text: str) -> None:
        self.lines.append(text)
        self.then(text)

    def with_word(self, word: str) -> list[str]:
        return [line for line in self.lines if line.startswith(word)]


def child(first: str = "") -> Callable[[str, Sequence[str], Path], list[str]]:
    """Return what gives the command of a run that begins with the code ``first``."""
    code = f"{first}\nfrom neq_cli.jobs.sweep.child import main\nmain()"

    def command(reference: str, overrides: Sequence[str], run: Path) -> list[str]:
        return [
            sys.executable,
            "-c",
            code,
            "train",
            reference,
            *overrides,
            "-o",
            str(run),
            "--resume",
            "--progress",
            "plain",
        ]

    return command


@pytest.fixture
def submitted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Told]:
    """Sweep small.yaml by jobs into the folder `here`; returns what was told."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(
        "neq_cli.jobs.sweep.cluster.run._POLL_SECONDS", 0.02
    )  # so that nothing is over between two looks
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path[1:]]))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")

    def start(
        *axes: str,
        first: str = "",
        jobs: int | None = None,
        then: Callable[[str], object] = lambda line: None,
        cluster: str = "local",
        told: Told | None = None,
        **options: Any,
    ) -> Told:
        told = Told(then) if told is None else told
        plan = plan_sweep("small.yaml", axes, Path("here"))
        submit_sweep(plan, jobs, told, SlurmOptions(**options), cluster, child(first))
        return told

    return start
