"""``neq compare``: runs side by side, seeds folded into mean and deviation."""

from __future__ import annotations

from typing import Annotated

import typer

from neq_cli.commands.shared import AllowDifferences, AsJson, BaselineOption, RunDirectories, read_runs, show, show_json
from neq_cli.errors import NeqError


def compare(
    run_directories: RunDirectories,
    baseline: BaselineOption = None,
    allow_differences: AllowDifferences = False,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="print CSV")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="print a Markdown table")] = False,
    as_latex: Annotated[bool, typer.Option("--latex", help="print a LaTeX table")] = False,
) -> None:
    """Set runs side by side: FLOPs, accuracy and seconds, seeds folded into mean and deviation."""
    from neq_cli.runs.compare.comparison import compare_runs, to_json
    from neq_cli.runs.views.tables import comparison as tables

    if as_json + as_csv + as_markdown + as_latex > 1:
        raise NeqError("neq compare: --json, --csv, --markdown and --latex exclude each other; choose one")
    runs = read_runs(run_directories)
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
