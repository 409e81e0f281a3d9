from __future__ import annotations

import contextlib
import csv
import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import yaml

from neq_cli.errors import RunDirectoryError, TrainingError
from neq_cli.runs.run_dir import RunWriter, atomic_write, check_available, default_run_directory, writing
from neq_cli.runs.run_reader import read_run

NOW = datetime(2026, 3, 4, 5, 6, 7)


@pytest.fixture
def writer(tmp_path: Path, recipe: Any) -> RunWriter:
    return RunWriter.create(tmp_path / "run", yaml.safe_dump(recipe()), {})


def test_default_directory_counts_on_where_it_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    taken = []
    for _ in range(3):
        path = default_run_directory("digits", 7, NOW)
        path.mkdir(parents=True)
        taken.append(path.as_posix())
    stem = "runs/digits/20260304-050607-s7"
    assert taken == [stem, f"{stem}-2", f"{stem}-3"]


@pytest.mark.parametrize(
    ("name", "folder"), [("../../etc/x y", "etc-x-y"), ("...", "recipe"), ("réseau-32", "réseau-32")]
)
def test_default_directory_stays_below_runs(name: str, folder: str) -> None:
    path = default_run_directory(name, 1, NOW)
    assert (path.parent.as_posix(), ".." in path.parts) == (f"runs/{folder}", False)


def test_fresh_run_directory(tmp_path: Path) -> None:
    writer = RunWriter.create(tmp_path / "a" / "b", "epochs: 3\n", {"torch": "2.15", "path": Path("x")})
    assert (writer.path / "recipe.yaml").read_text() == "epochs: 3\n"
    assert json.loads((writer.path / "environment.json").read_text()) == {"torch": "2.15", "path": "x"}
    status = json.loads((writer.path / "status.json").read_text())
    assert (status["state"], status["pid"], status["reason"]) == ("running", os.getpid(), None)
    assert datetime.fromisoformat(status["started"]).tzinfo is not None
    assert sorted(p.name for p in writer.path.iterdir() if p.is_dir()) == ["checkpoints", "neurons"]
    assert writer.weights_path == writer.path / "weights.safetensors"
    assert writer.checkpoint_path("best") == writer.path / "checkpoints" / "best.safetensors"
    with pytest.raises(ValueError, match="beste"):
        writer.checkpoint_path("beste")


def test_taken_directories_are_refused_in_one_line(tmp_path: Path) -> None:
    full, file, link = tmp_path / "full", tmp_path / "file", tmp_path / "link"
    full.mkdir()
    (full / "x").touch()
    file.touch()
    link.symlink_to(tmp_path / "nowhere")
    for path in (full, file, link, file / "below", tmp_path / ("n" * 300)):
        with pytest.raises(RunDirectoryError, match="-o") as caught:
            RunWriter.create(path, "", {})
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert list(full.iterdir()) == [full / "x"]
    check_available(tmp_path / "free")
    (tmp_path / "empty").mkdir()
    RunWriter.create(tmp_path / "empty", "", {})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_parent_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(RunDirectoryError, match="Permission denied"):
        RunWriter.create(tmp_path / "run", "", {})


def test_of_two_processes_one_gets_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Both looked before either began.
    RunWriter.create(tmp_path / "run", "first", {})
    monkeypatch.setattr("neq_cli.runs.run_dir.check_available", lambda path: None)
    with pytest.raises(RunDirectoryError, match="taken"):
        RunWriter.create(tmp_path / "run", "second", {})
    assert (tmp_path / "run" / "recipe.yaml").read_text() == "first"


