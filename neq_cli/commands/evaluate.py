"""``neq evaluate``: what a run's weights come to on its test data, or on another folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neq_cli.commands.shared import (
    AsJson,
    DeviceOption,
    Overrides,
    RecipeOption,
    TrainedArgument,
    WeightsOption,
    show,
    show_json,
    with_device,
)


def evaluate(
    trained: TrainedArgument,
    overrides: Overrides = None,
    data: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="test on this folder in place of data.root")
    ] = None,
    weights: WeightsOption = None,
    recipe: RecipeOption = None,
    device: DeviceOption = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="write the confusion matrix, .png or .svg")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Test a run's weights, and show what is taken for what; nothing is written into the run.

    Imports the Python files that the run's recipe names.
    """
    from neq_cli.jobs.evaluate import evaluate as evaluated
    from neq_cli.runs.compare.evaluation import to_json
    from neq_cli.runs.views.live.passes import pass_shown
    from neq_cli.runs.views.report.confusion import check_picture, write_confusion
    from neq_cli.runs.views.tables.evaluation import render, width_of

    if output is not None:
        check_picture(output)
    with pass_shown("testing") as on_batch:
        found = evaluated(
            trained,
            weights,
            recipe,
            data,
            with_device(overrides, device),
            wants_picture=output is not None,
            on_batch=on_batch,
        )
    if output is not None:
        write_confusion(found, output)
    if as_json:
        show_json(to_json(found))
        return
    content = render(found)
    show(content, narrowest=max(80, width_of(content)))
