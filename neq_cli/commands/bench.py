"""``neq bench``: a recipe's training step with neurons frozen, measured beside plain PyTorch's."""

from __future__ import annotations

from typing import Annotated

import typer

from neq_cli.commands.shared import AsJson, Overrides, RecipeArgument, load, show, show_json


def bench(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    fractions: Annotated[
        str, typer.Option(metavar="SHARE,...", help="shares of neurons to freeze, from 0 to 1")
    ] = "0,0.25,0.5,0.75,0.9,1",
    modes: Annotated[
        str, typer.Option(metavar="MODE,...", help="backward: exact, truncated (an approximation) or dense")
    ] = "exact,truncated",
    orders: Annotated[
        str, typer.Option(metavar="ORDER,...", help="random: in every layer; front: layer after layer from the input")
    ] = "random,front",
    rounds: Annotated[int, typer.Option(min=1, help="how often each is measured, by turns; intervals need 6")] = 6,
    layers: Annotated[
        float | None, typer.Option(metavar="SHARE", help="the share to show layer by layer; default that nearest 0.5")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a recipe's training step with neurons frozen, beside the dense step of plain PyTorch.

    On noise in the shape that the recipe gives, so that no data is needed, and with random weights.
    """
    from neq_cli.jobs.prepare import measured_steps
    from neq_cli.runs.views.tables.costs import bench_progress, render_bench
    from neq_cli.training.bench.options import parse_options

    options = parse_options(fractions, modes, orders, rounds, layers)  # before torch is imported, which takes seconds
    loaded = load(recipe, overrides)
    with bench_progress() as progress:
        result = measured_steps(loaded, options, progress)
    if as_json:
        show_json(result)
    else:
        show(render_bench(result, options.layers))
