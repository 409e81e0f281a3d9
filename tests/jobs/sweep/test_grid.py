"""Grids against itertools by hand; commas inside lists, mappings and quotes; names that no two points share."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neq_cli.errors import RecipeError
from neq_cli.jobs.sweep.grid import LARGEST, parse_grid, split_values
from neq_cli.recipe.yaml import read_yaml, write_yaml


def names(*arguments: str) -> list[str]:
    return [point.name for point in parse_grid(arguments).points]


def test_a_grid_is_the_product_in_the_order_given() -> None:
    grid = parse_grid(["policy.epsilon=1e-3,0.01", "epochs=5", "seed=1,2,3"])
    wanted = [
        (f"policy.epsilon={epsilon}", "epochs=5", f"seed={seed}")
        for epsilon, seed in itertools.product(["1e-3", "0.01"], [1, 2, 3])
    ]
    assert [point.overrides for point in grid.points] == wanted
    assert [point.labels for point in grid.points] == [
        ("0.001", "1"), ("0.001", "2"), ("0.001", "3"), ("0.01", "1"), ("0.01", "2"), ("0.01", "3"),
    ]  # fmt: skip
    assert grid.points[0].name == "policy.epsilon=0.001,seed=1"
    assert grid.points[-1].name == "policy.epsilon=0.01,seed=3"
    assert grid.keys == ("policy.epsilon", "seed")
    assert grid.folder_name == "epochs=5,policy.epsilon,seed"


def test_labels_are_read_by_people() -> None:
    points = parse_grid(["policy={kind: neq},{kind: stochastic, p: 0.5}", "exclude=[a],[b, c]"]).points
    assert [point.labels for point in points[1:3]] == [
        ("kind=neq", '["b", "c"]'),
        ("kind=stochastic p=0.5", '["a"]'),
    ]


def test_nothing_to_vary_is_one_run() -> None:
    assert names() == ["run"]
    assert parse_grid([]).folder_name == "recipe"
    assert names("epochs=3") == ["run"]
    assert names("seed=2", "epochs=3") == ["seed=2"]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("1,2,3", ["1", "2", "3"]),
        ("1", ["1"]),
        ("", [""]),
        (" 1 , 2 ", ["1", "2"]),
        ("[10, 20],[20,30]", ["[10, 20]", "[20,30]"]),
        ("{a: 1, b: [2, 3]},null", ["{a: 1, b: [2, 3]}", "null"]),
        ("'a,b',c", ["'a,b'", "c"]),
        ("'it''s, so',c", ["'it''s, so'", "c"]),
        (r'"a\",b",c', [r'"a\",b"', "c"]),
        ("it's,its", ["it's", "its"]),
        ("a[0,a]0", ["a[0", "a]0"]),
        ("['a]', 'b'],[c]", ["['a]', 'b']", "[c]"]),
        ('{"x,": "y}", z: 1},2', ['{"x,": "y}", z: 1}', "2"]),
        ("[it's, b],c", ["[it's, b]", "c"]),
        ("[1,2", ["[1,2"]),
        ("1,,2", ["1", "", "2"]),
    ],
)
def test_commas_inside_values_do_not_split(text: str, pieces: list[str]) -> None:
    assert split_values(text) == pieces


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text("ab,[]{}:'\" \\#", max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab,'", min_size=1, max_size=3), inner),
    max_leaves=5,
)


@settings(max_examples=40, deadline=None)
@given(st.lists(plain, min_size=1, max_size=4))
def test_values_written_in_flow_style_are_split_as_they_were_joined(values: list[object]) -> None:
    import json

    texts = [json.dumps(value) for value in values]
    assert split_values(",".join(texts)) == texts


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.text("ab,'\" ", max_size=5), max_size=3), min_size=1, max_size=4))
def test_lists_as_neq_writes_them_are_split_as_they_were_joined(values: list[list[str]]) -> None:
    texts = [write_yaml({"key": value}).partition(": ")[2].strip() for value in values]
    assert [read_yaml(text).value for text in split_values(",".join(texts))] == values


def test_names_do_not_depend_on_spelling_or_order() -> None:
    assert names("seed=1,2", "policy.epsilon=1e-3") == ["seed=1", "seed=2"]
    assert set(names("policy.epsilon=1e-3,1e-2", "seed=1")) == set(names("seed=1", "policy.epsilon=0.001,0.01"))
    grids = [
        parse_grid(["policy.epsilon=1e-3,1e-2", "seed=1"]),
        parse_grid(["seed=1,2,3", "policy.epsilon=0.001,0.01,0.1", "device=cpu", "data.root=/somewhere"]),
    ]
    assert [grid.folder_name for grid in grids] == ["policy.epsilon,seed"] * 2
    assert {point.name for point in grids[0].points} < {point.name for point in grids[1].points}


def test_names_are_safe_readable_and_distinct() -> None:
    arguments = [
        "policy={kind: baseline},{kind: stochastic, p: 0.2},{kind: stochastic, p: 0.5},{kind-stochastic-p: 0.5}",
        f"data.root=~/a/b,../../etc,/a b,/a*b,{'x' * 300},{'x' * 299}y,ü,'.'",
        f"model.name={'y' * 47},{'y' * 400}",
    ]
    found = names(*arguments)
    assert len(set(found)) == 4 * 8 * 2
    for name in found:
        assert re.fullmatch(r"[A-Za-z0-9_.+=,-]{1,170}", name)
        assert not name.startswith(".")
    assert re.fullmatch(r"policy=kind-stochastic-p-0.2-[0-9a-f]{8},seed=1", names(arguments[0], "seed=1")[1])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=60).filter(lambda text: "," not in text), min_size=2, max_size=5))
def test_any_text_gives_names_that_differ_or_is_refused(texts: list[str]) -> None:
    written = [f"{text!r}" for text in texts]
    try:
        found = names(f"description={','.join(written)}")
    except RecipeError as error:
        told = str(error)
        found = [] if "given twice" in told or "in any case" in told else [told, told]
    assert len({name.casefold() for name in found}) == len(found)
    assert all("/" not in name and name.isprintable() and len(name.encode()) < 200 for name in found)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["seed"], "command line: seed: not KEY=VALUE,VALUE..., such as policy.epsilon=0.001,0.01"),
        (["=1"], "command line: =1: not KEY=VALUE,VALUE"),
        (["policy.=1"], "not KEY=VALUE"),
        (["seed=1,,2"], "command line: seed=1,,2: an empty value; remove a comma, or write null"),
        (["seed=1,"], "an empty value"),
        (["seed=1,2,1"], "command line: seed=1,2,1: '1' is given twice; remove one"),
        (["policy.epsilon=1e-3,0.001"], "'0.001' is given twice"),
        (["seed=1", "seed=2"], "seed is given twice; give all its values at once: seed=VALUE,VALUE"),
        (["data.root=a,A"], "two runs would be called data.root=a in any case"),
        (
            [f"seed={','.join(map(str, range(101)))}", "epochs=1,2,3,4,5,6,7,8,9,10"],
            f"1010 runs, more than the {LARGEST}",
        ),
    ],
)
def test_what_is_no_grid_is_refused_in_one_line(arguments: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(said)) as caught:
        parse_grid(arguments)
    assert len(caught.value.problems) == 1


def test_all_problems_of_form_are_told_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_grid(["seed", "epochs=1,,2", "batch_size=1,1"])
    assert len(caught.value.problems) == 3


def test_a_huge_grid_is_counted_not_built() -> None:
    values = ",".join(map(str, range(1000)))
    with pytest.raises(RecipeError, match=f"{10**15} runs"):
        parse_grid([f"{key}={values}" for key in "abcde"])
