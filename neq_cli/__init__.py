"""Train any PyTorch model and stop updating the neurons that have reached equilibrium."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neq_cli.freezing import Baseline, Freezer, NEq, Observation, Policy, Stochastic

__version__ = "0.1.0"
__all__ = ["Baseline", "Freezer", "NEq", "Observation", "Policy", "Stochastic", "__version__"]


def __getattr__(name: str) -> Any:
    # The library half needs torch (seconds to import); `neq --help` must not.
    if name in __all__:
        from neq_cli import freezing

        return getattr(freezing, name)
    raise AttributeError(f"module 'neq_cli' has no attribute {name!r}")
