"""Drawings are as wide as asked, and what they show is what went in."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from neq_cli.runs.views.drawing import LEVELS, averaged, bar, chart, histogram, shorten, shorten_names

NAN = math.nan


def test_a_rising_series_uses_every_level_from_low_to_high() -> None:
    assert chart([0, 1, 2, 3, 4, 5, 6], 7) == ["▁▂▃▄▅▆▇"]


def test_a_given_range_says_what_the_lowest_and_highest_marks_are() -> None:
    assert chart([0, 50, 100, 100], 6, low=0, high=100) == ["▁▄▇▇  "]
    assert chart([10, 10], 2, low=0, high=10) == ["▇▇"]


def test_a_tall_chart_stacks_its_rows() -> None:
    # 15 steps over two rows: the lowest is one step, the highest fifteen.
    assert chart([0, 14], 2, rows=2) == [" ▇", "▁█"]


def test_what_was_not_measured_is_blank() -> None:
    assert chart([NAN, 0, NAN, 7], 5) == [" ▁ ▇ "]


def test_more_values_than_columns_become_means_of_equal_stretches() -> None:
    assert averaged([1, 3, 10, 20, 5, 7], 3) == [2, 15, 6]
    assert averaged([NAN, 3, NAN, NAN], 2)[0] == 3
    assert math.isnan(averaged([NAN, 3, NAN, NAN], 2)[1])


@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=60),
    st.integers(0, 30),
    st.integers(1, 4),
)
def test_a_chart_has_its_size_whatever_the_values(values: list[float], width: int, rows: int) -> None:
    lines = chart(values, width, rows)
    assert [len(line) for line in lines] == [width] * rows
    assert set("".join(lines)) <= set(LEVELS)


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0.0, "──────────"),
        (0.5, "━━━━━─────"),
        (0.55, "━━━━━╸────"),
        (1.0, "━━━━━━━━━━"),
        (0.0001, "╸─────────"),  # not nothing
        (0.9999, "━━━━━━━━━╸"),  # not everything
        (NAN, "──────────"),
    ],
)
def test_a_bar_shows_its_share(share: float, expected: str) -> None:
    assert "".join(bar(share, 10)) == expected


def test_a_histogram_adds_up_neighbouring_bins_and_leaves_empty_columns_blank() -> None:
    assert histogram([4, 4, 0, 0, 1, 0, 8, 6], 4) == "▄ ▁▇"


def test_an_even_spread_looks_even_at_a_width_that_does_not_divide_it() -> None:
    assert set(histogram([5] * 224, 60)) == {"▇"}


def test_a_long_text_loses_its_middle() -> None:
    assert shorten("abcdefghij", 7) == "abc…hij"
    assert shorten("abcdefghij", 10) == "abcdefghij"


@given(st.text(alphabet="abc.01日本語", max_size=30), st.integers(0, 20))
def test_a_shortened_text_fits_its_cells(text: str, width: int) -> None:
    assert cell_len(shorten(text, width)) <= width
    assert all(cell_len(name) <= width for name in shorten_names((text, "layer1.0.conv1"), width))


def test_shortened_names_keep_the_numbers_that_tell_them_apart() -> None:
    names = tuple(f"encoder.layers.encoder_layer_{n}.self_attention.out_proj" for n in range(12))
    short = shorten_names(names, 24)
    assert len(set(short)) == 12
    assert all(cell_len(name) <= 24 for name in short)
    assert shorten_names(("stages.2.blocks.17.attention", "fc"), 17) == ["sta…2.blo…17.att…", "fc"]
