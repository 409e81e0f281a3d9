"""A training session into its run directory, under the eyes of the user; the one place where the wings meet."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import asdict, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from neq_cli.errors import NeqError, RecipeError, RecipeValueError, RunDirectoryError
from neq_cli.events import Compiling, EpochRecord, RunResumed
from neq_cli.jobs.earlier import Earlier, earlier_choices
from neq_cli.jobs.recorder import Recording, status_of
from neq_cli.jobs.resume import Start, find_run, open_run
from neq_cli.jobs.signals import StopRequests
from neq_cli.recipe import Recipe, StochasticPolicy
from neq_cli.recipe.load import LoadedRecipe, dump_recipe
from neq_cli.recipe.shipped import python_files
from neq_cli.runs.store.past_epochs import past_epochs
from neq_cli.runs.store.paths import recipe_folder
from neq_cli.runs.store.run import Run, read_run
from neq_cli.runs.store.writer import ELSEWHERE, RunWriter, default_run_directory, writing
from neq_cli.runs.views.live.progress import Progress
from neq_cli.text import counted, format_metric, printable
from neq_cli.training.bench.options import BenchOptions
from neq_cli.training.startup import Startup

if TYPE_CHECKING:
    from neq_cli.freezing.backward.dispatch import Choice
    from neq_cli.runs.views.tables.bench import BenchProgress
    from neq_cli.training.processes.joined import Processes
    from neq_cli.training.session import Session


def train(
    loaded: LoadedRecipe, run_directory: Path | None, progress: Progress, *, resume: bool = False, loading: float = 0.0
) -> Path:
    """Train ``loaded`` into ``run_directory`` (None: one named after recipe, time and seed) and return that folder.

    ``resume`` goes on where an earlier training of it ended, and begins where there was none. ``loading``: how many
    seconds went by before this. The run's status tells afterwards how it ended. Raises NeqError for what is wrong,
    Terminated or KeyboardInterrupt where a signal ended it, once what was reached is saved. Of several processes, all
    call it.
    """
    from neq_cli.training.processes.joined import in_company, joined, restarted

    processes, resume = joined(), resume or restarted()
    with _own_prints_on_stderr(), StopRequests() as requests, ExitStack() as stack:
        stack.enter_context(processes.watched())
        with in_company(processes), requests.at_once():
            writer, start = None, Start(loaded.recipe)
            if resume and processes.first:
                writer, start = _resumption(loaded, run_directory, processes.count)
            if writer is not None:
                stack.enter_context(writer)
            if processes.first and not start.finished:
                path = run_directory if writer is None else writer.path
                start = replace(start, earlier=_earlier_choices(loaded, path, processes))
            start = processes.shared(start)
            if start.finished:
                return Path(processes.shared(_say_finished(writer, start, progress)))
            if writer is not None:
                writer.check_writable()
            loaded = replace(loaded, recipe=start.recipe)
            stack.enter_context(progress)
            stack.enter_context(_own_prints_on_stderr())  # once more: a display on a terminal prints them above itself
            startup = Startup(progress.show)
            if loading:
                startup.add("loading PyTorch", loading)
            session = prepared(
                loaded,
                processes,
                resumed=start.state is not None,
                choices=start.choices,
                earlier=start.earlier.choices,
                startup=startup,
            )
            started = replace(session.started, notes=(*session.started.notes, *start.earlier.notes))
            session = replace(session, started=started)
            _load(session, start)
            if writer is not None:
                writer.rewind(session.trainer.epoch, dump_recipe(session.recipe), _environment(session))
                for path in start.damaged:
                    with writing(path, ELSEWHERE):
                        path.unlink()
            elif processes.first:
                writer = stack.enter_context(_create_directory(run_directory, loaded.name, session))
        stack.enter_context(status_of(writer))
        if writer is not None:
            processes.last_words(partial(_give_up, writer, progress))
        stack.enter_context(in_company(processes))
        for message in (*start.messages, *([writer.note] if writer is not None and writer.note else [])):
            progress.message(message)
        if writer is not None:
            _write_beginning(writer, loaded, session)
        progress.show(session.started)
        took = startup.summary()
        if took:
            progress.message(f"started in {took}")
        past = past_epochs(read_run(writer.path)) if writer is not None and session.trainer.epoch else ()
        if past:
            progress.show(RunResumed(past))
        with _compiling_told(session.recipe, progress.show):
            Recording(session, writer, progress, requests, _best(session, past)).follow()
        path = Path(processes.shared(writer.path if writer is not None else None))
        progress.message(f"finished: {path}")
    return path


def _give_up(writer: RunWriter, progress: Progress, reason: str) -> None:
    """Leave things in order where the thread that trains waits for a process that is lost."""
    try:
        writer.failed(reason)
    finally:
        progress.__exit__(None, None, None)


def _resumption(loaded: LoadedRecipe, chosen: Path | None, processes: int) -> tuple[RunWriter | None, Start]:
    path, said = find_run(loaded, chosen)
    if path is None:
        return None, Start(loaded.recipe, messages=(said,))
    writer, start = open_run(loaded, path, processes)
    if start.state is not None:
        so_far = start.state["so_far"]
        within = f", {so_far['steps']} steps into the next" if so_far is not None else ""
        said += f" after epoch {start.state['epoch']}{within}"
    return writer, replace(start, messages=(said, *start.messages))


def _earlier_choices(loaded: LoadedRecipe, path: Path | None, processes: Processes) -> Earlier:
    """Return what the runs beside the one at ``path`` have timed, where that one is going to time anything."""
    from neq_cli.training.loop.device import machine, resolve_device

    if loaded.recipe.deterministic or loaded.recipe.backward == "dense":
        return Earlier()
    device = resolve_device(loaded.recipe.device, processes.local_rank if processes.count > 1 else None)
    own = None if path is None else path.absolute()
    folder = recipe_folder(loaded.name) if own is None else own.parent
    return earlier_choices(folder, machine(device, processes.count), own)


def _say_finished(writer: RunWriter | None, start: Start, progress: Progress) -> Path | None:
    if writer is None or start.state is None:
        return None
    run = read_run(writer.path)
    reached = (
        f"{counted(start.state['epoch'], 'epoch')}, {printable(run.metric)} {format_metric(_last(run), run.metric)}"
    )
    if start.state["epoch"] > start.recipe.epochs:
        reached += f", the {start.recipe.epochs} asked for among them"
    progress.message(f"finished already: {writer.path}: {reached}; more epochs=... would extend it")
    return writer.path


def _last(run: Run) -> float:
    """Return the last score that was measured, NaN where none was."""
    scores = run.column(run.metric)
    return float(next((score for score in scores[::-1] if score == score), math.nan))


def _load(session: Session, start: Start) -> None:
    """Put the state that was saved into the session. RunDirectoryError where it is another model's."""
    if start.state is None:
        return
    try:
        session.trainer.load_state_dict(start.state)
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, NeqError) as error:
        reason = printable(" ".join(str(error).split()), 300)
        raise RunDirectoryError(
            f"checkpoint: does not fit what recipe and code make now ({type(error).__name__}: {reason}); undo what "
            "changed in the model's code, or train anew without --resume"
        ) from error


