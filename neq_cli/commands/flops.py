"""``neq flops``: what one sample's back-propagation costs, counted without training."""

from __future__ import annotations

from neq_cli.commands.shared import AsJson, Overrides, RecipeArgument, load, show, show_json


def flops(recipe: RecipeArgument, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Count one sample's back-propagation without training, averaged over the recipe's epochs."""
    from neq_cli.jobs.prepare import estimated_flops
    from neq_cli.runs.views.tables.costs import render_flops

    loaded = load(recipe, overrides)
    estimate = estimated_flops(loaded)
    if as_json:
        show_json(estimate)
    else:
        show(render_flops(loaded.name, estimate))
