from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from neq_cli.runs.store.run import Run
from neq_cli.runs.views.tables.plot import render_plot

NEURONS = 100


@pytest.fixture
def course(make_run: Callable[..., Run], recipe: Any) -> Callable[..., Run]:
    """``course(frozen, top1, lr)``: a run of 100 neurons with these values by epoch."""

    def make(frozen: Sequence[float], top1: Sequence[float] = (), lr: Sequence[float] = ()) -> Run:
        rows = [
            {
                "neurons": NEURONS,
                "frozen": value,
                "flops_paper": 2000 * (1 - value / NEURONS),
                "flops_executed": 2000 * (1 - value / NEURONS / 2),
                "test_top1": top1[place] if top1 else 50.0,
                "lr": lr[place] if lr else 0.1,
            }
            for place, value in enumerate(frozen)
        ]
        return make_run("run", recipe(epochs=len(rows)), metrics=rows)

    return make


def printed(run: Run, width: int, encoding: str = "utf-8", colour: bool = False) -> str:
    content = io.BytesIO()
    file = io.TextIOWrapper(content, encoding=encoding)
    console = Console(file=file, width=width, force_terminal=colour, color_system="standard" if colour else None)
    console.print(render_plot(run))
    file.flush()
    return content.getvalue().decode(encoding)


def stars(text: str, title: str) -> list[tuple[int, int]]:
    """Every star of the ASCII chart under ``title`` as (column, row from the bottom)."""
    lines = text.splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith(title)) + 1
    rows = lines[start : start + 7]
    side = rows[0].index("+")
    return sorted(
        (column - side - 1, 6 - row) for row, line in enumerate(rows) for column, mark in enumerate(line) if mark == "*"
    )


@pytest.mark.parametrize("value", [100.0, 0.0, 50.0])
def test_an_axis_of_percentages_ends_where_they_do(course: Callable[..., Run], value: float) -> None:
    lines = printed(course([0, 0], top1=[value, value]), 44, "ascii").splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("test_top1")) + 1
    top, bottom = (float(lines[start + row].split("+")[0]) for row in (0, 6))
    assert 0 <= bottom < top <= 100
    assert bottom <= value <= top


def test_a_straight_line_is_straight(course: Callable[..., Run]) -> None:
    text = printed(course([0, 25, 50, 75, 100]), 44, "ascii")
    points = stars(text, "frozen")
    width = max(column for column, _ in points)
    for column, row in points:
        assert row == pytest.approx(6 * column / width, abs=0.6)
    falling = stars(text, "paper FLOPs")
    assert {row for column, row in falling if column == 0} == {6}
    assert {row for column, row in falling if column == width} == {0}
    # Executed FLOPs fall to half of dense.
    assert {row for column, row in stars(text, "executed FLOPs") if column == width} == {3}


def test_titles_and_axes_tell_numbers(course: Callable[..., Run]) -> None:
    text = printed(course([0, 25, 50], [10.0, 60.0, 90.0]), 60)
    assert "frozen, % of neurons: 50.0 last" in text
    assert "paper FLOPs, % of dense: 50.0 last" in text
    assert "executed FLOPs, % of dense: 75.0 last" in text
    assert "test_top1, %: 90.00 last" in text
    lines = text.splitlines()
    top = next(place for place, line in enumerate(lines) if line.startswith("test_top1")) + 1
    assert [lines[top + row].split("┤")[0].strip() for row in (0, 3, 6)] == ["90.0", "50.0", "10.0"]
    assert lines[-1].split() == ["epoch", "1", "2", "3"]


@pytest.mark.parametrize("epochs", [1, 2, 3, 120])
def test_it_fits(course: Callable[..., Run], epochs: int) -> None:
    run = course([(7 * epoch) % 101 for epoch in range(epochs)])
    for width in (40, 41, 80, 99, 100, 101, 160, 200):
        for encoding in ("utf-8", "ascii", "latin-1", "cp1252"):
            text = printed(run, width, encoding)
            assert max(map(cell_len, text.splitlines())) <= width
            assert str(epochs) in text
            assert text.isascii() == (encoding != "utf-8")
            # Side by side from 100 columns on.
            first = text.splitlines()[0]
            assert ("frozen" in first and "paper" in first) == (width >= 100)


def test_no_colours_off_a_terminal(course: Callable[..., Run]) -> None:
    run = course([0, 50])
    assert "\x1b" not in printed(run, 80)
    assert "\x1b[" in printed(run, 80, colour=True)


def test_steps_of_the_learning_rate_are_marked(course: Callable[..., Run]) -> None:
    text = printed(course([0] * 5, lr=[0.1, 0.1, 0.01, 0.01, 0.01]), 44, "ascii")
    assert "^ learning rate: 0.01 from epoch 3 on" in text
    floors = [line for line in text.splitlines() if "+--" in line]
    assert len(floors) == 4
    for floor in floors:
        columns = floor.split("+")[1]
        assert columns.index("^") == round(2 / 4 * (len(columns) - 1))
        assert columns.count("^") == 1


def test_epochs_without_a_measure_are_bridged(course: Callable[..., Run]) -> None:
    text = printed(course([0] * 5, [0.0, math.nan, math.nan, math.nan, 100.0]), 44, "ascii")
    columns = {column for column, _ in stars(text, "test_top1")}
    assert columns == set(range(max(columns) + 1))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e99, -1e99, 0.0, 1e-99])
@pytest.mark.filterwarnings("error", "ignore::ResourceWarning")  # of garbage of other tests
def test_odd_numbers(make_run: Callable[..., Run], value: float) -> None:
    columns = ("neurons", "frozen", "flops_paper", "flops_paper_dense", "flops_executed", "test_top1", "lr")
    text = printed(make_run("run", metrics=[dict.fromkeys(columns, value)] * 3), 80)
    assert max(map(len, text.splitlines())) <= 80
    if not abs(value) <= 1e30:
        assert "– last" in text


def test_one_epoch(course: Callable[..., Run]) -> None:
    text = printed(course([0]), 40, "ascii")
    assert stars(text, "frozen") == [(0, 0)]
    assert "epoch 1" in text


def test_observations_stand_on_the_axis_of_epochs(make_observed: Callable[..., Run]) -> None:
    # 0 to 0.5 epochs in two rows, then nothing measured until the last, after 2 epochs.
    shares = [0.0, 50.0, *[math.nan] * 5, 50.0]
    rows = [
        {"neurons": NEURONS, "frozen": value, "lr": 0.1 if place < 4 else 0.01} for place, value in enumerate(shares)
    ]
    run = make_observed(metrics=rows)
    text = printed(run, 44, "ascii")
    assert text.splitlines()[9].split() == ["epoch", "0.25", "1", "2"]
    width = max(column for column, _ in stars(text, "frozen"))
    assert min(column for column, row in stars(text, "frozen") if row == 3) == round((0.5 - 0.25) / 1.75 * width)
    assert "^ learning rate: 0.01 after epoch 1" in text
    for room in (40, 80, 120, 200):
        assert max(map(cell_len, printed(run, room).splitlines())) <= room


def test_observations_that_do_not_tell_their_epochs_are_counted(make_observed: Callable[..., Run]) -> None:
    text = printed(make_observed(metrics=[{"passed_epochs": math.nan}] * 3), 60)
    assert text.splitlines()[-1].split() == ["observation", "1", "2", "3"]


def test_one_observation(make_observed: Callable[..., Run]) -> None:
    text = printed(make_observed(rows=1), 40, "ascii")
    assert stars(text, "frozen") == [(0, 0)]
    assert "epoch 0.25" in text
