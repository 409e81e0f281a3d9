"""MLflow's own client finds what metrics.csv says, the recipe, and the files, in the run directory; nothing twice."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tracked import TrackedLoop

from neq_cli import read_run
from neq_cli.jobs.tracking.numbers import EDGES, numbers_again

mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
for library in ("sqlalchemy", "alembic"):
    pytest.importorskip(library, reason=f"{library} is not installed")


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)


def read(store: str) -> tuple[Any, Any]:
    """Return a client, and the only run that the store has."""
    client = mlflow.MlflowClient(tracking_uri=store)
    (run,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
    return client, run


def local(run: Path) -> str:
    return f"sqlite:///{run}/tracking/mlflow/mlflow.db"


def assert_all_is_there(path: Path, store: str) -> None:
    run, (client, found) = read_run(path), read(store)
    for name, column in run.metrics.items():
        expected = [(epoch, value) for epoch, value in enumerate(column.tolist(), 1) if not math.isnan(value)]
        history = client.get_metric_history(found.info.run_id, name)
        assert sorted((each.step, each.value) for each in history) == expected, name
    for epoch in range(1, run.epochs + 1):
        told = numbers_again(run, epoch)
        for name in (name for name in told.scalars if name.startswith("frozen_share/")):
            history = client.get_metric_history(found.info.run_id, name)
            assert [each.value for each in history if each.step == epoch] == [told.scalars[name]]


def test_a_run_with_the_pictures_of_its_report_is_read_back(tmp_path: Path) -> None:
    run = tmp_path / "run"
    TrackedLoop().record(run, 3, ["mlflow"])
    assert_all_is_there(run, local(run))
    client, found = read(local(run))
    assert client.get_experiment(found.info.experiment_id).name == "mine"
    assert (found.info.run_name, found.info.status) == ("run", "FINISHED")
    assert found.data.params["policy.epsilon"] == "0.05"
    assert found.data.params["settings.depth.of"] == "2"
    assert found.data.tags["neq.state"] == "finished"
    assert "coverage: " in found.data.tags["mlflow.note.content"]
    folder = run / "tracking/mlflow/artifacts" / found.info.run_id / "artifacts"
    names = {each.path for each in client.list_artifacts(found.info.run_id)}
    assert {"recipe.yaml", "log10_velocity"} <= names
    assert (folder / "recipe.yaml").read_text() == (run / "recipe.yaml").read_text()
    histograms = json.loads((folder / "log10_velocity/epoch_0002.json").read_text())
    assert histograms["edges"] == EDGES.tolist()
    for name, counts in numbers_again(read_run(run), 2).histograms.items():
        np.testing.assert_array_equal(histograms["counts"][name], counts)
    if find_spec("matplotlib") is not None:
        pictures = [each.path for each in client.list_artifacts(found.info.run_id, "report")]
        assert "report/accuracy-by-epoch.png" in pictures


def test_a_run_that_goes_on_is_the_same_one_and_doubles_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where its directory was moved in between too: MLflow notes where files lie, and none are written there."""
    loop, before, run = TrackedLoop(), tmp_path / "before", tmp_path / "run"
    with pytest.raises(RuntimeError):
        loop.record(before, 4, ["mlflow"], fails=True)
    assert read(local(before))[1].info.status == "FAILED"
    before.rename(run)
    capsys.readouterr()
    loop.rewind(2)
    loop.record(run, 5, ["mlflow"], resume=True)
    assert not before.exists()
    assert "mlflow: the run directory was moved" in capsys.readouterr().err
    client, found = read(local(run))
    assert found.info.status == "FINISHED"
    for name in ("train_loss", "test_top1", "frozen"):
        history = client.get_metric_history(found.info.run_id, name)
        assert sorted((each.step, each.value) for each in history) == [
            (epoch, value) for epoch, value in enumerate(read_run(run).metrics[name].tolist(), 1)
        ]


def test_a_store_that_the_user_set_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = f"sqlite:///{tmp_path}/team.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "ours")
    monkeypatch.chdir(tmp_path)  # where MLflow puts files of such a store
    TrackedLoop().record(tmp_path / "run", 2, ["mlflow"])
    assert_all_is_there(tmp_path / "run", store)
    client, found = read(store)
    assert client.get_experiment(found.info.experiment_id).name == "ours"
    assert [path.name for path in (tmp_path / "run/tracking").iterdir()] == ["ids.json"]


def test_a_server_that_is_gone_costs_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    TrackedLoop().record(tmp_path / "run", 2, ["mlflow"])
    assert str(read_run(tmp_path / "run").status) == "finished"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: track: mlflow failed (MlflowException: ")
