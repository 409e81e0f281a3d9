"""Runs of a sweep as their files grow, are taken back or are damaged; times to come against arithmetic by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from neq_cli.runs.views.live.sweep_state import FAILED, FINISHED, SweepState, SweptRun, failure_reason, is_finished

HEADER = "epoch,test_top1,neurons,frozen,epoch_seconds\n"


def run(path: Path, name: str = "seed=1", epochs: int = 10) -> SweptRun:
    (path / name).mkdir(exist_ok=True)
    return SweptRun(name, [name], path / name, epochs)


def write(one: SweptRun, text: str, mode: str = "a") -> None:
    with (one.path / "metrics.csv").open(mode) as file:
        file.write(text)


def test_what_is_added_is_taken_in_whole_rows(tmp_path: Path) -> None:
    one = run(tmp_path)
    one.look(0)
    assert (one.epochs_done, one.metric) == (0, "")
    write(one, HEADER + "1,10.5,200,0,2.0\n2,20.5,200,")
    one.look(1)
    assert (one.epochs_done, one.metric, one.score, one.frozen_share) == (1, "test_top1", 10.5, 0.0)
    write(one, "50,4.0\n3,,200,100,3.0\n")
    one.look(2)
    assert (one.epochs_done, one.score, one.frozen_share) == (3, 20.5, 0.5)  # not every epoch is tested


def test_the_metric_is_the_one_that_the_run_names(tmp_path: Path) -> None:
    one = run(tmp_path)
    (one.path / "environment.json").write_text(json.dumps({"metric": "test_f1"}))
    write(one, "epoch,test_top1,test_f1,neurons,frozen,epoch_seconds\n1,10.5,0.25,200,0,2.0\n")
    one.look(0)
    assert (one.metric, one.score) == ("test_f1", 0.25)


def test_only_what_is_new_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = run(tmp_path, epochs=10_000)
    write(one, HEADER + "".join(f"{epoch},1,2,1,0.1\n" for epoch in range(1, 5001)))
    one.look(0)
    assert one.epochs_done == 5000
    offset = one._offset
    write(one, "5001,9,2,1,0.1\n")
    one.look(0)
    assert (one.epochs_done, one.score, one._offset - offset) == (5001, 9, len("5001,9,2,1,0.1\n"))


def test_a_run_that_is_taken_back_is_read_anew(tmp_path: Path) -> None:
    one = run(tmp_path)
    write(one, HEADER + "1,10,2,0,1\n2,20,2,0,1\n3,30,2,0,1\n")
    one.look(0)
    write(one, HEADER + "1,10,2,0,1\n", "w")
    one.look(0)
    assert one.epochs_done == 1
    write(one, "2,21,2,0,1\n")
    one.look(0)
    # Cut and grown again between two looks, to where it had been read and beyond.
    write(one, HEADER + "1,10,2,0,1.5555\n2,22,2,1,1\n3,33,2,1,1\n", "w")
    one.look(0)
    assert (one.epochs_done, one.score) == (3, 33)
    write(one, HEADER + "1,10,2,0,1.5555\n2,22,2,1,1\n3,34,2,1,1\n4,44,2,1,1\n", "w")
    one.look(0)
    assert (one.epochs_done, one.score) == (4, 44)


@pytest.mark.parametrize(
    "damage",
    [
        "3,1,2,1,1\n",  # epoch 2 is missing
        "nonsense\n",
        "2,1,2\n",
        '2,"\n',
        "2,1e999,2,1,1\n",
        "2,1,0x10,1,1\n",
        "x" * 2**19,
        "2,\x1b[2J,2,1,1\n",
        "\udcff\n",
    ],
)
def test_damage_stops_the_reading_and_nothing_else(tmp_path: Path, damage: str) -> None:
    one = run(tmp_path)
    write(one, HEADER + "1,10,2,1,1\n")
    one.look(0)
    with (one.path / "metrics.csv").open("ab") as file:
        file.write(damage.encode(errors="surrogateescape"))
    for now in range(3):
        one.look(now)
    assert (one.epochs_done, one.score) == (1, 10)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    import os

    one = run(tmp_path)
    os.mkfifo(one.path / "metrics.csv")
    one.look(0)
    assert one.epochs_done == 0


def test_a_metric_of_the_tasks_own(tmp_path: Path) -> None:
    one, other = run(tmp_path, "a"), run(tmp_path, "b")
    for each, named in ((one, "error"), (other, "none such")):
        (each.path / "environment.json").write_text(json.dumps({"metric": named}))
        write(each, "epoch,error,neurons,frozen,epoch_seconds\n1,0.25,0,0,1\n")
        each.look(0)
    assert (one.metric, one.score) == ("error", 0.25)
    assert other.metric == ""
    assert math.isnan(other.frozen_share)  # there are no neurons


def test_times_to_come(tmp_path: Path) -> None:
    runs = [run(tmp_path, name) for name in "abcd"]
    state = SweepState("s", tmp_path, (), 2, runs, 0.0)
    assert math.isnan(state.seconds_left(0))
    runs[0].start(0)
    runs[1].start(0)
    write(runs[0], HEADER + "1,1,2,1,4\n")
    runs[0].look(7)  # 3 s to start, 4 s an epoch
    assert runs[0].starting_seconds == 3
    assert runs[0].seconds_left(8) == 9 * 4 - 1
    assert runs[0].seconds_left(100) == 8 * 4  # an epoch that takes its time is not over
    # Run a 35 s; runs b, c and d 3 s and 10 epochs of 4 s each; two at once.
    assert state.seconds_left(8) == pytest.approx((35 + 3 * 43) / 2)
    runs[1].end(FAILED, "why", 9)
    assert state.seconds_left(8) == pytest.approx((35 + 2 * 43) / 2)
    for one in (runs[0], runs[2]):
        one.end(FINISHED, "", 10)
    assert state.seconds_left(10) == pytest.approx(43)  # the last cannot be shared
    runs[3].end(FINISHED, "", 10)
    assert state.seconds_left(10) == 0


def test_a_resumed_run_has_less_to_do(tmp_path: Path) -> None:
    one = run(tmp_path)
    write(one, HEADER + "".join(f"{epoch},1,2,1,2\n" for epoch in range(1, 7)))
    one.start(5)
    assert (one.epochs_before, one.epochs_left) == (6, 4)
    assert one.seconds_left(5) == 8
    assert math.isnan(one.starting_seconds)


def test_reasons_are_believed_of_the_very_process_only(tmp_path: Path) -> None:
    assert failure_reason(tmp_path, 5) == ""
    assert not is_finished(tmp_path)
    (tmp_path / "status.json").write_text(json.dumps({"state": "failed", "reason": "a\nb\x1b" + "c" * 999, "pid": 5}))
    reason = failure_reason(tmp_path, 5)
    assert reason.isprintable()
    assert reason.startswith("a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}cc")
    assert len(reason) == 500
    assert failure_reason(tmp_path, 6) == ""
    (tmp_path / "status.json").write_text(json.dumps({"state": "finished"}))
    assert is_finished(tmp_path)


STEPS = "epoch,step,passed_epochs,test_top1,neurons,frozen,epoch_seconds\n"


def test_epochs_of_a_run_by_steps_are_those_passed(tmp_path: Path) -> None:
    one, other = run(tmp_path, "a"), run(tmp_path, "b")
    state = SweepState("s", tmp_path, (), 1, [one, other], 0.0)
    one.start(0)
    write(one, STEPS + "1,100,0.25,1,2,1,1\n2,200,0.5,1,2,1,1\n")
    one.look(2)
    assert (one.epochs_done, one.passed_epochs, one.epochs_left) == (0, 0.5, 9.5)
    assert one.epoch_seconds == 4  # a second for each fourth of one
    assert one.seconds_left(2) == 9.5 * 4
    assert state.share == 0.5 / 20
    write(one, "".join(f"{row},{row}00,{row / 4},1,2,1,1\n" for row in range(3, 10)))
    one.look(9)
    assert (one.epochs_done, one.passed_epochs, one.epochs_before) == (2, 2.25, 0)
    write(one, "10,1000,2.5,9,2,1,1\n", "a")
    one.look(10)
    assert one.score == 9  # rows are counted apart from epochs


@pytest.mark.parametrize("passed", ["0.25", "0.1", "-1", "0", "inf", "", "x"])
def test_epochs_that_do_not_pass_are_damage(tmp_path: Path, passed: str) -> None:
    one = run(tmp_path)
    write(one, STEPS + f"1,100,0.25,10,2,1,1\n2,200,{passed},20,2,1,1\n")
    for now in range(3):
        one.look(now)
    assert (one.passed_epochs, one.score) == (0.25, 10)
