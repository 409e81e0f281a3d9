"""Finds trained weights with all that is needed to use them: in a run directory, or in a file; writes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from neq_cli.errors import NeqError, RecipeError, RunDirectoryError
from neq_cli.jobs.prepare import load, load_text
from neq_cli.recipe.load import LoadedRecipe
from neq_cli.recipe.load import load_text as parse_recipe
from neq_cli.recipe.recorded import is_recorded
from neq_cli.recipe.shipped import entrypoints
from neq_cli.runs.store.content import Content, content_in, parse_content
from neq_cli.runs.store.paths import CHECKPOINTS, RunFiles
from neq_cli.runs.store.run import Run, read_run
from neq_cli.runs.store.untrusted import Number
from neq_cli.text import escaped

if TYPE_CHECKING:
    from neq_cli.training.data.picture import Known
    from neq_cli.training.loop.checkpoint import Weights

WhichWeights = Literal["best", "last", "final"]
TORCH_SUFFIXES = (".pt", ".pth", ".ts", ".torchscript")
"""Of files that `torch` or `torch.jit` has written, state dicts and graphs alike; what is in one tells which."""


@dataclass(frozen=True)
class Trained:
    """Weights, the recipe that they were trained by, and what is told of the data."""

    name: str  # of the run
    place: Path  # of the weights
    which: str  # "best", "last", "final", "previous", or "file"
    weights: Weights
    loaded: LoadedRecipe
    content: Content
    recorded: Mapping[str, Number] = field(default_factory=dict)  # the row of metrics.csv of their epoch


def find_trained(
    given: Path,
    which: WhichWeights | None = None,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
) -> Trained:
    """Return the weights in the run directory or file ``given``, whose recipe is changed by ``overrides``.

    ``which`` of a run's; None: the best, the final ones where there are none, else the last. ``recipe`` is for a file
    that tells none. The recipe's entrypoints are imported. Raises NeqError, one line.
    """
    try:
        run_directory = given if given.is_dir() or not given.exists() else _run_of(given)
    except OSError:  # no permission to look: reading it then says so
        run_directory = given
    if run_directory is None:
        if which is not None:
            raise NeqError(f"{_shown(given)}: is one file of weights; --weights {which} is for a run directory")
        return _of_file(given, recipe, overrides)
    if recipe is not None:
        raise NeqError(f"{_shown(given)}: has its own recipe; leave out --recipe, and change it by KEY=VALUE")
    if which is not None and run_directory != given:
        raise NeqError(f"{_shown(given)}: is one file of weights; give {_shown(run_directory)} for --weights {which}")
    return _of_run(run_directory, given if run_directory != given else None, which, overrides)


def known_images(content: Content) -> Known:
    """Return what a run tells of its data, as far as images are prepared by it."""
    from neq_cli.training.data.picture import Known

    return Known(
        classes=content.classes,
        image_shape=content.image_shape,
        statistics=content.statistics,
        normalised=content.statistics is not None if content.tells_statistics else None,
    )


def _of_run(directory: Path, file: Path | None, which: WhichWeights | None, overrides: Sequence[str]) -> Trained:
    from neq_cli.training.loop.checkpoint import read_weights_whole

    run = read_run(directory)
    if is_recorded(run.recipe):
        what = "was recorded from a training loop that neq does not know, nor can it make its model; test it there"
        raise RunDirectoryError(f"{_shown(directory)}: {what}")
    content = parse_content(run.environment.get("data"), run.files.environment)
    kinds = {name: run.files.checkpoint(name) for name in CHECKPOINTS} | {"final": run.files.weights}
    name = next(name for name, path in kinds.items() if path == file) if file else _chosen(run, kinds, which)
    loaded = load(str(run.files.recipe), overrides, warn=False)
    weights = read_weights_whole(kinds[name])
    # Once more: a run that trains has written rows since, and that of these weights before them.
    rows = read_run(directory).rows
    row = next((row for row in rows if weights.epoch is not None and row["epoch"] == weights.epoch), {})
    recorded = {key.removeprefix("test_"): value for key, value in row.items() if key.startswith("test_")}
    return Trained(run.recipe_name, kinds[name], name, weights, loaded, content, recorded)


def _chosen(run: Run, kinds: Mapping[str, Path], which: WhichWeights | None) -> str:
    there = [name for name in ("best", "final", "last") if kinds[name].is_file()]
    if which is None and there:
        return there[0]
    if which in there:
        return str(which)
    missing = run.path if which is None else kinds[which]
    mend = f"take --weights {there[0]}" if there else "and no other weights; train it further or anew"
    raise RunDirectoryError(f"{_shown(missing)}: not there{'; ' if there else ', '}{mend}")


def _of_file(file: Path, recipe: str | None, overrides: Sequence[str]) -> Trained:
    weights = _read(file)
    if recipe is not None:
        loaded = load(recipe, overrides, warn=False)
    elif "recipe_yaml" in weights.metadata:
        _refuse_python(weights.metadata["recipe_yaml"], file)
        loaded = load_text(weights.metadata["recipe_yaml"], file.absolute(), str(file), overrides)
    else:
        raise RecipeError([f"{_shown(file)}: does not tell the recipe it was trained by; give it: --recipe RECIPE"])
    name = weights.metadata.get("recipe", loaded.name)
    return Trained(name, file, "file", weights, loaded, content_in(weights.metadata, file))


def _read(file: Path) -> Weights:
    """Return the weights of a file by its suffix; NeqError for a graph, which is no state_dict of a model."""
    from neq_cli.training.loop.checkpoint import read_weights_whole
    from neq_cli.training.loop.torch_file import INSTEAD_OF_GRAPH, read_torch

    if file.suffix == ".onnx":
        raise NeqError(f"{_shown(file)}: is a graph for ONNX runtimes; {INSTEAD_OF_GRAPH}")
    return read_torch(file) if file.suffix in TORCH_SUFFIXES else read_weights_whole(file)


def _refuse_python(recipe_yaml: str, file: Path) -> None:
    """Raise NeqError where the recipe in a file of weights would have Python called: who opens weights expects none."""
    named = entrypoints(parse_recipe(recipe_yaml, file, str(file)).recipe)
    if named:
        what = f"its recipe calls Python, {escaped(named[0])}, which weights alone may not"
        mend = "where you trust it, give the recipe, and the Python beside it, by --recipe RECIPE"
        raise NeqError(f"{_shown(file)}: {what}; {mend}")


def _run_of(file: Path) -> Path | None:
    """Return the run directory that a file of weights lies in where it belongs; None where it lies elsewhere."""
    for root in (file.parent, file.parent.parent):
        files = RunFiles(root)
        if file in (files.weights, *map(files.checkpoint, CHECKPOINTS)) and files.recipe.is_file():
            return root
    return None


def _shown(path: Path) -> str:
    return escaped(str(path))
