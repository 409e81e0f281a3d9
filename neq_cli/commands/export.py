"""``neq export``: a run's weights as one plain state_dict."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from neq_cli.commands.shared import RunDirectory
from neq_cli.errors import NeqError, RunDirectoryError

if TYPE_CHECKING:
    from neq_cli.runs.store.run import Run


def export(
    run_directory: RunDirectory,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="the .safetensors file to write")],
    source: Annotated[
        Literal["final", "best", "last"], typer.Option("--from", help="final weights, or those of a checkpoint")
    ] = "final",
) -> None:
    """Write a run's weights as one plain state_dict in safetensors."""
    from neq_cli.runs.store.run import read_run

    run = read_run(run_directory)
    path = run.files.weights if source == "final" else run.files.checkpoint(source)
    if not path.is_file():
        there = [name for name in ("last", "best") if run.files.checkpoint(name).is_file()]
        mend = f"take --from {there[0]}" if there else "and no other weights; train it further or anew"
        raise NeqError(f"{path}: not there{'; ' if there else ', '}{mend}")
    if output.exists():
        raise NeqError(f"{output}: already exists; choose another with -o")
    if output.suffix != ".safetensors":
        raise NeqError(f"{output}: must end in .safetensors")
    from neq_cli.runs.store.content import weights_metadata
    from neq_cli.runs.store.disk import atomic_write, writing
    from neq_cli.training.loop.checkpoint import read_weights_whole, save_weights

    weights = read_weights_whole(path)
    told = weights_metadata(run.recipe_name, _recipe_yaml(run), run.environment.get("data"))
    if weights.epoch is not None:
        told["epoch"] = str(weights.epoch)
    with writing(output, "choose another with -o"):
        atomic_write(output, lambda partial: save_weights(weights.tensors, partial, told))
    print(output)


def _recipe_yaml(run: Run) -> str | None:
    """Return the recipe that goes with the weights; None of a loop of somebody's own, or one that neq cannot use."""
    from neq_cli.recipe.load import dump_portable
    from neq_cli.recipe.recorded import is_recorded
    from neq_cli.runs.store.resumable import stored_recipe

    try:
        return None if is_recorded(run.recipe) else dump_portable(stored_recipe(run.path))
    except RunDirectoryError:  # the weights are of use without
        return None
