"""``neq compare``: runs side by side, seeds folded into mean and deviation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from neq_cli.commands.shared import AllowDifferences, AsJson, BaselineOption, RunDirectories, read_runs, show, show_json
from neq_cli.errors import NeqError
from neq_cli.text import counted

if TYPE_CHECKING:
    from neq_cli.runs.store.run import Run


def compare(
    run_directories: RunDirectories,
    baseline: BaselineOption = None,
    allow_differences: AllowDifferences = False,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="print CSV")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="print a Markdown table")] = False,
    as_latex: Annotated[bool, typer.Option("--latex", help="print a LaTeX table")] = False,
) -> None:
    """Set runs side by side: FLOPs, accuracy and seconds, seeds folded into mean and deviation.

    Of a folder, all runs in it that can be read; those that differ in data, model or epochs in a table each.
    """
    from neq_cli.runs.compare.comparison import compare_runs, to_json
    from neq_cli.runs.store.folders import runs_of_folder
    from neq_cli.runs.views.tables import comparison as tables

    if as_json + as_csv + as_markdown + as_latex > 1:
        raise NeqError("neq compare: --json, --csv, --markdown and --latex exclude each other; choose one")
    runs = read_runs(run_directories)
    on_screen = not (as_json or as_csv or as_markdown or as_latex)
    if on_screen and baseline is None and not allow_differences and any(map(runs_of_folder, run_directories)):
        _show_apart(runs)
        return
    against = read_runs([baseline])[0] if baseline is not None else None
    compared = compare_runs(runs, against, allow_differences)
    if as_json:
        show_json(to_json(compared))
        return
    for wanted, text in ((as_csv, tables.to_csv), (as_markdown, tables.to_markdown), (as_latex, tables.to_latex)):
        if wanted:
            print(text(compared).rstrip("\n"))
            return
    show(tables.render(compared))


def _show_apart(runs: Sequence[Run]) -> None:
    """Print a table for the runs of each question, named where there are several."""
    from rich.console import Group
    from rich.text import Text

    from neq_cli.runs.compare.comparison import compare_runs
    from neq_cli.runs.compare.configurations import by_question, model_and_data
    from neq_cli.runs.views.tables.comparison import render

    asked = by_question(runs)
    for number, group in enumerate(asked):
        table = render(compare_runs(group))
        epochs = counted(group[0].epochs_planned, group[0].unit)
        title = Text(f"{model_and_data(group[0])}, {epochs}", style="bold")
        show(Group(*([""] if number else []), title, table) if len(asked) > 1 else table)
