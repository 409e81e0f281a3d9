"""A run in W&B: online where an API key is configured or WANDB_MODE says so, else offline, in the run directory.

Offline, each start of a run leaves a folder that holds all of the run until then: the newest one is what to upload.
Online, W&B takes nothing back: epochs that are trained again keep the numbers that it was told first.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from neq_cli.jobs.tracking import Ended, TrackedRun
from neq_cli.jobs.tracking.libraries import imported
from neq_cli.jobs.tracking.numbers import EDGES, EpochNumbers
from neq_cli.runs.store.disk import check_own, check_writable
from neq_cli.runs.store.paths import STATES


class WandbTracker:
    """Metrics and histograms by epoch, the recipe as config and file, notes, and the state as a tag.

    What was told in the last second may be lost where the process is killed with -9.
    """

    def __init__(self) -> None:
        self.identity = ""
        self.wandb: Any = None
        self.run: Any = None

    def begin(self, run: TrackedRun) -> int:
        """Begin the run, or go on with it; offline, from its first epoch on."""
        self.wandb, self.identity = imported("wandb"), run.identity
        mode = mode_of(self.wandb)
        check_own(run.folder, folder=True)
        run.folder.mkdir(exist_ok=True)
        check_writable(run.folder)  # W&B would go elsewhere without a word
        self.run = self.wandb.init(
            project=os.environ.get("WANDB_PROJECT") or run.project,
            id=self.identity,
            name=run.name,
            dir=str(run.folder.parent),  # W&B makes a folder "wandb" in it
            mode=mode,
            config=dict(run.recipe),
            allow_val_change=True,  # what may change where a run goes on
            notes="\n".join(run.notes),
            resume="allow" if run.is_known and mode == "online" else None,
            reinit="create_new",  # a run of the user's own in this process goes on
            settings=self.wandb.Settings(
                console="off",
                silent=True,
                init_timeout=30.0,  # a server that is gone may cost these seconds, and as many more at the end
                finish_timeout=30.0,  # what is not uploaded then is kept for `wandb sync`
                x_transaction_log_flush_interval=1.0,  # seconds; by default fifteen, which a kill would take away
            ),
        )
        self._set_state("running")
        self._save("recipe.yaml", run.recipe_yaml.encode())
        return 0 if self.run.offline else run.told

    def epoch(self, numbers: EpochNumbers) -> None:
        """Write an epoch, as W&B's step of the same number."""
        histograms = {
            name: self.wandb.Histogram(np_histogram=(counts, EDGES)) for name, counts in numbers.histograms.items()
        }
        self.run.log({**numbers.scalars, **histograms}, step=numbers.epoch, commit=True)

    def end(self, ended: Ended) -> None:
        """Add the pictures, as files, which need no step of their own, and end the run."""
        for name, content in ended.pictures.items():
            self._save(f"report/{name}.png", content)
        self.run.summary["reason"] = ended.reason
        self._set_state(ended.state)
        self.run.finish(exit_code=0 if ended.state == "finished" else 1)

    def _set_state(self, state: str) -> None:
        """Have the state as a tag beside those that the user gave it."""
        self.run.tags = (*(tag for tag in self.run.tags or () if tag not in STATES), state)

    def _save(self, name: str, content: bytes) -> None:
        path = Path(self.run.dir) / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        self.run.save(str(path), base_path=self.run.dir, policy="now")


def mode_of(wandb: Any) -> str:
    """Return the mode that the user set, else online where there is a key: without one W&B would stop and ask."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    keys = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
    has_key = any(os.environ.get(name) for name in keys) or wandb.login(prompt=False, verify=False)
    return "online" if has_key else "offline"
