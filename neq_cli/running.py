"""A training session into its run directory, under the eyes of the user; the one place where the wings meet."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neq_cli.earlier import Earlier, earlier_choices
from neq_cli.errors import NeqError, RecipeError, RunDirectoryError
from neq_cli.recipe import StochasticPolicy
from neq_cli.recipe.file import LoadedRecipe, dump_recipe
from neq_cli.recipe.shipped import python_files
from neq_cli.recording import Recording, status_of
from neq_cli.records import EpochRecord, RunResumed
from neq_cli.resuming import Start, find_run, open_run
from neq_cli.runs.formatting import printable
from neq_cli.runs.past_epochs import past_epochs
from neq_cli.runs.progress import Progress
from neq_cli.runs.run_dir import RunWriter, default_run_directory, writing
from neq_cli.runs.run_files import recipe_folder
from neq_cli.runs.run_reader import read_run
from neq_cli.signals import StopRequests
from neq_cli.training.bench.options import BenchOptions
from neq_cli.training.problems import RecipeValueError
from neq_cli.training.startup import Startup

if TYPE_CHECKING:
    from neq_cli.freezing.dispatch import Choice
    from neq_cli.training.distributed import Processes
    from neq_cli.training.session import Session

_MATCH = "match:"


def train(
    loaded: LoadedRecipe, run_directory: Path | None, progress: Progress, *, resume: bool = False, loading: float = 0.0
) -> Path:
    """Train ``loaded`` into ``run_directory`` (None: one named after recipe, time and seed) and return that folder.

    ``resume`` goes on where an earlier training of it ended, and begins where there was none. ``loading``: how many
    seconds went by before this. The run's status tells afterwards how it ended. Raises NeqError for what is wrong,
    Terminated or KeyboardInterrupt where a signal ended it, once what was reached is saved. Of several processes, all
    call it.
    """
    from neq_cli.training.distributed import in_company, joined, restarted

    processes, resume = joined(), resume or restarted()
    with StopRequests() as requests, ExitStack() as stack:
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
                return Path(processes.shared(_say_finished(writer, progress)))
            loaded = replace(loaded, recipe=start.recipe)
            stack.enter_context(progress)
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
                    with writing(path):
                        path.unlink()
            elif processes.first:
                writer = stack.enter_context(_create_directory(run_directory, loaded.name, session))
        stack.enter_context(status_of(writer))
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
        Recording(session, writer, progress, requests, _best(session, past)).follow()
        path = Path(processes.shared(writer.path if writer is not None else None))
        progress.message(f"finished: {path}")
    return path


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
    from neq_cli.training.device import machine, resolve_device

    if loaded.recipe.deterministic or loaded.recipe.backward == "dense":
        return Earlier()
    device = resolve_device(loaded.recipe.device, processes.local_rank if processes.count > 1 else None)
    own = None if path is None else path.absolute()
    folder = recipe_folder(loaded.name) if own is None else own.parent
    return earlier_choices(folder, machine(device, processes.count), own)


def _say_finished(writer: RunWriter | None, progress: Progress) -> Path | None:
    if writer is None:
        return None
    progress.message(f"finished already: {writer.path}; more epochs=... would extend it")
    return writer.path


def _load(session: Session, start: Start) -> None:
    """Put the state that was saved into the session. RunDirectoryError where it is another model's."""
    if start.state is None:
        return
    try:
        session.trainer.load_state_dict(start.state)
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, NeqError) as error:
        reason = printable(" ".join(str(error).split()), 300)
        raise RunDirectoryError(
            f"checkpoint: does not fit this recipe ({type(error).__name__}: {reason}); train anew without --resume"
        ) from error


def _environment(session: Session) -> dict[str, Any]:
    from neq_cli.training.device import environment

    trainer = session.trainer
    about = {"data": dict(session.data_content), "processes": trainer.processes.count}
    return {**environment(trainer.device), **about}


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
    """Return the fields of ``FlopsEstimate`` for ``loaded``."""
    from neq_cli.training.session import estimate_flops

    with _located(loaded):
        return asdict(estimate_flops(loaded.recipe, matched_flops(loaded)))


def measured_steps(
    loaded: LoadedRecipe, options: BenchOptions, show: Callable[[int, int, str], None]
) -> dict[str, Any]:
    """Return what `neq bench --json` prints; ``show`` is told the visits done, all of them, and what comes next."""
    from neq_cli.training.bench.measuring import bench

    with _located(loaded):
        return {"recipe": loaded.name, **bench(loaded.recipe, options, show)}


@contextmanager
def _located(loaded: LoadedRecipe) -> Iterator[None]:
    """Tell what only data and model show to be wrong with its place in the recipe or on the command line.

    What users' own code prints meanwhile goes to stderr: stdout is for results.
    """
    try:
        with redirect_stdout(sys.stderr):
            yield
    except RecipeValueError as error:
        raise RecipeError([loaded.problem(error.key, error.reason)]) from error


def matched_flops(loaded: LoadedRecipe) -> float | None:
    """Return the mean paper FLOPs of the run that ``p: match:RUN_DIR`` names; None where the policy names none."""
    policy = loaded.recipe.policy
    if not isinstance(policy, StochasticPolicy) or isinstance(policy.p, float) or policy.matched_p is not None:
        return None
    try:
        run = read_run(Path(os.path.expanduser(policy.p.removeprefix(_MATCH))))  # noqa: PTH111 - leaves ~nobody as it is
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
