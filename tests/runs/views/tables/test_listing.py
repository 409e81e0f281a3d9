"""The list of runs as it is printed: columns, units, and what is damaged."""

from __future__ import annotations

import math
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from neq_cli.runs.store.brief import DAMAGED, Brief
from neq_cli.runs.store.run import RunStatus
from neq_cli.runs.views.tables.listing import render_list, to_json, width_of

BEGAN = datetime(2026, 1, 31, 12, 5, tzinfo=timezone.utc)


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setenv("TZ", "UTC")
    time.tzset()


def make(path: str = "runs/a", state: str = "finished", reason: str = "", **fields: Any) -> Brief:
    told = {"recipe": "digits", "epochs": 3, "planned": 9, "metric": "test_top1", "last": 98.5, "best": 98.75}
    return Brief(Path(path), RunStatus(state, reason), BEGAN, **{**told, **fields})


def lines(*briefs: Brief) -> list[str]:
    content = render_list(briefs)
    console = Console(width=width_of(content))
    with console.capture() as captured:
        console.print(content)
    return [" ".join(line.split()) for line in captured.get().splitlines()]


def test_a_line_for_each_run() -> None:
    long = "sweeps/digits/grid/runs/" + "policy.epsilon=0.001," * 8
    assert lines(make(), make(long, "killed", last=math.nan, best=math.nan, planned=None)) == [
        "begun status epoch test_top1 best run",
        "2026-01-31 12:05 finished 3/9 98.50 98.75 runs/a",
        f"2026-01-31 12:05 killed 3 – – {long}",
    ]


def test_scores_of_different_metrics_are_named() -> None:
    header, *rows = lines(make(), make(metric="test_mae", last=0.12345, best=0.1, unit="observation"))
    assert header == "begun status epoch score best run"
    assert rows[0].endswith("3/9 test_top1 98.50 98.75 runs/a")
    assert rows[1].endswith("3/9 obs test_mae 0.1235 0.1 runs/a")


def test_damaged_runs_are_listed_and_their_reasons_below() -> None:
    empty = {"epochs": 0, "planned": None, "metric": None, "last": math.nan, "best": math.nan}
    many = [make(f"runs/{number}", DAMAGED, f"runs/{number}: torn", **empty) for number in range(12)]
    _, *rows = lines(*many)
    assert rows[0] == "2026-01-31 12:05 damaged – – – runs/0"
    assert rows[12:] == ["", *(f"runs/{number}: torn" for number in range(10)), "and 2 more that are damaged"]


def test_a_path_obeys_no_terminal() -> None:
    assert "\x1b" not in "".join(lines(make("runs/\x1b[31m")))


def test_json() -> None:
    found = to_json([make(last=math.nan, reason="why")])
    assert found == {
        "schema": 1,
        "runs": [
            {
                "path": "runs/a",
                "recipe": "digits",
                "state": "finished",
                "reason": "why",
                "began": "2026-01-31T12:05:00+00:00",
                "epochs": 3,
                "epochs_planned": 9,
                "unit": "epoch",
                "metric": "test_top1",
                "metric_last": None,
                "metric_best": 98.75,
            }
        ],
    }