def _environment(session: Session) -> dict[str, Any]:
    from neq_cli.training.loop.device import environment

    trainer = session.trainer
    about = {"data": dict(session.data_content), "processes": trainer.processes.count}
    matched = {} if session.matched_flops is None else {"matched_flops": session.matched_flops}
    return {**environment(trainer.device), **about, **matched}


def _write_beginning(writer: RunWriter, loaded: LoadedRecipe, session: Session) -> None:
    for source in python_files(session.recipe, loaded.directory):
        writer.write_source(source.name, source.read_bytes())
    writer.write_started(session.started)


def _best(session: Session, past: Sequence[EpochRecord]) -> float | None:
    """Return the best score of the epochs that are trained, None where none was measured."""
    scores = [float(epoch.metrics[session.started.metric]) for epoch in past]
    return max((score for score in scores if score == score), default=None)


def prepared(
    loaded: LoadedRecipe,
    processes: Processes | None = None,
    *,
    resumed: bool = False,
    choices: Mapping[str, Any] | None = None,
    earlier: Mapping[str, Choice] | None = None,
    startup: Startup | None = None,
) -> Session:
    """Return the session of ``loaded``, ready to train; the keywords are those of ``training.session.prepare``."""
    from neq_cli.training.session import prepare

    with _located(loaded):
        return prepare(
            loaded.recipe,
            loaded.name,
            matched_flops(loaded),
            processes,
            resumed=resumed,
            choices=choices,
            earlier=earlier,
            startup=startup,
        )


def estimated_flops(loaded: LoadedRecipe) -> dict[str, Any]:
    """Return the fields of ``FlopsEstimate`` for ``loaded``; notes only where there are any."""
    from neq_cli.training.session import estimate_flops

    with _located(loaded):
        estimate = asdict(estimate_flops(loaded.recipe, matched_flops(loaded)))
    return {key: value for key, value in estimate.items() if key != "notes" or value}


def measured_steps(loaded: LoadedRecipe, options: BenchOptions, progress: BenchProgress) -> dict[str, Any]:
    """Return what `neq bench --json` prints; ``progress`` is told how it gets on."""
    from neq_cli.training.bench.measure import bench

    with _located(loaded), _compiling_told(loaded.recipe, progress.compiling):
        return {"recipe": loaded.name, **bench(loaded.recipe, options, progress.show)}


@contextmanager
def _compiling_told(recipe: Recipe, show: Callable[[Compiling], object]) -> Iterator[None]:
    """Have ``show`` told of what is compiled inside, where the recipe asks for that."""
    if not recipe.compile:
        yield
        return
    from neq_cli.training.loop import compiling

    with compiling.told(show):
        yield


@contextmanager
def _located(loaded: LoadedRecipe) -> Iterator[None]:
    """Tell what only data and model show to be wrong with its place in the recipe or on the command line."""
    try:
        with _own_prints_on_stderr():
            yield
    except RecipeValueError as error:
        raise RecipeError([loaded.problem(error.key, error.reason)]) from error


def _own_prints_on_stderr() -> redirect_stdout[TextIO]:
    """Return a context in which what users' own code prints goes to stderr: stdout is for results."""
    return redirect_stdout(sys.stderr)


def matched_flops(loaded: LoadedRecipe) -> float | None:
    """Return the mean paper FLOPs of the run that ``p: match:RUN_DIR`` names; None where the policy names none."""
    policy = loaded.recipe.policy
    if not isinstance(policy, StochasticPolicy) or policy.run_to_match is None:
        return None
    try:
        run = read_run(Path(os.path.expanduser(policy.run_to_match)))  # noqa: PTH111 - leaves ~nobody as it is
        return float(run.column("flops_paper").mean())
    except RunDirectoryError as error:
        raise RecipeError([loaded.problem("policy.p", str(error))]) from error


def _create_directory(chosen: Path | None, name: str, session: Session) -> RunWriter:
    recipe, about = dump_recipe(session.recipe), _environment(session)
    if chosen is not None:
        return RunWriter.create(chosen, recipe, about)
    attempts = 10
    while True:
        attempts -= 1
        try:
            return RunWriter.create(default_run_directory(name, session.recipe.seed, datetime.now()), recipe, about)
        except RunDirectoryError:
            # Another run that began in the same second may have taken the name.
            if not attempts:
                raise
