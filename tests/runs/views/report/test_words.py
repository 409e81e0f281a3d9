from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from neq_cli.runs.compare.curves import Study, study
from neq_cli.runs.store.run import Run
from neq_cli.runs.views.report.words import caveats, facts

BASELINE = {"kind": "baseline"}


@pytest.fixture
def seeded(make_run: Callable[..., Run], recipe: Any) -> Callable[..., Run]:
    """``seeded(name, seed, top1, paper, executed, seconds)``, of one epoch unless more are planned."""

    def make(name: str, seed: int, top1: float, *numbers: float, epochs: int = 1, **changes: Any) -> Run:
        keys = ("flops_paper", "flops_executed", "epoch_seconds")
        row = {"test_top1": top1, **dict(zip(keys, numbers, strict=False))}
        plain = recipe(seed=seed, epochs=epochs, **changes)
        return make_run(f"{name}{seed}", plain, metrics=[row], finish=epochs == 1)

    return make


def three_seeds(seeded: Callable[..., Run]) -> Study:
    runs = [seeded("b", seed, 90.0 + seed, 1000, 1000, 100, policy=BASELINE) for seed in (1, 2, 3)]
    runs += [seeded("n", seed, 91.0 + 2 * seed, 610, 805, 98) for seed in (1, 2, 3)]
    return study(runs)


def test_facts_by_hand(seeded: Callable[..., Run]) -> None:
    found = three_seeds(seeded)
    baseline, neq = found.configurations
    paper, executed, accuracy, seconds = facts(neq, baseline)
    assert (paper.value, paper.detail) == ("−39.0%", "0.61K against 1.00K per sample and iteration")
    assert executed.value == "−19.5%"
    # 93, 95, 97 beside 91, 92, 93: 2, 3 and 4 points, and t(2) / sqrt(3) is 2.484.
    assert (accuracy.name, accuracy.value, accuracy.spread) == (
        "final test top-1 accuracy", "+3.00 points", "+0.52 to +5.48",
    )  # fmt: skip
    chance = "p = 0.250 over 3 seeds, the smallest that so few runs can give"
    assert accuracy.detail == f"95.00 ± 2.00 against 92.00 ± 1.00; {chance}"
    assert (seconds.value, seconds.detail) == ("−2.0%", "1 min 38 s ± 0.0 s against 1 min 40 s ± 0.0 s")
    assert [fact.certain for fact in (paper, executed, accuracy, seconds)] == [True] * 4
    assert (paper.spread, seconds.spread) == ("", "")  # equal in all runs


def test_two_seeds_apart_by_chance_are_grey(seeded: Callable[..., Run]) -> None:
    """+0.84 points with a deviation of 2.17 and two runs: the interval is Student's of one degree of freedom."""
    runs = [seeded("b", seed, 90.0, 1000, 1000, 6, policy=BASELINE) for seed in (1, 2)]
    deviations = (-2.17 / math.sqrt(2), 2.17 / math.sqrt(2))
    runs += [seeded("n", seed, 90.84 + deviations[seed - 1], 700 + 2 * seed, 800 + seed, 6 + seed) for seed in (1, 2)]
    baseline, neq = study(runs).configurations
    paper, executed, accuracy, seconds = facts(neq, baseline)
    half = math.tan(0.475 * math.pi) * 2.17 / math.sqrt(2)
    assert (accuracy.value, accuracy.certain) == ("+0.84 points", False)
    assert accuracy.spread == f"−{half - 0.84:.2f} to +{half + 0.84:.2f}"
    assert accuracy.detail == "within noise: 90.84 ± 2.17 against 90.00 ± 0.00; no p-value: n too small"
    assert (seconds.value, seconds.certain) == ("+25.0%", False)
    assert seconds.detail == "within noise: 7.5 s ± 0.7 s against 6.0 s ± 0.0 s"
    # Of 1000, -298 and -296: -297, with an error of 1.
    half = math.tan(0.475 * math.pi) * 0.1
    assert (paper.value, paper.certain) == ("−29.7%", True)
    assert paper.spread == f"−{29.7 + half:.1f} to −{29.7 - half:.1f}"
    assert executed.certain


def test_one_run_each_tells_no_spread(seeded: Callable[..., Run]) -> None:
    runs = [seeded("b", 1, 90.0, 1000, 1000, 100, policy=BASELINE), seeded("n", 1, 93.0, 610, 805, 50)]
    baseline, neq = study(runs).configurations
    found = facts(neq, baseline)
    assert [(fact.value, fact.certain, fact.spread) for fact in found] == [
        ("−39.0%", True, ""), ("−19.5%", True, ""), ("+3.00 points", False, ""), ("−50.0%", False, ""),
    ]  # fmt: skip
    assert all(fact.detail.startswith("one run tells no spread: ") for fact in found[2:])


