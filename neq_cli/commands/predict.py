"""``neq predict``: classes and scores of images in files, by a run's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neq_cli.commands.shared import AsJson, DeviceOption, RecipeOption, TrainedArgument, WeightsOption, show, show_json


def predict(
    trained: TrainedArgument,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="images, or folders of them")],
    top: Annotated[int, typer.Option(metavar="N", min=1, help="how many classes of each image")] = 5,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FOLDER", help="write the masks of a segmentation here")
    ] = None,
    weights: WeightsOption = None,
    recipe: RecipeOption = None,
    device: DeviceOption = None,
    as_json: AsJson = False,
) -> None:
    """Tell the classes of images in files, prepared as the run's test images are; its data need not be there.

    All files are read first: where one is no image, nothing is predicted. Imports the Python files that the run's
    recipe names.
    """
    from neq_cli.jobs.predict import predict as predicted
    from neq_cli.runs.views.tables.prediction import render

    found = predicted(trained, images, weights, recipe, device, top=top, masks=output)
    if as_json:
        show_json(found)
    else:
        show(render(found))
