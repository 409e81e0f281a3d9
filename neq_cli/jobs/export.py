"""Writes a run's weights, or its model as a graph, into one file for other programs; the run is left as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from neq_cli.complaints import complain
from neq_cli.errors import NeqError, RunDirectoryError
from neq_cli.jobs.prepare import own_prints_on_stderr
from neq_cli.jobs.trained import WhichWeights, find_trained, known_images
from neq_cli.runs.store.content import parse_content, weights_metadata
from neq_cli.runs.store.disk import atomic_write, check_writable, writing
from neq_cli.runs.store.run import Run, read_run
from neq_cli.text import escaped

if TYPE_CHECKING:
    from neq_cli.recipe import Recipe
    from neq_cli.training.graphs import GraphFormat, GraphOf

Format = Literal["safetensors", "torch", "torchscript", "onnx"]
SUFFIXES: Mapping[Format, tuple[str, ...]] = {
    "safetensors": (".safetensors",),
    "torch": (".pt", ".pth"),
    "torchscript": (".ts", ".torchscript", ".pt"),
    "onnx": (".onnx",),
}
"""How files of each format end; a suffix without a format is that of the first which has it."""
_ANOTHER = "choose another with -o"


def export(run_directory: Path, output: Path, source: WhichWeights = "final", form: Format | None = None) -> None:
    """Write the weights of the run, or its model, to ``output``: in the format ``form``, else in that of its suffix.

    ``safetensors`` and ``torch`` are plain state dicts, for which nothing that the run names is imported. The others
    are graphs, for which the model is made. Each file tells the recipe, the data, how images are prepared and what
    classes are called, as far as they are known. Raises NeqError, one line.
    """
    run = read_run(run_directory)
    path = run.files.weights if source == "final" else run.files.checkpoint(source)
    if not path.is_file():
        there = [name for name in ("last", "best") if run.files.checkpoint(name).is_file()]
        mend = f"take --from {there[0]}" if there else "and no other weights; train it further or anew"
        raise NeqError(f"{path}: not there{'; ' if there else ', '}{mend}")
    if output.exists():
        raise NeqError(f"{output}: already exists; {_ANOTHER}")
    form = _format_of(output, form)
    if form == "torchscript" or form == "onnx":
        _export_graph(run, output, source, form)
    else:
        _export_weights(run, path, output, form)


def _format_of(output: Path, form: Format | None) -> Format:
    """Return the format; NeqError where the suffix is that of none, or of another."""
    fitting = [name for name, suffixes in SUFFIXES.items() if output.suffix in suffixes]
    if form is None and fitting:
        return fitting[0]
    if form is not None and form in fitting:
        return form
    taken = SUFFIXES[form] if form is not None else dict.fromkeys(one for some in SUFFIXES.values() for one in some)
    *most, last = taken
    wanted = f"{', '.join(most)} or {last}" if most else last
    asked = "" if form is None else f", as --format {form} says"
    mend = f"; or take --format {' or '.join(fitting)}" if fitting else ""
    raise NeqError(f"{escaped(str(output))}: must end in {wanted}{asked}{mend}")


def _export_weights(run: Run, path: Path, output: Path, form: Format) -> None:
    from neq_cli.training.loop.checkpoint import read_weights_whole, save_weights
    from neq_cli.training.loop.torch_file import save_torch

    weights = read_weights_whole(path)
    told = _told(run, weights.epoch)
    save = save_torch if form == "torch" else save_weights
    with writing(output, _ANOTHER):
        atomic_write(output, lambda partial: save(weights.tensors, partial, told))


def _export_graph(run: Run, output: Path, source: WhichWeights, form: GraphFormat) -> None:
    from neq_cli.training.graphs import check_libraries, save_graph

    check_libraries(form)
    with writing(output, _ANOTHER):
        check_writable(output.parent)  # before the model is made
    graph, epoch = _graph_of(run, source, form)
    told = _told(run, epoch)
    notes: list[str] = []
    with writing(output, _ANOTHER), own_prints_on_stderr():
        atomic_write(output, lambda partial: notes.extend(save_graph(graph, form, partial, told, str(output))))
    for note in notes:
        complain(f"note: {note}")


def _graph_of(run: Run, source: WhichWeights, form: GraphFormat) -> tuple[GraphOf, int | None]:
    """Return the network of the run, and the epoch of its weights; imports the Python that its recipe names."""
    from neq_cli.jobs.loading import UNTRACKED, rebuilt
    from neq_cli.training.data.catalogue import sample_shape
    from neq_cli.training.graphs import GraphOf

    trained = find_trained(run.path, source, overrides=["device=cpu", UNTRACKED])
    recipe = trained.loaded.recipe
    instead = "take --format torch, or what neq_cli.load returns"
    if recipe.task_is_own:
        raise NeqError(f"--format {form}: only the task {recipe.task} itself knows how its model is called; {instead}")
    shape = trained.content.image_shape or sample_shape(recipe.data)
    if shape is None:
        raise NeqError(f"--format {form}: {run.path} does not tell the size of its images; {instead}")
    return GraphOf(rebuilt(trained), shape, any_size=recipe.task == "segmentation"), trained.weights.epoch


def _told(run: Run, epoch: int | None) -> dict[str, str]:
    """Return the text that goes with the weights."""
    from neq_cli.recipe.load import dump_portable

    recipe, data = _recipe(run), run.environment.get("data")
    told = weights_metadata(run.recipe_name, None if recipe is None else dump_portable(recipe), data)
    if epoch is not None:
        told["epoch"] = str(epoch)
    if recipe is not None:
        told |= _images_told(recipe, data, run.files.environment)
    # Lone surrogates, which a damaged run may hold, are what no file of text takes.
    return {key: text.encode("utf-8", "replace").decode() for key, text in told.items()}


def _recipe(run: Run) -> Recipe | None:
    """Return the recipe that goes with the weights; None of a loop of somebody's own, or one that neq cannot use."""
    from neq_cli.recipe.recorded import is_recorded
    from neq_cli.runs.store.resumable import stored_recipe

    try:
        return None if is_recorded(run.recipe) else stored_recipe(run.path)
    except RunDirectoryError:  # the weights are of use without
        return None


def _images_told(recipe: Recipe, data: object, file: Path) -> dict[str, str]:
    """Return how images are prepared and what classes are called, as JSON, where that is known without the model."""
    from neq_cli.training.data.catalogue import sample_shape
    from neq_cli.training.data.picture import transform_of

    told = {}
    try:
        content = parse_content(data, file)
        if content.class_names:
            told["class_names"] = json.dumps(content.class_names)
        shape = content.image_shape or sample_shape(recipe.data)
        if shape is not None:
            transform = transform_of(recipe, known_images(content), shape[0], shape)
            told["preprocessing"] = json.dumps(transform.told())
    except (NeqError, OverflowError):  # damaged, or unknown: the weights are of use without
        pass
    return told