def test_facts_without_a_baseline(seeded: Callable[..., Run]) -> None:
    (neq,) = study([seeded("n", 1, 93.0, 610, 805, 98)]).configurations
    assert [(fact.name, fact.value) for fact in facts(neq, None)] == [
        ("paper FLOPs", "610"),
        ("executed FLOPs", "805"),
        ("final test top-1 accuracy", "93.00"),
        ("time to train", "1 min 38 s"),
    ]
    (neq,) = study([seeded("m", seed, 90.0 + seed, 610, 805, 98 + seed) for seed in (1, 2, 3)]).configurations
    assert [fact.spread for fact in facts(neq, None)] == ["", "", "± 1.00", "± 1.0 s"]


def test_more_and_as_many(seeded: Callable[..., Run]) -> None:
    runs = [seeded("b", 1, 90.0, 1000, 1000, 100, policy=BASELINE), seeded("n", 1, 89.5, 1200, 1000.4, 100)]
    baseline, neq = study(runs).configurations
    paper, executed, accuracy, seconds = facts(neq, baseline)
    assert (paper.value, executed.value, seconds.value) == ("+20.0%", "±0.0%", "±0.0%")
    assert (executed.certain, seconds.certain) == (False, False)
    assert seconds.detail == "noise, for both computed the same: 1 min 40 s against 1 min 40 s"
    assert accuracy.value == "−0.50 points"
    assert accuracy.detail == "one run tells no spread: 89.50 against 90.00; no p-value: n too small"


@pytest.mark.parametrize(
    ("executed", "seconds", "value", "why"),
    [
        (800, (80, 81, 82), "−20.6%", ""),
        (800, (80, 100, 120), "−2.0%", "within noise"),
        (1000, (80, 81, 82), "−20.6%", "noise, for both computed the same"),
    ],
)
def test_times_that_tell_nothing_are_called_noise(
    seeded: Callable[..., Run], executed: float, seconds: tuple[float, ...], value: str, why: str
) -> None:
    runs = [seeded("b", seed, 90.0, 1000, 1000, 101 + seed, policy=BASELINE) for seed in (0, 1, 2)]
    runs += [seeded("n", seed, 90.0, 700, executed, seconds[seed]) for seed in (0, 1, 2)]
    baseline, neq = study(runs).configurations
    fact = facts(neq, baseline)[-1]
    assert (fact.value, fact.certain, fact.detail.partition(":")[0] if why else "") == (value, not why, why)


def test_nan_metrics_have_no_difference(seeded: Callable[..., Run]) -> None:
    nan = float("nan")
    baseline, neq = study([seeded("b", 1, 90.0, policy=BASELINE), seeded("n", 1, nan, nan, nan, 5)]).configurations
    paper, _, accuracy, _ = facts(neq, baseline)
    assert (paper.value, accuracy.value) == ("–", "–")


def test_caveats(seeded: Callable[..., Run]) -> None:
    runs = [seeded("b", seed, 90.0, policy=BASELINE) for seed in (1, 2, 3)]
    runs += [seeded("t", 1, 90.0, backward="truncated")]
    runs += [seeded("d", seed, 90.0, backward="dense") for seed in (1, 2)]
    text = "\n".join(caveats(study(runs)))
    assert "Configuration 2: only one run" in text
    assert "Configuration 3: fewer than 3 runs" in text
    assert "Configuration 2: backward=truncated is an approximation" in text
    assert "Configuration 3: backward=dense computes every gradient" in text


def test_numbers_of_several_configurations_are_folded(seeded: Callable[..., Run]) -> None:
    runs = [seeded("b", 1, 90.0, policy=BASELINE)]
    runs += [seeded(f"n{i}", 1, 90.0, policy={"kind": "neq", "epsilon": float(i)}) for i in range(3)]
    assert next(iter(caveats(study(runs)))).startswith("Configurations 1 to 4: only one run")


def test_an_unfinished_run_is_told(seeded: Callable[..., Run]) -> None:
    text = "\n".join(caveats(study([seeded("n", 1, 90.0, epochs=4)])))
    assert "Configuration 1: unfinished after 1/4 epochs" in text


def test_different_questions_are_told(seeded: Callable[..., Run]) -> None:
    runs = [seeded("a", 1, 90.0), seeded("b", 1, 90.0, model={"name": "resnet20"}, batch_size=7)]
    assert next(iter(caveats(study(runs, allow_differences=True)))) == (
        "These runs differ in model.name: they answer different questions."
    )


def test_several_tests_are_told(seeded: Callable[..., Run]) -> None:
    found = three_seeds(seeded)
    assert not any("corrected" in caveat for caveat in caveats(found))
    more = [seeded("s", seed, 90.0, policy={"kind": "stochastic", "p": 0.5}) for seed in (1, 2, 3)]
    text = "\n".join(caveats(study([*found.runs, *more])))
    assert "2 differences are tested and no p is corrected" in text
    assert "3 pairs cannot give a p below 0.25" in text  # the comparison's own note
