"""Frames fit their window and show the records' numbers; the live display leaves exactly the frame on the screen."""

from __future__ import annotations

import contextlib
import io
import math
import multiprocessing
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from neq_cli.errors import Terminated
from neq_cli.events import (
    Compiling,
    EpochRecord,
    LayerState,
    Preparing,
    Record,
    RunResumed,
    RunStarted,
    StepProgress,
)
from neq_cli.runs.views.drawing import text_of
from neq_cli.runs.views.live.dashboard import Dashboard, render_frame
from neq_cli.runs.views.live.frame import Painter
from neq_cli.runs.views.live.run_view import RunView
from neq_cli.signals import last_words
from neq_cli.text import to_go_on

DENSE = 138_940_000.0
SMALL = [
    "conv1",
    "bn1",
    *(f"layer{s}.{b}.{p}" for s in (1, 2, 3, 4) for b in (0, 1) for p in ("conv", "bn")),
    "fc.0",
    "fc",
]
LARGE = [
    "stem",
    *(f"stages.{s}.blocks.{b}.{p}" for s in range(2) for b in range(37) for p in "abcd"),
    "norm",
    "fc",
    "x",
]
SIZES = [(80, 24), (120, 40), (200, 60), (40, 10), (100, 20), (60, 15), (20, 5), (12, 4), (3, 2), (1, 1)]
BAR_ROW = re.compile(r"(\S+) +[━╸─]+ +(\d+)/(\d+)")


@lru_cache
def _records(names: tuple[str, ...], epochs: int, of: int, eval_every: int) -> tuple[Record, ...]:
    return tuple(_generate(names, epochs, of, eval_every))


def records(names: list[str], epochs: int, of: int = 250, eval_every: int = 1) -> list[Record]:
    """A run of ``epochs`` finished epochs, and a fifth of the next."""
    return list(_records(tuple(names), epochs, of, eval_every))


def _generate(names: tuple[str, ...], epochs: int, of: int, eval_every: int) -> Iterator[Record]:
    random = np.random.default_rng(7)
    sizes = {name: 10 + index for index, name in enumerate(names)}
    yield RunStarted("tiny", "a net on data", "neq epsilon=0.001 mu=0.5", "cpu", of, 500, "test_top1", sizes, (), 1e-3)
    trained = {name: np.ones(size, dtype=bool) for name, size in sizes.items()}
    for epoch in range(1, epochs + 1):
        layers = []
        frozen = sum(int((~rows).sum()) for rows in trained.values())
        for name, size in sizes.items():
            velocity = (random.normal(size=size) * 10 ** random.uniform(-6, -1)).astype(np.float32)
            trainable = np.abs(velocity) >= 1e-3
            layers.append(
                LayerState(name, "Conv2d", 1 - velocity, velocity, velocity, trained[name], trainable, 1.0, 1.0)
            )
            trained[name] = trainable
        neurons = sum(sizes.values())
        share = frozen / max(neurons, 1)
        metrics = {
            "epoch": epoch,
            "lr": 0.1,
            "train_loss": 2.0 / epoch,
            "train_top1": 50.0,
            "test_loss": 2.5 / epoch,
            "test_top1": 90.0 - abs(epoch - 5) if epoch % eval_every == 0 else math.nan,
            "neurons": neurons,
            "frozen": frozen,
            "flops_paper": DENSE * (1 - share),
            "flops_executed": DENSE * (1 - share / 3),
            "flops_paper_dense": DENSE,
            "flops_executed_dense": DENSE,
            "images_per_second": 1000.0,
            "epoch_seconds": 20.0,
            "probe_seconds": 0.4,
        }
        yield EpochRecord(epoch, metrics, tuple(layers))
    if epochs < of:
        yield StepProgress(epochs + 1, 100, 500, "train", 1234.4, 0.4321)


