"""Reading and writing YAML: hand-written values, PyYAML's own loader as the second reader."""

import math
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from neq_cli.recipe.yaml import YamlSyntaxError, read_yaml, write_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("5e-4", 0.0005),
        ("1E5", 100000.0),
        ("-2e3", -2000.0),
        ("1.5e+2", 150.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("1_000", 1000),
        ("0x10", 16),
        ("-3", -3),
        ("+3", 3),
        ("0", 0),
        (".inf", math.inf),
        ("true", True),
        ("no", False),
        ("On", True),
        ("~", None),
        ("null", None),
        ("", None),
        ("'1e-3'", "1e-3"),
        ("010", "010"),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("<<", "<<"),
        ("e3", "e3"),
        ("match:runs/x", "match:runs/x"),
        ("~/data", "~/data"),
        ("[10, 2e1]", [10, 20.0]),
        ("{a: {b: [x]}}", {"a": {"b": ["x"]}}),
        ("!!str 3", "3"),
    ],
)
def test_values(text: str, value: Any) -> None:
    read = read_yaml(text)
    assert read.problems == []
    assert (read.value, type(read.value)) == (value, type(value))


def test_nan() -> None:
    assert math.isnan(read_yaml(".nan").value)


def test_every_key_and_entry_has_its_line() -> None:
    read = read_yaml("# comment\na: 1\nb:\n  c: x\n\n  d: [1,\n    2]\n  e:\n    - 5\n    - f: 6\n")
    assert read.lines == {
        (): 2,
        ("a",): 2,
        ("b",): 3,
        ("b", "c"): 4,
        ("b", "d"): 6,
        ("b", "d", 0): 6,
        ("b", "d", 1): 7,
        ("b", "e"): 8,
        ("b", "e", 0): 9,
        ("b", "e", 1): 10,
        ("b", "e", 1, "f"): 10,
    }


def test_nothing_is_none() -> None:
    assert read_yaml("").value is None
    assert read_yaml("# only a comment\n").value is None


def test_a_repeated_key_is_a_problem_and_its_first_value_stays() -> None:
    read = read_yaml("a: 1\nb: {c: 1}\na: 2\nb: 3\n")
    assert read.value == {"a": 1, "b": {"c": 1}}
    assert read.problems == [
        (3, ("a",), "given twice, first in line 1; remove one"),
        (4, ("b",), "given twice, first in line 2; remove one"),
    ]


@pytest.mark.parametrize("key", ["1", "1.5", "on", "~", "[a]", "{a: 1}"])
def test_a_key_that_is_not_text_is_a_problem(key: str) -> None:
    read = read_yaml(f"a: 1\n? {key}\n: 2\n")
    assert read.value == {"a": 1}
    assert [(line, path) for line, path, _ in read.problems] == [(2, ())]


@pytest.mark.parametrize(
    "value", ["!!python/object/apply:os.system [ls]", "!mine 3", "!!binary aGk=", "!!set {a}", "!!int abc", "9" * 5000]
)
def test_a_value_that_is_not_plain_is_a_problem(value: str) -> None:
    read = read_yaml(f"a: 1\nb: {value}\n")
    assert read.value == {"a": 1, "b": None}
    assert [(line, path) for line, path, _ in read.problems] == [(2, ("b",))]


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        ("a:\n\tb: 1\n", 2, "a tab"),
        ("a:\n  b: 1\n\tc: 2\n", 3, "a tab"),
        ("a: 1\nb: c: d\n", 2, "a ':' that does not fit"),
        ("a: 1\nb: [1, 2\nc: 3\n", 2, "a [ that is not closed"),
        ("a: 1\nb: {x: 1\nc: 3\n", 2, "a { that is not closed"),
        ("a: 1\nb: 'c\nd: 3\n", 2, "a quote that is not closed"),
        ('a: "\\q"\n', 1, "a backslash"),
        ("a:\n  b: 2\n c: 3\n", 3, "indentation"),
        ("a: 1\nb: *.bias\n", 2, "put text that begins with * in quotes"),
        ("a: &x [1]\nb: *x\n", 1, "&name is not allowed"),
        ("a: @x\n", 1, "reserved character"),
        ("a: 1\n---\nb: 2\n", 2, "a second document"),
        ("a: 1\n...\nb\n", 3, "text after the end"),
        ("a: 1\nb: \x00\n", 2, "U+0000"),
        ("a: " + "[" * 100, 1, "nested more than"),
    ],
)
def test_text_that_is_not_a_recipes_yaml(text: str, line: int, part: str) -> None:
    with pytest.raises(YamlSyntaxError) as caught:
        read_yaml(text)
    assert caught.value.line == line
    assert part in caught.value.message
    assert "\n" not in caught.value.message


def test_an_alias_bomb_is_refused_at_once() -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60)]
    with pytest.raises(YamlSyntaxError):
        read_yaml("\n".join(lines))


@pytest.mark.parametrize(
    "value", [1e-05, 5e-4, 1e16, 0.1, "1e-3", "yes", "2020-01-01", "010", "", "a: b", "null", "1:30"]
)
def test_written_values_read_back_here_and_in_pyyaml(value: Any) -> None:
    text = write_yaml({"key": value})
    assert read_yaml(text).value == {"key": value}
    assert yaml.safe_load(text) == {"key": value}


def test_a_value_used_twice_is_written_twice() -> None:
    shared = [1, 2]
    assert write_yaml({"a": shared, "b": shared}) == "a: [1, 2]\nb: [1, 2]\n"


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(plain)
@settings(max_examples=150, deadline=None)
def test_anything_plain_reads_back(value: Any) -> None:
    text = write_yaml({"key": value})
    assert read_yaml(text).value == {"key": value}
    assert yaml.safe_load(text) == {"key": value}


@given(st.text(alphabet=st.sampled_from(list("ab01-:[]{},#&*!|>'\"%@`?~ \n\t.e+"))))
@settings(max_examples=300, deadline=None)
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    lines, message = [1], "read"
    try:
        lines += read_yaml(text).lines.values()
    except YamlSyntaxError as error:
        lines, message = [error.line], error.message
    assert 1 <= min(lines) <= max(lines) <= text.count("\n") + 2
    assert message
    assert "\n" not in message
