"""A run in short says what reading it whole says; which run of a folder is the newest."""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neq_cli.errors import RunDirectoryError
from neq_cli.runs.compare.comparison import final_metric
from neq_cli.runs.store import brief as briefs
from neq_cli.runs.store.brief import DAMAGED, newest, read_brief
from neq_cli.runs.store.run import Run, read_run


def set_status(run: Run, **changes: Any) -> None:
    status = json.loads(run.files.status.read_text())
    run.files.status.write_text(json.dumps({**status, **changes}))


def starts(run: Run, minute: int) -> Run:
    set_status(run, started=f"2026-01-31T12:{minute:02}:00+00:00")
    return run


@pytest.mark.parametrize("lower", [False, True])
def test_it_says_what_the_whole_run_says(make_run: Callable[..., Run], lower: bool) -> None:
    scores = [{"test_mae": value} for value in (3.0, 1.0, 2.0, math.nan)]
    run = make_run(metrics=scores, metric="test_mae", lower=lower, planned=9, finish=False)
    brief = read_brief(run.path)
    assert (brief.path, brief.recipe, brief.epochs, brief.planned) == (run.path, "digits", run.epochs, 9)
    assert (brief.metric, brief.last, brief.unit) == (run.metric, final_metric(run), run.unit)
    assert brief.best == (1.0 if lower else 3.0)
    assert brief.status == read_run(run.path).status
    assert brief.status.state == "running"


def test_observations_are_counted(make_observed: Callable[..., Run]) -> None:
    run = make_observed(rows=8, planned=12)
    brief = read_brief(run.path)
    assert (brief.unit, brief.epochs, brief.planned) == ("observation", 8, 12)


def test_a_killed_run_is_told_from_a_running_one(make_run: Callable[..., Run]) -> None:
    run = make_run(finish=False)
    set_status(run, pid=os.getpid())
    assert read_brief(run.path).status.state == "running"
    set_status(run, pid=2**22 + 1)  # Linux gives none that is larger
    assert read_brief(run.path).status.state == "killed"
    set_status(run, host=f"not-{socket.gethostname()}")
    assert read_brief(run.path).status.state == "running or killed"
    run.files.status.unlink()
    assert read_brief(run.path).status.state == "unknown"


def test_the_recipe_is_read_only_where_nothing_else_tells(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(planned=7)
    run.files.recipe.write_text("epochs: 5\n")
    with monkeypatch.context() as patch:
        patch.setattr(briefs, "read_yaml", None)
        assert read_brief(run.path).planned == 7
    environment = json.loads(run.files.environment.read_text())
    run.files.environment.write_text(json.dumps({**environment, "rows_planned": None}))
    assert read_brief(run.path).planned == 5


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("metrics.csv", b"epoch,nothing\n1,2\n", "metrics.csv:1: no column"),
        ("metrics.csv", b"\xff\n", "metrics.csv:1: not UTF-8"),
        ("status.json", b"{", "status.json:1: not JSON"),
        ("environment.json", b"[]", "environment.json: not a mapping"),
        ("recipe.yaml", None, "recipe.yaml: missing"),
    ],
)
def test_a_damaged_run_is_called_so_with_the_reason(
    make_run: Callable[..., Run], file: str, content: bytes | None, said: str
) -> None:
    run = make_run()
    if content is None:
        (run.path / file).unlink()
    else:
        (run.path / file).write_bytes(content)
    brief = read_brief(run.path)
    assert brief.status.state == DAMAGED
    assert said in brief.status.reason


def test_rows_out_of_order_and_cells_that_are_no_numbers(make_run: Callable[..., Run]) -> None:
    run = make_run()
    lines = run.files.metrics.read_text().splitlines(keepends=True)
    for changed in ([lines[0], lines[2]], [lines[0], lines[1].replace("51.0", "many")], [lines[0], "1,2\n"]):
        run.files.metrics.write_text("".join(changed))
        assert read_brief(run.path).status.state == DAMAGED
        with pytest.raises(RunDirectoryError):
            read_run(run.path)


def test_a_run_that_was_killed_as_it_began_is_not_damaged(make_run: Callable[..., Run]) -> None:
    run = make_run(finish=False)
    for file in (run.files.recipe, run.files.metrics):
        file.unlink()
    brief = read_brief(run.path)
    assert (brief.status.state, brief.epochs, brief.metric) == ("running", 0, None)


def test_the_newest_is_the_one_begun_last_that_can_be_looked_at(tmp_path: Path, make_run: Callable[..., Run]) -> None:
    (tmp_path / "all" / "sub").mkdir(parents=True)
    old, new = starts(make_run("all/z"), 1), starts(make_run("all/sub/a"), 2)
    assert newest(tmp_path / "all") == (new.path, f"{tmp_path}/all: {new.path} is the newest of 2 runs in it")
    assert newest(old.path) == (old.path, "")
    assert newest(tmp_path / "missing") == (tmp_path / "missing", "")
    begun = starts(make_run("all/b"), 3)
    begun.files.metrics.unlink()
    path, said = newest(tmp_path / "all")
    assert path == new.path
    assert said.endswith(f"of 3 runs in it; without a finished epoch, or damaged, and newer: {begun.path}")
    for run in (old, new):
        run.files.metrics.write_text("epoch\n")
    with pytest.raises(RunDirectoryError, match=r"none of the 3 runs in it has a finished epoch; .* is .*/b \("):
        newest(tmp_path / "all")


def test_of_two_that_began_in_one_second_the_longer_name_is_the_later(
    tmp_path: Path, make_run: Callable[..., Run]
) -> None:
    (tmp_path / "all").mkdir()
    for name in ("t-s1-10", "t-s1-2", "t-s1"):
        starts(make_run(f"all/{name}"), 1)
    assert newest(tmp_path / "all")[0].name == "t-s1-10"
