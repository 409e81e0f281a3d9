"""The method: usable in anybody's training loop with nothing but torch."""

from neq_cli.freezing.flops import Flops, LayerFlops
from neq_cli.freezing.freezer import Freezer
from neq_cli.freezing.policies import Baseline, NEq, Observation, Policy, Stochastic

__all__ = ["Baseline", "Flops", "Freezer", "LayerFlops", "NEq", "Observation", "Policy", "Stochastic"]