def view_of(run: list[Record]) -> RunView:
    assert isinstance(run[0], RunStarted)
    view = RunView(run[0], 0.0)
    for record in run[1:]:
        assert not isinstance(record, RunStarted)
        view.show(record, 0.0)
    return view


def line_with(frame: str, start: str) -> str:
    """The one line that begins with ``start``, after the margin."""
    (line,) = [line for line in frame.splitlines() if line.strip().startswith(start)]
    return line


# --- the window ---


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("names", [SMALL, LARGE, ["only"], []], ids=["20", "300", "1", "0"])
@pytest.mark.parametrize("epochs", [0, 1, 30])
def test_a_frame_fills_the_width_and_fits_the_height(names: list[str], epochs: int, width: int, height: int) -> None:
    lines = Painter().frame(view_of(records(names, epochs, of=30)), width, height, 5.0)
    assert 1 <= len(lines) <= height
    assert {cell_len(text_of(line)) for line in lines} == {width}
    assert not any("\n" in text_of(line) for line in lines)


def test_a_frame_keeps_its_height_through_the_run() -> None:
    runs = [records(SMALL, epochs, of=60) for epochs in (0, 1, 2, 50, 60)]
    heights = {len(Painter().frame(view_of(run), 100, 40, 0.0)) for run in runs}
    assert len(heights) == 1


def test_a_larger_window_shows_more() -> None:
    run = records(SMALL, 12)
    assert "learning rate" not in render_frame(80, 24, run)
    large = render_frame(120, 40, run)
    assert "learning rate" in large
    assert "test loss" in large
    assert line_with(large, "layer1.0.conv").count("%") == 1  # a share per layer


def test_at_80x24_nothing_essential_is_missing() -> None:
    frame = render_frame(80, 24, records(SMALL, 12), elapsed=4.0)
    for text in ("tiny", "a net on data", "cpu", "neq epsilon=0.001 mu=0.5", "epoch 13/250", "train 100/500"):
        assert text in frame
    for name in SMALL:
        assert re.search(rf"(^|\s){re.escape(name)} +[━╸─]", frame), name
    assert "…" not in frame


# --- the numbers ---


def test_frozen_neurons_are_those_of_the_coming_epoch() -> None:
    run = records(SMALL, 12)
    last = [record for record in run if isinstance(record, EpochRecord)][-1]
    coming = {layer.name: int((~layer.trainable).sum()) for layer in last.layers}
    frozen, neurons = sum(coming.values()), int(last.metrics["neurons"])
    assert frozen != last.metrics["frozen"]  # or the test could not tell them apart
    froze = sum(int((layer.trained & ~layer.trainable).sum()) for layer in last.layers)
    thawed = sum(int((layer.trainable & ~layer.trained).sum()) for layer in last.layers)

    frame = render_frame(80, 24, run)
    assert f"{froze} froze, {thawed} thawed" in line_with(frame, "─ frozen in epoch 13 ")
    total = line_with(frame, "all 20 layers")
    assert f" {frozen}/{neurons} " in total
    assert total.endswith(f"{100 * frozen / neurons:.1f}%")
    shown = {name: (int(a), int(b)) for name, a, b in BAR_ROW.findall(frame) if name in coming}
    assert shown == {layer.name: (coming[layer.name], layer.neurons) for layer in last.layers}


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40), (200, 60), (40, 10), (60, 15)])
def test_groups_of_a_large_model_add_up_to_all_of_it(width: int, height: int) -> None:
    run = records(LARGE, 12)
    last = [record for record in run if isinstance(record, EpochRecord)][-1]
    frozen = sum(int((~layer.trainable).sum()) for layer in last.layers)
    frame = render_frame(width, height, run)
    table = frame.split("all 300 layers")[1]
    rows = BAR_ROW.findall(table.split("\n", 1)[1])
    assert len(rows) > 1
    assert len({name for name, _, _ in rows}) == len(rows)  # no two groups look alike
    assert sum(int(a) for _, a, _ in rows) == frozen
    assert sum(int(b) for _, _, b in rows) == last.metrics["neurons"]


