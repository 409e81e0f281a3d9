"""Meters against sums written out: counters that begin anew, trapezoids, threads, and sources that fail."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from neq_cli.training.machine.energy.meter import Meter, counted, sampled


def following(values: list[float]) -> Iterator[float]:
    return iter(values)


def test_a_counter_goes_on_by_differences_and_begins_anew_after_its_largest() -> None:
    readings = following([90.0, 95.0, 95.0, 4.0, 99.0])
    spent = counted(lambda: next(readings), largest=100.0)
    # From 95 to 100, where it begins anew, and to 4.
    assert [spent() for _ in range(4)] == [5.0, 0.0, 9.0, 95.0]


def test_a_counter_that_falls_for_no_known_reason_is_an_error() -> None:
    readings = following([90.0, 4.0])
    spent = counted(lambda: next(readings))
    with pytest.raises(ValueError, match="fell from 90 to 4 joules"):
        spent()


def test_power_is_summed_up_by_trapezoids() -> None:
    power, clock = following([100.0, 200.0, 200.0, 50.0]), following([10.0, 10.5, 12.5, 13.5])
    spent = sampled(lambda: next(power), lambda: next(clock))
    assert [spent() for _ in range(3)] == [150 * 0.5, 200 * 2.0, 125 * 1.0]


def test_a_meter_adds_up_what_is_spent() -> None:
    amounts = following([1.0, 10.0, 100.0])
    meter = Meter("cpu", "by hand", lambda: next(amounts))
    assert [meter.joules() for _ in range(3)] == [1.0, 11.0, 111.0]


def test_what_has_to_be_looked_at_is_looked_at_from_start_to_close() -> None:
    looks, closed = threading.Semaphore(0), []

    def spent() -> float:
        looks.release()
        return 1.0

    meter = Meter("cpu", "by hand", spent, every=0.001, close=lambda: closed.append(True))
    assert not looks.acquire(timeout=0.02)  # not before the start
    meter.start()
    meter.start()
    assert all(looks.acquire(timeout=10) for _ in range(3))
    meter.close()
    assert closed == [True]
    while looks.acquire(blocking=False):
        pass
    assert not looks.acquire(timeout=0.02)
    assert meter.joules() >= 4


def test_a_source_that_failed_once_is_not_believed_again() -> None:
    calls = []

    def spent() -> float:
        calls.append(1)
        if len(calls) == 2:
            raise OSError("gone")
        return 1.0

    meter = Meter("cpu", "by hand", spent)
    assert meter.joules() == 1.0
    for _ in range(2):
        with pytest.raises(OSError, match="gone"):
            meter.joules()
    assert len(calls) == 2


def test_a_failure_in_the_thread_is_told_to_who_asks() -> None:
    failed = threading.Event()

    def spent() -> float:
        failed.set()
        raise OSError("gone")

    meter = Meter("cpu", "by hand", spent, every=0.001)
    meter.start()
    assert failed.wait(10)
    with pytest.raises(OSError, match="gone"):
        meter.joules()
    meter.close()
