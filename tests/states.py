"""An optimiser's state as everybody is told it: of all rows, by parameter."""

from __future__ import annotations

from typing import Any

from torch import Tensor, optim


def whole_state(optimizer: optim.Optimizer) -> dict[Tensor, dict[str, Any]]:
    """Return what ``state_dict()`` has of each parameter; between saves frozen rows' state may lie elsewhere."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {parameters[number]: values for number, values in optimizer.state_dict()["state"].items()}
