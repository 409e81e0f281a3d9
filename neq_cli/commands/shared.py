"""Shared by the commands: arguments, reading what they name, printing; only ``load`` imports torch."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from neq_cli.commands.completion import changes, recipes_and_files
from neq_cli.complaints import complain
from neq_cli.errors import NeqError, RunDirectoryError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from neq_cli.recipe.load import LoadedRecipe
    from neq_cli.runs.store.run import Run
    from neq_cli.runs.views.live.progress import Mode

_NOTES = 5
"""Runs that are left out, each with a note of its own."""

RecipeArgument = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="a file, or the name of a shipped recipe", autocompletion=recipes_and_files),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="changes, such as policy.epsilon=0.005 seed=2", autocompletion=changes
    ),
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps or auto; the same as device=...")]


def _newest(context: typer.Context, path: Path | None) -> Path | None:
    """Return the run that a RUN_DIR means, of a folder of runs the newest one, which a note names."""
    if path is None or context.resilient_parsing:
        return path
    from neq_cli.runs.store.brief import newest

    run, said = newest(path)
    if said:
        complain(f"note: {said}")
    return run


RunDirectory = Annotated[
    Path,
    typer.Argument(metavar="RUN_DIR", help="the folder of a run, or of several: the newest of them", callback=_newest),
]
TrainedArgument = Annotated[
    Path,
    typer.Argument(
        metavar="RUN_DIR|FILE",
        help="the folder of a run, or of several: the newest of them; or a file of weights",
        callback=_newest,
    ),
]
WeightsOption = Annotated[
    Literal["best", "last", "final"] | None,
    typer.Option(help="which of the run's; default the best, else the final ones"),
]
RecipeOption = Annotated[
    str | None,
    typer.Option(metavar="RECIPE", help="of a file that does not tell its own", autocompletion=recipes_and_files),
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
RunDirectories = Annotated[
    list[Path], typer.Argument(metavar="RUN_DIR...", help="the folders of the runs, or folders that hold some")
]
BaselineOption = Annotated[
    Path | None,
    typer.Option(metavar="RUN_DIR", help="the run to compare with; default the baseline policy's", callback=_newest),
]
AllowDifferences = Annotated[bool, typer.Option("--allow-differences", help="also where data, model or epochs differ")]


def with_device(overrides: Sequence[str] | None, device: str | None) -> list[str]:
    """Return the overrides with what ``--device`` says."""
    from neq_cli.recipe.document import Given

    return [*(overrides or ()), *([Given(f"device={device}", f"--device {device}")] if device else ())]


def load(
    reference: str, overrides: Sequence[str] | None, *, warn: bool = True, progress: Mode = "auto"
) -> LoadedRecipe:
    """Return the checked recipe; its warnings go to stderr, unless another process says them.

    Checking imports torch, and a terminal is told so meanwhile where ``progress`` lets it.
    """
    from neq_cli.runs.views.live.starting import starting

    with starting(progress if warn else "off"):
        from neq_cli.jobs.prepare import load as load_checked

        return load_checked(reference, overrides or (), warn=warn)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Return the runs in these folders, of a folder of runs all that can be read; RunDirectoryError where one is none.

    Of a folder of runs, those that are damaged or have no finished epoch yet are left out, and notes say so.
    """
    from neq_cli.runs.store.folders import runs_of_folder
    from neq_cli.runs.store.run import read_run

    runs: list[Run] = []
    left_out: list[str] = []
    for path in paths:
        inside = runs_of_folder(path)
        if not inside:
            runs.append(read_run(path))
        for run in inside:
            try:
                runs.append(read_run(run))
            except RunDirectoryError as error:
                left_out.append(str(error))
    if left_out and not runs:
        raise RunDirectoryError(f"{left_out[0]}{_others(len(left_out) - 1)}")
    for line in left_out[:_NOTES]:
        complain(f"note: left out: {line}")
    if len(left_out) > _NOTES:
        complain(f"note: left out: {len(left_out) - _NOTES} more; `neq list` shows them")
    return runs


def _others(count: int) -> str:
    return f" (and {count} more that cannot be read)" if count else ""


def show(content: RenderableType, narrowest: int = 80) -> None:
    """Print what rich lays out, ``narrowest`` columns wide at least: in fewer a table would lose columns and digits."""
    from rich.console import Console
    from rich.segment import SegmentLines

    from neq_cli.runs.views.drawing import text_of, without_blanks

    console = Console()
    console.width = max(console.width, narrowest)
    # Columns are filled up with blanks, which other programs, and who copies from a terminal, are better off without.
    lines = [without_blanks(line) for line in console.render_lines(content, pad=False)]
    if console.is_terminal:
        console.print(SegmentLines(lines, new_lines=True), soft_wrap=True, end="")
    else:
        print("\n".join(map(text_of, lines)))


def show_json(content: Any) -> None:
    """Print JSON for other programs."""
    print(json.dumps(content, indent=2))


def one_of_several() -> bool:
    """Whether torchrun started this, asked before torch is imported."""
    count = os.environ.get("WORLD_SIZE", "1")
    if not count.isdecimal():
        raise NeqError(f"WORLD_SIZE: '{count}' is no number of processes; torchrun sets it, or unset it")
    return int(count) > 1
