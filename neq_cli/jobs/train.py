"""Trains a recipe into a run directory, from its start or from where an earlier training of it ended.

The steps stand in ``train`` in their order; each is told in the function or module that takes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from neq_cli.errors import RunDirectoryError
from neq_cli.events import EpochRecord, RunResumed
from neq_cli.jobs.checkpoints import check_reached
from neq_cli.jobs.earlier_kernels import choices_beside
from neq_cli.jobs.follower import Follower, about, create_directory, write_beginning
from neq_cli.jobs.prepare import compiling_told, own_prints_on_stderr, prepared
from neq_cli.jobs.recording import status_of
from neq_cli.jobs.resume import Start, check_held_out, finished_already, reached, restore, resumption
from neq_cli.jobs.stop_requests import StopRequests
from neq_cli.jobs.sweep.memory_format import format_of_sweep
from neq_cli.jobs.tracking.teller import Tracking
from neq_cli.recipe.load import LoadedRecipe, dump_recipe
from neq_cli.runs.compare.saving import nothing_saved
from neq_cli.runs.store.disk import writing
from neq_cli.runs.store.run import past_epochs, read_run
from neq_cli.runs.store.writer import ELSEWHERE, RunWriter
from neq_cli.runs.views.live.progress import Progress
from neq_cli.training.startup import Startup

if TYPE_CHECKING:
    from neq_cli.training.processes.joined import Processes
    from neq_cli.training.session import Session


def train(
    loaded: LoadedRecipe,
    run_directory: Path | None,
    progress: Progress,
    *,
    resume: bool = False,
    loading: float = 0.0,
    command: Sequence[str] = (),
    path_told: bool = False,
) -> Path:
    """Train ``loaded`` into ``run_directory`` (None: one named after recipe, time and seed) and return that folder.

    ``resume`` goes on where an earlier training of it ended, and begins where there was none. ``loading``: how many
    seconds went by before this. ``command`` has the words that go on with the run, but for its directory, which comes
    behind them. ``path_told``: the caller tells the directory, so that the last line need not. The run's status tells
    afterwards how it ended. Raises NeqError for what is wrong, Terminated or KeyboardInterrupt where a signal ended it,
    once what was reached is saved. Of several processes, all call it.
    """
    from neq_cli.training.processes.joined import in_company, joined, restarted

    processes = joined()
    with own_prints_on_stderr(), StopRequests() as requests, ExitStack() as stack:
        stack.enter_context(processes.watched())
        # Nothing is written yet that a signal could leave in pieces: it ends all there and then.
        with in_company(processes), requests.at_once():
            writer, start = _find_start(loaded, run_directory, processes, stack, resume=resume or restarted())
            if start.finished:
                if writer is not None:
                    progress.message(finished_already(writer, start, path_told=path_told))
                return Path(processes.shared(writer.path if writer is not None else None))
            if writer is not None:
                writer.check_writable()
            stack.enter_context(progress)
            stack.enter_context(own_prints_on_stderr())  # once more: a display on a terminal prints them above itself
            startup = Startup(progress.show)
            if loading:
                startup.add("loading PyTorch", loading)
            session = _build(replace(loaded, recipe=start.recipe), run_directory, start, processes, startup)
            stack.callback(session.trainer.energy.close)
            if writer is not None:
                _rewind(writer, session, start)
            elif processes.first:
                writer = stack.enter_context(create_directory(run_directory, loaded.name, session))
        if session.trainer.divided is not None:
            check_reached(processes, writer)
        tracking = stack.enter_context(Tracking(session.recipe.track, writer))  # is left when it is known how it ended
        # From here on the run has a status, and the other processes are told of a failure before it is written there.
        stack.enter_context(status_of(writer))
        if writer is not None:
            processes.last_words(partial(_give_up, writer, progress))
        stack.enter_context(in_company(processes))
        for message in (*start.messages, *([writer.note] if writer is not None and writer.note else [])):
            progress.message(message)
        if writer is not None:
            write_beginning(writer, session, loaded.directory)
        past = past_epochs(read_run(writer.path)) if writer is not None and session.trainer.epoch else ()
        _show_beginning(progress, session, startup, past)
        tracking.show(session.started)
        with compiling_told(session.recipe, progress.show):
            Follower(session, writer, progress, requests, past, _best(session, past), tracking, command).follow()
        path = Path(processes.shared(writer.path if writer is not None else None))
        for line in _last_lines(path, path_told=path_told) if writer is not None else ():
            progress.closing(line)
    return path


def _last_lines(path: Path, *, path_told: bool) -> Iterator[str]:
    """Yield how the run came to its end, and why its freezing saved nothing where it did not."""
    place = "" if path_told else f": {path}"
    try:
        run = read_run(path)
        said, why = reached(run), nothing_saved(run)
    except RunDirectoryError:  # changed by somebody else meanwhile; `neq inspect` says how
        yield f"finished{place}"
        return
    yield f"finished: {said}{place}"
    if why is not None:
        yield f"nothing saved: {why}"


def _find_start(
    loaded: LoadedRecipe, chosen: Path | None, processes: Processes, stack: ExitStack, *, resume: bool
) -> tuple[RunWriter | None, Start]:
    """Return from where all processes start, as the first one finds it; and in that one the run that goes on."""
    writer, start = None, Start(loaded.recipe)
    if resume and processes.first:
        writer, start = resumption(loaded, chosen, processes.count)
    if writer is not None:
        stack.enter_context(writer)
    if processes.first and not start.finished:
        path = chosen if writer is None else writer.path
        start = replace(start, earlier=choices_beside(loaded, path, processes))
    return writer, processes.shared(start)


def _build(loaded: LoadedRecipe, chosen: Path | None, start: Start, processes: Processes, startup: Startup) -> Session:
    """Return the session, with the state that was saved."""
    session = prepared(
        loaded,
        processes,
        resumed=start.state is not None,
        choices=start.choices,
        earlier=start.earlier.choices,
        agree=format_of_sweep(loaded.recipe, chosen, processes),
        startup=startup,
    )
    started = replace(session.started, notes=(*session.started.notes, *start.earlier.notes))
    restore(session, start)
    return replace(session, started=replace(started, epochs=session.trainer.planned))


def _rewind(writer: RunWriter, session: Session, start: Start) -> None:
    """Bring a run directory back to where the session goes on from, without the checkpoints that are damaged."""
    if start.state is not None:
        check_held_out(writer, session.data_content)
    writer.rewind(session.trainer.epoch, dump_recipe(session.recipe), about(session))
    for path in start.damaged:
        with writing(path, ELSEWHERE):
            path.unlink()


def _show_beginning(progress: Progress, session: Session, startup: Startup, past: Sequence[EpochRecord]) -> None:
    progress.show(session.started)
    took = startup.summary()
    if took:
        progress.message(f"started in {took}")
    if past:
        progress.show(RunResumed(tuple(past)))


def _best(session: Session, past: Sequence[EpochRecord]) -> float | None:
    """Return the best score of the epochs that are trained, None where none was measured."""
    scores = [float(epoch.metrics[session.started.metric]) for epoch in past]
    best_of = min if session.started.lower_is_better else max
    return best_of((score for score in scores if score == score), default=None)


def _give_up(writer: RunWriter, progress: Progress, reason: str) -> None:
    """Leave things in order where the thread that trains waits for a process that is lost."""
    try:
        writer.failed(reason)
    finally:
        progress.__exit__(None, None, None)
