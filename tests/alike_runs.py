"""Two runs compared that computed the same in another order: sets are equal, and numbers within rounding."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from timings import TIMINGS


def untimed_rows(run: Path) -> list[dict[str, str]]:
    """Return the rows of metrics.csv without what differs from one time to the next."""
    with (run / "metrics.csv").open(newline="") as file:
        return [{name: cell for name, cell in row.items() if name not in TIMINGS} for row in csv.DictReader(file)]


def assert_alike(one: Path, other: Path, weights: float, observed: float) -> None:
    """Compare all that two runs left: metrics and weights within ``weights``, observations within ``observed``."""
    for expected, found in zip(untimed_rows(one), untimed_rows(other), strict=True):
        for key, value in expected.items():
            if key != "bytes_per_step":
                assert float(found[key]) == pytest.approx(float(value), rel=weights, abs=weights), key
    frozen = 0
    for epoch in range(1, len(untimed_rows(one)) + 1):
        name = f"neurons/epoch_{epoch:04d}.safetensors"
        expected_neurons, found_neurons = load_file(one / name), load_file(other / name)
        for key, values in expected_neurons.items():
            if values.dtype == np.bool_:
                assert (found_neurons[key] == values).all(), (epoch, key)
                frozen += int((~values).sum())
            else:
                np.testing.assert_allclose(found_neurons[key], values, rtol=0, atol=observed)
    assert frozen > 20  # or the comparison of sets would say little
    first, second = load_file(one / "weights.safetensors"), load_file(other / "weights.safetensors")
    assert list(first) == list(second)
    for key, values in first.items():
        np.testing.assert_allclose(second[key], values, rtol=0, atol=weights)
