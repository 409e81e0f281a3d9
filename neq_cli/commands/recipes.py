"""``neq recipes`` and ``neq init``: the recipes that ship with neq, listed and copied."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from neq_cli.commands.completion import recipe_names
from neq_cli.commands.shared import show
from neq_cli.complaints import complain


def recipes() -> None:
    """List the recipes that ship with neq."""
    from rich.table import Table

    from neq_cli.recipe.shipped import list_recipes

    table = Table(box=None, pad_edge=False, show_header=False)
    for shipped in list_recipes():
        table.add_row(shipped.name, shipped.description)
    show(table)


def init(
    name: Annotated[str, typer.Argument(metavar="NAME", help="a shipped recipe", autocompletion=recipe_names)],
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="where to put it")] = Path(),
    schema: Annotated[
        bool, typer.Option("--schema/--no-schema", help="lay the schema beside it, by which editors complete and check")
    ] = True,
) -> None:
    """Copy a shipped recipe here, to be changed."""
    from neq_cli.recipe.schema_file import NAME, Found, found_at
    from neq_cli.recipe.shipped import copy_recipe

    written = copy_recipe(name, folder, schema=schema)
    for path in written:
        print(path)
    laid = written[0].with_name(NAME)
    if schema and found_at(laid) is Found.OTHER:
        complain(f"note: {laid}: is not this version's, and stays; neq schema -o {shlex.quote(str(laid))} renews it")
