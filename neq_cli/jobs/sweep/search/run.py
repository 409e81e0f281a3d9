"""A search from its command to its front: plans it, trains so many trials as runs of a sweep, and reads the front."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from neq_cli.errors import RecipeError, RunDirectoryError
from neq_cli.jobs.stop_requests import StopRequests
from neq_cli.jobs.sweep.grid import Grid, Point
from neq_cli.jobs.sweep.plan import PlannedRun, SweepPlan
from neq_cli.jobs.sweep.process import train_command
from neq_cli.jobs.sweep.run import Command, Sweep, raise_failures
from neq_cli.jobs.sweep.search.space import Choice, Range, Space, parse_space
from neq_cli.jobs.sweep.search.study import SearchStudy, optuna
from neq_cli.recipe import Check
from neq_cli.recipe.keys import warnings
from neq_cli.recipe.load import Completion, LoadedRecipe, find_recipe, load_recipe
from neq_cli.runs.compare.comparison import final_metric
from neq_cli.runs.compare.front import on_front
from neq_cli.runs.compare.statistics import mean_known
from neq_cli.runs.store.paths import RunFiles
from neq_cli.runs.store.run import read_run
from neq_cli.runs.store.sweep_folder import SweepFiles, SweepRecord, check_sweep, default_sweep_directory, open_sweep
from neq_cli.runs.store.untrusted import read_json
from neq_cli.runs.views.live.sweep_state import FAILED, FINISHED, SweepState, SweptRun
from neq_cli.runs.views.live.sweep_view import SweepView
from neq_cli.runs.views.tables.front import FrontRow
from neq_cli.text import MISSING, counted

Show = Callable[[list[FrontRow], int], None]


@dataclass(frozen=True)
class SearchPlan:
    """A search that can begin: nothing is written yet."""

    reference: str  # the recipe as the user gave it
    name: str  # the recipe's
    space: Space
    axes: tuple[str, ...]  # as given
    files: SweepFiles
    base: LoadedRecipe  # with the first end of every range
    read: Callable[[Sequence[str]], LoadedRecipe]
    warnings: tuple[str, ...]

    def lines(self, trials: int) -> list[str]:
        """Say what would be searched."""
        return [f"{counted(trials, 'trial')} of {self.name}", *(f"{one.key}  {one}" for one in self.space.dimensions)]


def plan_search(
    reference: str,
    arguments: Sequence[str],
    folder: Path | None = None,
    checks: Sequence[Check] = (),
    complete: Completion | None = None,
) -> SearchPlan:
    """Return the plan of a search among ``arguments``, in ``folder`` or one named after recipe and keys.

    Raises RecipeError with the problems of all ends of ranges and of all choices, RunDirectoryError where the folder is
    taken, NeqError without optuna.
    """
    optuna()
    space = parse_space(arguments)
    name = find_recipe(reference).stem

    def read(overrides: Sequence[str]) -> LoadedRecipe:
        return load_recipe(reference, overrides, checks, complete)

    loaded = _checked(space.corners(), read)
    space = space.with_fractions(
        [one.key for one in space.dimensions if isinstance(one, Range) and _takes_fractions(one, space, read)]
    )
    keys = ",".join(sorted(one.key for one in space.dimensions))
    files = SweepFiles(folder if folder is not None else default_sweep_directory(name, f"search-{keys}"[:160]))
    check_sweep(files.root, name)
    said = dict.fromkeys(line for one in loaded for line in warnings(one.recipe))
    return SearchPlan(reference, name, space, tuple(arguments), files, loaded[0], read, tuple(said))


def run_search(
    plan: SearchPlan, trials: int, jobs: int, view: SweepView, show: Show, command: Command = train_command
) -> None:
    """Train until there are ``trials`` in all, ``jobs`` at once, then ``show`` their front and how many are finished.

    Trials that were being trained when an earlier call ended are gone on with first. Errors are those of ``run_sweep``.
    """
    axes = {one.partition("=")[0]: [one.partition("=")[2]] for one in plan.axes}
    lock = open_sweep(plan.files.root, SweepRecord(plan.name, axes))
    try:
        study = SearchStudy(plan.files.study, plan.space, plan.base.recipe.seed)
        study.give_up_those_cut_short()
        planned = _planned(plan, study, trials)
        keys = tuple(one.key for one in plan.space.dimensions)
        grid = Grid((), tuple(one.point for one in planned))
        sweep = SweepPlan(plan.reference, plan.name, grid, plan.files, tuple(planned), plan.warnings)
        before = {one.run.name for one in planned if one.run.state == FAILED}
        runs = [one.run for one in planned]
        state = SweepState(plan.name, plan.files.root, keys, jobs, runs, time.monotonic())
        with StopRequests() as requests, view:
            view.begin(state)
            if lock.note:
                view.message(lock.note)
            _Search(plan, study, sweep, state, view, requests, command).follow()
    finally:
        lock.release()
    finished = [one for one in runs if one.state == FINISHED]
    show(read_front(finished), len(finished))
    if not finished or any(one.state == FAILED and one.name not in before for one in runs):
        raise_failures(sweep, state)


def read_front(runs: Sequence[SweptRun]) -> list[FrontRow]:
    """Return the runs of the front, the cheapest first; those whose files do not tell are none of it."""
    rows = []
    for swept in runs:
        try:
            run = read_run(swept.path)
            flops = mean_known(run.column("flops_executed"))
            rows.append(FrontRow(swept.name, swept.labels, flops, final_metric(run), run.metric, run.lower_is_better))
        except RunDirectoryError:  # `neq compare` says what is wrong with it
            continue
    lower = any(row.lower_is_better for row in rows)
    front = on_front([(row.flops, row.metric) for row in rows], lower)
    return sorted((row for row, there in zip(rows, front, strict=True) if there), key=lambda row: row.flops)


class _Search(Sweep):
    """Asks for a trial when a process is free for it, and tells what came of it."""

    def __init__(
        self,
        search: SearchPlan,
        study: SearchStudy,
        plan: SweepPlan,
        state: SweepState,
        view: SweepView,
        requests: StopRequests,
        command: Command,
    ) -> None:
        super().__init__(plan, state, view, requests, command)
        self.search = search
        self.study = study
        self.queue = [one for one in self.queue if one.run.state != FAILED]
        self.chosen = dict(study.chosen())

    def start(self, planned: PlannedRun) -> None:
        """Choose what the run is trained with, unless an earlier call did, and start it."""
        number = _number(planned.run)
        if number not in self.chosen:
            asked, self.chosen[number] = self.study.ask()
            assert asked == number  # nobody else asks: the sweep's folder is locked
            planned.run.labels = _labels(self.search.space, self.chosen[number])
        overrides = self.search.space.overrides(self.chosen[number])
        try:
            loaded = self.search.read(overrides)
        except RecipeError as error:  # values that do not go together, which their ends do
            planned.run.end(FAILED, " ".join(error.problems), time.monotonic())
            self.view.changed(planned.run, time.monotonic())
            self.study.tell_failed(number)
            return
        planned.run.epochs = loaded.recipe.epochs
        super().start(replace(planned, point=replace(planned.point, overrides=overrides), loaded=loaded))

    def ended(self, run: SweptRun) -> None:
        """Tell what came of a run; one that was stopped or killed is trained on by the next call."""
        number = _number(run)
        if run.state == FINISHED:
            try:
                read = read_run(run.path)
                flops = mean_known(read.column("flops_executed"))
                self.study.tell(number, flops, final_metric(read), read.lower_is_better)
            except RunDirectoryError as error:
                run.state, run.reason = FAILED, str(error)
        elif run.state == FAILED and _says_failed(run):
            self.study.tell_failed(number)


def _planned(plan: SearchPlan, study: SearchStudy, trials: int) -> list[PlannedRun]:
    """Return the trials there are and those to come, ``trials`` in all but for those that were cut short."""
    chosen, told = study.chosen(), study.told()
    numbers = [*sorted(chosen), *range(study.next_number, study.next_number + max(trials - len(chosen), 0))]
    planned = []
    for number in numbers:
        name = f"trial-{number:04}"
        labels = _labels(plan.space, chosen[number]) if number in chosen else (MISSING,) * len(plan.space.dimensions)
        run = SweptRun(name, labels, plan.files.run(name), plan.base.recipe.epochs)
        run.look(0.0)
        if number in told:
            run.epochs = max(run.epochs_done, 1)
            run.state = FINISHED if told[number] else FAILED
            run.reason = "" if told[number] else "failed in an earlier call"
        planned.append(PlannedRun(Point(name, (), run.labels), plan.base, run))
    return planned


def _labels(space: Space, chosen: object) -> tuple[str, ...]:
    assert hasattr(chosen, "__getitem__")
    return tuple(chosen[one.key] if isinstance(one, Choice) else f"{chosen[one.key]:.4g}" for one in space.dimensions)


def _number(run: SweptRun) -> int:
    return int(run.name.rpartition("-")[2])


def _says_failed(run: SweptRun) -> bool:
    try:
        return read_json(RunFiles(run.path).status).get("state") == FAILED
    except RunDirectoryError:
        return False


def _checked(corners: Sequence[Sequence[str]], read: Callable[[Sequence[str]], LoadedRecipe]) -> list[LoadedRecipe]:
    loaded: list[LoadedRecipe] = []
    problems: dict[str, None] = {}
    for overrides in corners:
        try:
            loaded.append(read(overrides))
        except RecipeError as error:
            problems.update(dict.fromkeys(error.problems))
    if problems:
        raise RecipeError(problems)
    return loaded


def _takes_fractions(one: Range, space: Space, read: Callable[[Sequence[str]], LoadedRecipe]) -> bool:
    """Whether the key takes other than whole numbers, which the recipe's own check knows: mu=0..1 does."""
    first = {other.key: other.ends[0] for other in space.dimensions}
    halfway = {**first, one.key: repr(one.low + 0.5)}
    try:
        read([*space.fixed, *(f"{key}={text}" for key, text in halfway.items())])
    except RecipeError:
        return False
    return True
