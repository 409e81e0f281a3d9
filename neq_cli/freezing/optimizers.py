"""Which optimisers work row by row, so that rows can be frozen; others are refused by name or after a small trial."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from neq_cli.errors import FreezingError

ROW_WISE_OPTIMIZERS = frozenset(
    ["SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "Adagrad", "Adadelta", "ASGD"]
)
MIXING_OPTIMIZERS: Mapping[str, str] = {
    "LBFGS": "its update mixes all parameters",
    "Adafactor": "its second moments mix the rows of a weight",
    "Muon": "it orthogonalises each weight, which mixes the rows",
    "SparseAdam": "it takes sparse gradients only",
}


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise FreezingError where the optimiser does not update row by row, so that frozen rows could not be kept.

    Classes outside torch.optim are tried on two small weights whose gradients agree in the first row only.
    """
    for kind in type(optimizer).__mro__:
        if _is_stock(kind) and kind.__name__ in MIXING_OPTIMIZERS:
            reason = MIXING_OPTIMIZERS[kind.__name__]
            raise FreezingError(
                f"optimizer: {kind.__name__} cannot freeze neurons ({reason}); use SGD, AdamW or RMSprop"
            )
    known = _is_stock(type(optimizer)) and type(optimizer).__name__ in ROW_WISE_OPTIMIZERS
    if not known and not _updates_row_by_row(optimizer):
        raise FreezingError(
            f"optimizer: {type(optimizer).__name__} mixes the rows of a weight, so that none can be frozen; "
            "use one that updates element by element, such as SGD or AdamW"
        )


def _is_stock(kind: type) -> bool:
    return kind.__module__.startswith("torch.optim")


def _updates_row_by_row(optimizer: torch.optim.Optimizer) -> bool:
    generator = torch.Generator().manual_seed(0)
    start, common = torch.randn(2, 4, 3, generator=generator, device="cpu")
    results = []
    for scale in (1.0, 3.0):
        weight = nn.Parameter(start.clone())
        settings = {key: value for key, value in optimizer.defaults.items() if key not in ("fused", "foreach")}
        try:
            # The same draws for both, where the optimiser adds noise; the caller's random numbers stay as they are.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                trial = type(optimizer)([weight], **settings)
                for _ in range(3):
                    weight.grad = common.clone()
                    weight.grad[1:] *= scale
                    trial.step()
        except Exception as error:
            name = type(optimizer).__name__
            raise FreezingError(f"optimizer: {name} could not be tried for row-wise updates: {error}") from error
        row_state(trial, weight)
        results.append(weight.detach()[0])
    return torch.equal(*results)


def row_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Return the parameter's state tensors that have its shape, by key; scalars, such as Adam's ``step``, advance.

    Raises FreezingError where a tensor is neither a scalar nor of the parameter's shape.
    """
    state: Mapping[str, Any] = optimizer.state.get(parameter, {})
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    for key, value in tensors.items():
        if value.shape != parameter.shape and value.numel() != 1:
            raise FreezingError(
                f"optimizer: {type(optimizer).__name__}'s state {key!r} has shape {list(value.shape)} beside a "
                f"parameter of shape {list(parameter.shape)}, so that no row of it can be held"
            )
    # A parameter of one element is all row; a scalar beside it is told apart by its number of dimensions.
    return {key: value for key, value in tensors.items() if value.shape == parameter.shape}
