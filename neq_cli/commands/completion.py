"""What a shell completes after `neq VERB`: recipes, their keys and values; says nothing where it knows nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from neq_cli.recipe.offers import Offer


def recipe_names(incomplete: str) -> list[str]:
    """Return the shipped recipes that a word may become."""
    from neq_cli.recipe.load import shipped_names

    return [name for name in shipped_names() if name.startswith(incomplete)]


def recipes_and_files(incomplete: str) -> list[str]:
    """Return the shipped recipes and the YAML files that a word may become, and the folders on the way to them."""
    found = [*recipe_names(incomplete), *_files(incomplete)]
    while len(found) == 1 and found[0].endswith("/"):
        # With one word alone, a shell would go on to the next argument. Those in the folder keep it within the word.
        inside = list(_files(found[0]))
        if not inside:
            break
        found = inside if len(inside) > 1 or inside[0].endswith("/") else [*found, *inside]
    return found


def changes(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Return what a KEY=VALUE may become, with what the key means."""
    return list(_changes(context, incomplete, "overrides"))


def axes(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Return what a KEY=VALUE,VALUE... of a sweep may become, with what the key means."""
    return list(_changes(context, incomplete, "axes"))


def _files(incomplete: str) -> Iterator[str]:
    folder, slash, beginning = incomplete.rpartition("/")
    try:
        inside = sorted(Path(f"{folder}{slash}" or ".").expanduser().iterdir())
    except (OSError, RuntimeError, ValueError):
        return
    for path in inside:
        if not path.name.startswith(beginning) or (path.name.startswith(".") and not beginning):
            continue
        if path.suffix in (".yaml", ".yml"):
            yield f"{folder}{slash}{path.name}"
        elif incomplete and path.is_dir():  # in the first place there are names enough
            yield f"{folder}{slash}{path.name}/"


def _changes(context: typer.Context, incomplete: str, parameter: str) -> Iterator[tuple[str, str]]:
    from neq_cli.recipe.offers import offers

    earlier = joined(context.params.get(parameter) or ())
    # Bash cuts words at "=" and wants what follows it alone; of "policy.kind=" the key is an earlier word.
    before = f"{earlier.pop().removesuffix('=')}=" if earlier and _awaits_value(earlier[-1]) else ""
    given = {word.partition("=")[0] for word in earlier}
    known = [offer for offer in offers(_recipe(context.params.get("recipe"), earlier)) if offer.key not in given]
    for word, meaning in _words(before + incomplete, known, several=parameter == "axes"):
        # Typer would break a longer one into lines, each of which Fish takes for a word.
        yield word.removeprefix(before), shorten(meaning, 60, placeholder=" ...")


def _words(begun: str, known: Sequence[Offer], *, several: bool) -> Iterator[tuple[str, str]]:
    key, equals, value = begun.partition("=")
    if not equals:
        found = [offer for offer in known if offer.key.startswith(key)]
        for offer in found:
            yield f"{offer.key}=", offer.meaning
        if len(found) == 1:
            # Alone, the shell would take it for a whole word and add a blank; among its values it does not.
            yield from ((f"{found[0].key}={value}", found[0].meaning) for value in found[0].values)
        return
    before, comma, last = value.rpartition(",") if several else ("", "", value)
    for offer in known:
        if offer.key == key:
            taken = before.split(",")
            yield from (
                (f"{key}={before}{comma}{word}", offer.meaning)
                for word in offer.values
                if word.startswith(last) and word not in taken
            )


def joined(words: Iterable[str]) -> list[str]:
    """Return words with those together that bash cut at "=" or ":"."""
    found: list[str] = []
    open_ended = False
    for word in words:
        if found and (open_ended or word in ("=", ":")):
            found[-1] += word
        else:
            found.append(word)
        open_ended = word in ("=", ":")
    return found


def _awaits_value(word: str) -> bool:
    return "=" not in word or word.endswith("=")


def _recipe(reference: Any, overrides: Sequence[str]) -> dict[str, Any]:
    """Return what the recipe says so far, nothing where it cannot be read."""
    from neq_cli.errors import NeqError
    from neq_cli.recipe.load import read_document

    try:
        return read_document(str(reference), overrides)[2].values
    except NeqError:
        return {}
