"""Entrypoints: importing, and arguments against signatures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from neq_cli.errors import RecipeValueError, one_line
from neq_cli.recipe.entrypoints import accepted_arguments, add_import_folder, check_kwargs, load_entrypoint
from neq_cli.training.errors import DataError


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_module_in_the_working_directory_is_found(in_folder: Path) -> None:
    (in_folder / "epnets.py").write_text("class Net:\n    @staticmethod\n    def make(): return 7\n")
    assert load_entrypoint("epnets:Net.make")() == 7


def test_a_module_beside_the_recipe_is_found(in_folder: Path) -> None:
    (in_folder / "recipes").mkdir()
    (in_folder / "recipes" / "epbeside.py").write_text("def make(): return 8\n")
    add_import_folder(in_folder / "recipes")
    assert load_entrypoint("epbeside:make")() == 8


@pytest.mark.parametrize(
    ("entrypoint", "reason"),
    [
        ("epbad", "'epbad' is not of the form pkg.mod:callable"),
        (":make", "':make' is not of the form pkg.mod:callable"),
        ("epbad:", "'epbad:' is not of the form pkg.mod:callable"),
        (
            "epnowhere.nets:make",
            "no module 'epnowhere'; it is looked for beside the recipe, here and on PYTHONPATH",
        ),
        ("epgood:mak", "module 'epgood' has no 'mak'; did you mean 'make'?"),
        ("epgood:number", "'epgood:number' is a int, not a callable"),
    ],
)
def test_what_is_wrong_is_one_line(in_folder: Path, entrypoint: str, reason: str) -> None:
    (in_folder / "epgood.py").write_text("number = 3\ndef make(): pass\n")
    with pytest.raises(RecipeValueError) as raised:
        load_entrypoint(entrypoint, "model.entrypoint")
    assert str(raised.value) == f"model.entrypoint: {reason}"
    assert (raised.value.key, raised.value.reason) == ("model.entrypoint", reason)


@pytest.mark.parametrize(
    ("source", "says", "line"),
    [
        ("x = 1\nraise ValueError('first\\nsecond')\n", "ValueError: first", 2),
        ("import epmissing_dependency\n", "ModuleNotFoundError: No module named 'epmissing_dependency'", 1),
        ("def broken(:\n", "SyntaxError: ", 1),
        ("raise SystemExit(3)\n", "SystemExit: 3", 1),
    ],
)
def test_a_module_that_fails_to_import_is_told_with_its_line(
    in_folder: Path, source: str, says: str, line: int
) -> None:
    (in_folder / "epfails.py").write_text(source)
    with pytest.raises(RecipeValueError) as raised:
        load_entrypoint("epfails:make")
    message = str(raised.value)
    assert message.startswith("entrypoint: module 'epfails' fails to import: " + says)
    assert message.endswith(f"epfails.py:{line})")
    assert "\n" not in message


def make(size: int, *, depth: int = 2) -> None:
    """Stand in for a builder."""


def forwarding(size: int, **kwargs: Any) -> None:
    """Stand in for one that passes arguments on."""


def test_arguments_that_fit_have_no_problems() -> None:
    assert check_kwargs(make, {"size": 1, "depth": 2}) == []
    assert check_kwargs(forwarding, {"size": 1, "anything": 2}) == []
    assert check_kwargs(dict, {"anything": 1}) == []


def test_unknown_missing_and_supplied_arguments_are_told() -> None:
    assert check_kwargs(make, {"dept": 1}) == [
        ("dept", "unknown argument 'dept' of make; did you mean 'depth'?"),
        ("size", "make needs the argument 'size'"),
    ]
    assert check_kwargs(make, {"size": 1}, supplied=["size"]) == [("size", "'size' of make is set by neq; remove it")]
    assert check_kwargs(make, {}, supplied=["size"], name="x") == []


def test_kwargs_are_followed_to_what_they_are_passed_to() -> None:
    assert accepted_arguments(forwarding) == ({"size"}, True)
    assert accepted_arguments(forwarding, [make]) == ({"size", "depth"}, False)
    assert check_kwargs(forwarding, {"size": 1, "dept": 1}, forwards_to=[make]) == [
        ("dept", "unknown argument 'dept' of forwarding; did you mean 'depth'?")
    ]
    assert check_kwargs(forwarding, {"size": 1, "dept": 1}, closed=True)[0][0] == "dept"


def test_one_line_cuts_and_folds() -> None:
    assert one_line(ValueError("a  b\nc")) == "ValueError: a b"
    assert one_line(ValueError()) == "ValueError"
    assert one_line(ValueError("x" * 300)) == "ValueError: " + "x" * 197 + "..."


def test_a_data_error_from_a_worker_loses_its_traceback() -> None:
    text = (
        "Caught DataError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File ...\n"
        "neq_cli.training.errors.DataError: a.png: cannot be used\n"
    )
    assert str(DataError(text)) == "a.png: cannot be used"
    assert str(DataError("plain")) == "plain"
