"""Plain lines say what the metrics say, without escape codes; the choice of display follows the terminal."""

from __future__ import annotations

import io
import math
import os
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from rich.console import Console

from neq_cli.events import Compiling, EpochRecord, Preparing, Record, RunResumed, RunStarted, StepProgress
from neq_cli.runs.views.live.dashboard import Dashboard
from neq_cli.runs.views.live.progress import Mode, PlainProgress, Silent, choose_progress, started_line

STARTED = RunStarted(
    recipe_name="resnet32-cifar10",
    description="resnet32 on CIFAR10",
    policy="neq epsilon=0.001 mu=0.5",
    device="cpu (2 threads)",
    epochs=250,
    steps_per_epoch=490,
    metric="test_top1",
    layers={"conv1": 1000, "fc": 1320},
    notes=("always trained: class_token",),
)
METRICS = {
    "epoch": 12,
    "lr": 0.1,
    "train_loss": 0.43211,
    "train_top1": 85.0,
    "test_loss": 0.5,
    "test_top1": 87.654,
    "neurons": 2320,
    "frozen": 1234,
    "flops_paper": 84_810_000.0,
    "flops_executed": 130_000_000.0,
    "flops_paper_dense": 138_940_000.0,
    "flops_executed_dense": 138_940_000.0,
    "images_per_second": 1234.4,
    "epoch_seconds": 12.34,
    "probe_seconds": 0.4,
}


def epoch(**changes: float) -> EpochRecord:
    metrics = METRICS | changes
    return EpochRecord(int(metrics["epoch"]), metrics, ())


def plain_lines(*records: Record) -> list[str]:
    file = io.StringIO()
    # A terminal, with colours and too narrow for a line: plain is plain there, too.
    with PlainProgress(Console(file=file, force_terminal=True, width=40), now=lambda: 0.0) as progress:
        for record in records:
            progress.show(record)
    return file.getvalue().splitlines()


def test_a_start_is_told_where_it_takes_long_until_an_epoch_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neq_cli.runs.views.live.progress._LONG_SECONDS", 0.05)
    file, now = io.StringIO(), [0.0]

    def wait_for(text: str) -> None:
        ends = time.monotonic() + 10
        while text not in file.getvalue():
            assert time.monotonic() < ends
            time.sleep(0.005)

    with PlainProgress(Console(file=file), now=lambda: now[0]) as progress:
        progress.show(Preparing("timing memory formats"))
        wait_for("timing memory formats")
        progress.show(Preparing("reading images"))
        wait_for("reading images")
        for done in range(1000, 13_000, 1000):
            now[0] += 1
            progress.show(Preparing("reading images", done, 50_000))
        progress.show(STARTED)
        progress.show(epoch())
        progress.show(Preparing("timing kernels"))
        time.sleep(0.1)
    lines = file.getvalue().splitlines()
    assert lines[:4] == [
        "timing memory formats",
        "reading images",
        "reading images: 5,000 of 50,000, 10 %",
        "reading images: 10,000 of 50,000, 20 %",
    ]
    assert lines[4].startswith("resnet32-cifar10")
    assert lines[-1].startswith("epoch  12/250")


@pytest.mark.parametrize("ending", [STARTED, StepProgress(1, 1, 2, "train", 1.0, 1.0), None])
def test_what_is_quick_is_not_told(monkeypatch: pytest.MonkeyPatch, ending: Record | None) -> None:
    monkeypatch.setattr("neq_cli.runs.views.live.progress._LONG_SECONDS", 0.05)
    file = io.StringIO()
    with PlainProgress(Console(file=file)) as progress:
        progress.show(Preparing("opening the data"))
        progress.show(Preparing("building the model"))
        if ending is not None:
            progress.show(ending)
            time.sleep(0.1)
    time.sleep(0.1)
    assert "opening" not in file.getvalue()
    assert "building" not in file.getvalue()


def test_one_line_for_the_run_its_notes_and_one_per_epoch() -> None:
    step = StepProgress(12, 100, 490, "train", 1234.0, 0.5)
    past = RunResumed((epoch(epoch=11),))  # which stand in the log already
    assert plain_lines(STARTED, past, step, epoch(), step) == [
        "resnet32-cifar10: resnet32 on CIFAR10, neq epsilon=0.001 mu=0.5, cpu (2 threads), 250 epochs of 490 steps, "
        "2320 neurons in 2 layers",
        "note: always trained: class_token",
        # 238 epochs of 12.34 s are 2936.92 s.
        "epoch  12/250  loss 0.4321  top1 87.65  frozen 1234/2320 (53.2%)   flops  84.81M/138.94M paper, "
        "130.00M/138.94M executed  1234 img/s  12.3 s  eta 48:57",
    ]


def test_lines_of_different_epochs_are_aligned() -> None:
    quiet = epoch(epoch=1, frozen=0, flops_paper=138_940_000.0, test_top1=9.8)
    lines = plain_lines(STARTED, quiet, epoch())[2:]
    for word in ("loss", "top1", "frozen", "flops", "executed", "img/s"):
        assert lines[0].index(word) == lines[1].index(word)


