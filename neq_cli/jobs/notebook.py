"""What `neq train` does, as a call: for notebooks and scripts, which get the run back to look at."""

from __future__ import annotations

from pathlib import Path

from neq_cli.jobs.prepare import load
from neq_cli.jobs.train import train as train_into
from neq_cli.runs.store.paths import check_available
from neq_cli.runs.store.run import Run, read_run
from neq_cli.runs.views.live.progress import Mode, choose_progress


def train(
    recipe: str | Path, *overrides: str, output: str | Path | None = None, resume: bool = False, progress: Mode = "auto"
) -> Run:
    """Train a recipe, a file or a shipped one's name, into a run directory, and return the run.

    ``overrides`` are as on the command line: ``"epochs=3"``. ``output``: the run directory (None: one named after
    recipe, time and seed); ``resume`` goes on with the run in it. Raises NeqError, one line, for what is wrong, and
    KeyboardInterrupt, with all that was reached saved, where it was interrupted.
    """
    directory = None if output is None else Path(output)
    if directory is not None and not resume:
        check_available(directory)
    loaded = load(str(recipe), overrides)
    return read_run(train_into(loaded, directory, choose_progress(progress), resume=resume))