def test_a_large_model_at_80x24_names_every_group() -> None:
    frame = render_frame(80, 24, records(LARGE, 12))
    names = [name for name, _, _ in BAR_ROW.findall(frame.split("all 300 layers")[1].split("\n", 1)[1])]
    # 37 blocks per stage in equal parts; 20 cells, 4 of them single layers.
    ends = [(stage, 37 * part // 8, 37 * (part + 1) // 8 - 1) for stage in (0, 1) for part in range(8)]
    expected = ["stem", *(f"stag…{stage}.bloc…{a}-{b}" for stage, a, b in ends), "norm", "fc", "x"]
    assert len(names) == 20
    # Words may be shortened, numbers not.
    assert sorted(re.sub("[a-z…]+", "", name) for name in names) == sorted(
        re.sub("[a-z…]+", "", name) for name in expected
    )
    assert {"stem", "norm", "fc", "x"} <= set(names)


def test_the_last_epoch_s_numbers_and_the_best() -> None:
    run = records(SMALL, 12)
    frame = render_frame(80, 24, run)
    assert "─ epoch 12 ─" in frame
    assert "lr 0.1, took 0:20, probe 0.4 s" in frame
    assert re.search(r"0\.1667 .*best 0\.1667 at epoch 12$", line_with(frame, "train loss"))  # 2 / 12
    assert re.search(r"83\.00% .*best 90\.00% at epoch 5$", line_with(frame, "test top-1"))  # 90 - 7


def test_the_last_epoch_s_energy_where_it_is_measured() -> None:
    run = [
        replace(record, metrics={**record.metrics, "joules": 1000.0 * record.epoch})
        if isinstance(record, EpochRecord)
        else record
        for record in records(SMALL, 12)
    ]
    assert "lr 0.1, took 0:20, probe 0.4 s, 12.00 kJ" in render_frame(80, 24, run)
    assert "kJ" not in render_frame(80, 24, records(SMALL, 12))


def test_where_lower_is_better_the_least_is_the_best() -> None:
    started, *rest = records(SMALL, 8)
    assert isinstance(started, RunStarted)
    frame = render_frame(80, 24, [replace(started, lower_is_better=True, counted="items"), *rest])
    # 90 less the distance from epoch 5: 86 in the first epoch.
    assert line_with(frame, "test top-1").endswith("best 86.00% at epoch 1")
    assert "1234 items/s" in frame
    assert "img/s" not in frame


def test_flops_against_dense_now_and_on_average() -> None:
    run = records(SMALL, 12)
    rows = [record.metrics for record in run if isinstance(record, EpochRecord)]
    frame = render_frame(80, 24, run)
    for accounting in ("paper", "executed"):
        shares = [100 * row[f"flops_{accounting}"] / DENSE for row in rows]
        line = line_with(frame, f"{accounting} FLOPs")
        assert f" {rows[-1][f'flops_{accounting}'] / 1e6:.2f}M " in line
        assert line.endswith(f" {shares[-1]:.1f}% of 138.94M, mean {sum(shares) / 12:.1f}%")


def test_velocity_in_one_line() -> None:
    run = records(SMALL, 12)
    last = [record for record in run if isinstance(record, EpochRecord)][-1]
    velocity = np.abs(np.concatenate([layer.velocity for layer in last.layers]))
    line = line_with(render_frame(80, 24, run), "|velocity|")
    mantissa, exponent = f"{velocity.mean():.1e}".split("e")
    assert f" {mantissa}e{int(exponent)} " in line
    assert line.endswith(f" {100 * (velocity < 1e-3).mean():.1f}% below epsilon 0.001")
    # 1e-3 is four of the seven decades from 1e-7 to 1.
    left, right = line.split("1e-7 ")[1].split(" 1  ")[0].split("│")
    assert abs(len(left) / len(left + right) - 4 / 7) < 0.05


def test_a_policy_without_epsilon_has_no_mark() -> None:
    run = records(SMALL, 3)
    assert isinstance(run[0], RunStarted)
    run[0] = replace(run[0], policy="stochastic p=0.2", epsilon=None)
    line = line_with(render_frame(80, 24, run), "|velocity|")
    assert "│" not in line
    assert "below" not in line


def test_a_layer_the_probe_does_not_reach_has_no_velocity() -> None:
    nothing = np.full(4, np.nan, dtype=np.float32)
    everything = np.ones(4, dtype=bool)
    run = records(["a", "b"], 1)
    assert isinstance(run[1], EpochRecord)
    lost = LayerState("b", "Linear", nothing, nothing, np.zeros(4, np.float32), everything, everything, 0.0, 0.0)
    run[1] = replace(run[1], layers=(run[1].layers[0], lost))
    frame = render_frame(80, 24, run)
    assert re.search(r"b +─+ +0/4 +0\.0% +–$", line_with(frame, "b "))
    mean = float(np.abs(run[1].layers[0].velocity).mean())
    assert f" {mean:.1e} ".replace("e-0", "e-") in line_with(frame, "|velocity|")


def test_an_untested_epoch_shows_the_latest_test() -> None:
    frame = render_frame(80, 24, records(SMALL, 11, eval_every=4))
    assert " 87.00% " in line_with(frame, "test top-1")  # epoch 8: 90 - 3
    assert line_with(frame, "test top-1").endswith("best 89.00% at epoch 4")


def test_progress_speed_and_time_left() -> None:
    frame = render_frame(80, 24, records(SMALL, 12), elapsed=4.0)
    epoch, phase = line_with(frame, "epoch 13/250"), line_with(frame, "train 100/500")
    # 12 epochs of 20 s and 4 s are gone. A fifth of the next in 4 s is the usual speed: 16 s and 237 x 20 s are left.
    assert epoch.endswith("4:04 gone  1:19:16 left")
    assert phase.endswith("loss 0.4321  1234 img/s     0:16 left")
    bar = re.search("[━╸─]+", phase)
    assert bar is not None
    assert abs((bar[0].count("━") + bar[0].count("╸") / 2) / len(bar[0]) - 0.2) < 0.5 / len(bar[0]) + 1e-9


def test_until_an_epoch_s_speed_is_known_the_last_one_s_stands() -> None:
    begins = StepProgress(13, 0, 500, "train", math.nan, math.nan)
    frame = render_frame(80, 24, [*records(SMALL, 12)[:-1], begins])
    assert " 1000 img/s " in line_with(frame, "train 0/500")


def test_before_the_first_epoch_ended_time_left_goes_by_its_steps() -> None:
    frame = render_frame(80, 24, records(SMALL, 0), elapsed=4.0)
    assert line_with(frame, "epoch 1/250").endswith("0:04 gone  1:23:16 left")  # 16 s and 249 x 20 s
    assert "no epoch finished yet" in frame
    assert " 0/390 " in line_with(frame, "all 20 layers")


def test_a_resumed_run_shows_what_one_without_a_break_would_but_its_pace() -> None:
    started, *epochs, step = records(SMALL, 50)
    straight = render_frame(80, 24, [started, *epochs, step], elapsed=4.0)
    resumed = render_frame(80, 24, [started, RunResumed(tuple(epochs)), step], elapsed=4.0)
    assert line_with(resumed, "epoch 51/250").endswith("0:04 gone  1:06:36 left")  # 16 s and 199 x 20 s
    differ = [new for old, new in zip(straight.splitlines(), resumed.splitlines(), strict=True) if old != new]
    assert differ == [line_with(resumed, "epoch 51/250")]


def test_a_resumed_run_whose_files_are_damaged_does_not_claim_that_nothing_is_frozen() -> None:
    started, *epochs, step = records(SMALL, 50)
    past = RunResumed(tuple(replace(epoch, layers=()) for epoch in epochs))
    frame = render_frame(80, 24, [started, past, step], elapsed=4.0)
    assert "–/390" in line_with(frame, "all 20 layers")


def test_the_last_epoch_s_choice_is_labelled_as_such() -> None:
    frame = render_frame(80, 24, records(SMALL, 6, of=6))
    assert "─ would freeze next, in epoch 7 ─" in frame
    assert "frozen in epoch 7" not in frame
    assert re.search(r" \d+ of 390 in epoch 6$", line_with(render_frame(120, 40, records(SMALL, 6, of=6)), "frozen "))
    assert "finished in 2:00" in line_with(frame, "epoch 6/6")


# --- the live display ---


class Screen:
    """A terminal that knows what the display uses: text, newlines, cursor up and home, erasing."""

    def __init__(self, width: int, height: int) -> None:
        self.resize(width, height)
        self.history: list[str] = []

    def resize(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.lines = [["?"] * width for _ in range(height)]  # whatever re-wrapping left
        self.row, self.column = height - 1, 0

    def feed(self, text: str) -> None:
        for sequence, final, character in re.findall(r"\x1b\[([?0-9;]*)([A-Za-z])|([\s\S])", text):
            if final:
                self.control(sequence, final)
            elif character == "\r":
                self.column = 0
            elif character == "\n":
                self.column = 0
                self.row += 1
                if self.row == self.height:
                    self.history.append("".join(self.lines.pop(0)).rstrip())
                    self.lines.append([" "] * self.width)
                    self.row -= 1
            else:
                assert self.column < self.width, "a line ran over the edge"
                self.lines[self.row][self.column] = character
                self.column += 1

    def control(self, sequence: str, final: str) -> None:
        if final == "A":
            self.row = max(self.row - int(sequence or 1), 0)
        elif final == "H":
            self.row, self.column = 0, 0
        elif final == "J":
            assert sequence == "2"
            self.lines = [[" "] * self.width for _ in range(self.height)]
        elif final == "K":
            assert sequence == "2"
            self.lines[self.row] = [" "] * self.width
        else:
            assert final in "mhl"

    def text(self) -> list[str]:
        return ["".join(line).rstrip() for line in self.lines]


class Terminal:
    """A dashboard on a console of a given size, with its clock stopped and its thread idle."""

    def __init__(self, width: int, height: int, environment: dict[str, str] | None = None) -> None:
        self.file = io.StringIO()
        self.console = Console(
            file=self.file,
            force_terminal=True,
            force_interactive=True,
            width=width,
            height=height,
            _environ={"TERM": "xterm-256color"} | (environment or {}),
        )
        self.dashboard = Dashboard(self.console, clock=lambda: 0.0)
        self.dashboard._live.auto_refresh = False

    def written(self) -> str:
        text = self.file.getvalue()
        self.file.seek(0)
        self.file.truncate()
        return text


def show_all(dashboard: Dashboard, run: list[Record]) -> None:
    for record in run:
        dashboard.show(record)


def expected(dashboard: Dashboard, width: int, height: int) -> list[str]:
    assert dashboard.view is not None
    return [text_of(line).rstrip() for line in Painter().frame(dashboard.view, width, height, 0.0)]


def test_the_screen_shows_the_frame_through_records_messages_and_resizing() -> None:
    run = records(SMALL, 30)
    terminal, screen = Terminal(80, 24), Screen(80, 24)
    with terminal.dashboard as dashboard:
        show_all(dashboard, run[:10])
        dashboard._live.refresh()
        screen.feed(terminal.written())
        assert screen.text() == expected(dashboard, 80, 24)

        dashboard.message("saved [bold]checkpoint[/bold]")
        dashboard._live.refresh()
        screen.feed(terminal.written())
        assert screen.text() == expected(dashboard, 80, 24)
        assert screen.history[-1] == "saved [bold]checkpoint[/bold]"
        assert screen.text()[-1] == " saved [bold]checkpoint[/bold]"

        for width, height in ((120, 40), (40, 10), (20, 3), (200, 60), (80, 24)):
            terminal.console.size = (width, height)
            screen.resize(width, height)
            show_all(dashboard, run[10:20])
            for _ in range(2):
                dashboard._live.refresh()
            screen.feed(terminal.written())
            frame = expected(dashboard, width, height)
            assert screen.text()[: len(frame)] == frame
            assert not any(screen.text()[len(frame) :])
    screen.feed(terminal.written())
    # The last frame stands, head and all, above the line for the prompt.
    assert screen.text()[0].startswith(" tiny  a net on data")
    assert screen.text()[-1] == ""
    assert "stopped after 0:00" in screen.text()[2]


def test_what_a_terminal_echoes_does_not_move_the_frame() -> None:
    terminal, screen = Terminal(80, 24), Screen(80, 24)
    with terminal.dashboard as dashboard:
        show_all(dashboard, records(SMALL, 3))
        for _ in range(2):
            dashboard._live.refresh()
            screen.feed(terminal.written())
            assert screen.text() == expected(dashboard, 80, 24)
            screen.feed("^C")  # at the end of a line that fills the width, it would begin a new one


LONG = "runs/a-folder-with-a-long-name/20261129-040622-s1"


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40), (60, 20)])
def test_after_ctrl_c_the_title_stays_and_the_line_to_go_on_with_is_whole(
    width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("neq", "train", "recipes/digits.yaml", "model={name: a b}", "epochs=60", "--resume", "-o", LONG)
    terminal, screen = Terminal(width, height), Screen(width, height)
    ends = Terminated("SIGINT", "saved", command)
    with contextlib.suppress(Terminated), terminal.dashboard as dashboard:
        show_all(dashboard, records(SMALL, 5))
        dashboard._live.refresh()
        raise ends
    screen.feed(terminal.written())
    # What the command line prints then, and a prompt.
    said = to_go_on(last_words(ends.signal, str(ends)), ends.command, width)
    screen.feed(f"{said}\n$ ")
    lines = screen.text()
    assert lines[0].startswith(" tiny")
    assert lines[-1] == "$"
    start = lines.index("interrupted; saved; to go on:")
    copied = "\n".join(lines[start + 1 : -1])
    assert tuple(shlex.split(copied.replace("\\\n", " "))) == command
    assert any(LONG in line for line in lines)


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40), (60, 20)])
def test_last_lines_stand_below_the_last_frame_which_keeps_its_title(width: int, height: int) -> None:
    terminal, screen = Terminal(width, height), Screen(width, height)
    with terminal.dashboard as dashboard:
        show_all(dashboard, records(SMALL, 6, of=8))
        dashboard.closing(f"finished: 6 epochs, test_top1 89.00: {LONG}")
        dashboard.closing("nothing saved: all layers ran dense")
        assert "finished:" not in terminal.written()
    screen.feed(terminal.written())
    lines = screen.text()
    assert lines[0].startswith(" tiny")
    assert lines[-2:] == ["nothing saved: all layers ran dense", ""]
    assert lines[-3].endswith(LONG)
    assert sum(LONG in line for line in lines) == 1
    # Such lines come of a run that has ended, also before its last epoch.
    assert "finished in" in line_with("\n".join(lines), "epoch 6/8 ")
    assert any("would freeze next, in epoch 7" in line for line in lines)


