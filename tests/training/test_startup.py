"""What a start consists of is told as it happens, and added up; by a clock that the test sets."""

from __future__ import annotations

import pytest

from neq_cli.events import Preparing
from neq_cli.training.startup import Startup


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_parts_are_told_as_they_begin_and_added_up(clock: Clock) -> None:
    told: list[Preparing] = []
    startup = Startup(told.append, clock)
    for seconds in (2.0, 1.5):
        with startup.part("reading images"):
            clock.now += seconds
            assert told[-1] == Preparing("reading images")
    with startup.part("opening the data"):
        clock.now += 0.01
    with startup.part("the first step", told=False):
        clock.now += 0.25
    assert [record.what for record in told] == ["reading images", "reading images", "opening the data"]
    assert startup.summary() == "3.8 s (reading images 3.5 s, the first step 0.2 s)"
    assert startup.summary() == ""


def test_a_part_within_another_is_that_ones_and_one_that_fails_counts(clock: Clock) -> None:
    startup = Startup(clock=clock)

    def fail() -> None:
        with startup.part("outer"):
            clock.now += 1
            with startup.part("inner"):
                clock.now += 2
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        fail()
    assert startup.seconds == {"outer": 3}


def test_how_far_a_part_is_is_told_a_few_times_a_second(clock: Clock) -> None:
    told: list[Preparing] = []
    startup = Startup(told.append, clock)
    for done in range(1, 101):
        clock.now += 0.0625  # exact in binary
        startup.count("reading images", done, 100)
    assert [record.done for record in told] == list(range(4, 101, 4))
    assert told[0].text == "reading images: 4 of 100, 4 %"
    assert Preparing("x", 31_000, 49_950).text == "x: 31,000 of 49,950, 62 %"


def test_only_the_first_step_is_a_part_and_nothing_is_once_it_is_over(clock: Clock) -> None:
    startup = Startup(clock=clock)
    for _ in range(3):
        with startup.step(compiled=True):
            clock.now += 1
    assert startup.seconds == {"compiling": 1}
    startup.finish()
    with startup.part("capturing the step"):
        clock.now += 1
    assert startup.seconds == {"compiling": 1}
    other = Startup(clock=clock)
    with other.step(compiled=False):
        clock.now += 2
    assert other.seconds == {"the first step": 2}


def test_a_quick_start_is_not_worth_a_line(clock: Clock) -> None:
    startup = Startup(clock=clock)
    with startup.part("opening the data"):
        clock.now += 0.9
    assert startup.summary() == ""
