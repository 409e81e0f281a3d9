"""Finds the run that ``--resume`` goes on with, and reads where it stands; every reason not to is one line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neq_cli.errors import NeqError, RecipeError, RunDirectoryError
from neq_cli.jobs.earlier_kernels import Earlier
from neq_cli.recipe import Problem, Recipe
from neq_cli.recipe.load import LoadedRecipe
from neq_cli.runs.store.brief import read_brief
from neq_cli.runs.store.content import parse_content
from neq_cli.runs.store.folders import runs_of_folder
from neq_cli.runs.store.paths import check_resumable
from neq_cli.runs.store.resumable import ANEW, differences, ended_at_rest, merged, newest_unfinished, stored_recipe
from neq_cli.runs.store.run import Run, read_run
from neq_cli.runs.store.untrusted import damaged, read_json
from neq_cli.runs.store.writer import RunWriter
from neq_cli.text import counted, format_metric, printable, some_of

if TYPE_CHECKING:
    from neq_cli.training.session import Session


@dataclass(frozen=True)
class Start:
    """From where a run starts; by default from nothing. ``state`` is None where nothing was saved yet."""

    recipe: Recipe
    state: Mapping[str, Any] | None = None
    choices: Mapping[str, Any] = field(default_factory=dict)  # of kernels, made so far
    finished: bool = False
    messages: tuple[str, ...] = ()
    damaged: tuple[Path, ...] = ()  # checkpoints that must not become the one before last
    earlier: Earlier = field(default_factory=Earlier)


def resumption(loaded: LoadedRecipe, chosen: Path | None, processes: int) -> tuple[RunWriter | None, Start]:
    """Take the run that ``loaded`` goes on with, and read from where; None and a start from nothing without one."""
    path, said = find_run(loaded, chosen)
    if path is None:
        return None, Start(loaded.recipe, messages=(said,))
    writer, start = open_run(loaded, path, processes)
    if start.state is not None:
        so_far = start.state["so_far"]
        within = f", {counted(so_far['steps'], 'step')} into the next" if so_far is not None else ""
        said += f" after {start.recipe.unit} {start.state['epoch']}{within}"
    return writer, replace(start, messages=(said, *start.messages))


def find_run(loaded: LoadedRecipe, chosen: Path | None) -> tuple[Path | None, str]:
    """Return the run that ``loaded`` goes on with, None where there is none yet, and a line that says which.

    That is ``chosen`` where it is given, else the newest one of the recipe's name and seed, an unfinished one first.
    """
    if chosen is not None:
        _refuse_folder_of_runs(chosen)
        check_resumable(chosen)
        path = chosen if chosen.exists() or chosen.is_symlink() else None
        name = str(chosen)
    else:
        found = newest_unfinished(loaded.name, loaded.recipe.seed)
        path = found.path if found is not None else None
        name = f"{loaded.name} with seed {loaded.recipe.seed}" if path is None else str(path)
    return path, f"nothing to resume of {name}; beginning" if path is None else f"resuming {name}"


def _refuse_folder_of_runs(path: Path) -> None:
    """Raise RunDirectoryError where ``path`` holds runs: which of them is to train on is not for neq to guess."""
    briefs = sorted(map(read_brief, runs_of_folder(path)), key=lambda brief: brief.order, reverse=True)
    if not briefs:
        return
    told = some_of(f"{printable(brief.path)} ({brief.status.state})" for brief in briefs)
    what = f"{printable(path)}: holds {counted(len(briefs), 'run')}, and is none itself: {told}"
    raise RunDirectoryError(f"{what}; give the one to go on with by -o, or leave -o out for the newest unfinished one")


def open_run(loaded: LoadedRecipe, path: Path, processes: int) -> tuple[RunWriter, Start]:
    """Take the run at ``path``, so that no other process does, and read what it goes on from, where it lies.

    ``processes``: how many will train it. Raises RecipeError where ``loaded`` differs in what must stay, and
    RunDirectoryError where the run is another process's, damaged, or no run.
    """
    writer = RunWriter.reopen(path)
    try:
        return writer, _read(loaded, writer, processes)
    except BaseException:
        writer.close()
        raise


def _read(loaded: LoadedRecipe, writer: RunWriter, processes: int) -> Start:
    if writer.is_new:
        return Start(loaded.recipe)
    stored = stored_recipe(writer.path)
    problems = differences(stored, loaded.recipe, writer.path)
    recipe = merged(stored, loaded.recipe)
    state, messages, bad = read_checkpoint(writer, whole=recipe.parallel != "fsdp" or processes == 1)
    status = read_json(writer.files.status) if writer.files.status.exists() else {}
    # A run that was extended has more than its first command line asks for, and is as finished.
    finished = (
        status.get("state") == "finished"
        and state is not None
        and (state["passes"] >= recipe.epochs or ended_at_rest(stored, recipe, state["passes"]))
    )
    if state is not None:
        if not finished:
            problems += _epochs_problems(stored, recipe, state) + _energy_problems(writer, recipe, state)
        said, wrong = _images_a_step(stored, recipe, len(state["processes"]), processes)
        messages += said
        problems += wrong
    if problems:
        raise RecipeError([loaded.problem(problem.key, problem.message) for problem in problems])
    return Start(recipe, state, _kernel_choices(writer), finished, tuple(messages), bad)


def _epochs_problems(stored: Recipe, recipe: Recipe, state: Mapping[str, Any]) -> list[Problem]:
    """Return what is wrong with ``epochs`` where more are trained than ``recipe`` asks for."""
    trained = state["passes"] + (state["so_far"] is not None)
    if recipe.epochs >= trained:
        return []
    said = f"{recipe.epochs}, but epoch {trained} is trained, on the way to {stored.epochs}"
    or_end = f", or {trained} to end there" if trained < stored.epochs else ""
    return [Problem("epochs", f"{said}; give {stored.epochs} to go on{or_end}")]


def _energy_problems(writer: RunWriter, recipe: Recipe, state: Mapping[str, Any]) -> list[Problem]:
    """Return what is wrong where energy is asked for, and the table of epochs has no room for it."""
    if not recipe.energy or not state["epoch"]:
        return []
    asked = {"joules": "energy", **({} if recipe.grams_per_kwh is None else {"co2_grams": "grams_per_kwh"})}
    rows = read_run(writer.path).rows
    begun = f"{printable(writer.path)} was begun without it, and its table keeps its columns"
    said = f"{begun}; leave it out, {ANEW}"
    return [Problem(key, said) for column, key in asked.items() if column not in rows[0]]


def _images_a_step(stored: Recipe, recipe: Recipe, begun: int, processes: int) -> tuple[list[str], list[Problem]]:
    """Return what the user should know where a step has another number of images, and what is wrong where asked for."""
    before, now = stored.batch_size * begun, recipe.batch_size * processes
    if before == now:
        return [], []
    messages = [f"{processes} processes, begun with {begun}: {now} images a step, not {before}"]
    if recipe.batch_size == stored.batch_size:
        return messages, []
    said = f"{recipe.batch_size} in {processes} processes are {now} images a step, but the run has {before}"
    return messages, [Problem("batch_size", f"{said}; keep that number, {ANEW}")]


def read_checkpoint(
    writer: RunWriter, *, whole: bool = True
) -> tuple[Mapping[str, Any] | None, list[str], tuple[Path, ...]]:
    """Return the last checkpoint that is whole, None where none was written yet, and what the user should know of it.

    ``whole``: with all of what lies in shards; else that is read where it is needed. Last come the files that are
    damaged. Raises RunDirectoryError where there are checkpoints and all are damaged.
    """
    from neq_cli.training.loop.checkpoint import load_state

    problems: list[str] = []
    bad: list[Path] = []
    for name in ("last", "previous"):
        path = writer.checkpoint_path(name)
        if not path.exists():
            continue
        try:
            state = _completed(load_state(path, whole=whole))
            _check(path, state)
        except RunDirectoryError as error:
            problems.append(str(error))
            bad.append(path)
        else:
            return state, [f"{problem}; going on from {path.name}" for problem in problems], tuple(bad)
    if problems:
        raise RunDirectoryError("\n".join([*problems, f"{writer.path}: no checkpoint is whole; train anew"]))
    return None, [], ()


def restore(session: Session, start: Start) -> None:
    """Put the state that was saved into the session. RunDirectoryError where it is another model's."""
    if start.state is None:
        return
    try:
        session.trainer.load_state_dict(start.state)
    except RunDirectoryError:
        raise
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, NeqError) as error:
        if session.trainer.processes.may_be_loss(error):
            raise
        reason = printable(" ".join(str(error).split()), 300)
        raise RunDirectoryError(
            f"checkpoint: does not fit what recipe and code make now ({type(error).__name__}: {reason}); undo what "
            "changed in the model's code, or train anew without --resume"
        ) from error