def test_lines_of_a_frame_end_without_blanks() -> None:
    terminal = Terminal(120, 40)
    with terminal.dashboard as dashboard:
        show_all(dashboard, records(SMALL, 6))
        dashboard.message("a message")
        dashboard._live.refresh()
    lines = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]|\r", "", terminal.written()).split("\n")
    assert len(lines) > 80
    # Where no message stands in the last line, it is a blank, for a frame keeps its height.
    assert not [line for line in lines if line.endswith(" ") and line != " "]


def test_names_are_not_markup_and_cannot_control_the_terminal() -> None:
    run = records(["[bold]layer[/bold]", "b\x1b[2Jx"], 2)
    assert isinstance(run[0], RunStarted)
    run[0] = replace(run[0], recipe_name="[red]tiny[/red]", notes=("note with [link]",))
    terminal, screen = Terminal(80, 24), Screen(80, 24)
    with terminal.dashboard as dashboard:
        show_all(dashboard, run)
        dashboard._live.refresh()
    text = terminal.written()
    assert "\x1b[2Jx" not in text
    screen.feed(text)
    whole = "\n".join([*screen.history, *screen.text()])
    for literal in ("[red]tiny[/red]", "[bold]layer[/bold]", "note: note with [link]", "b�[2Jx"):
        assert literal in whole


