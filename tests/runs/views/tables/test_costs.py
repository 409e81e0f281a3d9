"""What `neq bench` prints."""

from __future__ import annotations

from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from neq_cli.events import Compiling
from neq_cli.runs.views.tables.costs import bench_progress, render_bench

TIMES = {
    "step_ms": 812.4, "step_ms_quartiles": [800.0, 820.0], "forward_ms": 300.0, "backward_ms": 500.0,
    "optimizer_ms": 11.26, "row_keeping_ms": 1.125, "saved_for_backward_bytes": 61_440_000, "peak_memory_bytes": None,
}  # fmt: skip
LAYERS = [
    {"name": "conv1", "kind": "Conv2d", "neurons": 16, "frozen": 8, "kernel": "rounded", "rows_computed": 16,
     "reason": "rounded 0.1 ms, sliced 0.2 ms, dense 0.3 ms"},
    {"name": "conv2", "kind": "Conv2d", "neurons": 32, "frozen": 16, "kernel": "dense", "rows_computed": 32,
     "reason": "dense 0.1 ms, sliced 0.2 ms"},
    {"name": "conv2b", "kind": "Conv2d", "neurons": 32, "frozen": 16, "kernel": "dense", "rows_computed": 32,
     "reason": "dense 0.1 ms, sliced 0.2 ms"},
    {"name": "conv3", "kind": "Conv2d", "neurons": 32, "frozen": 16, "kernel": "sliced", "rows_computed": 16,
     "reason": "by rule"},
    {"name": "bn1", "kind": "BatchNorm2d", "neurons": 16, "frozen": 8, "kernel": "dense", "rows_computed": 16,
     "reason": "normalisation: a reason"},
    {"name": "bn2", "kind": "BatchNorm2d", "neurons": 16, "frozen": 8, "kernel": "dense", "rows_computed": 16,
     "reason": "normalisation: a reason"},
    {"name": "conv4", "kind": "Conv2d", "neurons": 16, "frozen": 16, "kernel": "none", "rows_computed": 0,
     "reason": "no neuron trains"},
    {"name": "fc", "kind": "Linear", "neurons": 10, "frozen": 0, "kernel": "dense", "rows_computed": 10,
     "reason": "never frozen (output layer)"},
]  # fmt: skip


def measurement(mode: str, order: str, share: float, **changes: Any) -> dict[str, Any]:
    own = {
        "frozen_fraction": share, "backward": mode, "order": order, "frozen": 5, "dense_step_ms": 1000.0,
        "time_ratio": 0.8124, "flops_ratio": 0.8, "dense_saved_for_backward_bytes": 88_000_000, "layers": LAYERS,
        "dense_peak_memory_bytes": None, "time_ratio_interval": [0.8011, 0.8342], "time_ratio_confidence": 0.96875,
    }  # fmt: skip
    return {**TIMES, **own, **changes}


def result(**changes: Any) -> dict[str, Any]:
    values = {
        "recipe": "mine", "model": "resnet18", "neurons": 10600, "data": "ImageNet", "synthetic_data": True,
        "batch_size": 16, "image_shape": [3, 224, 224], "optimizer": "sgd", "precision": "fp32", "compile": False,
        "device": "cpu (2 threads)", "threads": 2, "versions": {"neq": "0.1.0", "torch": "2.15.0"},
        "channels_last": True, "channels_last_ms": 800.0, "contiguous_ms": 912.3, "rounds": 6,
        "channels_last_ratio_interval": [0.85, 0.91], "channels_last_ratio_confidence": 0.96875, "steps_per_round": 1,
        "dense": {**TIMES, "step_ms": 1234.5},
        "measurements": [measurement("exact", order, share) for order in ("random", "front") for share in (0.0, 0.5)],
    }  # fmt: skip
    return values | changes


