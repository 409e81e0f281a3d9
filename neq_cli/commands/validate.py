"""``neq validate``: a recipe checked, and printed with every default written out."""

from __future__ import annotations

from typing import Annotated

import typer

from neq_cli.commands.shared import Overrides, RecipeArgument, load, show
from neq_cli.complaints import complain


def validate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    coverage: Annotated[
        bool, typer.Option("--coverage", help="build the model, and list what of it are neurons and what is not")
    ] = False,
) -> None:
    """Check a recipe without opening its data, and print it with every default written out."""
    loaded = load(recipe, overrides)
    for note in loaded.notes:
        complain(f"note: {note}")
    if not coverage:
        print(loaded.resolved_yaml(), end="")
        return
    from neq_cli.jobs.prepare import estimated_coverage
    from neq_cli.runs.views.tables.coverage import render_coverage

    show(render_coverage(estimated_coverage(loaded)))
