"""``neq recipes`` and ``neq init``: the recipes that ship with neq, listed and copied."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neq_cli.commands.shared import recipe_names, show


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
) -> None:
    """Copy a shipped recipe here, to be changed."""
    from neq_cli.recipe.shipped import copy_recipe

    for path in copy_recipe(name, folder):
        print(path)
