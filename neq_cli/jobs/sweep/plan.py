"""Plans a sweep: checks every run before any is trained, its recipe, its name, and what earlier calls left of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from neq_cli.errors import RecipeError, RunDirectoryError
from neq_cli.jobs.sweep.grid import Grid, Point, parse_grid
from neq_cli.jobs.sweep.matching import Matches, find_matches, with_match
from neq_cli.recipe import Check, Problem
from neq_cli.recipe.keys import warnings
from neq_cli.recipe.load import Completion, LoadedRecipe, find_recipe, load_recipe
from neq_cli.runs.store.paths import RunFiles, check_resumable
from neq_cli.runs.store.resumable import differences, ended_at_rest, stored_recipe
from neq_cli.runs.store.sweep_folder import SweepFiles, check_sweep, default_sweep_directory
from neq_cli.runs.views.live.sweep_state import FINISHED, SweptRun, is_finished
from neq_cli.text import format_passes

_KINDS = "policy.kind: kinds with keys of their own are swept as policy='{kind: baseline},{kind: stochastic, p: 0.5}'"


@dataclass(frozen=True)
class PlannedRun:
    """One run: its point of the grid, its recipe, and how it stands."""

    point: Point
    loaded: LoadedRecipe
    run: SweptRun
    after: SweptRun | None = None  # which must have finished before this one can begin


@dataclass(frozen=True)
class SweepPlan:
    """A sweep that can begin: nothing is written yet."""

    reference: str  # the recipe as the user gave it
    name: str  # the recipe's
    grid: Grid
    files: SweepFiles
    runs: tuple[PlannedRun, ...]
    warnings: tuple[str, ...]


def plan_sweep(
    reference: str,
    arguments: Sequence[str],
    folder: Path | None = None,
    checks: Sequence[Check] = (),
    check_loaded: Callable[[LoadedRecipe], object] | None = None,
    complete: Completion | None = None,
) -> SweepPlan:
    """Return the plan of a sweep over ``KEY=V1,V2,...`` arguments, in ``folder`` or one named after recipe and keys.

    ``checks`` and ``complete`` are those of ``load_recipe``; ``check_loaded`` raises RecipeError for what only a whole
    recipe tells. Raises RecipeError with the problems of all points at once, and RunDirectoryError where the folder is
    taken.
    """
    grid = parse_grid(arguments)
    name = find_recipe(reference).stem
    files = SweepFiles(folder if folder is not None else default_sweep_directory(name, grid.folder_name))
    matches = find_matches(grid.points)
    found = matches.found
    points = (with_match(one, found[one.name], files) if one.name in found else one for one in grid.points)
    grid = replace(grid, points=tuple(points))
    loaded = _loaded(reference, grid, [_remembered(check) for check in checks], check_loaded, complete, matches)
    check_sweep(files.root, name)
    swept = {
        point.name: SweptRun(point.name, point.labels, files.run(point.name), one.recipe.epochs)
        for point, one in zip(grid.points, loaded, strict=True)
    }
    runs = tuple(
        PlannedRun(point, one, swept[point.name], swept[found[point.name]] if point.name in found else None)
        for point, one in zip(grid.points, loaded, strict=True)
    )
    _raise_folded([(run.point, _take_stock(run)) for run in runs], len(runs))
    said = folded([(run.point.name, warnings(run.loaded.recipe)) for run in runs], len(runs))
    return SweepPlan(reference, name, grid, files, runs, said)


def _loaded(
    reference: str,
    grid: Grid,
    checks: Sequence[Check],
    check_loaded: Callable[[LoadedRecipe], object] | None,
    complete: Completion | None,
    matches: Matches,
) -> list[LoadedRecipe]:
    """Return the recipes of all points; what a match names is yet to be trained, and not looked for."""
    loaded: list[LoadedRecipe] = []
    problems: list[tuple[Point, Sequence[str]]] = []
    for point in grid.points:
        if point.name in matches.problems:
            problems.append((point, [matches.problems[point.name]]))
            continue
        try:
            one = load_recipe(reference, point.overrides, checks, complete)
            if check_loaded is not None and point.name not in matches.found:
                check_loaded(one)
            loaded.append(one)
        except RecipeError as error:
            problems.append((point, error.problems))
    of_kinds = any(" policy." in line for _, lines in problems for line in lines)
    advice = [_KINDS] if of_kinds and "policy.kind" in grid.keys else []
    _raise_folded(problems, len(grid.points), advice)
    _raise_folded(_duplicates(grid, loaded), len(grid.points))
    return loaded


def _remembered(check: Check) -> Check:
    """Return ``check`` with a memory: the points of a grid have most sections in common."""
    known: dict[tuple[str, str], list[Problem]] = {}

    def remembering(name: str, section: Any) -> Iterable[Problem]:
        key = (name, repr(section))
        if key not in known:
            known[key] = list(check(name, section))
        return known[key]

    return remembering


def _duplicates(grid: Grid, loaded: Sequence[LoadedRecipe]) -> list[tuple[Point, Sequence[str]]]:
    seen: dict[str, Point] = {}
    found: list[tuple[Point, Sequence[str]]] = []
    for point, one in zip(grid.points, loaded, strict=True):
        first = seen.setdefault(repr(one.recipe), point)
        if first is not point:
            found.append((point, [f"the same recipe as {first.name}; remove one of the values"]))
    return found


def _take_stock(planned: PlannedRun) -> list[str]:
    """Note how far the run is trained; returns what keeps it from being gone on with."""
    run, loaded = planned.run, planned.loaded
    try:
        check_resumable(run.path)
        if not RunFiles(run.path).recipe.exists():
            return []
        stored = stored_recipe(run.path)
        problems = differences(stored, loaded.recipe, run.path, _ANEW)
        finished = is_finished(run.path)
    except (RunDirectoryError, OSError) as error:
        return [str(error)]
    run.look(0.0)
    if loaded.recipe.batch_size != stored.batch_size:
        said = f"{loaded.recipe.batch_size}, but {run.path} was begun with {stored.batch_size}; leave it, {_ANEW}"
        problems.append(Problem("batch_size", said))
    if run.passed_epochs > run.epochs and not finished:
        trained = format_passes(run.passed_epochs)
        said = f"{run.epochs}, but epoch {trained} of {run.path} is trained, on the way to {stored.epochs}"
        problems.append(Problem("epochs", f"{said}; give at least {math.ceil(run.passed_epochs)}, {_ANEW}"))
    if finished and (run.epochs_done >= run.epochs or ended_at_rest(stored, loaded.recipe, run.epochs_done)):
        run.epochs = run.epochs_done  # an earlier call may have asked for more
        run.state = FINISHED
    return [loaded.problem(problem.key, problem.message) for problem in problems]


_ANEW = "or give another folder with -o"


def _raise_folded(problems: Sequence[tuple[Point, Sequence[str]]], points: int, advice: Sequence[str] = ()) -> None:
    lines = folded([(point.name, said) for point, said in problems], points)
    if lines:
        raise RecipeError([*lines, *advice])


def folded(said: Sequence[tuple[str, Sequence[str]]], runs: int) -> tuple[str, ...]:
    """Return what is said of many runs, each line once, behind the names of those it is said of unless it is all.

    ``said`` are (name, lines) pairs; ``runs`` is how many runs there are, also those of which nothing is said.
    """
    names: dict[str, list[str]] = {}
    for name, lines in said:
        for line in lines:
            names.setdefault(line, []).append(name)
    return tuple(f"{_of(names[line], runs)}{line}" for line in names)


def _of(names: Sequence[str], runs: int) -> str:
    if len(names) == runs and runs > 1:
        return ""
    more = len(names) - 1
    return f"{names[0]}{f' and {more} more' if more else ''}: "
