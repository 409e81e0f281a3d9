"""What trackio's own store has of a run, in a process of its own: trackio decides at its import where that lies."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from neq_cli import read_run
from neq_cli.jobs.tracking.numbers import numbers_again

if find_spec("trackio") is None:
    pytest.skip("trackio is not installed", allow_module_level=True)

TRAINS = """
import json, sys
from pathlib import Path

from tracked import TrackedLoop

loop, run = TrackedLoop(), Path("run")
try:
    loop.record(run, 4, ["trackio"], fails=True)
except RuntimeError:
    loop.rewind(2)
loop.record(run, 5, ["trackio"], resume=True)

import trackio

(name,) = trackio.SQLiteStorage.get_runs("mine")
logs = trackio.SQLiteStorage.get_logs("mine", name)
print(json.dumps({"name": name, "logs": logs, "config": trackio.SQLiteStorage.get_run_config("mine", name)}))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """Return the folder of a run that failed after epoch 4 and went on after epoch 2, and what trackio says of it."""
    import os

    folder = tmp_path_factory.mktemp("trackio")
    environment = {**os.environ, "TRACKIO_DIR": str(folder / "store"), "HOME": str(folder)}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    environment.pop("TRACKIO_SPACE_ID", None)
    environment.pop("TRACKIO_SERVER_URL", None)
    done = subprocess.run(
        [sys.executable, "-c", TRAINS], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout), done.stderr


def test_every_epoch_is_there_once(found: tuple[Path, dict[str, Any], str]) -> None:
    folder, told, _ = found
    run = read_run(folder / "run")
    rows = [row for row in told["logs"] if "train_loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    for row in rows:
        numbers = numbers_again(run, row["step"])
        # Rows that were trained again stay as they were first told: they differ in their times alone.
        scalars = {name: value for name, value in numbers.scalars.items() if not name.endswith("_seconds")}
        assert {name: row[name] for name in scalars} == scalars
        for name, counts in numbers.histograms.items():
            assert row[name]["histogram"] == counts.tolist() if "histogram" in row[name] else row[name]["values"]


def test_config_and_state(found: tuple[Path, dict[str, Any], str]) -> None:
    folder, told, errors = found
    identity = json.loads((folder / "run/tracking/ids.json").read_text())["trackio"]["id"]
    assert told["name"] == f"run-{identity[:6]}"
    assert told["config"]["policy"]["epsilon"] == 0.05
    assert any("coverage: " in note for note in told["config"]["notes"])
    states = [row["state"] for row in told["logs"] if "state" in row]
    assert states == ["running", "failed RuntimeError: the loop's own", "finished"]
    assert not [line for line in errors.splitlines() if line.startswith("* ")], "trackio's own lines"
