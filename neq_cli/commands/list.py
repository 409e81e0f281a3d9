"""``neq list``: the runs in folders, a line each: when begun, how far, how good."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neq_cli.commands.shared import AsJson, show, show_json
from neq_cli.complaints import complain

_USUAL = (Path("runs"), Path("sweeps"))


def list_runs(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="[FOLDER]...", help="where runs lie; default runs and sweeps, here")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the runs in a folder, however deep, the newest last: status, epochs, score, date."""
    from neq_cli.runs.store.brief import read_brief
    from neq_cli.runs.store.folders import find_runs
    from neq_cli.runs.views.tables.listing import render_list, to_json, width_of

    found = [find_runs(folder) for folder in folders or (usual for usual in _USUAL if usual.is_dir())]
    paths = dict.fromkeys(run for one in found for run in one.runs)
    briefs = sorted(map(read_brief, paths), key=lambda brief: brief.order)
    for line in (line for one in found for line in one.unread):
        complain(f"note: {line}")
    if as_json:
        show_json(to_json(briefs))
    elif briefs:
        content = render_list(briefs)
        show(content, narrowest=width_of(content))
    else:
        where = ", ".join(map(str, folders or _USUAL))
        complain(f"note: no runs in {where}; `neq train RECIPE` makes one")