def check_held_out(writer: RunWriter, data: Mapping[str, Any]) -> None:
    """Raise RunDirectoryError where ``data``, as it is now, would hold out other images than the run has so far.

    Some of these have been trained on. What is told of data are counts: of files that took the place of others no more
    is known than of any training data.
    """
    path = writer.files.environment
    before = parse_content(read_json(path).get("data"), path).held_out if path.exists() else None
    now = parse_content(data, path).held_out
    if before is not None and now is not None and before != now:
        what = f"{now[0]} of {now[1]} images would be held out, and so far {before[0]} of {before[1]} were"
        mend = "restore the data, or train anew without --resume"
        raise RunDirectoryError(f"data.validation: {what}, so that some would be tested that were trained on; {mend}")


def finished_already(writer: RunWriter, start: Start, *, path_told: bool) -> str:
    """Return the line that tells how far a finished run is trained, and how good it is.

    ``path_told``: without its directory, which the caller tells.
    """
    epoch = start.state["passes"] if start.state is not None else 0
    said = reached(read_run(writer.path), epoch)
    if epoch > start.recipe.epochs:
        said += f", the {start.recipe.epochs} asked for among them"
    more = "more epochs=..."
    if epoch < start.recipe.epochs:
        said += f" of {start.recipe.epochs}, ended by stop_when_frozen={start.recipe.stop_when_frozen}"
        more = "stop_when_frozen=null"
    place = "" if path_told else f" {writer.path}:"
    return f"finished already:{place} {said}; {more} would extend it"


