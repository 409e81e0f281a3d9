"""``neq inspect``: a run's frozen neurons by layer, and what it saved."""

from __future__ import annotations

from typing import Annotated

import typer

from neq_cli.commands.shared import AsJson, RunDirectory, show, show_json
from neq_cli.errors import NeqError


def inspect(
    run_directory: RunDirectory,
    epoch: Annotated[
        int | None, typer.Option(help="the state after this epoch or observation; default the last")
    ] = None,
    layer: Annotated[str | None, typer.Option(metavar="GLOB", help="only layers whose name matches")] = None,
    plot: Annotated[bool, typer.Option("--plot", help="draw frozen share, FLOPs and accuracy by epoch")] = False,
    coverage: Annotated[
        bool, typer.Option("--coverage", help="list what of the model are neurons, and what is not and why")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List a run's frozen neurons by layer, and what it saved."""
    from neq_cli.runs.compare.inspection import inspect_run, to_json
    from neq_cli.runs.store.run import read_run
    from neq_cli.runs.views.tables.inspection import render

    if coverage:
        if plot or epoch is not None or layer is not None:
            raise NeqError("neq inspect: --coverage is of the whole model; leave out --plot, --epoch and --layer")
        from neq_cli.runs.store.coverage import recorded_coverage
        from neq_cli.runs.views.tables.coverage import render_coverage

        found = recorded_coverage(read_run(run_directory))
        show_json(found) if as_json else show(render_coverage(found))
        return
    if plot:
        if as_json or epoch is not None or layer is not None:
            raise NeqError("neq inspect: --plot draws the whole run; leave out --json, --epoch and --layer")
        from neq_cli.runs.views.tables.plot import render_plot

        show(render_plot(read_run(run_directory)), narrowest=1)
        return
    inspection = inspect_run(read_run(run_directory), epoch, layer)
    if as_json:
        show_json(to_json(inspection))
    else:
        show(render(inspection))
