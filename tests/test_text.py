from __future__ import annotations

import math
import subprocess

import pytest

from neq_cli.text import (
    folded,
    format_flops,
    format_flops_like,
    format_joules,
    format_metric,
    format_p_value,
    format_passes,
    format_percent,
    format_seconds,
    in_training,
    printable,
    ratio_percent,
    shell_lines,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (138_940_000, "138.94M"),
        (3_640_000_000, "3.64G"),
        (305.06e9, "305.06G"),
        (0, "0"),
        (999, "999"),
        (1000, "1.00K"),
        (999_994, "999.99K"),
        (999_996, "1.00M"),  # not 1000.00K
        (2.5e12, "2.50T"),
        (7e21, "7000.00E"),
        (math.nan, "–"),
        (math.inf, "–"),
    ],
)
def test_flops(value: float, text: str) -> None:
    assert format_flops(value) == text


def test_a_spread_is_written_in_the_unit_of_its_mean() -> None:
    assert format_flops(550_000, like=84.8e6) == "0.55M"


@pytest.mark.parametrize(
    ("value", "like", "text"),
    [
        (84.8e6, 1e9, "0.08G"),
        (1500, 138.94e6, "0.0015M"),
        (4e6, 1e9, "0.004G"),
        (5e6, 1e9, "0.01G"),  # as other numbers of the unit, where that is not 0
        (0, 1e9, "0.00G"),
        (1500, None, "1.50K"),
        (3, 900, "3"),
        (float("nan"), 1e9, "–"),
    ],
)
def test_a_count_in_a_far_larger_unit_is_not_zero(value: float, like: float | None, text: str) -> None:
    assert format_flops_like(value, like) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (725, "12 min 05 s"),
        (3599.6, "1 h 00 min"),
        (12_300, "3 h 25 min"),
        (math.nan, "–"),
    ],
)
def test_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.4, "0 J"),
        (812.0, "812 J"),
        (1234.0, "1.23 kJ"),
        (45.6e6, "45.60 MJ"),
        (999.996e6, "1.00 GJ"),
        (math.nan, "–"),
    ],
)
def test_joules(value: float, text: str) -> None:
    assert format_joules(value) == text


def test_metrics_p_values_and_percent() -> None:
    assert format_metric(94.126, "test_top1") == "94.13"
    assert format_metric(0.012345, "my_own") == "0.01235"
    assert format_p_value(0.25) == "0.250"
    assert format_p_value(2 / 2**20) == "1.9e-06"
    assert format_percent(ratio_percent(1, 3)) == "33.3%"
    assert format_percent(ratio_percent(1, 0)) == "–"


def test_printable_disarms_a_terminal() -> None:
    hostile = "a\x1b[31mred\x07\r\nb\u202ec\ud800é漢"
    clean = printable(hostile)
    assert clean == "a�[31mred���b�c�é漢"
    clean.encode()
    assert printable("x" * 10, 4) == "xxx…"
    assert printable("a\u00a0b\u3000c\u202f") == "a b c "


@pytest.mark.parametrize(
    ("epochs", "text"),
    [
        (12.0, "12"),
        (2.3125, "2.31"),
        (2.5, "2.5"),
        (100.0, "100"),
        (0.25, "0.25"),
        (0.00123, "0.0012"),
        (1e40, "1e+40"),
    ],
)
def test_passes_over_the_data(epochs: float, text: str) -> None:
    assert format_passes(epochs) == text


def test_passes_that_are_not_known_are_a_dash() -> None:
    assert format_passes(math.nan) == "–"


@pytest.mark.parametrize(
    ("step", "passed", "text"),
    [
        (6000, 2.31, " (step 6000, epoch 2.31)"),
        (6000, math.nan, " (step 6000)"),
        (None, 2.0, " (epoch 2)"),
        (None, None, ""),
        (math.inf, -math.inf, ""),
    ],
)
def test_where_an_observation_stands(step: float | None, passed: float | None, text: str) -> None:
    assert in_training(step, passed) == text


PATH = "/a/folder-whose-name-is/longer-than/the-window"


@pytest.mark.parametrize("width", [1, 20, 40, 60, 80, 200, None])
def test_a_command_in_lines_is_one_to_a_shell(width: int | None) -> None:
    words = ["neq", "train", "it's", "model={name: a}", "policy.epsilon=-1", "--device", "cpu", "--resume", "-o", PATH]
    lines = shell_lines(words, width)
    copied = subprocess.run(
        ["sh", "-c", f"printf '%s\\n' {chr(10).join(lines)}"], capture_output=True, text=True, check=True
    )
    assert copied.stdout.splitlines() == words
    assert any(f"-o {PATH}" in line for line in lines)
    if width is None:
        assert len(lines) == 1
    else:
        assert all(len(line) <= width or len(line.split(" ", 2)) <= 3 or "'" in line for line in lines)
        assert not any(line.endswith("-o \\") for line in lines)


@pytest.mark.parametrize(
    ("width", "lines"),
    [
        (None, [f"finished: 3 epochs: {PATH}"]),
        (200, [f"finished: 3 epochs: {PATH}"]),
        (60, ["finished: 3 epochs:", PATH]),
        (12, ["finished: 3", "epochs:", PATH]),
    ],
)
def test_lines_are_broken_at_blanks_alone(width: int | None, lines: list[str]) -> None:
    assert folded(f"finished: 3 epochs: {PATH}", width) == lines
