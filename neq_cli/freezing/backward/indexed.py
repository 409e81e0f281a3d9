"""Matrix products that load trainable rows by their number while they multiply: nothing is gathered into memory first.

By Triton, where it is there and does on the device what PyTorch does. No kernel has to be: the timing may choose it.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

_TYPES = (torch.float16, torch.bfloat16, torch.float32)
_ROWS, _FEATURES, _TOKENS = 64, 64, 32
# Programs that a GPU of some hundred processors is busy with, and tokens that are worth one.
_PROGRAMS, _FEWEST_TOKENS = 264, 512


def can_multiply(matrix: Tensor) -> bool:
    """Whether there are kernels for matrices of this type on this device."""
    return matrix.dtype in _TYPES and _works(matrix.device)


def weight_gradient(errors: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """Return ``errors[:, rows].T @ values``: [tokens, neurons], int64 [k], [tokens, features] -> [k, features]."""
    tokens, count, features = len(errors), len(rows), values.shape[1]
    blocks = _blocks(count, _ROWS), _blocks(features, _FEATURES)
    # Few rows make few blocks: then the tokens are shared out, and what each part comes to is added up in its order.
    parts = max(1, min(_PROGRAMS // (blocks[0] * blocks[1]), tokens // _FEWEST_TOKENS))
    part = _blocks(_blocks(tokens, parts), _TOKENS) * _TOKENS
    parts = max(1, _blocks(tokens, part))
    output = errors.new_empty(parts, count, features, dtype=torch.float32)
    _kernels().weight_gradient[blocks[0], blocks[1], parts](
        errors, rows, values, output, tokens, count, features, *errors.stride(), *values.stride(), part,
        ROWS=_ROWS, FEATURES=_FEATURES, TOKENS=_TOKENS, PRECISION=_precision(),
    )  # fmt: skip
    return (output[0] if parts == 1 else output.sum(0)).to(values.dtype)


def input_gradient(errors: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """Return ``errors[:, rows] @ weight[rows]``: [tokens, neurons], int64 [k], [neurons, features]."""
    tokens, features = len(errors), weight.shape[1]
    output = errors.new_empty(tokens, features)
    _kernels().input_gradient[_blocks(tokens, _ROWS), _blocks(features, _FEATURES)](
        errors, rows, weight, output, tokens, len(rows), features, *errors.stride(), *weight.stride(),
        TOKENS=_ROWS, FEATURES=_FEATURES, ROWS=_TOKENS, PRECISION=_precision(),
    )  # fmt: skip
    return output


def _blocks(count: int, size: int) -> int:
    return -(-count // size)


def _precision() -> str:
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _kernels() -> Any:
    # Lazily: Triton is not there everywhere, and takes its time.
    return importlib.import_module("neq_cli.freezing.backward.indexed_kernels")


@cache
def _works(device: torch.device) -> bool:
    """Whether Triton's products are PyTorch's on this device, found by a trial."""
    if device.type != "cuda":
        return False
    try:
        errors, values = (torch.arange(12.0, device=device).view(3, 4) for _ in range(2))
        rows = torch.tensor([1, 3], device=device)
        found = weight_gradient(errors, rows, values), input_gradient(errors, rows, values.t().contiguous())
        expected = errors[:, rows].t() @ values, errors[:, rows] @ values.t()[rows]
        # Small whole numbers: exact in any precision.
        return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    except Exception:
        return False  # without a compiler, on an old device, without Triton: the other kernels do
