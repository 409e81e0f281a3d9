"""An evaluation as it is printed: metrics beside those recorded, and what is taken for what; no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from neq_cli.runs.compare.evaluation import Evaluation, Pairs, iou, recall
from neq_cli.text import format_percent, printable, ratio_percent

MOST_IN_TABLE = 20
"""Classes whose whole confusion matrix is printed; of more, the pairs that are confused most."""
_PAIRS_SHOWN = 20
_PERCENTAGES = ("top1", "top5", "miou", "pixel_accuracy")
_WORDS = {"top1": "top-1", "top5": "top-5", "miou": "mean IoU", "pixel_accuracy": "pixel accuracy"}
_STYLE: dict[str, Any] = {
    "title_justify": "left",
    "title_style": "bold",
    "header_style": "dim",
    "box": None,
    "padding": (0, 2, 0, 0),
}


def render(evaluation: Evaluation) -> RenderableType:
    """Return everything of an evaluation; names that came from files are printed as they are, never as markup."""
    parts: list[RenderableType] = [_title(evaluation), _metrics(evaluation)]
    pairs = evaluation.pairs
    if pairs is not None:
        table, legend = _by_class(evaluation, pairs) if evaluation.segmentation else _confusion(evaluation, pairs)
        parts += ["", table, Text(legend, style="dim")]
    return Group(*parts)


def width_of(content: RenderableType) -> int:
    """Return the columns that ``content`` takes where no cell of it is to be cut."""
    return Console(width=10_000).measure(content).maximum


def _title(evaluation: Evaluation) -> Text:
    epoch = "" if evaluation.epoch is None else f" of {evaluation.unit} {evaluation.epoch}"
    title = Text(printable(evaluation.run), style="bold")
    kind = "" if evaluation.weights == "file" else f"{printable(evaluation.weights)} "
    title.append(f"  {kind}weights{epoch}", style="not bold")
    title.append(f"\n{printable(evaluation.place)}\n", style="dim not bold")
    tested = f"{evaluation.images} test {evaluation.counted} of {printable(evaluation.data)}"
    return title.append(tested, style="not bold")


def _metrics(evaluation: Evaluation) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_column(style="dim")
    for name, value in evaluation.metrics.items():
        shown = f"{value:.2f}%" if name in _PERCENTAGES else f"{value:.6g}"
        table.add_row(Text(printable(_WORDS.get(name, name))), Text(shown), Text(_beside(evaluation, name, value)))
    return table


def _beside(evaluation: Evaluation, name: str, value: float) -> str:
    if name not in evaluation.recorded:
        return ""
    recorded = evaluation.recorded[name]
    return "as recorded, to the bit" if value == recorded else f"recorded: {recorded:.9g}"


def _confusion(evaluation: Evaluation, pairs: Pairs) -> tuple[Table, str]:
    if pairs.classes > MOST_IN_TABLE:
        return _most_confused(evaluation, pairs)
    counts, right = pairs.matrix(), recall(pairs)
    columns = pairs.classes + bool(counts[:, -1].any())
    table = Table(title="What is taken for what", **_STYLE)
    table.add_column("class", no_wrap=True)
    for number in range(columns):
        table.add_column(str(number) if number < pairs.classes else "other", justify="right", no_wrap=True)
    table.add_column("right", justify="right", no_wrap=True)
    for true in range(pairs.classes):
        cells = [_cell(int(counts[true, predicted]), true == predicted) for predicted in range(columns)]
        table.add_row(Text(printable(evaluation.named(true), 30)), *cells, format_percent(float(right[true])))
    return table, "rows: the class; columns: what it is taken for"


def _cell(count: int, right: bool) -> Text:
    if right:
        return Text(str(count), style="bold")
    return Text(str(count) if count else "·", style="" if count else "dim")


def _most_confused(evaluation: Evaluation, pairs: Pairs) -> tuple[Table, str]:
    _, true, _ = pairs.by_class()
    found = pairs.most_confused(_PAIRS_SHOWN)
    table = Table(title="Most confused", **_STYLE)
    for name in ("class", "taken for"):
        table.add_column(name, overflow="fold")
    for name in ("images", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    for one, predicted, count in found:
        names = (Text(printable(evaluation.named(number), 60)) for number in (one, predicted))
        table.add_row(*names, str(count), format_percent(ratio_percent(count, int(true[one]))))
    return table, f"the commonest mistakes of {pairs.classes} classes; share: of the images of the class"


def _by_class(evaluation: Evaluation, pairs: Pairs) -> tuple[Table, str]:
    table = Table(title="By class", **_STYLE)
    table.add_column("class", overflow="fold")
    for name in ("IoU", "right", "pixels"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("most often taken for", overflow="fold")
    for row in _class_rows(evaluation, pairs):
        table.add_row(*row)
    return table, "right: share of the class's pixels"


def _class_rows(evaluation: Evaluation, pairs: Pairs) -> Iterator[tuple[Text | str, ...]]:
    counts, shares, right = pairs.matrix(), iou(pairs), recall(pairs)
    _, true, _ = pairs.by_class()
    for number in range(pairs.classes):
        wrong = counts[number].copy()
        wrong[number] = 0
        worst = int(np.argmax(wrong))
        mistaken = f"{evaluation.named(worst)} {format_percent(ratio_percent(int(wrong[worst]), int(true[number])))}"
        yield (
            Text(printable(evaluation.named(number), 60)),
            format_percent(float(shares[number])),
            format_percent(float(right[number])),
            f"{int(true[number]):,}",
            Text(printable(mistaken, 70) if wrong[worst] else ""),
        )
