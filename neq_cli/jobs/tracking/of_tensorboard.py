"""A run in TensorBoard: event files in the run directory, which end and begin again where the run does.

A run that goes on has its reader forget what later epochs had written, by a purge step. Each epoch is flushed.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from neq_cli.jobs.tracking import Ended, TrackedRun
from neq_cli.jobs.tracking.libraries import imported
from neq_cli.jobs.tracking.numbers import EDGES, EpochNumbers
from neq_cli.runs.store.disk import check_own


class TensorBoardTracker:
    """Scalars and histograms by epoch, recipe, notes and state as texts, the recipe as hyperparameters too."""

    def __init__(self) -> None:
        self.identity = ""
        self.writer: Any = None

    def begin(self, run: TrackedRun) -> int:
        """Open a new event file that replaces what earlier ones have of later epochs."""
        tensorboard, self.identity = imported("tensorboard"), run.identity
        stays = min(run.told, run.epoch)
        check_own(run.folder, folder=True)
        if run.is_known:
            wait_for_a_later_name(run.folder)
        self.writer = tensorboard.SummaryWriter(str(run.folder), purge_step=stays + 1 if run.is_known else None)
        self.writer.add_text("recipe", f"```yaml\n{run.recipe_yaml}```", stays)
        self.writer.add_text("notes", "\n".join(f"- {note}" for note in run.notes), stays)
        self.writer.add_text("state", "running", stays)
        if not run.is_known:
            # What the tab HPARAMS shows; ``add_hparams`` would make a run of its own of it.
            for summary in tensorboard.summary.hparams(flat(run.recipe), {run.metric: 0.0}):
                self.writer.file_writer.add_summary(summary)
        self.writer.flush()
        return stays

    def epoch(self, numbers: EpochNumbers) -> None:
        """Write an epoch; it is in the file once this returns."""
        for name, value in numbers.scalars.items():
            self.writer.add_scalar(name, value, numbers.epoch)
        middles = (EDGES[:-1] + EDGES[1:]) / 2
        for name, counts in numbers.histograms.items():
            self.writer.add_histogram_raw(
                name,
                min=float(EDGES[0]),
                max=float(EDGES[-1]),
                num=int(counts.sum()),
                sum=float(counts @ middles),  # as if each value were in the middle of its bin
                sum_squares=float(counts @ middles**2),
                bucket_limits=EDGES[1:].tolist(),
                bucket_counts=counts.tolist(),
                global_step=numbers.epoch,
            )
        self.writer.flush()

    def end(self, ended: Ended) -> None:
        """Write pictures and state, and close the file."""
        from PIL import Image

        for name, content in ended.pictures.items():
            pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
            self.writer.add_image(f"report/{name}", pixels, ended.epoch, dataformats="HWC")
        self.writer.add_text("state", f"{ended.state} {ended.reason}".strip(), ended.epoch)
        self.writer.close()


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Return nested values by dotted keys; what is neither number nor text as JSON."""
    found: dict[str, bool | int | float | str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            is_plain = isinstance(value, (bool, int, float, str))
            found[f"{prefix}{key}"] = value if is_plain else json.dumps(value, default=str)
    return found


def wait_for_a_later_name(folder: Path) -> None:
    """Let a second begin in which no event file was begun: readers take files by name, in which there are seconds.

    A file of a clock that is ahead of this one's is not waited for.
    """
    names = [path.name.split(".") for path in folder.glob("events.out.tfevents.*")]
    begun = {int(parts[3]) for parts in names if len(parts) > 3 and parts[3].isdigit()}
    while int(time.time()) in begun:
        time.sleep(0.05)
