"""``neq recipes`` and ``neq init``: the recipes that ship with neq, listed and copied; one for a folder of data."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from neq_cli.commands.completion import recipe_names
from neq_cli.commands.shared import show
from neq_cli.complaints import complain
from neq_cli.errors import NeqError


def recipes() -> None:
    """List the recipes that ship with neq."""
    from rich.table import Table

    from neq_cli.recipe.shipped import list_recipes

    table = Table(box=None, pad_edge=False, show_header=False)
    for shipped in list_recipes():
        table.add_row(shipped.name, shipped.description)
    show(table)


def init(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="a shipped recipe; none: they are listed", autocompletion=recipe_names),
    ] = None,
    destination: Annotated[
        Path | None, typer.Argument(metavar="[DESTINATION]", help="a folder, or what to call it: FILE.yaml")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="write a recipe for the images in this folder instead")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="its model; default one that fits the images' size")
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema/--no-schema", help="lay the schema beside it, by which editors complete and check")
    ] = True,
) -> None:
    """Copy a shipped recipe here, to be changed, or write one for images of your own.

    neq init --data FOLDER [DESTINATION] counts its classes and images, and chooses what trains, each value with the
    reason beside it.
    """
    if data is not None:
        if destination is not None:
            what = f"--data writes a recipe of its own, not '{name}'; give at most where to write it"
            raise NeqError(f"neq init: {what}")
        _write_for(data, model, Path(name) if name is not None else Path(), schema=schema)
        return
    if model is not None:
        raise NeqError("neq init: --model is for --data; in a copy, change model.name")
    if name is None:
        recipes()
        return
    from neq_cli.recipe.shipped import copy_recipe

    _tell(copy_recipe(name, Path() if destination is None else destination, schema=schema), schema=schema)


def _write_for(data: Path, model: str | None, destination: Path, *, schema: bool) -> None:
    """Write a recipe for the images in a folder, and tell what is in it."""
    from neq_cli.recipe.shipped import check_new, place_of, write_recipe

    stem = re.sub(r"[^\w.+-]+", "-", data.expanduser().absolute().name).strip(".-") or "recipe"
    path = place_of(destination, f"{stem}.yaml")
    with suppress(OSError):  # which writing tells
        check_new(path)  # before torch is imported, and images are looked at
    from neq_cli.jobs.starting_recipe import starting_recipe

    made = starting_recipe(data, model, path)
    for line in made.found:
        complain(f"note: {line}")
    _tell(write_recipe(path, made.text.encode(), schema=schema), schema=schema)


def _tell(written: Sequence[Path], *, schema: bool) -> None:
    """Print the files, and say where the schema is another version's."""
    from neq_cli.recipe.schema_file import NAME, Found, found_at

    for path in written:
        print(path)
    laid = written[0].with_name(NAME)
    if schema and found_at(laid) is Found.OTHER:
        complain(f"note: {laid}: is not this version's, and stays; neq schema -o {shlex.quote(str(laid))} renews it")
