"""Shared by the commands: arguments, reading what they name, printing; only ``load`` imports torch."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from neq_cli.commands.completion import changes, recipes_and_files
from neq_cli.errors import NeqError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from neq_cli.recipe.load import LoadedRecipe
    from neq_cli.runs.store.run import Run


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
RunDirectory = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="the folder of a run")]
TrainedArgument = Annotated[
    Path, typer.Argument(metavar="RUN_DIR|FILE", help="the folder of a run, or a .safetensors file of its weights")
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
RunDirectories = Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="the folders of the runs")]
BaselineOption = Annotated[
    Path | None, typer.Option(metavar="RUN_DIR", help="the run to compare with; default the baseline policy's")
]
AllowDifferences = Annotated[bool, typer.Option("--allow-differences", help="also where data, model or epochs differ")]


def with_device(overrides: Sequence[str] | None, device: str | None) -> list[str]:
    """Return the overrides with what ``--device`` says."""
    from neq_cli.recipe.document import Given

    return [*(overrides or ()), *([Given(f"device={device}", f"--device {device}")] if device else ())]


def load(reference: str, overrides: Sequence[str] | None, *, warn: bool = True) -> LoadedRecipe:
    """Return the checked recipe; its warnings go to stderr, unless another process says them."""
    from neq_cli.jobs.prepare import load as load_checked

    return load_checked(reference, overrides or (), warn=warn)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Return the runs in these folders; RunDirectoryError where one is none."""
    from neq_cli.runs.store.run import read_run

    return [read_run(path) for path in paths]


def show(content: RenderableType, narrowest: int = 80) -> None:
    """Print what rich lays out, ``narrowest`` columns wide at least: in fewer a table would lose columns and digits."""
    from rich.console import Console

    console = Console()
    console.width = max(console.width, narrowest)
    if console.is_terminal:
        console.print(content)
        return
    with console.capture() as captured:
        console.print(content)
    # Columns are filled up with blanks, which other programs and files are better off without.
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def show_json(content: Any) -> None:
    """Print JSON for other programs."""
    print(json.dumps(content, indent=2))


def one_of_several() -> bool:
    """Whether torchrun started this, asked before torch is imported."""
    count = os.environ.get("WORLD_SIZE", "1")
    if not count.isdecimal():
        raise NeqError(f"WORLD_SIZE: '{count}' is no number of processes; torchrun sets it, or unset it")
    return int(count) > 1
