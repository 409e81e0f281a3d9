"""Commands that read run directories: what a run did, how runs compare, what they leave for others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from neq_cli.commands.shared import (
    AllowDifferences,
    AsJson,
    BaselineOption,
    RunDirectories,
    RunDirectory,
    read_runs,
    show,
    show_json,
)
from neq_cli.errors import NeqError


def inspect(
    run_directory: RunDirectory,
    epoch: Annotated[int | None, typer.Option(help="the state after this epoch; default the last")] = None,
    layer: Annotated[str | None, typer.Option(metavar="GLOB", help="only layers whose name matches")] = None,
    plot: Annotated[bool, typer.Option("--plot", help="draw frozen share, FLOPs and accuracy by epoch")] = False,
    as_json: AsJson = False,
) -> None:
    """List a run's frozen neurons by layer, and what it saved."""
    from neq_cli.runs.compare.inspection import inspect_run, to_json
    from neq_cli.runs.store.run import read_run
    from neq_cli.runs.views.tables.inspection import render

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


def export(
    run_directory: RunDirectory,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="the .safetensors file to write")],
    source: Annotated[
        Literal["final", "best", "last"], typer.Option("--from", help="final weights, or those of a checkpoint")
    ] = "final",
) -> None:
    """Write a run's weights as one plain state_dict in safetensors."""
    from neq_cli.runs.store.run import read_run

    run = read_run(run_directory)
    path = run.files.weights if source == "final" else run.files.checkpoint(source)
    if not path.is_file():
        there = [name for name in ("last", "best") if run.files.checkpoint(name).is_file()]
        mend = f"take --from {there[0]}" if there else "and no other weights; train it further or anew"
        raise NeqError(f"{path}: not there{'; ' if there else ', '}{mend}")
    if output.exists():
        raise NeqError(f"{output}: already exists; choose another with -o")
    if output.suffix != ".safetensors":
        raise NeqError(f"{output}: must end in .safetensors")
    from neq_cli.runs.store.writer import atomic_write, writing
    from neq_cli.training.loop.checkpoint import read_weights, save_weights

    weights = read_weights(path)
    with writing(output, "choose another with -o"):
        atomic_write(output, lambda partial: save_weights(weights, partial, {"recipe": run.recipe_name}))
    print(output)