def test_before_a_run_has_started_the_screen_says_what_it_is_busy_with_and_then_nothing() -> None:
    terminal, screen = Terminal(80, 24), Screen(80, 24)
    with terminal.dashboard as dashboard:
        for record, says in (
            (Preparing("timing memory formats"), "starting: timing memory formats, 0:00"),
            (Preparing("reading images", 31_000, 50_000), "starting: reading images: 31,000 of 50,000, 62 %, 0:00"),
        ):
            dashboard.show(record)
            dashboard._live.refresh()
            screen.feed(terminal.written())
            assert says in screen.text()
    screen.feed(terminal.written())
    # The reason why it did not start is all there is to read.
    assert not [line for line in screen.text() if "starting" in line]


def test_what_a_started_run_is_busy_with_stands_where_its_steps_do() -> None:
    terminal, screen = Terminal(80, 24), Screen(80, 24)
    with terminal.dashboard as dashboard:
        show_all(dashboard, records(SMALL, 2))
        for record, says in (
            (Preparing("reading images", 31_000, 50_000), "reading images"),
            (StepProgress(3, 1, 100, "train", 100.0, 1.0), "train 1/100"),
        ):
            dashboard.show(record)
            dashboard._live.refresh()
            screen.feed(terminal.written())
            assert screen.text()[3].startswith(f" {says} ")


