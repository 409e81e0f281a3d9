"""What a search may choose, as it is written, and a line for each mistake."""

from __future__ import annotations

import pytest

from neq_cli.errors import RecipeError
from neq_cli.jobs.sweep.search.space import Choice, Range, parse_space


def test_ranges_choices_and_what_all_share() -> None:
    space = parse_space(
        [
            "policy.epsilon=1e-4..1e-1",
            "policy.share=0.5..1.0",
            "policy.mu=0..0.5",
            "optimizer.name=sgd,adam",
            "epochs=3",
        ]
    )
    assert space.dimensions == (
        Range("policy.epsilon", 1e-4, 1e-1, log=True),
        Range("policy.share", 0.5, 1.0, log=False),
        Range("policy.mu", 0.0, 0.5, log=False),
        Choice("optimizer.name", ("sgd", "adam")),
    )
    assert space.fixed == ("epochs=3",)
    chosen = {"policy.epsilon": 0.1 + 0.2, "policy.share": 1.0, "policy.mu": 0, "optimizer.name": "adam"}
    overrides = space.overrides(chosen)
    assert overrides == (
        "epochs=3", "policy.epsilon=0.30000000000000004", "policy.share=1.0", "policy.mu=0.0", "optimizer.name=adam",
    )  # fmt: skip
    assert float(overrides[1].partition("=")[2]) == 0.1 + 0.2


def test_two_powers_of_ten_are_searched_by_the_logarithm() -> None:
    for text, log in (("0.01..1", True), ("0.011..1", False), ("0..1", False), ("-1..100", False)):
        (dimension,) = parse_space([f"a={text}"]).dimensions
        assert isinstance(dimension, Range)
        assert (dimension.low, dimension.high, dimension.log) == (*map(float, text.split("..")), log)


def test_every_end_and_choice_is_met_at_a_corner() -> None:
    space = parse_space(["a=1..2", "b=x,y,z", "c=5"])
    assert space.corners() == [
        ("c=5", "a=1", "b=x"), ("c=5", "a=2", "b=x"), ("c=5", "a=1", "b=y"), ("c=5", "a=1", "b=z"),
    ]  # fmt: skip
    assert space.with_fractions(["a"]).corners()[1] == ("c=5", "a=2.0", "b=x")


def test_another_device_is_the_same_search_and_other_values_are_not() -> None:
    first = parse_space(["a=1..2", "epochs=3"]).definition
    assert parse_space(["epochs=3", "device=cpu", "a=1..2"]).definition == first
    assert parse_space(["a=1..3", "epochs=3"]).definition != first
    assert parse_space(["a=1..2", "epochs=4"]).definition != first


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["a=2..1"], "a=2..1: a range goes from the smaller number to the larger one, LOW..HIGH"),
        (["a=1..1"], "a=1..1: a range goes from the smaller number to the larger one, LOW..HIGH"),
        (["a=1..1e999"], "a=1..1e999: a range goes from the smaller number to the larger one, LOW..HIGH"),
        (["a=0..1,5"], "a=0..1,5: a range stands alone; give LOW..HIGH, or single values"),
        (
            ["a=0..1", "seed=1,2"],
            "seed=1,2: a search has one seed; give one, and train the runs of the front with others afterwards",
        ),
        (["a=1"], "nothing to search; give a range, such as policy.epsilon=1e-4..1e-1, or choices"),
        ([], "nothing to search; give a range, such as policy.epsilon=1e-4..1e-1, or choices"),
    ],
)
def test_a_mistake_is_one_line(given: list[str], line: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_space(given)
    assert caught.value.problems == (f"command line: {line}",)
