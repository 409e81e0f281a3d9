"""The method: usable in anybody's training loop with nothing but torch."""

from neq_cli.freezing.flops import Flops, LayerFlops
from neq_cli.freezing.freezer import Freezer
from neq_cli.freezing.policies import Baseline, NEq, Observation, Policy
from neq_cli.freezing.yardsticks import Budget, Front, Stochastic

__all__ = [
    "Baseline",
    "Budget",
    "Flops",
    "Freezer",
    "Front",
    "LayerFlops",
    "NEq",
    "Observation",
    "Policy",
    "Stochastic",
]
