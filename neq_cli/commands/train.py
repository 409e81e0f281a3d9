"""``neq train``: a recipe trained into a run directory, here or on several processes."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from neq_cli.commands.shared import DeviceOption, Overrides, RecipeArgument, load, one_of_several, with_device
from neq_cli.errors import NeqError

if TYPE_CHECKING:
    from neq_cli.recipe.load import LoadedRecipe


def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="run directory; default runs/RECIPE/TIME-sSEED")
    ] = None,
    device: DeviceOption = None,
    progress: Annotated[
        Literal["auto", "rich", "plain", "off"],
        typer.Option(help="live dashboard, a line per epoch or observation, or nothing"),
    ] = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with the run in DIR, or with the recipe's newest unfinished one")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="build everything, train nothing")] = False,
    show_batch: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="draw the first batch as the model sees it into this .png, train nothing"),
    ] = None,
) -> None:
    """Train a recipe, with neurons freezing and thawing, into a run directory.

    On several processes: torchrun --nproc-per-node N -m neq_cli train RECIPE.
    """
    from neq_cli.runs.store.paths import check_available, default_run_directory
    from neq_cli.runs.views.live.progress import Silent, choose_progress

    if show_batch is not None:
        if resume or dry_run or output is not None or one_of_several():
            what = "draws a batch by one process and trains nothing; leave out -o, --resume, --dry-run and torchrun"
            raise NeqError(f"neq train: --show-batch {what}")
        _draw_batch(recipe, with_device(overrides, device), show_batch)
        return
    began = time.perf_counter()
    first = True  # whether this is the process that speaks for all
    if one_of_several():
        from neq_cli.training.processes.joined import join

        first = join().first
    elif output is not None and not resume:
        check_available(output)  # before torch is imported, which takes seconds
    loaded = load(recipe, with_device(overrides, device), warn=first, progress=progress)
    if dry_run:
        _show_plan(loaded, output or default_run_directory(loaded.name, loaded.recipe.seed, datetime.now()))
        return
    from neq_cli.jobs.train import train as train_into

    shown = choose_progress(progress) if first else Silent()
    piped = not sys.stdout.isatty()
    run_directory = train_into(
        loaded,
        output,
        shown,
        resume=resume,
        loading=time.perf_counter() - began,
        command=_command_to_go_on(recipe, overrides, device, progress),
        path_told=piped,
    )
    if first and piped:
        print(run_directory)


def _command_to_go_on(recipe: str, overrides: Sequence[str] | None, device: str | None, progress: str) -> list[str]:
    """Return the words of the command line that goes on with the run whose directory comes behind them.

    No words under torchrun, whose own part of the line is not known here.
    """
    if one_of_several():
        return []
    options = [*(["--device", device] if device else []), *(["--progress", progress] if progress != "auto" else [])]
    neq = ["python", "-m", "neq_cli"] if Path(sys.argv[0]).name == "__main__.py" else ["neq"]
    return [*neq, "train", recipe, *(overrides or ()), *options, "--resume", "-o"]


def _draw_batch(recipe: str, overrides: list[str], file: Path) -> None:
    """Draw the first training batch into a file, and print its name."""
    from neq_cli.jobs.show_batch import check_picture
    from neq_cli.jobs.show_batch import show_batch as draw

    check_picture(file)
    draw(load(recipe, overrides), file)
    print(file)


def _show_plan(loaded: LoadedRecipe, run_directory: Path) -> None:
    """Build everything and print what ``train`` would begin with."""
    from rich.console import Console

    from neq_cli.jobs.prepare import prepared
    from neq_cli.runs.views.live.progress import PlainProgress
    from neq_cli.text import format_flops

    session = prepared(loaded)
    PlainProgress(Console(file=sys.stdout)).show(session.started)
    flops = session.trainer.freezer.flops()
    print(
        f"{format_flops(flops.paper)} FLOPs per sample and iteration in the paper's accounting, "
        f"{format_flops(flops.executed)} executed"
    )
    print(f"would write {run_directory}")
