from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from neq_cli.errors import NeqError, RunDirectoryError
from neq_cli.runs.store.run import Run
from neq_cli.runs.views.report.fields import layer_map

LAYERS = "epoch,layer,kind,neurons,frozen,phi_mean,velocity_abs_mean,flops_paper,flops_executed\n"


def test_percentages_by_hand(make_run: Callable[..., Run]) -> None:
    # Sets chosen after an epoch are in force during the next: 4 neurons in conv1, 3 in bn1, 2 in fc.
    run = make_run("run", frozen={"conv1": [[0], [1, 2, 3]], "bn1": [[], [0, 1, 2]]})
    found = layer_map([run])
    assert found.names == ("conv1", "bn1", "fc")
    np.testing.assert_allclose(found.percent, [[0, 25, 75], [0, 0, 100], [0, 0, 0]])
    assert (found.layers_per_row, found.epochs_per_column, found.epochs) == (1, 1, 3)


def test_runs_are_folded_by_neurons(make_run: Callable[..., Run], recipe: Any) -> None:
    runs = [make_run("a", frozen={"conv1": [[0, 1]]}), make_run("b", recipe(seed=2), epochs=2, finish=False)]
    np.testing.assert_allclose(layer_map(runs).percent[0], [0, 25, 0])


def rows(epochs: int, layers: int) -> list[str]:
    """One neuron in ten is frozen in layer 0, two in layer 1, ... in odd epochs; none in even ones."""
    return [
        f"{epoch},l{layer},Conv2d,10,{min(layer + 1, 10) if epoch % 2 else 0},,,1,1\n"
        for epoch in range(1, epochs + 1)
        for layer in range(layers)
    ]


def test_long_and_deep_runs_are_binned(
    make_run: Callable[..., Run], recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns, most_rows = 6, 10
    monkeypatch.setattr("neq_cli.runs.views.report.fields.MOST_COLUMNS", columns)
    monkeypatch.setattr("neq_cli.runs.views.report.fields.MOST_ROWS", most_rows)
    epochs, layers = 2 * columns - 1, 2 * most_rows + 1
    run = make_run("run", recipe(epochs=epochs), sizes={"l0": 2})
    run.files.layers.write_text(LAYERS + "".join(rows(epochs, layers)))
    found = layer_map([run])
    assert (found.layers_per_row, found.epochs_per_column) == (3, 2)
    assert found.percent.shape == (-(-layers // 3), columns)
    assert len(found.names) == layers
    # Layers 0 to 2 in an odd and an even epoch: (10 + 20 + 30) / 6; the last column has the odd one only.
    np.testing.assert_allclose(found.percent[0], [10] * (columns - 1) + [20])


def test_torn_rows_are_left_out(make_run: Callable[..., Run]) -> None:
    run = make_run("run", epochs=2, finish=False)
    with run.files.layers.open("a") as file:
        file.write("3,conv1,Conv2d,4,4,,,1,1\n3,bn1,Conv2")
    assert layer_map([run]).percent.shape == (3, 2)


def test_a_model_without_observed_layers(make_run: Callable[..., Run]) -> None:
    run = make_run("run")
    run.files.layers.write_text(LAYERS)
    assert layer_map([run]).names == ()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("1,unknown,Conv2d,4,0,,,1,1\n", "not as in epoch 1"),
        ("2,l0,Conv2d,4,5,,,1,1\n", "5 of 4 neurons"),
        ("0,l0,Conv2d,4,0,,,1,1\n", "not as in epoch 1"),
        ("2,l0,Conv2d\n", "3 cells where 9 belong"),
        ("2,l0,Conv2d,x,0,,,1,1\n", "'x' is not a number"),
    ],
)
def test_damage_is_one_line(make_run: Callable[..., Run], row: str, message: str) -> None:
    run = make_run("run")
    first = "1,l0,Conv2d,4,0,,,1,1\n" + ("2,l0,Conv2d,4,0,,,1,1\n" if row.startswith("1") else "")
    run.files.layers.write_text(LAYERS + first + row)
    with pytest.raises(RunDirectoryError, match=message) as caught:
        layer_map([run])
    assert "\n" not in str(caught.value)


def test_runs_of_other_layers_are_refused(make_run: Callable[..., Run]) -> None:
    runs = [make_run("a"), make_run("b", sizes={"other": 2})]
    with pytest.raises(NeqError, match=r"1 layers where .*a has 3"):
        layer_map(runs)


def test_observations_are_called_so(make_observed: Callable[..., Run]) -> None:
    run = make_observed(frozen={"conv1": [[0]] * 8})
    assert layer_map([run]).unit == "observation"
    run.files.layers.write_text(LAYERS + "1,conv1,Conv2d,4,0,,,1,1\n2,other,Conv2d,4,0,,,1,1\n")
    with pytest.raises(RunDirectoryError, match=r"observation 2, layer 'other', .* not as in observation 1"):
        layer_map([run])