def test_what_was_not_measured_is_a_dash() -> None:
    line = plain_lines(STARTED, epoch(test_top1=math.nan, train_loss=math.nan))[-1]
    assert "loss –  top1     –  frozen" in line


def test_what_is_compiled_for_long_is_a_line_now_and_then() -> None:
    told = [Compiling(float(seconds)) for seconds in range(90)]
    assert plain_lines(*told, Compiling(89.6, ended=True)) == [
        "compiling, 10 s", "compiling, 20 s", "compiling, 40 s", "compiling, 80 s", "compiled in 90 s"
    ]  # fmt: skip
    short = [Compiling(float(seconds)) for seconds in range(9)]
    assert plain_lines(*short, Compiling(9.0, ended=True), *told[:11]) == ["compiling, 10 s"]


def test_another_metric_is_named() -> None:
    started = replace(STARTED, metric="test_miou")
    assert "  miou 61.20  " in plain_lines(started, epoch(test_miou=61.2))[-1]


def test_no_escape_codes_whatever_the_names_and_messages() -> None:
    file = io.StringIO()
    with PlainProgress(Console(file=file, force_terminal=True)) as progress:
        progress.show(replace(STARTED, recipe_name="[red]x[/red]\x1b[31m", notes=("a\x1b]0;title\x07",)))
        progress.show(epoch())
        progress.message("first [bold]line[/bold]\x1b[2J\nsecond line")
    assert "\x1b" not in file.getvalue()
    assert "\x07" not in file.getvalue()
    assert file.getvalue().startswith("[red]x[/red]")
    assert file.getvalue().splitlines()[-2:] == ["first [bold]line[/bold]�[2J", "second line"]


def test_silent_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with choose_progress("off") as progress:
        progress.show(STARTED)
        progress.show(epoch())
        progress.message("anything")
    assert isinstance(progress, Silent)
    assert capsys.readouterr() == ("", "")


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with choose_progress("plain") as progress:
        progress.message("hello")
    assert capsys.readouterr() == ("", "hello\n")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Console]:
    for name in ("CI", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    master, slave = os.openpty()
    with os.fdopen(slave, "w", encoding="utf-8") as file:
        yield Console(file=file)
    os.close(master)


@pytest.mark.parametrize(
    ("mode", "expected"), [("auto", Dashboard), ("rich", Dashboard), ("plain", PlainProgress), ("off", Silent)]
)
def test_on_a_terminal_the_mode_decides(terminal: Console, mode: Mode, expected: type) -> None:
    assert type(choose_progress(mode, terminal)) is expected


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("CI", "true", PlainProgress),
        ("CI", "1", PlainProgress),
        ("CI", "false", Dashboard),
        ("CI", "", Dashboard),
        ("TERM", "dumb", PlainProgress),
        ("NO_COLOR", "1", Dashboard),  # it asks for no colour, not for no display
    ],
)
def test_auto_heeds_the_environment(
    terminal: Console, monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: type
) -> None:
    monkeypatch.setenv(name, value)
    assert type(choose_progress("auto", terminal)) is expected


def test_auto_is_plain_in_a_pipe_even_where_colours_are_forced(
    terminal: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    pipe = Console(file=io.StringIO())
    assert pipe.is_terminal  # what rich makes of it
    assert type(choose_progress("auto", pipe)) is PlainProgress


def test_auto_is_plain_where_block_characters_cannot_be_written(terminal: Console) -> None:
    master, slave = os.openpty()
    with os.fdopen(slave, "w", encoding="latin-1") as file:
        assert type(choose_progress("auto", Console(file=file))) is PlainProgress
    os.close(master)


class Gone(io.StringIO):
    """A pipe that nobody reads any more."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_reader_that_has_gone_does_not_end_the_training() -> None:
    progress = PlainProgress(Console(file=Gone()))
    progress.message("one")
    progress.message("two")


def test_observations_are_called_so() -> None:
    started = replace(STARTED, epochs=40, steps_per_epoch=500, unit="observation")
    lines = plain_lines(started, epoch(step=6000, passed_epochs=2.31))
    assert ", cpu (2 threads), 40 observations, one every 500 steps, 2320 neurons" in lines[0]
    assert lines[-1].startswith("observation 12/40  loss 0.4321  top1 87.65  ")
    one = replace(started, epochs=1, steps_per_epoch=1)
    assert ", 1 observation, one every 1 step, " in plain_lines(one)[0]
    assert ", 1 observation, 2320 neurons" in plain_lines(replace(one, steps_per_epoch=0))[0]


def test_one_of_a_thing_is_told_as_one() -> None:
    started = RunStarted("tiny", "a net on data", "baseline", "cpu", 1, 1, "test_top1", {"fc": 1}, ())
    assert started_line(started) == "tiny: a net on data, baseline, cpu, 1 epoch of 1 step, 1 neuron in 1 layer"
    several = replace(started, epochs=2, steps_per_epoch=3, layers={"a": 2, "b": 2})
    assert started_line(several).endswith(", 2 epochs of 3 steps, 4 neurons in 2 layers")