def test_metrics_are_one_header_and_one_row_per_epoch(writer: RunWriter, records: Any) -> None:
    values = [0.1 + 0.2, math.nan, np.float32(0.1)]
    for record in records(3, metrics=[{"test_top1": value, "train_loss": 1e-30} for value in values]):
        writer.write_epoch(record)
    with (writer.path / "metrics.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header[:3] == ["epoch", "lr", "test_top1"]
    assert header[-1] == "train_loss"
    assert [row[0] for row in rows] == ["1", "2", "3"]
    # Written so that reading gives the same float; what was not measured is empty.
    assert [row[2] for row in rows] == ["0.30000000000000004", "", repr(float(np.float32(0.1)))]
    assert rows[0][header.index("neurons")] == "9"


def test_layer_rows_by_hand(writer: RunWriter, records: Any) -> None:
    first, second = records(2, frozen={"conv1": [[0, 2], []]})
    second.layers[0].phi[:] = [0.5, np.nan, 0.25, 0.75]
    second.layers[0].velocity[:] = [-1.0, 2.0, np.nan, np.nan]
    second.layers[1].phi[:] = np.nan
    writer.write_epoch(first)
    writer.write_epoch(second)
    with (writer.path / "layers.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["epoch"], row["layer"]) for row in rows] == [(e, n) for e in "12" for n in ("conv1", "bn1", "fc")]
    conv, bn, fc = rows[3:]
    assert list(conv) == [
        "epoch", "layer", "kind", "neurons", "frozen", "phi_mean", "velocity_abs_mean", "flops_paper", "flops_executed",
    ]  # fmt: skip
    # Two of four were frozen during epoch 2, so 100 x 2 FLOPs; means leave NaN out.
    assert (conv["neurons"], conv["frozen"], conv["flops_paper"], conv["flops_executed"]) == (
        "4",
        "2",
        "200.0",
        "800.0",
    )
    assert (float(conv["phi_mean"]), float(conv["velocity_abs_mean"])) == (0.5, 1.5)
    assert (bn["phi_mean"], fc["kind"], rows[0]["frozen"]) == ("", "Linear", "0")


def test_neuron_files_hold_the_arrays_as_they_were(writer: RunWriter, records: Any) -> None:
    writer.write_started(_started())
    for record in records(2, frozen={"bn1": [[1]]}):
        writer.write_epoch(record)
        path = writer.path / "neurons" / f"epoch_000{record.epoch}.safetensors"
        stored = safetensors.numpy.load_file(path)
        for layer in record.layers:
            for field in ("phi", "delta_phi", "velocity", "trained", "trainable"):
                array = stored.pop(f"{layer.name}/{field}")
                np.testing.assert_array_equal(array, getattr(layer, field))
                assert array.dtype == (bool if field.startswith("train") else np.float32)
        assert not stored
        with safetensors.safe_open(path, "numpy") as file:
            assert file.metadata() == {"schema": "1", "epoch": str(record.epoch), "policy": "neq epsilon=0.001 mu=0.5"}


def test_strided_arrays_and_empty_layers_are_stored(writer: RunWriter, records: Any) -> None:
    (record,) = records(1, sizes={"conv1": 0, "": 3})
    object.__setattr__(record.layers[1], "phi", np.arange(6, dtype=np.float64)[::2])
    writer.write_epoch(record)
    layers = read_run(writer.path).neurons(1)
    assert layers["conv1"]["phi"].shape == (0,)
    np.testing.assert_array_equal(layers[""]["phi"], [0, 2, 4])


def test_records_out_of_order_or_with_other_columns_are_a_mistake(writer: RunWriter, records: Any) -> None:
    first, second, third = records(3, metrics=[{}, {"extra": 1.0}, {}])
    with pytest.raises(ValueError, match="epoch 2"):
        writer.write_epoch(second)
    writer.write_epoch(first)
    for wrong, what in ((first, "epoch 1"), (second, "extra"), (third, "epoch 3")):
        with pytest.raises(ValueError, match=what):
            writer.write_epoch(wrong)
    assert read_run(writer.path).epochs == 1


def test_how_a_run_ends(tmp_path: Path, recipe: Any, records: Any) -> None:
    ends = {"finished": "", "interrupted": "SIGTERM", "failed": "loss is NaN at epoch 2, step 3"}
    for state, reason in ends.items():
        writer = RunWriter.create(tmp_path / state, yaml.safe_dump(recipe()), {})
        writer.write_epoch(records(1)[0])
        if state == "finished":
            writer.finish()
        else:
            getattr(writer, state)(reason)
        status = read_run(writer.path).status
        assert (status.state, status.reason) == (state, reason)


def test_what_the_run_says_of_itself_stands_in_the_environment(tmp_path: Path) -> None:
    writer = RunWriter.create(tmp_path / "run", "", {"torch": "2.15", "notes": ["dirty checkout"]})
    writer.write_started(_started())
    environment = json.loads((writer.path / "environment.json").read_text())
    assert environment == {
        "torch": "2.15",
        "notes": ["dirty checkout", "cls_token trains always"],
        "recipe_name": "digits",
        "description": "small on digits",
        "policy": "neq epsilon=0.001 mu=0.5",
        "device": "cpu",
        "metric": "test_top1",
    }


def test_full_disk_is_one_line_and_keeps_what_was_there(
    writer: RunWriter, records: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = records(2)
    writer.write_epoch(first)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrainingError, match=r"epoch_0002.safetensors: cannot be written: No space left") as caught:
        writer.write_epoch(second)
    assert "\n" not in str(caught.value)
    with pytest.raises(TrainingError, match=r"status.json"):
        writer.failed("x")
    monkeypatch.undo()
    assert read_run(writer.path).epochs == 1
    assert not list(writer.path.rglob("*.partial"))


def test_writing_makes_errors_of_the_disk_one_line(tmp_path: Path) -> None:
    target = tmp_path / "gone" / "last.safetensors"
    with pytest.raises(TrainingError, match="cannot be written"), writing(target):
        atomic_write(target, lambda path: safetensors.numpy.save_file({"a": np.zeros(1)}, path))
    with pytest.raises(ZeroDivisionError), writing(target):
        _ = 1 / 0


def test_atomic_write_keeps_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write(path, b"old")

    def half(partial: Path) -> None:
        partial.write_bytes(b"ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, half)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"old")]
    atomic_write(path, lambda partial: partial.write_bytes(b"new"))
    assert path.read_bytes() == b"new"


def test_an_epoch_stopped_at_any_sync_is_whole_or_not_there(
    tmp_path: Path, recipe: Any, records: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    for moment in range(20):
        writer = RunWriter.create(tmp_path / str(moment), yaml.safe_dump(recipe()), {})
        syncs = iter(range(moment))
        first, second = records(2)
        writer.write_epoch(first)

        def sync(descriptor: int, syncs: Any = syncs) -> None:
            if next(syncs, None) is None:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(os, "fsync", sync)
            writer.write_epoch(second)
        run = read_run(writer.path)
        assert len(run.layers(run.epochs)) == len(run.neurons(run.epochs)) == 3
        seen.append(run.epochs)
    # Neurons, their folder, layers; then the row of metrics.csv, which makes the epoch.
    assert seen == [1, 1, 1] + [2] * 17


def test_a_kill_at_any_moment_leaves_a_run_that_reads(tmp_path: Path, recipe: Any) -> None:
    script = f"""
import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]
import yaml
from pathlib import Path
from conftest import make_records, SIZES
from neq_cli.runs.run_dir import RunWriter
writer = RunWriter.create(Path(sys.argv[1]), sys.argv[2], {{}})
for record in make_records(9999, {{}}, [], SIZES):
    writer.write_epoch(record)
    print(record.epoch, flush=True)
"""
    for attempt in (0, 1):
        path = tmp_path / str(attempt)
        command = [sys.executable, "-c", script, str(path), yaml.safe_dump(recipe(epochs=9999))]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()
            assert str(read_run(path).status) == f"running: process {process.pid}"
            time.sleep(0.05 * attempt)
            process.send_signal(signal.SIGKILL)
            seen = [1, *map(int, process.stdout.read().split())]
        run = read_run(path)
        assert str(run.status) == f"killed: process {process.pid} is gone"
        assert run.epochs in (seen[-1], seen[-1] + 1)
        assert len(run.layers(run.epochs)) == len(run.neurons(run.epochs)) == 3


def _started() -> Any:
    from neq_cli.records import RunStarted

    notes = ("cls_token trains always",)
    policy = "neq epsilon=0.001 mu=0.5"
    return RunStarted("digits", "small on digits", policy, "cpu", 3, 7, "test_top1", {"conv1": 4}, notes)
