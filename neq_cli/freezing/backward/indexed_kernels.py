"""Triton kernels of matrix products that load some columns or rows by their number. Imported where Triton is there."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def weight_gradient(  # type: ignore[no-untyped-def]
    errors, rows, values, output, tokens, count, features,
    errors_token, errors_row, values_token, values_feature, part,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write errors[:, rows].T @ values over one part of the tokens into output [parts, count, features]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    number = tl.load(rows + row, mask=row < count, other=0)
    first = tl.program_id(2) * part
    last = tl.minimum(first + part, tokens)
    total = tl.zeros((ROWS, FEATURES), dtype=tl.float32)
    for start in range(first, last, TOKENS):
        token = (start + tl.arange(0, TOKENS)).to(tl.int64)
        error = tl.load(
            errors + number[:, None] * errors_row + token[None, :] * errors_token,
            mask=(row < count)[:, None] & (token < last)[None, :], other=0.0,
        )  # fmt: skip
        value = tl.load(
            values + token[:, None] * values_token + feature[None, :] * values_feature,
            mask=(token < last)[:, None] & (feature < features)[None, :], other=0.0,
        )  # fmt: skip
        total = tl.dot(error, value, total, input_precision=PRECISION)
    place = (tl.program_id(2) * count + row[:, None]).to(tl.int64) * features + feature[None, :]
    tl.store(output + place, total, mask=(row < count)[:, None] & (feature < features)[None, :])


@triton.jit
def input_gradient(  # type: ignore[no-untyped-def]
    errors, rows, weight, output, tokens, count, features,
    errors_token, errors_row, weight_row, weight_feature,
    TOKENS: tl.constexpr, FEATURES: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write errors[:, rows] @ weight[rows] into output [tokens, features]."""
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    total = tl.zeros((TOKENS, FEATURES), dtype=tl.float32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        number = tl.load(rows + row, mask=row < count, other=0)
        error = tl.load(
            errors + token[:, None] * errors_token + number[None, :] * errors_row,
            mask=(token < tokens)[:, None] & (row < count)[None, :], other=0.0,
        )  # fmt: skip
        weights = tl.load(
            weight + number[:, None] * weight_row + feature[None, :] * weight_feature,
            mask=(row < count)[:, None] & (feature < features)[None, :], other=0.0,
        )  # fmt: skip
        total = tl.dot(error, weights, total, input_precision=PRECISION)
    place = token[:, None] * features + feature[None, :]
    tl.store(output + place, total, mask=(token < tokens)[:, None] & (feature < features)[None, :])
