"""``neq validate``: a recipe checked, and printed with every default written out."""

from __future__ import annotations

from neq_cli.commands.shared import Overrides, RecipeArgument, load


def validate(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Check a recipe without opening its data, and print it with every default written out."""
    print(load(recipe, overrides).resolved_yaml(), end="")
