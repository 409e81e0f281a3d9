"""``neq sweep``: a recipe trained once for every combination of values."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from neq_cli.commands.completion import axes as axes_of
from neq_cli.commands.shared import DeviceOption, RecipeArgument, one_of_several, with_device
from neq_cli.complaints import columns, complain
from neq_cli.errors import NeqError
from neq_cli.text import folded

Mode = Literal["auto", "rich", "plain", "off"]


def sweep(
    recipe: RecipeArgument,
    axes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE[,VALUE]...",
            help="changes; of several values, every combination is trained",
            autocompletion=axes_of,
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="sweep directory; default sweeps/RECIPE/KEYS")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1, help="runs trained at once, each by a process of its own; 1, with slurm all", show_default=False
        ),
    ] = None,
    launcher: Annotated[
        Literal["local", "slurm"], typer.Option(help="processes of this machine, or jobs of a SLURM cluster")
    ] = "local",
    slurm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="an option of sbatch, such as partition=gpu or time=04:00:00; repeatable"
        ),
    ] = None,
    device: DeviceOption = None,
    sampler: Annotated[
        Literal["grid", "optuna"],
        typer.Option(help="every combination, or a search: --trials runs among KEY=LOW..HIGH and choices"),
    ] = "grid",
    trials: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="runs of a search, with those of earlier calls", show_default=False),
    ] = None,
    progress: Annotated[Mode, typer.Option(help="live overview, a line per run, or nothing")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check every run and list them, train nothing")] = False,
) -> None:
    """Train a recipe once for every combination of values, skipping what is finished and resuming what is not.

    The same command goes on with the same sweep, also with more values. Values with commas of their own:
    scheduler.milestones=[10,20],[20,30] or policy='{kind: baseline},{kind: stochastic, p: 0.5}'.
    """
    from neq_cli.jobs.prepare import matched_flops
    from neq_cli.jobs.sweep.cluster.options import parse_slurm
    from neq_cli.jobs.sweep.cluster.run import refuse_jobs, submit_sweep
    from neq_cli.jobs.sweep.plan import plan_sweep
    from neq_cli.jobs.sweep.run import run_sweep
    from neq_cli.recipe.entrypoints import add_import_folder
    from neq_cli.recipe.load import find_recipe
    from neq_cli.runs.views.live.starting import starting
    from neq_cli.runs.views.live.sweep_view import choose_sweep_view, plan_lines

    if one_of_several():
        raise NeqError("neq sweep: started by torchrun; start it alone, with --jobs for several runs at once")
    if slurm and launcher != "slurm":
        raise NeqError("--slurm: only of use with --launcher slurm; give that too, or leave it out")
    if (trials is not None) != (sampler == "optuna"):
        raise NeqError("neq sweep: --sampler optuna and --trials N go together; give both, or neither for a grid")
    if sampler == "optuna" and launcher == "slurm":
        raise NeqError("--launcher slurm: not for a search, whose runs wait for what came of others; leave it out")
    options = parse_slurm(slurm or [])
    add_import_folder(find_recipe(recipe).parent)
    changes = with_device(axes, device)
    if trials is not None:
        _search(recipe, changes, output, trials, jobs or 1, progress, dry_run)
        return
    with starting(progress):
        from neq_cli.training.checks import check_section  # which imports torch
        from neq_cli.training.models.image_defaults import with_image_defaults

        plan = plan_sweep(recipe, changes, output, [check_section], matched_flops, complete=with_image_defaults)
    for warning in plan.warnings:
        complain(f"warning: {warning}")
    if dry_run:
        print("\n".join(plan_lines([run.run for run in plan.runs])))
        print(f"would write {plan.files.root}")
        return
    view = choose_sweep_view(progress)
    if launcher == "slurm":
        run_directories = submit_sweep(plan, jobs, view, options)
    else:
        refuse_jobs(plan)
        run_directories = run_sweep(plan, jobs or 1, view)
    _say_where(run_directories, progress)


def _search(
    recipe: str, changes: list[str], output: Path | None, trials: int, jobs: int, progress: Mode, dry_run: bool
) -> None:
    """Search, and print the front."""
    from neq_cli.jobs.sweep.search.run import plan_search, run_search
    from neq_cli.runs.views.live.starting import starting
    from neq_cli.runs.views.live.sweep_view import choose_sweep_view
    from neq_cli.runs.views.tables.front import front_lines

    with starting(progress):
        from neq_cli.training.checks import check_section  # which imports torch
        from neq_cli.training.models.image_defaults import with_image_defaults

        plan = plan_search(recipe, changes, output, [check_section], complete=with_image_defaults)
    for warning in plan.warnings:
        complain(f"warning: {warning}")
    if dry_run:
        print("\n".join([*plan.lines(trials), f"would write {plan.files.root}"]))
        return
    keys = [one.key for one in plan.space.dimensions]
    run_search(
        plan,
        trials,
        jobs,
        choose_sweep_view(progress),
        lambda rows, count: _print(front_lines(rows, keys, count)),
    )
    _say_where(plan.files.runs, progress)


def _print(lines: list[str]) -> None:
    if lines:
        print("\n".join(lines))


def _say_where(run_directories: Path, progress: Mode) -> None:
    if progress != "off":
        # A line of its own where it would be broken: it is there to be copied.
        complain("\n".join(folded(f"compare them: neq compare {shlex.quote(str(run_directories))}/*", columns())))
    if not sys.stdout.isatty():
        print(run_directories)
