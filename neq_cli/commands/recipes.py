"""Commands on recipes, which train nothing: what there is, whether one is right, what it would cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neq_cli.commands.shared import (
    AsJson,
    Overrides,
    RecipeArgument,
    load,
    recipe_names,
    show,
    show_json,
)


def flops(recipe: RecipeArgument, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Count one sample's back-propagation without training, averaged over the recipe's epochs."""
    from neq_cli.jobs.train import estimated_flops
    from neq_cli.runs.views.tables.flops import render_flops

    loaded = load(recipe, overrides)
    estimate = estimated_flops(loaded)
    if as_json:
        show_json(estimate)
    else:
        show(render_flops(loaded.name, estimate))


def validate(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Check a recipe without opening its data, and print it with every default written out."""
    print(load(recipe, overrides).resolved_yaml(), end="")


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
