"""The picture of an evaluation's confusion matrix, a printed column wide or wider, PNG or SVG; needs matplotlib."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from neq_cli.errors import NeqError
from neq_cli.runs.compare.evaluation import Evaluation
from neq_cli.runs.store.disk import atomic_write, writing
from neq_cli.runs.views.drawing import shorten
from neq_cli.runs.views.report.drawing import PRINT, Format, Style, drawn, require_matplotlib
from neq_cli.runs.views.report.files import check_replaceable
from neq_cli.text import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_CLASSES = 2000
_MOST_NUMBERS = 20  # classes in whose cells numbers are written
_MOST_NAMES = 60
_LONGEST_NAME = 18
_CELL = 0.22  # inches


def check_picture(path: Path) -> None:
    """Raise NeqError where no picture can be written to ``path``: before anything slow is begun."""
    require_matplotlib("neq evaluate -o")
    if path.suffix.lower() not in (".png", ".svg"):
        raise NeqError(f"{printable(path)}: must end in .png or .svg")
    with writing(path, "choose another place with -o"):
        check_replaceable(path)


def write_confusion(evaluation: Evaluation, path: Path) -> None:
    """Write the picture; one that neq wrote before is replaced. NeqError where classes are too many to be seen."""
    assert evaluation.pairs is not None
    classes = evaluation.pairs.classes
    if classes > MOST_CLASSES:
        raise NeqError(f"{printable(path)}: a matrix of {classes} classes is not drawn; at most {MOST_CLASSES} are")
    width = max(PRINT.width, min(1.2 + _CELL * classes, 12.0))
    form: Format = "png" if path.suffix.lower() == ".png" else "svg"
    content = drawn(partial(_draw, evaluation), replace(PRINT, width=width), width * 0.95, "confusion", form)
    with writing(path, "choose another place with -o"):
        atomic_write(path, content)


def _draw(evaluation: Evaluation, figure: Figure, style: Style) -> None:
    """Draw shares of each class as shades, with the counts (of pixels: percentages) where there is room."""
    from matplotlib.colors import LinearSegmentedColormap

    assert evaluation.pairs is not None
    counts = evaluation.pairs.matrix()
    classes = evaluation.pairs.classes
    counts = counts if counts[:, -1].any() else counts[:, :-1]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    ends: list[Any] = [style.paper, tuple(part / 255 for part in style.density)]
    axes = figure.add_subplot()
    shades = LinearSegmentedColormap.from_list("shares", ends)
    axes.imshow(shares, cmap=shades, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    if classes <= _MOST_NUMBERS:
        for (row, column), count in np.ndenumerate(counts):
            text = f"{100 * shares[row, column]:.0f}" if evaluation.segmentation else str(count)
            if count and text != "0":
                colour = style.paper if shares[row, column] > 0.5 else style.ink
                axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=style.font_size - 1)
    names = [shorten(printable(evaluation.name(number)), _LONGEST_NAME) for number in range(counts.shape[1])]
    places = _places(counts.shape[1])
    turned = 90 if max(map(len, names)) > 3 else 0
    axes.set_xticks(places, [names[place] for place in places], rotation=turned, parse_math=False)
    places = places[places < classes]
    axes.set_yticks(places, [names[place] for place in places], parse_math=False)
    axes.tick_params(length=0, labelsize=style.font_size - 1)
    axes.set_xlabel("taken for" + (", % of the class's pixels" if evaluation.segmentation else ""))
    axes.set_ylabel("class")


def _places(count: int) -> NDArray[np.int64]:
    """Return which of so many classes have their names written."""
    return np.arange(0, count, -(-count // _MOST_NAMES), dtype=np.int64)
