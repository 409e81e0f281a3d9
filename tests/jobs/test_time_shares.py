"""When a run tells that much of its time goes into other things than training."""

from __future__ import annotations

from neq_cli.jobs.time_shares import TimeShare


def rows(*pairs: tuple[float, float]) -> list[dict[str, float | int]]:
    return [{"epoch_seconds": whole, "probe_seconds": probe} for whole, probe in pairs]


def told(*pairs: tuple[float, float]) -> list[str | None]:
    cost = TimeShare("probe_seconds", 0.05, "probing", "raise probe_every")
    return [cost.note(row) for row in rows(*pairs)]


def test_it_is_told_once_when_it_is_more_than_a_twentieth() -> None:
    pairs = [(100.0, 2.0), (100.0, 2.0), (100.0, 12.0), (100.0, 50.0)]
    # 16 of 300 seconds are 5.3 %.
    assert told(*pairs) == [None, None, "probing took 5 % of the time so far; raise probe_every", None]


def test_a_twentieth_a_first_row_and_a_run_of_seconds_are_not_much() -> None:
    assert told(*[(100.0, 5.0)] * 4) == [None] * 4
    assert told((100.0, 90.0), (1000.0, 1.0), (1000.0, 1.0)) == [None] * 3
    assert told(*[(2.0, 1.6)] * 3) == [None] * 3
    assert told(*[(2.0, 1.6)] * 4)[3] == "probing took 80 % of the time so far; raise probe_every"


def test_a_resumed_run_tells_it_once_too() -> None:
    pairs = [(100.0, 20.0)] * 6
    for done in range(6):
        cost = TimeShare("probe_seconds", 0.05, "probing", "", rows(*pairs[:done]))
        said = [cost.note(row) is not None for row in rows(*pairs[done:])]
        assert said == [number == 2 for number in range(done, 6)]
