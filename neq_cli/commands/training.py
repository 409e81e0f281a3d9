"""Commands that train: one run, a grid of runs, or a few measured steps."""

from __future__ import annotations

import os
import shlex
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from neq_cli.commands.shared import (
    AsJson,
    Overrides,
    RecipeArgument,
    load,
    show,
    show_json,
)
from neq_cli.complaints import complain
from neq_cli.errors import NeqError

if TYPE_CHECKING:
    from neq_cli.recipe.load import LoadedRecipe


def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="run directory; default runs/RECIPE/TIME-sSEED")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps or auto; the same as device=...")] = None,
    progress: Annotated[
        Literal["auto", "rich", "plain", "off"], typer.Option(help="live dashboard, a line per epoch, or nothing")
    ] = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with the run in DIR, or with the recipe's newest unfinished one")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="build everything, train nothing")] = False,
) -> None:
    """Train a recipe, with neurons freezing and thawing, into a run directory.

    On several processes: torchrun --nproc-per-node N -m neq_cli train RECIPE.
    """
    from neq_cli.runs.store.writer import check_available, default_run_directory
    from neq_cli.runs.views.live.progress import Silent, choose_progress

    began = time.perf_counter()
    changes = [*(overrides or ()), *([f"device={device}"] if device else ())]
    alone = not _one_of_several()
    if output is not None and alone and not resume:
        check_available(output)  # before torch is imported, which takes seconds
    first = True if alone else _join()
    loaded = load(recipe, changes, warn=first)
    if dry_run:
        _show_plan(loaded, output or default_run_directory(loaded.name, loaded.recipe.seed, datetime.now()))
        return
    from neq_cli.jobs import train as running

    shown = choose_progress(progress) if first else Silent()
    loading = time.perf_counter() - began
    run_directory = running.train(loaded, output, shown, resume=resume, loading=loading)
    if first and not sys.stdout.isatty():
        print(run_directory)


def sweep(
    recipe: RecipeArgument,
    axes: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE[,VALUE]...", help="changes; of several values, every combination is trained"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="sweep directory; default sweeps/RECIPE/KEYS")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="runs trained at once, each by a process of its own")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps or auto; the same as device=...")] = None,
    progress: Annotated[
        Literal["auto", "rich", "plain", "off"], typer.Option(help="live overview, a line per run, or nothing")
    ] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check every run and list them, train nothing")] = False,
) -> None:
    """Train a recipe once for every combination of values, skipping what is finished and resuming what is not.

    The same command goes on with the same sweep, also with more values. Values with commas of their own:
    scheduler.milestones=[10,20],[20,30] or policy='{kind: baseline},{kind: stochastic, p: 0.5}'.
    """
    from neq_cli.jobs.sweep.plan import plan_sweep
    from neq_cli.jobs.sweep.run import run_sweep
    from neq_cli.jobs.train import matched_flops
    from neq_cli.recipe.entrypoints import add_import_folder
    from neq_cli.recipe.source import find_recipe
    from neq_cli.runs.views.live.sweep_view import choose_sweep_view, plan_lines
    from neq_cli.training.checks import check_section

    if _one_of_several():
        raise NeqError("neq sweep: started by torchrun; start it alone, with --jobs for several runs at once")
    add_import_folder(find_recipe(recipe).parent)
    changes = [*(axes or ()), *([f"device={device}"] if device else ())]
    plan = plan_sweep(recipe, changes, output, [check_section], matched_flops)
    for warning in plan.warnings:
        complain(f"warning: {warning}")
    if dry_run:
        print("\n".join(plan_lines([run.run for run in plan.runs])))
        print(f"would write {plan.files.root}")
        return
    run_directories = run_sweep(plan, jobs, choose_sweep_view(progress))
    if progress != "off":
        complain(f"compare them: neq compare {shlex.quote(str(run_directories))}/*")
    if not sys.stdout.isatty():
        print(run_directories)


def bench(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    fractions: Annotated[
        str, typer.Option(metavar="SHARE,...", help="shares of neurons to freeze, from 0 to 1")
    ] = "0,0.25,0.5,0.75,0.9,1",
    modes: Annotated[
        str, typer.Option(metavar="MODE,...", help="backward: exact, truncated (an approximation) or dense")
    ] = "exact,truncated",
    orders: Annotated[
        str, typer.Option(metavar="ORDER,...", help="random: in every layer; front: layer after layer from the input")
    ] = "random,front",
    rounds: Annotated[int, typer.Option(min=1, help="how often each is measured, by turns")] = 5,
    layers: Annotated[
        float | None, typer.Option(metavar="SHARE", help="the share to show layer by layer; default that nearest 0.5")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a recipe's training step with neurons frozen, beside the dense step of plain PyTorch.

    On noise in the shape that the recipe gives, so that no data is needed, and with random weights.
    """
    from neq_cli.jobs.train import measured_steps
    from neq_cli.runs.views.tables.bench import bench_progress, render_bench
    from neq_cli.training.bench.options import parse_options

    options = parse_options(fractions, modes, orders, rounds, layers)  # before torch is imported, which takes seconds
    loaded = load(recipe, overrides)
    with bench_progress() as progress:
        result = measured_steps(loaded, options, progress)
    if as_json:
        show_json(result)
    else:
        show(render_bench(result, options.layers))


def _one_of_several() -> bool:
    """Whether torchrun started this, asked before torch is imported."""
    count = os.environ.get("WORLD_SIZE", "1")
    if not count.isdecimal():
        raise NeqError(f"WORLD_SIZE: '{count}' is no number of processes; torchrun sets it, or unset it")
    return int(count) > 1


def _join() -> bool:
    """Join the processes that torchrun started; returns whether this is the one that speaks for all."""
    from neq_cli.training.processes.joined import join

    return join().first


def _show_plan(loaded: LoadedRecipe, run_directory: Path) -> None:
    from rich.console import Console

    from neq_cli.jobs.train import prepared
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