@pytest.mark.parametrize(("environment", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_no_color_takes_the_colours_and_leaves_the_layout(environment: dict[str, str], coloured: bool) -> None:
    terminal, screen = Terminal(80, 24, environment), Screen(80, 24)
    with terminal.dashboard as dashboard:
        show_all(dashboard, records(SMALL, 5))
        dashboard._live.refresh()
        frame = expected(dashboard, 80, 24)
        text = terminal.written()
    screen.feed(text)
    assert screen.text() == frame
    codes = {int(code) for sequence in re.findall(r"\x1b\[([0-9;]+)m", text) for code in sequence.split(";")}
    assert any(30 <= code <= 49 or 90 <= code <= 107 for code in codes) is coloured


def test_in_a_pipe_only_the_last_frame_is_left() -> None:
    file = io.StringIO()
    run = records(SMALL, 6, of=6)
    with Dashboard(Console(file=file, width=80, height=24), clock=lambda: 0.0) as dashboard:
        show_all(dashboard, run)
        dashboard.message("one message")
    text = file.getvalue()
    assert "\x1b" not in text
    assert text.splitlines()[0] == "one message"
    assert text.count("epoch 6/6") == 1


def test_standard_error_is_caught_while_it_runs_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = io.StringIO()
    monkeypatch.setattr(sys, "stderr", before)
    terminal, screen = Terminal(80, 24), Screen(80, 24)
    with terminal.dashboard as dashboard:
        show_all(dashboard, records(SMALL, 2))
        print("a [warning] from a library", file=sys.stderr)
        dashboard._live.refresh()
        screen.feed(terminal.written())
        assert screen.text() == expected(dashboard, 80, 24)
    assert sys.stderr is before
    assert "a [warning] from a library" in screen.history


@pytest.mark.parametrize("width", [60, 120])
def test_what_is_compiled_stands_in_place_of_the_speed(width: int) -> None:
    started = records(SMALL, 12)[0]
    step = StepProgress(1, 0, 15, "train", math.nan, math.nan)
    assert "compiling, 40 s" in line_with(render_frame(width, 24, [started, step, Compiling(40.2)]), "train 0/15")
    frame = render_frame(width, 24, [started, step, Compiling(40.2), Compiling(41.0, ended=True)])
    assert "compiling" not in frame


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_worker_does_not_draw() -> None:
    terminal = Terminal(80, 24)
    before = sys.stderr
    with terminal.dashboard as dashboard:
        show_all(dashboard, records(SMALL, 2))
        assert sys.stderr is not before
        worker = multiprocessing.get_context("fork").Process(target=lambda: os._exit(0 if sys.stderr is before else 3))
        worker.start()
        worker.join(timeout=30)
        assert sys.stderr is not before
    assert worker.exitcode == 0


def test_a_frame_costs_next_to_nothing() -> None:
    view = view_of(records(LARGE, 40))
    first: list[float] = []
    later: list[float] = []
    for _ in range(5):
        painter = Painter()
        for times in (first, later):
            start = time.process_time()
            painter.frame(view, 80, 24, 1.0)
            times.append(time.process_time() - start)
    assert min(first) < 0.010  # once per epoch
    assert min(later) < 0.001  # four times a second


# --- observations ---


def observations(number: int, of: int) -> list[Record]:
    """A run that looks at its neurons every 500 steps, 2600 an epoch."""
    started, *rest = records(SMALL, number, of)
    assert isinstance(started, RunStarted)
    told: list[Record] = [replace(started, unit="observation")]
    for record in rest:
        if isinstance(record, EpochRecord):
            place = {"step": 500 * record.epoch, "passed_epochs": 500 * record.epoch / 2600}
            record = replace(record, metrics={**record.metrics, **place})
        told.append(record)
    return told


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("number", [0, 1, 12, 40])
def test_a_frame_of_observations_fills_the_width(number: int, width: int, height: int) -> None:
    for of in (40, 123_456) if number < 40 else (40,):
        lines = Painter().frame(view_of(observations(number, of)), width, height, 5.0)
        assert 1 <= len(lines) <= height
        assert {cell_len(text_of(line)) for line in lines} == {width}


@pytest.mark.parametrize(("width", "height"), [(40, 10), (80, 24), (120, 40)])
def test_bars_of_observations_are_aligned(width: int, height: int) -> None:
    frame = render_frame(width, height, observations(12, 40), elapsed=4.0)
    run, phase = line_with(frame, "observation 13/40 "), line_with(frame, "train 100/500 ")
    assert re.search("[━╸─]", run).start() == re.search("[━╸─]", phase).start()  # type: ignore[union-attr]
    assert re.search("─ ", run).start() == re.search("─ ", phase).start()  # type: ignore[union-attr]
    assert "frozen in observation 13" in frame
    assert "…" not in frame


def test_observations_are_called_so() -> None:
    frame = render_frame(80, 24, observations(12, 40))
    assert line_with(frame, "─ observation 12 (epoch 2.31) ─").endswith(" lr 0.1, took 0:20, probe 0.4 s ─")
    assert line_with(frame, "train loss").endswith("best 0.1667 at observation 12")
    assert line_with(frame, "test top-1").endswith("best 90.00% at observation 5")
    assert "would freeze next, in observation 41" in render_frame(80, 24, observations(40, 40))
    assert "─ no observation finished yet ─" in render_frame(80, 24, observations(0, 40))
    # Where both have no room, what it took stays and where it stands goes.
    assert line_with(render_frame(60, 24, observations(12, 40)), "─ observation 12 ─").endswith("probe 0.4 s ─")
