from __future__ import annotations

import json
import shlex

import pytest

from neq_cli.runs.views.report.names import command_line, key_in_words, metric_in_words


@pytest.mark.parametrize(
    ("argv", "typed"),
    [
        (["/usr/bin/neq", "train", "a b.yaml"], "neq train 'a b.yaml'"),
        (["/site-packages/neq_cli/__main__.py", "train", "policy={kind: neq}"], "neq train 'policy={kind: neq}'"),
        (["train.py", "--lr", "$HOME"], "train.py --lr '$HOME'"),
    ],
)
def test_a_command_line_can_be_typed_again(argv: list[str], typed: str) -> None:
    found = command_line(json.dumps(argv))
    assert found == typed
    assert shlex.split(typed)[1:] == argv[1:]


@pytest.mark.parametrize("written", ["", "neq", "[", "[]", "[1]", '["neq", null]', '{"a": 1}', '"neq"', "null"])
def test_what_is_no_command_line_is_none(written: str) -> None:
    assert command_line(written) is None


def test_names_in_words() -> None:
    assert metric_in_words("test_top1") == "test top-1 accuracy"
    assert metric_in_words("test_miou") == "test mean IoU"
    assert metric_in_words("perplexity_of_words") == "perplexity of words"
    assert metric_in_words("_") == "_"
    assert metric_in_words("x" * 99 + "\x1b") == "x" * 39 + "…"
    assert key_in_words("packages.torch") == "torch"
    assert key_in_words("data.image_shape") == "data, image shape"
    assert key_in_words("argv") == "command line"
