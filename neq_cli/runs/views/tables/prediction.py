"""Predictions of images as they are printed: the likeliest classes, or what share of the pixels each class has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from neq_cli.text import printable


def render(predictions: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Return a row for each class of each image; file names and names of classes are printed as they are."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    masks = any("percent" in found for prediction in predictions for found in prediction["classes"])
    table.add_column("image", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("pixels" if masks else "score", justify="right", no_wrap=True)
    written = any("mask" in prediction for prediction in predictions)
    if written:
        table.add_column("mask", overflow="fold")
    for prediction in predictions:
        image, mask = Text(printable(prediction["image"])), Text(printable(prediction.get("mask", "")))
        for found in prediction["classes"]:
            name, number = printable(found["name"], 60), str(found["class"])
            share = f"{found['percent']:.1f}%" if masks else f"{100 * found['score']:.2f}%"
            table.add_row(image, Text(name if name == number else f"{number} {name}"), share, *([mask] * written))
            image = mask = Text("")
    return table
