from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from neq_cli.runs.compare.evaluation import Evaluation, Pairs, iou, recall, same_as_recorded, to_json
from neq_cli.runs.views.tables.evaluation import render, width_of


def pairs_of(true: list[int], predicted: list[int], classes: int) -> Pairs:
    """Count by hand, pair by pair."""
    counts: dict[tuple[int, int], int] = {}
    for pair in zip(true, predicted, strict=True):
        counts[pair] = counts.get(pair, 0) + 1
    columns = np.array([(*pair, count) for pair, count in sorted(counts.items())]).reshape(-1, 3)
    return Pairs(classes, columns[:, 0], columns[:, 1], columns[:, 2])


def evaluation(**changes: Any) -> Evaluation:
    plain: dict[str, Any] = {
        "run": "name [bold]", "place": "runs/x", "weights": "best", "epoch": 3, "data": "d", "images": 4,
        "counted": "images", "metrics": {"loss": 0.1234567, "top1": 50.0},
        "recorded": {"loss": 0.1234567, "top1": 50.0},
    }  # fmt: skip
    return Evaluation(**{**plain, **changes})


def printed(shown: Evaluation, width: int = 200) -> str:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(render(shown))
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


@pytest.fixture(params=[0, 1, 2])
def guesses(request: pytest.FixtureRequest) -> tuple[list[int], list[int]]:
    generator = np.random.default_rng(request.param)
    # Class 4 never occurs, and outputs go one beyond the five classes.
    return generator.integers(0, 4, 200).tolist(), generator.integers(0, 6, 200).tolist()


def test_matrix_recall_and_iou_are_those_counted_one_by_one(guesses: tuple[list[int], list[int]]) -> None:
    pairs = pairs_of(*guesses, classes=5)
    true, predicted = map(np.array, guesses)
    for row in range(5):
        assert pairs.matrix()[row].tolist() == [int(((true == row) & (predicted == one)).sum()) for one in range(6)]
    for number in range(4):
        mine, said = true == number, predicted == number
        assert recall(pairs)[number] == pytest.approx(100 * (predicted[mine] == number).mean())
        assert iou(pairs)[number] == pytest.approx(100 * (mine & said).sum() / (mine | said).sum())
    assert math.isnan(iou(pairs)[4])
    assert math.isnan(recall(pairs)[4])


def test_the_commonest_mistakes_come_first() -> None:
    pairs = pairs_of([0, 0, 0, 1, 1, 2, 2, 2, 2], [1, 1, 0, 0, 1, 0, 0, 0, 2], classes=3)
    assert pairs.most_confused(2) == [(2, 0, 3), (0, 1, 2)]
    assert pairs.most_confused(9) == [(2, 0, 3), (0, 1, 2), (1, 0, 1)]


def test_the_mean_of_iou_is_what_training_records(guesses: tuple[list[int], list[int]]) -> None:
    import torch

    from neq_cli.training.loop.segmentation import Segmentation

    true, predicted = (torch.tensor(side).view(1, 10, 20) for side in guesses)
    logits = torch.nn.functional.one_hot(predicted, 6).movedim(-1, 1).float()
    task = Segmentation(5)
    totals = task.new_totals(torch.device("cpu"))
    task.update(totals, logits, true, torch.zeros(()))
    assert np.nanmean(iou(pairs_of(*guesses, classes=5))) == pytest.approx(task.results(totals)["miou"])


def test_what_is_recorded_is_compared_to_the_bit() -> None:
    assert same_as_recorded(evaluation())
    assert same_as_recorded(evaluation(recorded={"loss": math.nextafter(0.1234567, 1)})) is False
    assert same_as_recorded(evaluation(recorded={})) is None
    assert printed(evaluation()).count("as recorded, to the bit") == 2
    assert "recorded: 49" in printed(evaluation(recorded={"top1": 49.0}))


def test_few_classes_are_a_matrix_with_their_names() -> None:
    pairs = pairs_of([0, 0, 1, 1], [0, 1, 1, 2], classes=2)
    lines = printed(evaluation(pairs=pairs, class_names=("cat", "dog [red]"))).splitlines()
    assert lines[0].startswith("name [bold]  best weights of epoch 3")
    observed = printed(evaluation(pairs=pairs, unit="observation"))
    assert observed.splitlines()[0].startswith("name [bold]  best weights of observation 3")
    first = lines.index("What is taken for what") + 1
    assert [" ".join(line.split()) for line in lines[first : first + 3]] == [
        "class 0 1 other right",
        "0 cat 1 1 · 50.0%",
        "1 dog [red] · 1 1 50.0%",
    ]


def test_no_column_of_a_matrix_is_cut() -> None:
    everything = [number for number in range(20) for _ in range(20)], [*range(20)] * 20
    many = pairs_of(*everything, classes=20)
    shown = evaluation(pairs=Pairs(20, many.true, many.predicted, many.counts * 12345))
    width = width_of(render(shown))
    assert width > 80
    assert printed(shown, width).split().count("12345") == 400


def test_many_classes_are_their_worst_pairs() -> None:
    pairs = pairs_of([0] * 9 + [30] * 4, [7] * 6 + [0] * 3 + [2] * 4, classes=31)
    lines = [line.split() for line in printed(evaluation(pairs=pairs)).splitlines()]
    assert ["0", "7", "6", "66.7%"] in lines
    assert ["30", "2", "4", "100.0%"] in lines


def test_json_has_what_is_printed_and_the_matrix() -> None:
    pairs = pairs_of([0, 0, 1, 1], [0, 1, 1, 2], classes=3)
    found = to_json(evaluation(pairs=pairs, class_names=("a", "b", "c"), segmentation=True))
    assert found["confusion"] == [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert [one["iou"] for one in found["classes"]] == [50.0, pytest.approx(100 / 3), None]
    assert [one["pixels"] for one in found["classes"]] == [2, 2, 0]
    assert found["most_confused"][0] == {"true": "a", "predicted": "b", "count": 1}
    assert found["same_as_recorded"] is True
