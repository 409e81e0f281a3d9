"""Tells what is wrong with a recipe in a line, with where the value was written, or that it is a default."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic_core import PydanticUndefined

from neq_cli.recipe.describe import shown, slot_at
from neq_cli.recipe.document import Document, Located, Override, Place
from neq_cli.recipe.values import Section
from neq_cli.recipe.yaml import KeyPath
from neq_cli.text import escaped


def path_of(key: str) -> KeyPath:
    """Return the path of a dotted key; "" is the whole recipe."""
    return tuple(key.split(".")) if key else ()


def located(document: Document, key: str, message: str, others: Sequence[str] = (), used: Any = None) -> Located:
    """Return a problem with its place. ``used`` is the section or recipe of which a value that nobody wrote is told."""
    path = path_of(key)
    place = document.place(path, map(path_of, others))
    return place, path, message + _unwritten(document, path, used)


def lines(problems: Sequence[Located], file: str) -> list[str]:
    """Return one line per problem: the file's from top to bottom, then the command line's from left to right."""
    ordered = sorted(problems, key=lambda problem: _order(problem[0]))
    return list(dict.fromkeys(line(problem, file) for problem in ordered))


def line(problem: Located, file: str) -> str:
    """Return the line that tells of ``problem`` with what is called ``file``, or with the command line."""
    place, path, message = problem
    key = ".".join(map(str, path))
    if not isinstance(place, Override):
        return escaped(f"{file}:{place}: {key}: {message}" if key else f"{file}:{place}: {message}")
    # An override names its key itself, unless the problem is with another that it brought about.
    named = key in ("", ".".join(map(str, place.path)))
    return escaped(
        f"command line: {place.text}: {message}" if named else f"command line: {place.text}: {key}: {message}"
    )


def _order(place: Place) -> tuple[int, int]:
    return (1, place.order) if isinstance(place, Override) else (0, place)


def _unwritten(document: Document, path: KeyPath, recipe: Any) -> str:
    """Say of a value that is written nowhere that it is the default, or the model's, and how to give another."""
    if not path or document.has(path):
        return ""
    slot = slot_at(path, document.values)
    field = None if slot is None else slot.field
    if field is None or field.is_required():
        return ""
    default = field.get_default(call_default_factory=True)
    value = _at(recipe, path, default)
    if value in (None, [], {}, PydanticUndefined) or isinstance(value, Section):
        return ""  # nothing was chosen
    what = "is the default" if value == default else "came with the model"
    return f" ({shown(value)} {what}: write {'.'.join(map(str, path))})"


def _at(recipe: Any, path: KeyPath, otherwise: Any) -> Any:
    for key in path:
        recipe = getattr(recipe, str(key), None)
        if recipe is None:
            return otherwise
    return recipe
