"""Builds what a loaded recipe names, and tells what only data and model show to be wrong with its place in the file.

``neq train`` takes the session from here; ``neq flops`` and ``neq bench``, which write no run directory, their numbers.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from neq_cli.complaints import complain
from neq_cli.errors import RecipeError, RecipeValueError, RunDirectoryError
from neq_cli.events import Compiling
from neq_cli.recipe import Recipe, StochasticPolicy
from neq_cli.recipe.load import LoadedRecipe
from neq_cli.runs.store.run import read_run
from neq_cli.training.bench.options import BenchOptions
from neq_cli.training.startup import Startup

if TYPE_CHECKING:
    from neq_cli.freezing.backward.dispatch import KernelChoice
    from neq_cli.runs.views.tables.costs import BenchProgress
    from neq_cli.training.machine.memory_format import Agree
    from neq_cli.training.processes.joined import Processes
    from neq_cli.training.session import Session


def load(reference: str, overrides: Sequence[str] = (), *, warn: bool = True) -> LoadedRecipe:
    """Return the checked recipe; its warnings go to stderr, unless another process says them."""
    from neq_cli.jobs.tracking.libraries import check_track
    from neq_cli.recipe.entrypoints import add_import_folder
    from neq_cli.recipe.keys import warnings
    from neq_cli.recipe.load import find_recipe, load_recipe
    from neq_cli.training.checks import check_section
    from neq_cli.training.models.image_defaults import with_image_defaults

    # Before the checks: they import entrypoints, which may lie beside the recipe.
    add_import_folder(find_recipe(reference).parent)
    loaded = load_recipe(reference, overrides, checks=[check_section, check_track], complete=with_image_defaults)
    for warning in warnings(loaded.recipe) if warn else ():
        complain(f"warning: {warning}")
    return loaded


def load_text(text: str, path: Path, file: str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Return the checked recipe in ``text``, which the file of weights ``path``, called ``file``, holds."""
    from neq_cli.recipe import load as reading
    from neq_cli.recipe.entrypoints import add_import_folder
    from neq_cli.training.checks import check_section
    from neq_cli.training.models.image_defaults import with_image_defaults

    add_import_folder(path.parent)
    return reading.load_text(text, path, file, overrides, [check_section], with_image_defaults)


def prepared(
    loaded: LoadedRecipe,
    processes: Processes | None = None,
    *,
    resumed: bool = False,
    choices: Mapping[str, Any] | None = None,
    earlier: Mapping[str, KernelChoice] | None = None,
    agree: Agree | None = None,
    startup: Startup | None = None,
) -> Session:
    """Return the session of ``loaded``, ready to train; the keywords are those of ``training.session.prepare``."""
    from neq_cli.training.session import prepare

    with located(loaded):
        return prepare(
            loaded.recipe,
            loaded.name,
            matched_flops(loaded),
            processes,
            resumed=resumed,
            choices=choices,
            earlier=earlier,
            agree=agree,
            startup=startup,
            notes=loaded.notes,
        )


def estimated_coverage(loaded: LoadedRecipe) -> dict[str, Any]:
    """Return what share of the model of ``loaded`` are neurons, in the plain values of ``Coverage``."""
    from neq_cli.training.estimate import estimate_coverage

    with located(loaded):
        return estimate_coverage(loaded.recipe).to_dict()


def summarised(loaded: LoadedRecipe) -> dict[str, Any]:
    """Return what ``loaded`` comes to, in the plain values of ``Summary``; its data is opened where it lies here."""
    from neq_cli.training.summary import summarise

    with located(loaded):
        return summarise(loaded.recipe).to_dict()


def estimated_flops(loaded: LoadedRecipe) -> dict[str, Any]:
    """Return the fields of ``FlopsEstimate`` for ``loaded``; notes only where there are any."""
    from neq_cli.training.estimate import estimate_flops

    with located(loaded):
        estimate = asdict(estimate_flops(loaded.recipe, matched_flops(loaded)))
    estimate["notes"] = (*loaded.notes, *estimate["notes"])
    return {key: value for key, value in estimate.items() if key != "notes" or value}


def measured_steps(loaded: LoadedRecipe, options: BenchOptions, progress: BenchProgress) -> dict[str, Any]:
    """Return what `neq bench --json` prints; ``progress`` is told how it gets on."""
    from neq_cli.training.bench.measure import bench

    with located(loaded), compiling_told(loaded.recipe, progress.compiling):
        return {"recipe": loaded.name, **bench(loaded.recipe, options, progress.show)}


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


@contextmanager
def compiling_told(recipe: Recipe, show: Callable[[Compiling], object]) -> Iterator[None]:
    """Have ``show`` told of what is compiled inside, where the recipe asks for that."""
    if not recipe.compile:
        yield
        return
    from neq_cli.training.machine import compiling

    with compiling.told(show):
        yield


@contextmanager
def located(loaded: LoadedRecipe) -> Iterator[None]:
    """Tell what only data and model show to be wrong with its place in the recipe or on the command line."""
    try:
        with own_prints_on_stderr():
            yield
    except RecipeValueError as error:
        raise RecipeError([loaded.problem(error.key, error.reason, error.others)]) from error


def own_prints_on_stderr() -> redirect_stdout[TextIO]:
    """Return a context in which what users' own code prints goes to stderr: stdout is for results."""
    return redirect_stdout(sys.stderr)
