from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from neq_cli.runs.compare.inspection import inspect_run
from neq_cli.runs.store.run import Run
from neq_cli.runs.views.tables.inspection import render


def printed(run: Run, width: int = 80, **kwargs: Any) -> str:
    console = Console(file=StringIO(), width=width)
    console.print(render(inspect_run(run, **kwargs)))
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def words(text: str) -> str:
    return " ".join(text.split())


def test_everything_is_told(make_run: Callable[..., Run]) -> None:
    text = words(printed(make_run(frozen={"conv1": [[0, 2], [2, 3], [1, 2, 3]], "fc": [[0, 1], [0, 1], [0, 1]]})))
    for fact in (
        "digits resnet32 on CIFAR10 NEq eps=0.001 mu=0.5",
        "status finished",
        "epochs 3 of 3",
        "frozen 4 of 9 neurons (44.4%) in epoch 3; 29.6% in the mean",  # during epochs 1 to 3: 0, 4, 4 of 9
        "next 5 of 9 neurons (55.6%) would freeze next",
        "paper FLOPs 1.00K per iteration in the mean epoch (50.0% of dense)",
        "executed FLOPs 1.50K per iteration in the mean epoch (75.0% of dense)",
        "test_top1 53.00 final, 53.00 best in epoch 3",
        "time 30.0 s, of which probing 5.0%",
        "note a note",
        "conv1 Conv2d 2/4 50% 3",
        "frozen: not updated in epoch 3; next: what would freeze after it",
        "Frozen in epoch 3 conv1: 2-3 fc: 0-1 (all)",
        "Would freeze next conv1: 1-3 fc: 0-1 (all)",
        "1 0 4 0 4",
        "2 4 1 1 4",
        "3 4 1 0 5",
        "all 6 1 5",
    ):
        assert fact in text, fact


def test_what_is_in_force_is_never_mixed_with_what_was_chosen(make_run: Callable[..., Run]) -> None:
    # In epoch 2: 0 and 2. Chosen after it: 3, frozen in epoch 3.
    text = words(printed(make_run(frozen={"conv1": [[0, 2], [3], []]}), epoch=2))
    for fact in (
        "frozen 2 of 9 neurons (22.2%) in epoch 2; 11.1% in the mean",  # 0 and 2 of 9
        "next 1 of 9 neurons (11.1%) frozen in epoch 3",
        "Layers in epoch 2, observed at its end",
        "conv1 Conv2d 2/4 50% 1",
        "next: frozen in epoch 3",
        "Frozen in epoch 2 conv1: 0, 2 Frozen in epoch 3 conv1: 3 Changes",
    ):
        assert fact in text, fact
    assert "would" not in text


def test_energy_is_told_with_how_it_was_measured(make_run: Callable[..., Run]) -> None:
    metrics = [{"joules": 1500.0, "co2_grams": 0.25}, {"joules": 345.0, "co2_grams": 0.5}]
    environment = {"energy": {"gpu": "not used", "cpu": "RAPL package-0, Fake CPU", "grams_per_kwh": 56}}
    run = make_run(metrics=metrics, environment=environment)
    # 1500 + 345, 0.25 + 0.5
    assert "energy 1.84 kJ, 0.75 g of CO2 (cpu: RAPL package-0, Fake CPU)" in words(printed(run))
    assert "energy 1.50 kJ, 0.25 g of CO2" in words(printed(run, epoch=1))


def test_energy_that_is_not_known_whole_is_a_dash(make_run: Callable[..., Run]) -> None:
    run = make_run("partly", metrics=[{"joules": 1500.0}, {"joules": float("nan")}])
    assert "energy –" in words(printed(run))
    assert "energy " not in words(printed(make_run()))


def test_nothing_frozen(make_run: Callable[..., Run]) -> None:
    text = words(printed(make_run()))
    assert "Frozen in epoch 3 none Would freeze next none" in text


@pytest.mark.parametrize("width", [80, 120, 200])
def test_lines_fit_and_long_index_lists_wrap_whole(make_run: Callable[..., Run], width: int) -> None:
    name = "features.5.17.attn.relative_position_bias_table.projection"
    odd = list(range(1, 2000, 2))
    text = printed(make_run(sizes={name: 2000, "fc": 2}, frozen={name: [odd] * 3}), width)
    assert max(map(len, text.splitlines())) <= width
    lists = text.split("Frozen in epoch 3")[1].split("Changes")[0].split("Would freeze next")
    for below in lists:
        numbers = [int(word.strip(",")) for word in below.split() if word.strip(",").isdigit()]
        assert numbers == odd


def test_three_hundred_layers_are_one_line_each_at_80_columns(make_run: Callable[..., Run]) -> None:
    names = {f"layer4.{index}.conv1": 3 for index in range(300)}
    lines = printed(make_run(sizes=names, epochs=1)).splitlines()
    assert [line.split()[0] for line in lines if " Conv2d " in line] == list(names)


def test_many_epochs_are_folded_to_the_last_ten(make_run: Callable[..., Run], recipe: Any) -> None:
    sets = [[epoch % 4] for epoch in range(14)]
    below = printed(make_run(recipe=recipe(epochs=14), frozen={"conv1": sets})).split("Changes")[1].splitlines()
    assert below[1].split() == ["epoch", "frozen", "froze", "thawed", "next"]
    # Each epoch one freezes, and from the second on the one before thaws.
    assert below[2].split() == ["1", "to", "4", "4", "3", "1"]
    assert [line.split()[0] for line in below[3:13]] == [str(epoch) for epoch in range(5, 15)]
    assert {tuple(line.split()[1:]) for line in below[3:13]} == {("1", "1", "1", "1")}
    assert below[13].split() == ["all", "14", "13", "1"]


def test_an_earlier_epoch_and_a_glob_are_said(make_run: Callable[..., Run]) -> None:
    text = words(printed(make_run(), epoch=2, layer_glob="c*"))
    assert "epochs 3 of 3; all below: after epoch 2" in text
    assert "Changes in c*" in text


def test_text_from_files_is_neither_markup_nor_escape_codes(make_run: Callable[..., Run], recipe: Any) -> None:
    hostile = "[red]\x1b[31m[/nope]"
    run = make_run(
        recipe=recipe(model={"name": hostile}),
        environment={"notes": [hostile]},
        sizes={hostile: 2},
        frozen={hostile: [[0]] * 3},
    )
    text = printed(run)
    assert "\x1b" not in text
    assert text.count("[red]") >= 4


@pytest.mark.parametrize("width", [80, 120])
def test_observations_are_called_so(make_observed: Callable[..., Run], width: int) -> None:
    run = make_observed(frozen={"conv1": [[0, 2]] * 8, "fc": [[0, 1]] * 8}, finish=False)
    lines = printed(run, width, epoch=5)
    assert max(map(len, lines.splitlines())) <= width
    text = words(lines)
    for fact in (
        "observations 8 of 12; all below: after observation 5 (step 500, epoch 1.25)",
        "in observation 5; 35.6% in the mean",  # in observations 1 to 5: 0, 4, 4, 4, 4 of 9
        "per iteration in the mean observation (50.0% of dense)",
        "55.00 final, 55.00 best in observation 5",
        "Layers in observation 5, observed at its end",
        "frozen: not updated in observation 5; next: frozen in observation 6",
        "since: observation from which the frozen ones",
        "Frozen in observation 5",
        "observation frozen froze thawed next",
    ):
        assert fact in text, fact
    assert text.replace("epoch 1.25", "").count("epoch") == 0
    assert "observations 8 of 12 (step 800, epoch 2)" in words(printed(run))
