"""Where curves, marks and the ends of their axis lie: by epochs as ever, by observations where these were made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from neq_cli.runs.compare.curves import study
from neq_cli.runs.store.run import Run
from neq_cli.runs.views.report.drawing import PAGE
from neq_cli.runs.views.report.pictures import pictures

pytest.importorskip("matplotlib")
if TYPE_CHECKING:
    from matplotlib.axes import Axes


def drawn(runs: Sequence[Run], name: str) -> Axes:
    from matplotlib.figure import Figure

    figure = Figure()
    picture = next(each for each in pictures(study(runs)) if each.name.startswith(name))
    picture.draw(figure, PAGE)
    return figure.axes[0]


def curves(axes: Axes) -> list[list[float]]:
    """Return where the points of each line lie, without the marks of the learning rate."""
    return [np.asarray(line.get_xdata()).tolist() for line in axes.lines if len(line.get_xdata()) != 2]


def test_epochs(make_run: Callable[..., Run]) -> None:
    axes = drawn([make_run(metrics=[{"lr": rate} for rate in (0.1, 0.1, 0.01)])], "accuracy-by-epoch")
    assert curves(axes) == [[1, 2, 3]]
    assert axes.get_xlim() == (0.5, 3.5)
    assert axes.get_xlabel() == "epoch"
    assert axes.lines[-1].get_xdata() == [2.5, 2.5]  # between the second epoch and the third


def test_observations_stand_on_one_axis_with_epochs(
    make_run: Callable[..., Run], make_observed: Callable[..., Run], recipe: Any
) -> None:
    rates = [0.1] * 8 + [0.01] * 4
    runs = [
        make_run("b", recipe(policy={"kind": "baseline"}), metrics=[{"lr": rate} for rate in (0.1, 0.1, 0.01)]),
        make_observed("n", metrics=[{"lr": rate} for rate in rates], frozen={"conv1": [[0]] * 12}),
    ]
    axes = drawn(runs, "updated-neurons-by-epoch")
    assert curves(axes) == [[1, 2, 3], [row / 4 for row in range(1, 13)]]
    assert axes.get_xlim() == (0.125, 3.5)
    assert axes.get_xlabel() == "epoch"
    assert axes.lines[-1].get_xdata() == [2, 2]  # the old rate held up to there, in both
    layers = drawn(runs, "frozen-by-layer")
    assert layers.get_xlabel() == "observation"
    assert layers.get_xlim() == (0.5, 12.5)
    assert layers.lines[-1].get_xdata() == [8.5, 8.5]
    spread = drawn(runs, "velocity-by-observation")
    assert (spread.get_xlabel(), spread.get_ylabel()) == ("observation", "velocity v (per observation)")
