"""Train any PyTorch model and stop updating the neurons that have reached equilibrium."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neq_cli.freed_memory import keep_freed_memory
    from neq_cli.freezing import Baseline, Budget, Freezer, Front, NEq, Observation, Policy, Stochastic
    from neq_cli.jobs.loading import load
    from neq_cli.jobs.notebook import train
    from neq_cli.jobs.recorder import Recorder
    from neq_cli.runs.store.run import Run, read_run

__version__ = "0.1.0"
__all__ = [
    "Baseline",
    "Budget",
    "Freezer",
    "Front",
    "NEq",
    "Observation",
    "Policy",
    "Recorder",
    "Run",
    "Stochastic",
    "__version__",
    "keep_freed_memory",
    "load",
    "read_run",
    "train",
]
_HOMES = {
    "Recorder": "neq_cli.jobs.recorder",
    "Run": "neq_cli.runs.store.run",
    "keep_freed_memory": "neq_cli.freed_memory",
    "load": "neq_cli.jobs.loading",
    "read_run": "neq_cli.runs.store.run",
    "train": "neq_cli.jobs.notebook",
}
"""Where the names are that the package itself offers, but for those of the method."""


def __getattr__(name: str) -> Any:
    # Each when it is asked for: most need torch (seconds to import); `neq --help` and reading a run must not.
    if name in __all__:
        return getattr(importlib.import_module(_HOMES.get(name, "neq_cli.freezing")), name)
    raise AttributeError(f"module 'neq_cli' has no attribute {name!r}")
