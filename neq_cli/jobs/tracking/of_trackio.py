"""A run in trackio: in the place where trackio keeps all runs on this machine, or at the server it is configured for.

trackio takes nothing back: epochs that are trained again after a resume keep the numbers that it was told first.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from neq_cli.jobs.tracking import Ended, TrackedRun
from neq_cli.jobs.tracking.libraries import imported
from neq_cli.jobs.tracking.numbers import EDGES, EpochNumbers


class TrackioTracker:
    """Metrics and histograms by epoch, the recipe as config, recipe, notes and state as texts.

    What was told in the last second may be missing where the process is killed with -9; on this machine it is told
    again where the run goes on.
    """

    def __init__(self) -> None:
        self.identity = ""
        self.trackio: Any = None
        self.run: Any = None

    def begin(self, run: TrackedRun) -> int:
        """Begin the run, or go on with it, and return the last epoch that trackio has."""
        self.trackio, self.identity = imported("trackio"), run.identity
        if self.trackio.context_vars.current_run.get() is not None:
            raise RuntimeError("a run of trackio is going on in this process, which has one at a time")
        name = f"{run.name}-{self.identity[:6]}"  # by which a run is found again
        self.run = self.trackio.init(
            project=run.project,
            name=name,
            config={**run.recipe, "notes": list(run.notes)},
            resume="allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )
        if not run.is_known:
            text = self.trackio.Markdown(f"```yaml\n{run.recipe_yaml}```")
            self.run.log({"recipe": text, "state": "running"}, step=0)
        if os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL"):
            return run.told
        return self.trackio.SQLiteStorage.get_last_step(run.project, run=name) or 0

    def epoch(self, numbers: EpochNumbers) -> None:
        """Hand an epoch to trackio, whose thread writes it within half a second."""
        histograms = {
            name: self.trackio.Histogram(np_histogram=(counts, EDGES)) for name, counts in numbers.histograms.items()
        }
        self.run.log({**numbers.scalars, **histograms}, step=numbers.epoch)

    def end(self, ended: Ended) -> None:
        """Add the pictures and the state, and end the run."""
        with tempfile.TemporaryDirectory() as folder:
            pictures = {}
            for name, content in ended.pictures.items():
                path = Path(folder) / f"{name}.png"
                path.write_bytes(content)
                pictures[f"report/{name}"] = self.trackio.Image(path)
            self.run.log({**pictures, "state": f"{ended.state} {ended.reason}".strip()}, step=ended.epoch)
            self.trackio.finish()
