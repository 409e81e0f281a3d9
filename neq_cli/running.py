"""A training session into its run directory, under the eyes of the user; the one place where the wings meet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neq_cli.errors import NeqError, RecipeError, RunDirectoryError, Terminated, TrainingError
from neq_cli.recipe import Recipe, StochasticPolicy
from neq_cli.recipe.file import LoadedRecipe, dump_recipe
from neq_cli.recipe.shipped import python_files
from neq_cli.records import EpochRecord
from neq_cli.runs.progress import Progress
from neq_cli.runs.run_dir import RunWriter, atomic_write, default_run_directory, writing
from neq_cli.runs.run_reader import read_run
from neq_cli.training.bench.options import BenchOptions
from neq_cli.training.problems import RecipeValueError

if TYPE_CHECKING:
    from neq_cli.freezing.dispatch import Dispatch
    from neq_cli.training.session import Session

_MATCH = "match:"


def train(loaded: LoadedRecipe, run_directory: Path | None, progress: Progress) -> Path:
    """Train ``loaded`` into ``run_directory`` (None: one named after recipe, time and seed) and return that folder.

    Its status tells afterwards how it ended. Raises NeqError for what is wrong, KeyboardInterrupt or Terminated where
    a signal ended it; what was saved stays.
    """
    from neq_cli.training.device import environment

    session = prepared(loaded)
    about = {**environment(session.trainer.device), "data": dict(session.data_content)}
    writer = _create_directory(run_directory, loaded.name, session.recipe, about)
    with _status_of(writer), progress:
        for source in python_files(session.recipe, loaded.directory):
            writer.write_source(source.name, source.read_bytes())
        writer.write_started(session.started)
        _keep_kernel_choices(session, writer)
        progress.show(session.started)
        _stream(session, writer, progress)
        progress.message(f"finished: {writer.path}")
    return writer.path


def prepared(loaded: LoadedRecipe) -> Session:
    """Return the session of ``loaded``, ready to train."""
    from neq_cli.training.session import prepare

    with _located(loaded):
        return prepare(loaded.recipe, loaded.name, matched_flops(loaded))


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
    """Tell what only data and model show to be wrong with its place in the recipe or on the command line."""
    try:
        yield
    except RecipeValueError as error:
        raise RecipeError([loaded.problem(error.key, error.reason)]) from error


def matched_flops(loaded: LoadedRecipe) -> float | None:
    """Return the mean paper FLOPs of the run that ``p: match:RUN_DIR`` names; None where the policy names none."""
    policy = loaded.recipe.policy
    if not isinstance(policy, StochasticPolicy) or isinstance(policy.p, float) or policy.matched_p is not None:
        return None
    try:
        run = read_run(Path(policy.p.removeprefix(_MATCH)).expanduser())
        return float(run.column("flops_paper").mean())
    except RunDirectoryError as error:
        raise RecipeError([loaded.problem("policy.p", str(error))]) from error


def _create_directory(chosen: Path | None, name: str, recipe: Recipe, about: Mapping[str, Any]) -> RunWriter:
    if chosen is not None:
        return RunWriter.create(chosen, dump_recipe(recipe), about)
    attempts = 10
    while True:
        attempts -= 1
        try:
            path = default_run_directory(name, recipe.seed, datetime.now())
            return RunWriter.create(path, dump_recipe(recipe), about)
        except RunDirectoryError:
            # Another run that began in the same second may have taken the name.
            if not attempts:
                raise


def _stream(session: Session, writer: RunWriter, progress: Progress) -> None:
    best: float | None = None
    for record in session.trainer.run():
        if isinstance(record, EpochRecord):
            writer.write_epoch(record)
            score = record.metrics[session.started.metric]
            improved = score == score and (best is None or score > best)
            best = score if improved else best
            _save_checkpoints(session, writer, improved=improved)
        progress.show(record)
    _save_weights(session, writer)


def _keep_kernel_choices(session: Session, writer: RunWriter) -> None:
    """Have every choice of a kernel written before it is first used, and what is dense whatever the choice."""
    freezer = session.trainer.freezer

    def write(dispatch: Dispatch) -> None:
        dense = {} if freezer.backward == "dense" else freezer.anatomy.dense_because
        writer.write_dispatch({"backward": freezer.backward, "dense": dense, "choices": dispatch.state_dict()})

    write(freezer.dispatch)
    freezer.dispatch.on_choice = write


def _save_checkpoints(session: Session, writer: RunWriter, *, improved: bool) -> None:
    """Write the checkpoints, the last files of an epoch."""
    from neq_cli.training.checkpoint import save_state

    state = session.trainer.state_dict()
    last, previous = writer.checkpoint_path("last"), writer.checkpoint_path("previous")

    def write_and_move_on(path: Path) -> None:
        save_state(state, path)
        if last.exists():
            last.replace(previous)

    with writing(last):
        atomic_write(last, write_and_move_on)
    if improved:
        best = writer.checkpoint_path("best")
        with writing(best):
            atomic_write(best, lambda path: save_state(state, path))


def _save_weights(session: Session, writer: RunWriter) -> None:
    from neq_cli.training.checkpoint import save_weights

    weights = session.trainer.tested_model.state_dict()
    metadata = {"recipe": session.started.recipe_name, "epoch": str(session.trainer.epoch)}
    with writing(writer.weights_path):
        atomic_write(writer.weights_path, lambda path: save_weights(weights, path, metadata))


@contextmanager
def _status_of(writer: RunWriter) -> Iterator[None]:
    """Say in status.json how what happens inside ended."""
    try:
        yield
    except KeyboardInterrupt:
        writer.interrupted("SIGINT")
        raise
    except Terminated:
        writer.interrupted("SIGTERM")
        raise
    except BaseException as error:
        # A full disk fails this too; the first error is the one to show.
        with suppress(TrainingError):
            writer.failed(str(error) if isinstance(error, NeqError) else f"{type(error).__name__}: {error}")
        raise
    else:
        writer.finish()