def printed(content: dict[str, Any], layers: float = 0.5, width: int = 80) -> list[str]:
    out = StringIO()
    Console(file=out, width=width).print(render_bench(content, layers))
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_the_circumstances_come_first() -> None:
    assert printed(result())[:10] == [
        "recipe     mine",
        "model      resnet18, 10600 neurons, fp32",
        "batch      16 images of 3x224x224, noise in the shape of ImageNet",
        "optimizer  sgd",
        "device     cpu (2 threads)",
        "versions   neq 0.1.0, torch 2.15.0",
        "format     channels_last, the faster one of the dense step: contiguous 912 ms,",
        "           channels_last 800 ms, ratio 0.850–0.910",
        "n          6 rounds, everything by turns",
        "",
    ]
    other = printed(
        result(
            channels_last=False, channels_last_ms=None, contiguous_ms=None, rounds=1, channels_last_ratio_interval=None,
            steps_per_round=4, synthetic_data=False, compile=True, device="cuda (NVIDIA H100)",
        )
    )  # fmt: skip
    assert "format     contiguous, as the recipe says" in other
    assert "n          1 round of 4 steps, everything by turns" in other
    assert "batch      16 images of 3x224x224, ImageNet" in other
    assert "model      resnet18, 10600 neurons, fp32, compiled" in other
    assert "device     cuda (NVIDIA H100), 2 CPU threads" in other


def test_steps_by_mode_and_order() -> None:
    lines = printed(result())
    assert lines[10:19] == [
        "dense, plain PyTorch",
        "frozen step ms  time    interval FLOPs saved forward backward optim.  rows",
        "          1234 1.000           – 1.000  61.4     300      500   11.3  1.12",
        "exact, a share of every layer at random",
        "     0     812 0.812 0.801–0.834 0.800  61.4     300      500   11.3  1.12",
        "   0.5     812 0.812 0.801–0.834 0.800  61.4     300      500   11.3  1.12",
        "exact, layer after layer from the input",
        "     0     812 0.812 0.801–0.834 0.800  61.4     300      500   11.3  1.12",
        "   0.5     812 0.812 0.801–0.834 0.800  61.4     300      500   11.3  1.12",
    ]
    assert not any("within noise of" in line for line in lines)
    assert "interval: of the median, by the order of the rounds' ratios; 96.9 % of such" in lines
    assert not any("--rounds 6" in line for line in lines)


def test_what_the_rounds_do_not_tell_from_the_dense_step_is_called_noise() -> None:
    """The same dense kernels came to 0.851 and 1.295 of the dense step."""
    found = [
        measurement("exact", "random", 0.0, time_ratio=0.851, time_ratio_interval=[0.79, 1.12]),
        measurement("exact", "random", 0.25, time_ratio=1.295, time_ratio_interval=[1.0, 1.41]),
        measurement("exact", "random", 0.5, time_ratio=0.75, time_ratio_interval=[0.7, 0.999]),
        measurement("exact", "front", 0.5),
    ]
    lines = printed(result(measurements=found))
    told = [line for line in lines if line.startswith("within noise")]
    assert told == ["within noise of the dense step: 0, 0.25 frozen"]
    place = lines.index(told[0])
    assert [line.split()[:1] for line in lines[place - 3 : place]] == [["0"], ["0.25"], ["0.5"]]
    out = StringIO()
    Console(file=out, width=80, force_terminal=True, color_system="standard").print(
        render_bench(result(measurements=found), 0.5)
    )
    grey = [line for line in out.getvalue().splitlines() if line.startswith("\x1b[2m") and "0.800" in line]
    assert [("0.851" in line, "1.295" in line) for line in grey] == [(True, False), (False, True)]


def test_formats_in_a_near_tie_are_called_noise() -> None:
    near = printed(result(channels_last=False, channels_last_ratio_interval=[0.98, 1.01]))
    assert "format     contiguous, for the two are within noise: contiguous 912 ms," in near


def test_few_rounds_say_how_little_they_tell() -> None:
    few = [measurement("exact", "random", 0.5, time_ratio_confidence=0.75)]
    lines = printed(result(rounds=3, measurements=few))
    assert any(line.endswith("75.0 % of such") for line in lines)
    assert "--rounds 6 gives an interval of 95 %" in lines
    one = [measurement("exact", "random", 0.5, time_ratio_interval=None, time_ratio_confidence=None)]
    lines = printed(result(rounds=1, measurements=one))
    row = next(line for line in lines if line.split()[:1] == ["0.5"])
    assert row.split()[:4] == ["0.5", "812", "0.812", "–"]
    assert "interval: needs more than one round, one of 95 % needs six" in lines
    assert not any("within noise" in line for line in lines)


