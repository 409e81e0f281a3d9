"""``neq report``: one page of what runs did and saved, or its figures for a paper."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neq_cli.commands.shared import AllowDifferences, BaselineOption, RunDirectories, read_runs
from neq_cli.errors import NeqError


def report(
    run_directories: RunDirectories,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="the .html page to write")
    ] = None,
    png: Annotated[
        Path | None, typer.Option(metavar="DIR", help="write the figures for a paper, PNG at 300 dpi")
    ] = None,
    svg: Annotated[Path | None, typer.Option(metavar="DIR", help="write the figures for a paper, SVG")] = None,
    baseline: BaselineOption = None,
    allow_differences: AllowDifferences = False,
) -> None:
    """Write one page that shows what runs did and saved, readable offline, or its figures for a paper.

    Needs matplotlib: pip install 'neq[report]'.
    """
    from neq_cli.runs.views.report.drawing import Format, require_matplotlib
    from neq_cli.runs.views.report.files import write_pictures
    from neq_cli.runs.views.report.page import build_report, render_page, write_page

    if output is None and png is None and svg is None:
        raise NeqError("neq report: nothing to write; give -o FILE.html, --png DIR or --svg DIR")
    require_matplotlib()
    runs = read_runs(run_directories)
    built = build_report(runs, read_runs([baseline])[0] if baseline is not None else None, allow_differences)
    if output is not None:
        write_page(output, render_page(built))
        print(output)
    wanted: tuple[tuple[Path | None, Format], ...] = ((png, "png"), (svg, "svg"))
    for folder, form in wanted:
        if folder is not None:
            for path in write_pictures(built.pictures, folder, form):
                print(path)
