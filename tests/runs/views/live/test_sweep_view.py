"""The overview fits every window and says how runs stand; plain lines have no escape codes; text stays text."""

from __future__ import annotations

import contextlib
import io
import math
import re
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from neq_cli.errors import Terminated, TrainingError
from neq_cli.runs.views.drawing import text_of
from neq_cli.runs.views.live.sweep_frame import sweep_frame
from neq_cli.runs.views.live.sweep_state import FAILED, FINISHED, PENDING, RUNNING, STOPPED, SweepState, SweptRun
from neq_cli.runs.views.live.sweep_view import (
    PlainSweep,
    SilentSweep,
    SweepOverview,
    begin_line,
    choose_sweep_view,
    plan_lines,
    run_line,
)


def swept(number: int, state: str, epochs_done: int = 0, **known: float | str) -> SweptRun:
    run = SweptRun(f"epsilon=0.0{number},seed={number}", [f"0.0{number}", str(number)], Path("/nowhere"), 30)
    run.state, run.epochs_done = state, epochs_done
    if epochs_done:
        run.metric, run.score, run.frozen_share = "test_top1", 97.5, 0.123
        run._seconds.append(2.0)
    for name, value in known.items():
        setattr(run, name, value)
    return run


def example(*runs: SweptRun, jobs: int = 2) -> SweepState:
    return SweepState("digits", Path("sweeps/digits/epsilon,seed"), ("policy.epsilon", "seed"), jobs, runs, 100.0)


def usual() -> SweepState:
    return example(
        swept(1, FINISHED, 30, began=100.0, ended=165.0),
        swept(2, FAILED, 3, reason="the loss became NaN; lower the learning rate", began=100.0, ended=130.0),
        swept(3, RUNNING, 12, began=150.0, _epoch_began=190.0),
        swept(4, RUNNING, began=188.0, _epoch_began=188.0),
        swept(5, PENDING),
        swept(6, PENDING, 4),
    )


def text(state: SweepState, width: int = 80, height: int = 24, now: float = 191.0) -> list[str]:
    return [text_of(line).rstrip() for line in sweep_frame(state, width, height, now)]


def test_the_overview_says_how_every_run_stands() -> None:
    lines = text(usual())
    assert lines[0].startswith(" sweep digits  2 at once  ")
    assert lines[0].endswith("  sweeps/digits/epsilon,seed")
    assert lines[1].startswith(" 1/6 runs, 1 failed ━")
    assert "1:31 gone" in lines[1]
    table = [line.split() for line in lines[3:]]
    assert table[0] == ["epsilon", "seed", "state", "epoch", "top-1", "frozen", "time"]
    assert table[1] == ["0.01", "1", "finished", "30/30", "97.50", "12.3%", "1:05"]
    assert lines[5].split(maxsplit=3)[2:] == ["failed", "the loss became NaN; lower the learning rate"]
    assert [word for word in table[3] if "━" not in word] == [
        "0.03",
        "3",
        "running",
        "12/30",
        "97.50",
        "12.3%",
        "0:35",
        "left",
    ]
    assert [word for word in table[4] if "─" not in word] == ["0.04", "4", "running", "0/30", "–", "–", "–", "left"]
    assert table[5] == ["0.05", "5", "pending"]
    assert table[6] == ["0.06", "6", "pending", "4/30", "97.50", "12.3%", "–"]
    columns = [lines[row].index("12.3%") for row in (4, 6, 9)]
    assert len(set(columns)) == 1
    assert lines[3].index("frozen") + len("frozen") == columns[0] + len("12.3%")


def test_the_bar_is_the_share_of_epochs() -> None:
    line = text(usual(), 120)[1]
    drawn = re.findall("[━╸─]+", line)[0]
    full = drawn.count("━") + 0.5 * drawn.count("╸")
    assert full / len(drawn) == pytest.approx((30 + 3 + 12 + 4) / 180, abs=0.01)


@pytest.mark.parametrize("width", [1, 5, 20, 39, 40, 59, 60, 80, 120, 300])
@pytest.mark.parametrize("height", [1, 2, 3, 4, 6, 9, 24])
def test_it_fits_every_window(width: int, height: int) -> None:
    states = [usual(), example(), example(*(swept(n % 10, state, 3) for n in range(60) for state in (PENDING, FAILED)))]
    states[0].message = "SIGINT: 2 running, which save and end"
    for state in states:
        lines = sweep_frame(state, width, height, 191.0)
        assert 0 < len(lines) <= height
        assert {sum(cell_len(segment.text) for segment in line) for line in lines} == {width}


def test_a_low_window_keeps_what_runs_and_fails_in_the_order_of_the_grid() -> None:
    runs = [swept(n, PENDING) for n in range(20)]
    for number, (state, ended) in {3: (FINISHED, 5.0), 4: (FINISHED, 9.0), 7: (RUNNING, math.nan),
                                   15: (FAILED, 8.0), 16: (STOPPED, 8.0)}.items():  # fmt: skip
        runs[number].state, runs[number].ended = state, ended
    for run in runs:
        run.labels = ("x", run.labels[1])
    lines = text(example(*runs), height=9)
    assert [line.split()[1] for line in lines[4:-1]] == ["4", "7", "15", "16"]
    assert lines[-1] == " and 15 pending, 1 finished more"
    assert len(text(example(*runs), height=24)) == 24


def test_when_it_has_ended_it_says_how() -> None:
    state = example(swept(1, FINISHED, 30), swept(2, FINISHED, 30))
    state.ended = 160.0
    assert "finished in 1:00" in text(state)[1]
    state.runs[1].state = STOPPED
    assert "ended after 1:00" in text(state)[1]


