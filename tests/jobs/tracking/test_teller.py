"""Trackers are told everything once, in order, whatever was missed; one that fails costs a line and no training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tracked import TrackedLoop

from neq_cli import read_run
from neq_cli.errors import RunDirectoryError
from neq_cli.jobs.tracking import Ended, TrackedRun, ids, teller
from neq_cli.jobs.tracking.numbers import EpochNumbers


class Memory:
    """A tracker that takes nothing back, and fails where it is told to."""

    told: dict[str, list[Any]]  # by the run's identity at it
    fails_at: Any

    def __init__(self) -> None:
        self.identity = ""

    def begin(self, run: TrackedRun) -> int:
        self.run, self.identity = run, run.identity
        self._fail("begin")
        found = self.told.setdefault(run.identity, [])
        assert run.is_known == bool(found)
        found.append(("begin", run.epoch, run.told))
        return run.told

    def epoch(self, numbers: EpochNumbers) -> None:
        self._fail(numbers.epoch)
        self.told[self.identity].append(numbers.epoch)

    def end(self, ended: Ended) -> None:
        self._fail("end")
        self.told[self.identity].append((ended.state, ended.reason, ended.epoch, bool(ended.pictures)))

    def _fail(self, where: Any) -> None:
        if where == self.fails_at:
            raise OSError(28, "No space left on device")


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> type[Memory]:
    """Have "tensorboard" stand for a tracker of ours."""
    Memory.told, Memory.fails_at = {}, None
    monkeypatch.setitem(teller.TRACKERS, "tensorboard", Memory)
    monkeypatch.setattr(teller, "report_pictures", lambda run: {"curve": b"png"})
    monkeypatch.setattr(teller, "can_draw", lambda: True)
    return Memory


def notes(run: Path) -> list[str]:
    return [note for note in read_run(run).environment["notes"] if note.startswith("track")]


def test_a_run_from_its_beginning_to_its_end(tmp_path: Path, memory: type[Memory]) -> None:
    TrackedLoop().record(tmp_path / "run", 3, ["tensorboard", "tensorboard"])
    ((identity, told),) = memory.told.items()
    assert told == [("begin", 0, 0), 1, 2, 3, ("finished", "", 3, True)]
    kept = json.loads((tmp_path / "run/tracking/ids.json").read_text())
    assert kept == {"tensorboard": {"id": identity, "epoch": 3}}
    assert notes(tmp_path / "run") == []


def test_nothing_is_left_behind_by_a_run_without_trackers(tmp_path: Path) -> None:
    TrackedLoop().record(tmp_path / "run", 1, [])
    assert not (tmp_path / "run/tracking").exists()


def test_a_run_that_is_gone_on_with_is_the_same_one(tmp_path: Path, memory: type[Memory]) -> None:
    """Epochs 3 and 4 are trained again, which the tracker has, and are not told twice."""
    loop = TrackedLoop()
    with pytest.raises(RuntimeError):
        loop.record(tmp_path / "run", 4, ["tensorboard"], fails=True)
    loop.rewind(2)
    loop.record(tmp_path / "run", 5, ["tensorboard"], resume=True)
    ((_, told),) = memory.told.items()
    failed = ("failed", "RuntimeError: the loop's own", 4, False)
    assert told == [("begin", 0, 0), 1, 2, 3, 4, failed, ("begin", 2, 4), 5, ("finished", "", 5, True)]


@pytest.mark.parametrize("missed", ["never tracked", "killed before it was noted", "failed"])
def test_what_a_tracker_missed_is_told_later(
    tmp_path: Path, memory: type[Memory], missed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, run = TrackedLoop(), tmp_path / "run"
    memory.fails_at = 2 if missed == "failed" else None
    loop.record(run, 3, [] if missed == "never tracked" else ["tensorboard"])
    first = {"never tracked": [], "killed before it was noted": [1, 2, 3], "failed": [1]}[missed]
    if missed == "killed before it was noted":
        (identity,) = memory.told
        ids.write_ids(run / "tracking/ids.json", {"tensorboard": ids.Kept(identity, 2)})
    memory.fails_at = None
    loop.record(run, 5, ["tensorboard"], resume=True)
    ((_, told),) = memory.told.items()
    epochs = [each for each in told if isinstance(each, int)]
    again = [3] if missed == "killed before it was noted" else []
    assert epochs == first + again + [epoch for epoch in range(1, 6) if epoch not in first]


@pytest.mark.parametrize(("where", "told"), [("begin", []), (2, [1]), ("end", [1, 2, 3])])
def test_one_that_fails_costs_a_line(
    tmp_path: Path, memory: type[Memory], capsys: pytest.CaptureFixture[str], where: Any, told: list[int]
) -> None:
    memory.fails_at = where
    TrackedLoop().record(tmp_path / "run", 3, ["tensorboard"])
    run = read_run(tmp_path / "run")
    assert str(run.status) == "finished"
    assert run.epochs == 3
    what = "it has not been told the end" if where == "end" else "it is told no more; --resume would go on with it"
    line = f"track: tensorboard failed (No space left on device); {what}"
    assert capsys.readouterr().err == f"warning: {line}\n"
    assert notes(tmp_path / "run") == [line]
    assert [each for found in memory.told.values() for each in found if isinstance(each, int)] == told


def test_one_that_fails_leaves_the_others_alone(
    tmp_path: Path, memory: type[Memory], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other(Memory):
        told: dict[str, list[Any]] = {}  # noqa: RUF012
        fails_at = None

    monkeypatch.setitem(teller.TRACKERS, "mlflow", Other)
    monkeypatch.setattr("neq_cli.jobs.recorder.trackers_problem", lambda trackers: None)
    memory.fails_at = 2
    TrackedLoop().record(tmp_path / "run", 3, ["tensorboard", "mlflow"])
    ((_, told),) = Other.told.items()
    assert told == [("begin", 0, 0), 1, 2, 3, ("finished", "", 3, True)]


def test_a_full_disk_where_ids_are_kept(
    tmp_path: Path, memory: type[Memory], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, kept: object) -> None:
        if any(1 in told for told in memory.told.values()):
            raise OSError(28, "No space left on device")
        ids.write_ids(path, kept)  # type: ignore[arg-type]

    monkeypatch.setattr(teller, "write_ids", full)
    TrackedLoop().record(tmp_path / "run", 3, ["tensorboard"])
    assert str(read_run(tmp_path / "run").status) == "finished"
    assert capsys.readouterr().err == "warning: track: nothing more is told to tensorboard: No space left on device\n"


def test_ids_that_are_damaged_end_the_tracking_alone(
    tmp_path: Path, memory: type[Memory], capsys: pytest.CaptureFixture[str]
) -> None:
    loop, run = TrackedLoop(), tmp_path / "run"
    loop.record(run, 1, ["tensorboard"])
    (run / "tracking/ids.json").write_text("{")
    loop.record(run, 2, ["tensorboard"], resume=True)
    assert read_run(run).epochs == 2
    assert capsys.readouterr().err.startswith("warning: track: nothing is told to tensorboard: ")


@pytest.mark.parametrize("place", ["tracking", "tracking/ids.json"])
def test_links_that_lead_out_of_the_run_directory_are_refused(tmp_path: Path, memory: type[Memory], place: str) -> None:
    loop, run, elsewhere = TrackedLoop(), tmp_path / "run", tmp_path / "elsewhere"
    loop.record(run, 1, [])
    elsewhere.mkdir()
    (run / place).parent.mkdir(exist_ok=True)
    (run / place).symlink_to(elsewhere)
    with pytest.raises(RunDirectoryError, match=f"{place}: a link, where neq writes"):
        loop.record(run, 2, ["tensorboard"], resume=True)
    assert not list(elsewhere.iterdir())


def test_without_matplotlib_the_end_is_told_without_pictures(
    tmp_path: Path, memory: type[Memory], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teller, "can_draw", lambda: False)
    TrackedLoop().record(tmp_path / "run", 1, ["tensorboard"])
    ((_, told),) = memory.told.items()
    assert told[-1] == ("finished", "", 1, False)
    assert capsys.readouterr().err == f"warning: {teller.WITHOUT}\n"
