"""A run in MLflow: at the server that MLflow is configured for, else in an SQLite file in the run directory.

MLflow takes nothing back: epochs that are trained again after a resume keep the numbers that it was told first.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from neq_cli.jobs.tracking import Ended, TrackedRun
from neq_cli.jobs.tracking.libraries import imported
from neq_cli.jobs.tracking.numbers import EDGES, EpochNumbers
from neq_cli.jobs.tracking.of_tensorboard import flat
from neq_cli.runs.store.disk import check_own

_STATUS = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
_MOST_METRICS, _MOST_PARAMS = 1000, 100  # of a call
_LONGEST_PARAM, _LONGEST_TAG = 6000, 5000  # characters
_MOVED = "mlflow: the run directory was moved since the run began, so that pictures and histograms are not added"


class MLflowTracker:
    """Metrics by epoch, the recipe as parameters and file, notes and state as tags; histograms, pictures as files."""

    def __init__(self) -> None:
        self.identity = ""
        self.mlflow: Any = None
        self.client: Any = None
        self.takes_files = True

    def begin(self, run: TrackedRun) -> int:
        """Make the run, or go on with it, and return the last epoch that MLflow has."""
        self.mlflow = imported("mlflow")
        is_local = not self.mlflow.is_tracking_uri_set()
        if is_local:
            check_own(run.folder, folder=True)
            run.folder.mkdir(exist_ok=True)
            check_own(run.folder / "mlflow.db")
        uri = f"sqlite:///{run.folder.resolve() / 'mlflow.db'}" if is_local else None
        self.client = self.mlflow.MlflowClient(tracking_uri=uri)
        artifacts = (run.folder.resolve() / "artifacts").as_uri()
        has = 0
        if run.is_known:
            self.identity = run.identity
            found = self.client.get_run(run.identity)
            has = max((int(each.step) for each in self.client.get_metric_history(run.identity, "epoch")), default=0)
            self.client.update_run(run.identity, status="RUNNING")
            # What a store says of where its files lie is the directory's word: none are written outside.
            self.takes_files = not is_local or found.info.artifact_uri.startswith(f"{artifacts}/")
        else:
            experiment = self._experiment(run, artifacts if is_local else None)
            self.identity = self.client.create_run(experiment, run_name=run.name).info.run_id
            self._log_parameters(run)
        self._tell(run)
        return has

    def epoch(self, numbers: EpochNumbers) -> None:
        """Write an epoch; it is at the server, or in the file, once this returns."""
        if self.takes_files:
            counts = {name: found.tolist() for name, found in numbers.histograms.items()}
            content = json.dumps({"edges": EDGES.tolist(), "counts": counts})
            self.client.log_text(self.identity, content, f"log10_velocity/epoch_{numbers.epoch:04d}.json")
        now = int(1000 * time.time())
        # The column "epoch" is the last one, for it tells which epochs are whole.
        names = [*(name for name in numbers.scalars if name != "epoch"), "epoch"]
        metric = self.mlflow.entities.Metric
        metrics = [metric(_allowed(name), numbers.scalars[name], now, numbers.epoch) for name in names]
        for first in range(0, len(metrics), _MOST_METRICS):
            self.client.log_batch(self.identity, metrics=metrics[first : first + _MOST_METRICS])

    def end(self, ended: Ended) -> None:
        """Add the pictures, and end the run."""
        if self.takes_files and ended.pictures:
            with tempfile.TemporaryDirectory() as folder:
                for name, content in ended.pictures.items():
                    (Path(folder) / f"{name}.png").write_bytes(content)
                self.client.log_artifacts(self.identity, folder, "report")
        self.client.set_tag(self.identity, "neq.state", ended.state)
        self.client.set_tag(self.identity, "neq.reason", ended.reason[:_LONGEST_TAG])
        self.client.set_terminated(self.identity, _STATUS.get(ended.state, "FAILED"))

    def _experiment(self, run: TrackedRun, artifacts: str | None) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or run.project
        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self.client.create_experiment(name, artifact_location=artifacts))
            except self.mlflow.MlflowException:  # another run has made it in between
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)

    def _log_parameters(self, run: TrackedRun) -> None:
        param = self.mlflow.entities.Param
        params = [param(_allowed(key), str(value)[:_LONGEST_PARAM]) for key, value in flat(run.recipe).items()]
        for first in range(0, len(params), _MOST_PARAMS):
            self.client.log_batch(self.identity, params=params[first : first + _MOST_PARAMS])

    def _tell(self, run: TrackedRun) -> None:
        """Tell what may differ each time that the run goes on; its parameters, which MLflow never changes, do not."""
        if self.takes_files:
            self.client.log_text(self.identity, run.recipe_yaml, "recipe.yaml")
        else:
            run.say(_MOVED)
        self.client.set_tag(self.identity, "mlflow.note.content", "\n\n".join(run.notes)[:_LONGEST_TAG])
        self.client.set_tag(self.identity, "neq.state", "running")


def _allowed(name: str) -> str:
    """Return a name in the letters that MLflow takes."""
    return "".join(letter if letter.isalnum() or letter in "_-. :/" else "_" for letter in name)[:250]