def test_keys_with_the_same_last_word_are_told_apart() -> None:
    state = example(swept(1, PENDING))
    state.keys = ("model.name", "data.name")
    assert text(state)[3].split()[:2] == ["model.name", "data.name"]
    state.keys = ()
    assert text(state)[3].split()[0] == "run"


def test_foreign_text_cannot_paint() -> None:
    run = swept(1, FAILED, reason="[red]\x1b[2J\x07 \u202e[/]")
    run.labels = ("[bold]\x1b]0;x\x07", "日本" * 30)
    state = example(run)
    state.message = "\x1b[5m[/nothing]"
    file = io.StringIO()
    console = Console(file=file, width=80, height=24, force_terminal=True, color_system=None)
    view = SweepOverview(console)
    with view:
        view.begin(state)
        view.message("[red]\x1b[31mover[/nothing]")
    drawn = file.getvalue()
    assert "[red]" in drawn
    assert "[bold]" in drawn
    for forbidden in ("\x1b[2J\x07", "\x07", "\x1b]0;", "\x1b[5m", "\x1b[31m", "\u202e"):
        assert forbidden not in drawn


def test_plain_lines_tell_what_starts_and_ends() -> None:
    file = io.StringIO()
    state = usual()
    state.runs[2].epochs_before = 7
    with PlainSweep(Console(file=file, force_terminal=True, width=40)) as view:
        view.begin(state)
        view.show(190.0)
        for index in (2, 3, 0, 1):
            view.changed(state.runs[index], 191.0)
        view.message("a\x1b[2J\nb")
    lines = file.getvalue().splitlines()
    assert lines == [
        "sweep of digits: 6 runs, 1 finished already, 2 at once, in sweeps/digits/epsilon,seed",
        "started      epsilon=0.03,seed=3 after epoch 7",
        "started      epsilon=0.04,seed=4",
        "finished     epsilon=0.01,seed=1  epoch 30/30  top1 97.50  frozen 12.3%  took 1:05  1/6 finished  eta –",
        "failed       epsilon=0.02,seed=2: the loss became NaN; lower the learning rate",
        "a\N{REPLACEMENT CHARACTER}[2J",
        "b",
    ]


def test_a_plan_is_a_line_per_run() -> None:
    runs = [swept(1, FINISHED, 30), swept(2, PENDING, 4), swept(3, PENDING)]
    assert plan_lines(runs) == [
        "epsilon=0.01,seed=1  finished",
        "epsilon=0.02,seed=2  to go on with after epoch 4 of 30",
        "epsilon=0.03,seed=3  to train, 30 epochs",
    ]


def test_the_display_follows_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    pipe = Console(file=io.StringIO())
    assert type(choose_sweep_view("auto", pipe)) is PlainSweep
    assert type(choose_sweep_view("plain", pipe)) is PlainSweep
    assert type(choose_sweep_view("off", pipe)) is SilentSweep
    assert type(choose_sweep_view("rich", pipe)) is SweepOverview


def test_one_run_of_one_epoch_is_told_as_one() -> None:
    run = SweptRun("seed=1", ["0.01", "1"], Path("/nowhere"), 1)
    run.state = PENDING
    assert begin_line(example(run)).startswith("sweep of digits: 1 run, ")
    assert plan_lines([run]) == ["seed=1  to train, 1 epoch"]
    assert text(example(run))[1].startswith(" 0/1 run ")


@pytest.mark.parametrize("error", [None, Terminated("SIGINT"), TrainingError("seed=1: wrong\nseed=2: wrong")])
def test_the_last_frame_leaves_room_for_what_comes_below_it(error: BaseException | None) -> None:
    """A sweep of more runs than the window has lines."""
    console = Console(file=io.StringIO(), width=80, height=12, force_terminal=True)
    state = example(*(swept(n % 10, FINISHED, 30) for n in range(30)))
    with contextlib.suppress(Terminated, TrainingError), SweepOverview(console) as view:
        view.begin(state)
        state.ended = 160.0
        console.file.truncate(console.file.seek(0))  # type: ignore[union-attr]
        if error is not None:
            raise error
    written = console.file.getvalue()  # type: ignore[attr-defined]
    frame = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]|\r", "", written).rstrip("\n").split("\n")
    # How to compare the runs, and where they are, or what went wrong; and a prompt.
    below = {None: 2, Terminated: 1, TrainingError: 2}[None if error is None else type(error)] + 1
    assert len(frame) == 12 - below
    assert frame[0].startswith(" sweep digits")
    assert not [line for line in frame if line != line.rstrip()]


def test_the_overview_is_drawn_a_few_times_a_second_at_most() -> None:
    console = Console(file=io.StringIO(), width=80, height=24, force_terminal=True)
    drawn: list[float] = []
    view = SweepOverview(console)
    view._live.refresh = lambda: drawn.append(view._now)  # type: ignore[method-assign]
    state = usual()
    view.begin(state)
    for tick in range(1, 101):
        view.show(100.0 + tick / 100)
    assert drawn == [100.0, 100.25, 100.5, 100.75, 101.0]
    view.changed(state.runs[0], 101.01)
    assert drawn[-1] == 101.01


def test_runs_by_steps_are_told_in_epochs() -> None:
    halfway = swept(1, PENDING, 2, part_done=0.3125)
    assert plan_lines([halfway, swept(2, PENDING, 0, part_done=0.5)]) == [
        "epsilon=0.01,seed=1  to go on with after epoch 2.31 of 30",
        "epsilon=0.02,seed=2  to go on with after epoch 0.5 of 30",
    ]
    state = example(swept(1, RUNNING, 2, part_done=0.3125, epochs_before=2.3125, began=100.0))
    assert run_line(state.runs[0], state, 100.0) == "started      epsilon=0.01,seed=1 after epoch 2.31"
    assert "2/30" in text(state)[4]
