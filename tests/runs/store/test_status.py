"""What a run says of its starts, by hand."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone

import pytest

from neq_cli.runs.store.status import parse_time, resumed_environment, resumed_status

NEW = {"state": "running", "pid": 2, "host": "b", "started": "2026-02-02T00:00:00+00:00", "ended": None, "reason": None}


def test_a_status_keeps_its_first_start() -> None:
    old = {
        "state": "failed",
        "pid": 1,
        "host": "a",
        "started": "2026-01-01T00:00:00+00:00",
        "ended": "x",
        "reason": "y",
    }
    assert resumed_status(old, NEW) == {**NEW, "started": old["started"]}
    for nonsense in ({}, {"started": 3}, {"started": "soon"}, {"started": "2026-01-01T00:00:00"}):
        assert resumed_status(nonsense, NEW) == NEW


def test_an_environment_tells_what_differs() -> None:
    old = {"neq": "0.3", "packages": {"torch": "2.9", "numpy": "2"}, "device": "cpu", "argv": ["a"], "policy": "neq"}
    new = {"neq": "0.4", "packages": {"torch": "2.10", "numpy": "2"}, "device": "cuda", "argv": ["b"], "cuda": None}
    entry = {"at": "now", "epoch": 3, "host": "h"}
    got = resumed_environment(old, new, entry)
    changed = {"neq": "0.4", "packages": {"torch": "2.10"}}
    assert got == {**old, "resumed": [{**entry, "device": "cuda", "argv": ["b"], "changed": changed}]}
    again = resumed_environment(got, old, {"at": "later"})
    assert again["resumed"] == [*got["resumed"], {"at": "later", "device": "cpu", "argv": ["a"], "changed": {}}]


def test_the_last_hundred_entries_are_kept_and_fewer_long_ones() -> None:
    environment: dict[str, object] = {"resumed": "nonsense"}
    for number in range(130):
        environment = resumed_environment(environment, {"argv": ["x"]}, {"epoch": number})
    resumed = environment["resumed"]
    assert isinstance(resumed, list)
    assert [entry["epoch"] for entry in resumed] == list(range(30, 130))
    for number in range(30):
        environment = resumed_environment(environment, {"argv": ["x" * 100_000]}, {"epoch": number})
    assert [entry["epoch"] for entry in environment["resumed"]] == [28, 29]  # type: ignore[attr-defined]
    assert len(json.dumps(environment, indent=2)) < 2**20


@pytest.mark.parametrize("text", [None, 3, "", "yesterday", "2026-01-01", "2026-01-01T00:00:00"])
def test_what_is_no_time(text: object) -> None:
    assert parse_time(text) is None


def test_a_time_is_read_as_it_was() -> None:
    time = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone(timedelta(hours=2)))
    assert parse_time(time.isoformat(timespec="seconds")) == time
