"""Train any PyTorch model and stop updating the neurons that have reached equilibrium."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neq_cli.freed_memory import keep_freed_memory
    from neq_cli.freezing import Baseline, Budget, Freezer, Front, NEq, Observation, Policy, Stochastic

__version__ = "0.1.0"
__all__ = [
    "Baseline",
    "Budget",
    "Freezer",
    "Front",
    "NEq",
    "Observation",
    "Policy",
    "Stochastic",
    "__version__",
    "keep_freed_memory",
]


def __getattr__(name: str) -> Any:
    if name == "keep_freed_memory":
        from neq_cli import freed_memory

        return freed_memory.keep_freed_memory
    # The library half needs torch (seconds to import); `neq --help` must not.
    if name in __all__:
        from neq_cli import freezing

        return getattr(freezing, name)
    raise AttributeError(f"module 'neq_cli' has no attribute {name!r}")