def reached(run: Run, epochs: int | None = None) -> str:
    """Return how far a run is trained, and how good it is: "30 epochs, test_top1 98.61"; ``epochs``: of those asked."""
    scores = run.column(run.metric)
    last = float(next((score for score in scores[::-1] if score == score), math.nan))  # the last that was measured
    length = counted(run.epochs, run.unit) if epochs is None else counted(epochs, "epoch")
    return f"{length}, {printable(run.metric)} {format_metric(last, run.metric)}"


def _completed(state: Any) -> Any:
    """Return ``state`` with what an earlier neq did not tell, which observed at the end of every pass."""
    if not isinstance(state, dict):
        return state
    so_far = state.get("so_far")
    if isinstance(so_far, dict):
        passed = {"pass_steps": so_far.get("steps"), "pass_images": so_far.get("images")}
        so_far = {**passed, "joules": math.nan, **so_far}
    return {"passes": state.get("epoch"), "updates": 0, **state, "so_far": so_far}


def _check(path: Path, state: object) -> None:
    """Raise RunDirectoryError unless ``state`` has what is looked at before the model is built."""
    so_far = state.get("so_far") if isinstance(state, dict) else None
    counts = [state.get(key) for key in ("epoch", "passes", "updates")] if isinstance(state, dict) else [None]
    if isinstance(so_far, dict):
        counts += [so_far.get(key) for key in ("epoch", "steps", "images", "pass_steps", "pass_images")]
    if not all(type(count) is int and 0 <= count < 2**48 for count in counts):
        raise damaged(path, "not the state of a run")
    assert isinstance(state, dict)
    if not (isinstance(so_far, dict | None) and isinstance(state.get("processes"), list) and state["processes"]):
        raise damaged(path, "not the state of a run")


def _kernel_choices(writer: RunWriter) -> Mapping[str, Any]:
    path = writer.files.dispatch
    choices = read_json(path).get("choices", {}) if path.exists() else {}
    if not isinstance(choices, dict):
        raise damaged(path, "choices: not a mapping")
    return choices
