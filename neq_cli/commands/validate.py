"""``neq validate``: a recipe checked and told in five lines, or printed with every default written out."""

from __future__ import annotations

from typing import Annotated

import typer

from neq_cli.commands.shared import Overrides, RecipeArgument, load, show
from neq_cli.complaints import complain
from neq_cli.errors import NeqError


def validate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    resolved: Annotated[
        bool, typer.Option("--resolved", help="print the recipe with every default written out; opens no data")
    ] = False,
    coverage: Annotated[
        bool, typer.Option("--coverage", help="build the model, and list what of it are neurons and what is not")
    ] = False,
) -> None:
    """Check a recipe, and tell its model, data, neurons and length in five lines; trains and downloads nothing.

    Data that lies here is opened, to be counted and to see whether the model takes it.
    """
    if resolved and coverage:
        raise NeqError("neq validate: --resolved and --coverage exclude each other; choose one")
    loaded = load(recipe, overrides)
    for note in loaded.notes:
        complain(f"note: {note}")
    if resolved:
        print(loaded.resolved_yaml(), end="")
        return
    from neq_cli.jobs.prepare import estimated_coverage, summarised
    from neq_cli.runs.views.tables.coverage import render_coverage
    from neq_cli.runs.views.tables.summary import summary_lines

    if coverage:
        show(render_coverage(estimated_coverage(loaded)))
        return
    for line in summary_lines(loaded.file, loaded.recipe.model_dump(), summarised(loaded)):
        print(line)
