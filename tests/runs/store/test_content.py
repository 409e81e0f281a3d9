from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from neq_cli.errors import RunDirectoryError
from neq_cli.runs.store.content import Content, content_in, parse_content, weights_metadata

PATH = Path("environment.json")
WHOLE = {
    "name": "d", "classes": 2, "class_names": ["a", "b"], "image_shape": [1, 8, 9], "mean": [0.5], "std": [0.25]
}  # fmt: skip


def test_what_a_run_tells_is_read_back_from_both_places() -> None:
    expected = Content(2, ("a", "b"), (1, 8, 9), ((0.5,), (0.25,)), tells_statistics=True)
    assert parse_content(WHOLE, PATH) == expected
    assert content_in(weights_metadata("recipe", "epochs: 1", WHOLE), PATH) == expected
    assert [expected.name(number) for number in (0, 1, 2)] == ["a", "b", "2"]


def test_images_that_were_not_normalised_are_told_apart_from_earlier_versions() -> None:
    assert parse_content({**WHOLE, "mean": None, "std": None}, PATH).tells_statistics
    earlier = parse_content({"name": "d", "classes": 2}, PATH)
    assert (earlier.statistics, earlier.tells_statistics, earlier.class_names) == (None, False, ())
    assert parse_content(None, PATH) == content_in({}, PATH) == Content()


def test_what_was_held_out_is_told_with_what_it_was_held_out_of() -> None:
    assert parse_content({**WHOLE, "train": 90, "test": 10, "validation": 10}, PATH).held_out == (10, 100)
    assert parse_content({**WHOLE, "train": 90, "test": 10}, PATH).held_out is None


@pytest.mark.parametrize(
    "changes",
    [
        {"classes": "ten"}, {"classes": True}, {"classes": -1}, {"classes": 2**40}, {"class_names": "ab"},
        {"class_names": [1]}, {"image_shape": [8, 8]}, {"image_shape": [1, 8, 0.5]}, {"mean": [0.5, 0.5]},
        {"mean": None}, {"mean": ["x"]}, {"std": [0.0]}, {"std": [float("nan")]}, {"mean": [], "std": []},
        {"validation": 10}, {"validation": "ten", "train": 90}, {"validation": 10, "train": -1},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_damaged_is_one_line(changes: dict[str, Any]) -> None:
    with pytest.raises(RunDirectoryError, match=r"^environment.json: data.*; the file is damaged"):
        parse_content({**WHOLE, **changes}, PATH)
    with pytest.raises(RunDirectoryError, match=r"^environment.json: data"):
        content_in({"data": json.dumps({**WHOLE, **changes})}, PATH)


@pytest.mark.parametrize("text", ["[", "[1]", "7", "[" * 100_000])
def test_metadata_that_is_none_of_ours_is_one_line(text: str) -> None:
    with pytest.raises(RunDirectoryError, match=r"^environment.json: data: not"):
        content_in({"data": text}, PATH)
