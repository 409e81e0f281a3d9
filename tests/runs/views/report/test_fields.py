from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from neq_cli.errors import RunDirectoryError
from neq_cli.runs.store.run import Run
from neq_cli.runs.views.report.fields import FIELDS, MOST_EPOCHS, densities, sampled


def write_neurons(run: Run, values: dict[int, np.ndarray]) -> None:
    """Give every epoch one layer of ``values[epoch]``: phi as they are, delta_phi half of them, velocity twice."""
    for epoch, phi in values.items():
        phi = phi.astype(np.float32)
        flags = np.ones(len(phi), dtype=bool)
        with np.errstate(over="ignore"):
            velocity = phi * 2
        tensors = {
            "a/phi": phi,
            "a/delta_phi": phi / 2,
            "a/velocity": velocity,
            "a/trained": flags,
            "a/trainable": flags,
        }
        safetensors.numpy.save_file(tensors, run.files.neurons(epoch), {"schema": "1"})


@pytest.fixture
def drawn_run(make_run: Callable[..., Run], recipe: Any) -> tuple[Run, dict[int, np.ndarray]]:
    generator = np.random.default_rng(3)
    values = {epoch: generator.normal(0.2, 0.3 / epoch, 500) for epoch in (1, 2, 3)}
    run = make_run("run")
    write_neurons(run, values)
    return run, values


def test_shares_equal_numpys_histogram(drawn_run: tuple[Run, dict[int, np.ndarray]]) -> None:
    run, values = drawn_run
    factors = {"phi": 1, "delta_phi": 0.5, "velocity": 2}
    for density in densities(run, 0.05):
        assert density.epochs == (1, 2, 3)
        for column, epoch in enumerate(density.epochs):
            own = (values[epoch].astype(np.float32) * np.float32(factors[density.field])).astype(np.float64)
            inside = np.clip(own, density.edges[0] * (1 - 1e-12), density.edges[-1] * (1 - 1e-12))
            counts, _ = np.histogram(inside, bins=density.edges)
            # A value within rounding of an edge may fall on its other side.
            assert np.abs(counts - density.shares[:, column] * 500).sum() <= 4
            assert density.shares[:, column].sum() == pytest.approx(1)
            assert density.mean[column] == pytest.approx(own.mean())
        everything = np.concatenate([value * factors[density.field] for value in values.values()])
        beyond = (everything < density.edges[0]) | (everything > density.edges[-1])
        assert density.outside == pytest.approx(beyond.mean())
        assert density.outside < 0.005


def test_scales(drawn_run: tuple[Run, dict[int, np.ndarray]]) -> None:
    phi, delta, velocity = densities(drawn_run[0], 0.05)
    assert phi.scale.linear is None
    assert phi.edges[-1] >= 1
    assert np.ptp(np.diff(phi.edges)) < 1e-12
    for density in (delta, velocity):
        assert density.scale.linear == 0.05
        np.testing.assert_allclose(density.edges, -density.edges[::-1], atol=1e-12)
        # Bins are of equal width in asinh(value / 0.05).
        assert np.ptp(np.diff(np.arcsinh(density.edges / 0.05))) < 1e-9
    assert densities(drawn_run[0])[2].scale.linear == pytest.approx(velocity.edges[-1] / 100)


def test_what_is_not_finite_is_left_out(make_run: Callable[..., Run]) -> None:
    run = make_run("run")
    odd = np.array([np.nan, np.inf, -np.inf, 0.25, 0.75])
    write_neurons(run, {1: odd, 2: np.full(4, np.nan), 3: np.zeros(0)})
    for density in densities(run, 0.01):
        np.testing.assert_allclose(density.shares.sum(axis=0), [1, 0, 0])
        assert density.mean[0] == pytest.approx(0.5 * {"phi": 1, "delta_phi": 0.5, "velocity": 2}[density.field])
        assert np.isnan(density.mean[1:]).all()


@pytest.mark.parametrize("value", [0.0, 1.0, -3e38, 3e38, 1e-45])
@pytest.mark.parametrize("threshold", [None, 0.0, 0.001, 1e300, float("nan")])
def test_all_values_alike(make_run: Callable[..., Run], value: float, threshold: float | None) -> None:
    run = make_run("run")
    write_neurons(run, dict.fromkeys((1, 2, 3), np.full(7, value)))
    for density in densities(run, threshold):
        assert np.isfinite(density.edges).all()
        assert (np.diff(density.edges) > 0).all()


def test_epochs_are_sampled_evenly() -> None:
    assert sampled(3, 5) == (1, 2, 3)
    assert sampled(5, 5) == (1, 2, 3, 4, 5)
    many = sampled(1000, MOST_EPOCHS)
    assert (many[0], many[-1], len(set(many))) == (1, 1000, MOST_EPOCHS)
    assert set(np.diff(many)) == {6, 7}


def test_damage_is_one_line(make_run: Callable[..., Run]) -> None:
    run = make_run("run")
    Path(run.files.neurons(2)).write_bytes(b"nothing")
    with pytest.raises(RunDirectoryError, match=r"epoch_0002\.safetensors: not a safetensors file"):
        densities(run)


def test_fields_are_those_of_figure_5() -> None:
    assert FIELDS == ("phi", "delta_phi", "velocity")