def test_truncated_is_called_an_approximation_where_it_is_measured() -> None:
    assert not any("approximation" in line for line in printed(result()))
    truncated = printed(result(measurements=[measurement("truncated", "front", 0.5)]))
    assert "truncated, layer after layer from the input" in truncated
    assert any(line.startswith("truncated is an approximation") for line in truncated)


def test_layers_of_the_share_asked_for() -> None:
    others = [measurement("exact", "random", 0.9, layers=LAYERS[:1]), measurement("exact", "random", 0.5)]
    lines = printed(result(measurements=others))
    start = lines.index("exact, random, 0.5 frozen, layer by layer")
    assert lines[start + 1 :] == [
        "layer             frozen kernel  rows why",
        "conv1               8/16 rounded   16 rounded 0.1, sliced 0.2, dense 0.3 ms",
        "conv2 and 1 alike  16/32 dense     32 dense 0.1, sliced 0.2 ms",
        "conv3              16/32 sliced    16 by rule",
        "2 layers dense: normalisation: a reason",
        "1 layer no weight gradient: no neuron trains",
        "1 layer dense: never frozen (output layer)",
    ]
    assert "exact, random, 0.9 frozen, layer by layer" in printed(result(measurements=others), layers=0.9)


def test_layers_without_a_measurement_are_counted_alone() -> None:
    lines = printed(result(measurements=[measurement("exact", "random", 0.5, layers=LAYERS[-2:])]))
    assert lines[-3:] == [
        "exact, random, 0.5 frozen, layer by layer",
        "1 layer no weight gradient: no neuron trains",
        "1 layer dense: never frozen (output layer)",
    ]


def test_eighty_columns_are_enough() -> None:
    huge = {
        **TIMES, "step_ms": 12345.6, "forward_ms": 23456.7, "backward_ms": 34567.8, "optimizer_ms": 4567.8,
        "row_keeping_ms": 1234.5, "saved_for_backward_bytes": 71e9, "peak_memory_bytes": 81e9,
        "step_ms_quartiles": [10000.0, 13000.0],
    }  # fmt: skip
    one = {
        **measurement("truncated", "random", 0.25),
        **huge,
        "time_ratio": 10.123,
        "time_ratio_interval": [9.5, 123.4],
    }
    lines = printed(result(dense=huge, measurements=[one]), layers=0.25)
    assert max(map(len, lines)) <= 80
    row = next(line for line in lines if line.split()[:1] == ["0.25"])
    assert row.split() == [
        "0.25", "12346", "10.12", "9.500–123", "0.800", "71000", "23457", "34568", "4568", "1234", "81000"
    ]  # fmt: skip
    assert any(line.endswith("peak") for line in lines)


def test_names_are_text() -> None:
    layers = [{**LAYERS[0], "name": "[red]x[/red]\x1b", "reason": "[bold]why"}]
    lines = printed(result(recipe="[bold]r", measurements=[measurement("exact", "random", 0.5, layers=layers)]))
    assert lines[0] == "recipe     [bold]r"
    assert any(line.startswith("[red]x[/red]\N{REPLACEMENT CHARACTER} ") for line in lines)


class Terminal(StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_one_line_that_goes_and_only_on_a_terminal(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal() if terminal else StringIO()
    with bench_progress(Console(file=out, width=80)) as progress:
        progress.show(3, 20, "round 1 of 2: exact random 0.5")
        text = out.getvalue()
        progress.compiling(Compiling(40.0))
        compiling = out.getvalue().removeprefix(text)
        progress.compiling(Compiling(41.0, ended=True))
        after = out.getvalue().removeprefix(text + compiling)
    if not terminal:
        assert out.getvalue() == "compiling, 40 s\ncompiled in 41 s\n"
        return
    assert "round 1 of 2: exact random 0.5 (compiling, 40 s)" in compiling
    assert "compiling" not in after
    assert "3/20 round 1 of 2: exact random 0.5" in text
    assert "\n" not in text
    assert out.getvalue().endswith("\x1b[2K")  # cleared
