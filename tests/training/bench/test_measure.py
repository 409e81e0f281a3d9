"""The bench as a whole: what it reports, what its ratios are made of, and that everything is measured by turns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from neq_cli.errors import RecipeError
from neq_cli.recipe import Recipe
from neq_cli.training.bench import measure as module
from neq_cli.training.bench.frozen_sets import Arm
from neq_cli.training.bench.measure import bench
from neq_cli.training.bench.options import BenchOptions
from neq_cli.training.bench.samples import LayerUse, Subject, measurements
from neq_cli.training.bench.timed_step import TimedStep

OWN_CODE = """
from torch import nn

def perceptron():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
"""
PROMISED = {
    "frozen_fraction", "backward", "order", "step_ms", "dense_step_ms", "time_ratio", "flops_ratio",
    "saved_for_backward_bytes", "dense_saved_for_backward_bytes",
}  # fmt: skip


def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Recipe:
    """A perceptron of 64, 32 and 10, four digits; kernels are chosen by rule."""
    (tmp_path / "benched_model.py").write_text(OWN_CODE)
    monkeypatch.syspath_prepend(tmp_path)
    values = {
        "model": {"entrypoint": "benched_model:perceptron"},
        "data": {"name": "digits", "workers": 0},
        "epochs": 1,
        "batch_size": 4,
        "optimizer": {"name": "sgd", "lr": 0.1},
        "channels_last": False,
        "deterministic": True,
        "device": "cpu",
    }
    return Recipe.model_validate(values | changes)


@pytest.fixture
def nondeterministic_again() -> Any:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nondeterministic_again: None) -> dict[str, Any]:
    return bench(recipe(tmp_path, monkeypatch), BenchOptions(fractions=(0.0, 0.5, 1.0), rounds=2))


def by_arm(result: dict[str, Any]) -> dict[tuple[str, str, float], dict[str, Any]]:
    return {(one["backward"], one["order"], one["frozen_fraction"]): one for one in result["measurements"]}


def test_every_mode_order_and_share_is_reported_as_json_has_it(result: dict[str, Any]) -> None:
    assert list(by_arm(result)) == [
        (mode, order, share)
        for mode in ("exact", "truncated") for order in ("random", "front") for share in (0.0, 0.5, 1.0)
    ]  # fmt: skip
    assert all(one.keys() >= PROMISED for one in result["measurements"])
    assert json.loads(json.dumps(result, allow_nan=False))["measurements"][0]["order"] == "random"
    assert {"device", "versions", "rounds", "channels_last"} <= result.keys()
    assert set(result["versions"]) == {"neq", "python", "torch", "torchvision"}
    assert (result["rounds"], result["synthetic_data"], result["image_shape"]) == (2, True, [1, 8, 8])
    assert result["channels_last"] is False
    assert result["channels_last_ms"] is None
    assert all(one["peak_memory_bytes"] is None for one in result["measurements"])


def test_ratios_lie_in_their_intervals(result: dict[str, Any]) -> None:
    for one in result["measurements"]:
        low, high = one["time_ratio_interval"]
        assert low <= one["time_ratio"] <= high
        assert one["time_ratio_confidence"] == 0.5  # of two rounds
        first, third = one["step_ms_quartiles"]
        assert first <= one["step_ms"] <= third


def test_flops_by_hand(result: dict[str, Any]) -> None:
    hidden, output = 64 * 32, 32 * 10
    forward = hidden + output
    dense = forward + hidden + 2 * output  # nothing is propagated below the first layer
    found = {key: one["flops_ratio"] for key, one in by_arm(result).items()}
    for mode in ("exact", "truncated"):
        for order in ("random", "front"):
            assert found[mode, order, 0.0] == 1
            assert found[mode, order, 0.5] == (forward + hidden / 2 + 2 * output) / dense
            assert found[mode, order, 1.0] == (forward + output) / dense


def test_saved_bytes_by_hand(result: dict[str, Any]) -> None:
    images, hidden, loss = 4 * 4 * 64, 4 * 4 * 32, 4 * 4 * 10 + 8 * 4 + 4
    assert result["dense"]["saved_for_backward_bytes"] == images + hidden + loss
    for (_, _, share), one in by_arm(result).items():
        assert one["dense_saved_for_backward_bytes"] == images + hidden + loss
        assert one["saved_for_backward_bytes"] == (images if share < 1 else 0) + hidden + loss


def test_kernels_by_layer(result: dict[str, Any]) -> None:
    output = ("3", "Linear", 10, 0, "dense", 10, "never frozen (output layer)")
    expected = {
        0.0: ("1", "Linear", 32, 0, "dense", 32, "all neurons train"),
        0.5: ("1", "Linear", 32, 16, "sliced", 16, "by rule"),
        1.0: ("1", "Linear", 32, 32, "none", 0, "no neuron trains"),
    }
    for (_, _, share), one in by_arm(result).items():
        assert [tuple(layer.values()) for layer in one["layers"]] == [expected[share], output]
        assert one["frozen"] == int(32 * share)


def test_everything_is_measured_by_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nondeterministic_again: None
) -> None:
    monkeypatch.setattr(module, "_VISIT_SECONDS", 0)  # one step each
    ran: list[tuple[int, int]] = []
    stock = TimedStep.run

    def run(step: TimedStep) -> Any:
        layer = step.model.get_submodule("1")
        ran.append((id(step), 0 if type(layer) is nn.Linear else 1))
        return stock(step)

    monkeypatch.setattr(TimedStep, "run", run)
    shown: list[tuple[int, int, str]] = []
    options = BenchOptions(fractions=(0.0, 0.25, 0.5, 0.75), rounds=3)
    found = bench(recipe(tmp_path, monkeypatch), options, lambda *progress: shown.append(progress))
    assert found["steps_per_round"] == 1

    arms = [
        f"{mode} {order} {share}"
        for mode in ("exact", "truncated")
        for order, share in [("random and front", "0"), ("random", "0.25"), ("random", "0.5"), ("random", "0.75"),
                             ("front", "0.25"), ("front", "0.5"), ("front", "0.75")]
    ]  # fmt: skip
    plain = "plain dense"
    one_round = [plain, *arms[:5], plain, *arms[5:10], plain, *arms[10:], plain]
    visits = [f"warm-up: {label}" for label in (plain, *arms)]
    visits += [f"round {number} of 3: {label}" for number in (1, 2, 3) for label in one_round]
    assert [what for _, _, what in shown] == ["building", *visits, "done"]
    assert [done for done, _, _ in shown[1:]] == list(range(len(visits) + 1))
    assert {total for _, total, _ in shown[1:]} == {len(visits)}

    # A settling and a timed step in each visit, of three models of their own; the plain one's layer is never swapped.
    timed = ran[-2 * 3 * len(one_round) :]
    assert timed[::2] == timed[1::2]
    models = list(dict.fromkeys(model for model, _ in timed))
    assert len(models) == 3
    expected = [models[0 if label == plain else 1 if label.startswith("exact") else 2] for label in one_round] * 3
    assert [model for model, _ in timed[::2]] == expected
    swapped = [int(label != plain and not label.endswith(" 0")) for label in one_round] * 3
    assert [swap for _, swap in timed[::2]] == swapped


def test_short_steps_are_repeated() -> None:
    assert [module.repeats({"forward": forward, "backward": 0.03}) for forward in (0.02, 0.07, 0.5)] == [4, 2, 1]
    assert module.repeats({"forward": 1e-5}) == 20


def test_the_faster_memory_format_is_used_for_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nondeterministic_again: None
) -> None:
    options = BenchOptions(fractions=(1.0,), modes=("exact",), orders=("front",), rounds=1)
    laid_out: list[bool] = []
    stock = TimedStep.lay_out

    def lay_out(step: TimedStep, *, channels_last: bool) -> None:
        laid_out.append(channels_last)
        stock(step, channels_last=channels_last)

    monkeypatch.setattr(TimedStep, "lay_out", lay_out)
    for faster in (True, False):
        times = {faster: [0.9, 1.1, 1.0, 1.0, 0.8, 1.2], not faster: [2.0] * 6}
        monkeypatch.setattr(module, "time_formats", lambda *_, times=times: times)
        laid_out.clear()
        found = bench(recipe(tmp_path, monkeypatch, channels_last="auto"), options)
        assert laid_out == [faster, faster]  # the plain model's and the other's
        assert found["channels_last"] is faster
        assert (found["channels_last_ms"], found["contiguous_ms"]) == ((1.0, 2.0) if faster else (2.0, 1.0))
        assert found["channels_last_ratio_interval"] == ([0.4, 0.6] if faster else [2 / 1.2, 2 / 0.8])
        assert found["channels_last_ratio_confidence"] == 1 - 2 / 64
    near = {True: [8.0, 8.2, 8.1, 8.3, 8.2, 8.5], False: [8.3] * 6}  # 8.2 against 8.3, and one round says otherwise
    monkeypatch.setattr(module, "time_formats", lambda *_: near)
    assert bench(recipe(tmp_path, monkeypatch, channels_last="auto"), options)["channels_last"] is False
    found = bench(recipe(tmp_path, monkeypatch, channels_last=True), options)
    assert found["channels_last"] is True
    assert found["channels_last_ratio_interval"] is None
    assert found["measurements"][0]["time_ratio_interval"] is None  # of one round
    assert found["measurements"][0]["time_ratio_confidence"] is None


def test_both_formats_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nondeterministic_again: None) -> None:
    options = BenchOptions(fractions=(1.0,), modes=("exact",), orders=("front",), rounds=1)
    found = bench(recipe(tmp_path, monkeypatch, channels_last="auto"), options)
    low, high = found["channels_last_ratio_interval"]
    assert found["channels_last"] is (high < 1)
    assert 0 < low <= high
    assert found["channels_last_ratio_confidence"] >= 0.95
    assert min(found["channels_last_ms"], found["contiguous_ms"]) > 0


def seconds(forward: float, backward: float, optimizer: float, row_keeping: float) -> dict[str, float]:
    return {"forward": forward, "backward": backward, "optimizer": optimizer, "row_keeping": row_keeping}


def test_a_measurement_by_hand() -> None:
    before = Subject(None, visits=[[seconds(1, 1, 0, 0)], [seconds(2, 2, 0, 0)]])
    after = Subject(None, visits=[[seconds(3, 3, 0, 0)], [seconds(1, 1, 0, 0), seconds(2, 2, 0, 0)]])
    plain = Subject(None, saved_for_backward=100, peak_memory=7)
    subject = Subject(
        Arm("exact", 0.5, ("random", "front"), {}),
        visits=[
            [seconds(1, 0.5, 0.25, 0.25), seconds(2, 0.5, 0.25, 0.25)],
            [seconds(3, 0.5, 0.25, 0.25)],
        ],
        saved_for_backward=60,
        flops_ratio=0.75,
        layers=(LayerUse("a", "Linear", 8, 4, "sliced", 4, ""), LayerUse("b", "Linear", 2, 1, "sliced", 1, "")),
        beside=(before, after),
    )
    one, other = measurements(subject, plain)
    assert (one.order, other.order) == ("random", "front")
    assert (one.step_ms, one.step_ms_quartiles) == (3000, [2500, 3500])
    assert one.dense_step_ms == 4000
    # 2.5 of 2 and 6 in the first round, 4 of 4, 2 and 4 in the second.
    assert (one.time_ratio, one.time_ratio_interval) == ((2.5 / 4 + 4 / 4) / 2, [2.5 / 4, 4 / 4])
    assert one.time_ratio_confidence == 0.5
    assert (one.forward_ms, one.backward_ms, one.optimizer_ms, one.row_keeping_ms) == (2000, 500, 250, 250)
    assert (one.saved_for_backward_bytes, one.dense_saved_for_backward_bytes) == (60, 100)
    assert (one.frozen, one.flops_ratio, one.peak_memory_bytes, one.dense_peak_memory_bytes) == (5, 0.75, None, 7)


def test_what_does_not_fit_is_a_recipe_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="exclude: 'nothing' matches no layer"):
        bench(recipe(tmp_path, monkeypatch, exclude=["nothing"], deterministic=False), BenchOptions(rounds=1))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_on_a_gpu_parts_and_memory_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    changes = {
        "device": "cuda", "precision": precision, "batch_size": 256, "deterministic": False, "channels_last": "auto",
        "model": {"name": "resnet20", "kwargs": {"num_classes": 10, "in_channels": 1}},
    }  # fmt: skip
    found = by_arm(bench(recipe(tmp_path, monkeypatch, **changes), BenchOptions(fractions=(0.0, 0.5, 1.0), rounds=2)))
    for one in found.values():
        assert all(one[f"{part}_ms"] > 0 for part in ("forward", "backward", "optimizer"))
        assert one["peak_memory_bytes"] > 0
    for mode in ("exact", "truncated"):
        nothing, everything = found[mode, "random", 0.0], found[mode, "random", 1.0]
        assert everything["peak_memory_bytes"] < nothing["peak_memory_bytes"]
        assert everything["saved_for_backward_bytes"] < nothing["saved_for_backward_bytes"] / 10
        # The Freezer keeps the weights of the epoch before; three models share the device and do not count.
        copy = nothing["peak_memory_bytes"] - nothing["dense_peak_memory_bytes"]
        assert copy < nothing["dense_peak_memory_bytes"] / 2
