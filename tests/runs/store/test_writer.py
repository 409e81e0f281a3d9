from __future__ import annotations

import contextlib
import csv
import dataclasses
import errno
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import yaml

from neq_cli.errors import RunDirectoryError, TrainingError
from neq_cli.runs.store.disk import atomic_write, writing
from neq_cli.runs.store.paths import check_available
from neq_cli.runs.store.run import read_run
from neq_cli.runs.store.writer import RunWriter


@pytest.fixture
def writer(tmp_path: Path, recipe: Any) -> RunWriter:
    return RunWriter.create(tmp_path / "run", yaml.safe_dump(recipe()), {})


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
    (tmp_path / "empty" / ".DS_Store").touch()  # a file manager looked
    RunWriter.create(tmp_path / "empty", "", {})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_parent_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(RunDirectoryError, match="Permission denied"):
        RunWriter.create(tmp_path / "run", "", {})


def test_of_two_processes_one_gets_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Both looked before either began; what the second sees once it has the lock decides.
    first = RunWriter.create(tmp_path / "run", "first", {})
    looks = iter([lambda path: None, check_available])
    monkeypatch.setattr("neq_cli.runs.store.writer.check_available", lambda path: next(looks)(path))
    with pytest.raises(RunDirectoryError, match="being trained"):
        RunWriter.create(tmp_path / "run", "second", {})
    first.close()
    looks = iter([lambda path: None, check_available])
    with pytest.raises(RunDirectoryError, match="not empty"):
        RunWriter.create(tmp_path / "run", "second", {})
    assert (tmp_path / "run" / "recipe.yaml").read_text() == "first"
    RunWriter.reopen(tmp_path / "run").close()  # the refused one holds nothing


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
        "metric_better": "higher",
        "unit": "epoch",
        "rows_planned": 3,
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
import sys; sys.path[:0] = [{str(Path(__file__).parents[1])!r}]
import yaml
from pathlib import Path
from conftest import make_records, SIZES
from neq_cli.runs.store.writer import RunWriter
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


def test_going_on_ends_as_if_never_interrupted(tmp_path: Path, recipe: Any, records: Any) -> None:
    five = records(5, frozen={"conv1": [[0], [1], [2], [0, 1]]})
    straight = written(tmp_path / "straight", recipe, five)
    path = written(tmp_path / "run", recipe, five)
    for name in ("metrics.csv", "layers.csv"):  # a fifth line that was torn, and what came after it
        whole = (path / name).read_bytes()
        (path / name).write_bytes(whole[:-9])
    for leftover in (path, path / "neurons", path / "checkpoints"):
        (leftover / ".x.safetensors.partial").write_bytes(b"half")
    with RunWriter.reopen(path) as writer:
        assert not writer.is_new
        writer.rewind(3, None, {})
        assert read_run(path).epochs == 3
        assert len((path / "layers.csv").read_text().splitlines()) == 1 + 3 * 3
        assert sorted(p.name for p in (path / "neurons").iterdir()) == [f"epoch_000{t}.safetensors" for t in (1, 2, 3)]
        assert not list(path.rglob("*.partial"))
        with pytest.raises(ValueError, match="epoch 5"):
            writer.write_epoch(five[4])
        for record in five[3:]:
            writer.write_epoch(record)
        writer.finish()
    assert same_files(path) == same_files(straight)


@pytest.mark.parametrize("epoch", range(6))
@pytest.mark.parametrize("missing", [0, 1, 40, 10_000])
def test_rewinding_to_every_epoch(tmp_path: Path, recipe: Any, records: Any, epoch: int, missing: int) -> None:
    five = records(5)
    straight = same_files(written(tmp_path / "straight", recipe, five))
    path = written(tmp_path / "run", recipe, five)
    # Rows of epochs to come may be torn anywhere, or not there at all.
    for name in ("metrics.csv", "layers.csv"):
        lines = (path / name).read_bytes().splitlines(keepends=True)
        per_epoch = 1 if name == "metrics.csv" else 3
        kept = b"".join(lines[: 1 + per_epoch * epoch])
        whole = b"".join(lines)
        (path / name).write_bytes(whole[: max(len(kept), len(whole) - missing)])
    with RunWriter.reopen(path) as writer:
        writer.rewind(epoch, None, {})
        for record in five[epoch:]:
            writer.write_epoch(record)
    assert same_files(path) == straight


def test_what_a_resumed_run_says_of_itself(tmp_path: Path, recipe: Any, records: Any) -> None:
    path = tmp_path / "run"
    with RunWriter.create(path, "seed: 1\n", {"neq": "0.3", "device": "cpu", "argv": ["neq", "train"]}) as writer:
        writer.write_started(_started())
        writer.write_epoch(records(1)[0])
        writer.interrupted("SIGTERM")
    before = json.loads((path / "status.json").read_text())
    first_environment = json.loads((path / "environment.json").read_text())
    (path / "status.json").write_text(json.dumps({**before, "started": "2020-01-01T00:00:00+00:00", "pid": 1}))
    recipe_file = (path / "recipe.yaml").stat()
    with RunWriter.reopen(path) as writer:
        assert json.loads((path / "status.json").read_text())["state"] == "interrupted"  # nothing is written yet
        writer.rewind(1, "seed: 1\n", {"neq": "0.4", "device": "cuda", "argv": ["neq", "train", "--resume"]})
        started = dataclasses.replace(
            _started(), device="cuda", epochs=9, unit="observation", notes=("cls_token trains always", "another")
        )
        writer.write_started(started)
    status = json.loads((path / "status.json").read_text())
    assert (status["state"], status["reason"], status["ended"]) == ("running", None, None)
    assert (status["pid"], status["started"]) == (os.getpid(), "2020-01-01T00:00:00+00:00")
    environment = json.loads((path / "environment.json").read_text())
    (resumed,) = environment.pop("resumed")
    assert datetime.fromisoformat(resumed.pop("at")).tzinfo is not None
    assert resumed == {
        "epoch": 1, "host": socket.gethostname(), "device": "cuda", "argv": ["neq", "train", "--resume"],
        "changed": {"neq": "0.4"},
    }  # fmt: skip
    # What it said first stays, but for the rows planned: it may go on for longer.
    assert environment == {**first_environment, "notes": ["cls_token trains always", "another"], "rows_planned": 9}
    assert (path / "recipe.yaml").stat().st_mtime_ns == recipe_file.st_mtime_ns  # not written again
    with RunWriter.reopen(path) as writer:
        writer.rewind(1, "seed: 1\nepochs: 9\n", {})
    assert (path / "recipe.yaml").read_text() == "seed: 1\nepochs: 9\n"


def test_a_table_that_does_not_reach_the_checkpoint_is_refused_and_nothing_is_lost(
    tmp_path: Path, recipe: Any, records: Any
) -> None:
    path = written(tmp_path / "run", recipe, records(4))
    metrics, layers = (path / "metrics.csv").read_bytes(), (path / "layers.csv").read_bytes()

    def refused(name: str, content: bytes | None, what: str) -> None:
        whole = (path / name).read_bytes()
        (path / name).unlink() if content is None else (path / name).write_bytes(content)
        before = everything(path)
        with RunWriter.reopen(path) as writer, pytest.raises(RunDirectoryError, match=what) as caught:
            writer.rewind(4, "new", {})
        assert str(caught.value).startswith((f"{path / name}: ", f"{path / name}:1: "))
        assert "\n" not in str(caught.value)
        assert everything(path) == before
        (path / name).write_bytes(whole)

    lines = metrics.splitlines(keepends=True)
    refused("metrics.csv", metrics[:-1], "whole rows of 3 epochs, but the checkpoint is of epoch 4")
    refused("metrics.csv", b"".join(lines[:1]), "whole rows of 0 epochs")
    refused("metrics.csv", b"", "whole rows of 0 epochs")
    refused("metrics.csv", None, "whole rows of 0 epochs")
    refused("metrics.csv", b"".join([*lines[:3], lines[2], *lines[3:]]), "whole rows of 1 epoch")  # 2 stands twice
    refused("metrics.csv", b"".join([*lines[:2], *lines[3:]]), "whole rows of 1 epoch")
    refused("metrics.csv", metrics.replace(b"\n2,", b"\n2,9,"), "whole rows of 1 epoch")
    refused("metrics.csv", b"a,b\n" + metrics, "whole rows of 0 epochs")
    refused("layers.csv", layers[:-1], "its rows of epochs 1 to 4 are not all there")
    refused("layers.csv", layers.replace(b"\n2,bn1", b"\nx,bn1"), "its rows of epochs 1 to 4 are not all there")
    refused("layers.csv", b"epoch,layer\n", "its columns are not epoch, layer, kind, neurons")
    refused("layers.csv", None, "its columns are not")
    refused("status.json", b"[" * 9999, "not JSON")
    refused("environment.json", b"{}x", "not JSON")


def test_a_run_of_another_neq_is_not_mixed_with_this_one(tmp_path: Path, recipe: Any, records: Any) -> None:
    first, second = records(2, metrics=[{"old": 1}, {"new": 2}])
    path = written(tmp_path / "run", recipe, [first])
    before = everything(path)
    with RunWriter.reopen(path) as writer:
        writer.rewind(1, None, {})
        with pytest.raises(RunDirectoryError, match=r"metrics.csv: columns .*: new, old; go on with the neq") as caught:
            writer.write_epoch(second)
    assert "\n" not in str(caught.value)
    changed = {"status.json", "environment.json"}
    assert {k: v for k, v in everything(path).items() if k not in changed} == {
        k: v for k, v in before.items() if k not in changed
    }


def test_columns_keep_the_order_of_the_header(tmp_path: Path, recipe: Any, records: Any) -> None:
    two = records(2, metrics=[{"a": 1, "b": 2}, {"a": 3, "b": 4}])
    straight = written(tmp_path / "straight", recipe, two)
    path = written(tmp_path / "run", recipe, two[:1])
    turned = dataclasses.replace(two[1], metrics=dict(reversed(two[1].metrics.items())))
    with RunWriter.reopen(path) as writer:
        writer.rewind(1, None, {})
        writer.write_epoch(turned)
    assert (path / "metrics.csv").read_bytes() == (straight / "metrics.csv").read_bytes()


def test_layers_without_rows_and_names_of_several_lines(tmp_path: Path, recipe: Any, records: Any) -> None:
    for name, sizes in (("none", {}), ("odd", {'a,"b"': 2, "line\nbreak": 3, "": 1, "2,x": 1})):
        three = [
            dataclasses.replace(record, layers=record.layers if sizes else ()) for record in records(3, sizes=sizes)
        ]
        straight = written(tmp_path / f"{name} straight", recipe, three)
        path = written(tmp_path / name, recipe, three)
        with RunWriter.reopen(path) as writer:
            writer.rewind(2, None, {})
            writer.write_epoch(three[2])
        assert same_files(path) == same_files(straight)


def test_a_copy_made_of_hard_links_is_left_as_it_was(tmp_path: Path, recipe: Any, records: Any) -> None:
    three = records(3)
    path, copy = written(tmp_path / "run", recipe, three), tmp_path / "copy"
    shutil.copytree(path, copy, copy_function=os.link)
    before = everything(copy)
    for epoch in (3, 1, 0):
        with RunWriter.reopen(path) as writer:
            writer.rewind(epoch, "new", {})
            for record in three[epoch:]:
                writer.write_epoch(record)
        assert everything(copy) == before


def test_a_run_that_had_just_begun_begins_in_place(tmp_path: Path, recipe: Any, records: Any) -> None:
    straight = written(tmp_path / "straight", recipe, records(2))
    missing, empty, begun, foreign = (tmp_path / name for name in ("missing", "empty", "begun", "foreign"))
    empty.mkdir()
    shutil.copytree(straight, begun)
    for path in [begun / "recipe.yaml", *begun.rglob("*.csv"), *begun.rglob("*.safetensors")]:
        path.unlink()
    (begun / ".recipe.yaml.partial").write_text("half")
    foreign.mkdir()
    (foreign / "notes.txt").touch()
    for path in (missing, empty, begun):
        with RunWriter.reopen(path) as writer:
            assert writer.is_new
            with pytest.raises(ValueError, match="epoch 1"):
                writer.rewind(1, "x", {})
            writer.rewind(0, yaml.safe_dump(recipe()), {})
            for record in records(2):
                writer.write_epoch(record)
        assert same_files(path) == same_files(straight)
    with pytest.raises(RunDirectoryError, match=r"no recipe\.yaml, but other files: not a run"):
        RunWriter.reopen(foreign)
    assert list(foreign.iterdir()) == [foreign / "notes.txt"]  # not even a lock
    for path in (foreign / "notes.txt", foreign / "notes.txt" / "below"):
        with pytest.raises(RunDirectoryError, match=r"choose another with -o"):
            RunWriter.reopen(path)


def test_a_directory_with_a_lock_alone_is_free(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    RunWriter.create(tmp_path, "seed: 1\n", {}).close()


WRITTEN = (
    "recipe.yaml", "environment.json", "status.json", "metrics.csv", "layers.csv", "dispatch.json", "model.py",
    "weights.safetensors", ".lock", "neurons", "checkpoints", "neurons/epoch_0001.safetensors",
    "neurons/epoch_0009.safetensors", "checkpoints/last.safetensors", "checkpoints/best.safetensors",
    "checkpoints/shards_000001",
)  # fmt: skip


@pytest.mark.parametrize("kind", ["link", "dead link", "fifo"])
@pytest.mark.parametrize("name", WRITTEN)
def test_nothing_is_written_through_links(tmp_path: Path, recipe: Any, records: Any, name: str, kind: str) -> None:
    path, outside = written(tmp_path / "run", recipe, records(1)), tmp_path / "outside"
    place = path / name
    if place.is_dir():
        place.rename(outside)
    elif kind == "link":
        outside.write_bytes(place.read_bytes() if place.exists() else b"mine")
        place.unlink(missing_ok=True)
    else:
        place.unlink(missing_ok=True)
    os.mkfifo(place) if kind == "fifo" else place.symlink_to(outside if kind == "link" else tmp_path / "nowhere")
    before = everything(outside) if outside.is_dir() else outside.exists() and outside.read_bytes()
    with pytest.raises(RunDirectoryError, match=r"where neq writes; put a .* in its place, or remove it") as caught:
        RunWriter.reopen(path)
    assert str(caught.value).startswith(f"{place}: ")
    assert "\n" not in str(caught.value)
    assert before == (everything(outside) if outside.is_dir() else outside.exists() and outside.read_bytes())
    assert not (tmp_path / "nowhere").exists()


def test_a_link_that_comes_later_is_not_written_through_either(tmp_path: Path, recipe: Any, records: Any) -> None:
    two = records(2)
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    for name in ("metrics.csv", "layers.csv"):
        path = written(tmp_path / name, recipe, two[:1])
        with RunWriter.reopen(path) as writer:
            writer.rewind(1, None, {})
            (path / name).unlink()
            (path / name).symlink_to(outside)
            with pytest.raises(TrainingError, match=rf"{name}: cannot be written"):
                writer.write_epoch(two[1])
            (path / "model.py").symlink_to(outside)
            with pytest.raises(RunDirectoryError, match=r"model.py: a link"):
                writer.write_source("model.py", b"x")
        assert outside.read_bytes() == b"mine"


def test_the_run_directory_itself_may_be_a_link(tmp_path: Path, recipe: Any, records: Any) -> None:
    written(tmp_path / "run", recipe, records(1))
    (tmp_path / "latest").symlink_to(tmp_path / "run")
    with RunWriter.reopen(tmp_path / "latest") as writer:
        writer.rewind(1, None, {})


@pytest.fixture
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process needs no sync: what it wrote is there. Tests of hundreds of kills do."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.mark.slow
@pytest.mark.usefixtures("no_sync")
def test_killed_at_every_write_of_a_fresh_run(tmp_path: Path, recipe: Any, records: Any) -> None:
    two = records(2, frozen={"conv1": [[0]]})
    straight = tmp_path / "straight"
    train(straight, recipe, two)
    kills = 0
    for path in killed_everywhere(tmp_path, lambda path: train(path, recipe, two)):
        kills += 1
        if (path / "recipe.yaml").exists():  # then all that tells what it is stands there
            assert json.loads((path / "status.json").read_text())["state"] in ("running", "finished")
            assert json.loads((path / "environment.json").read_text()) == {}
        train(path, recipe, two)
        assert same_files(path) == same_files(straight), kills
        assert read_run(path).status.state == "finished"
    # Per epoch: two files and the checkpoint, each with its write, sync and more.
    assert kills > 2 * 4 * 3


@pytest.mark.usefixtures("no_sync")
def test_killed_at_every_write_of_a_resumed_run(tmp_path: Path, recipe: Any, records: Any) -> None:
    three = records(3, frozen={"conv1": [[0], [1]]})
    straight, torn = tmp_path / "straight", tmp_path / "torn"
    train(straight, recipe, three)
    train(torn, recipe, three)
    (torn / "checkpoints" / "last.safetensors").write_bytes(b"1")
    for name in ("metrics.csv", "layers.csv"):
        (torn / name).write_bytes((torn / name).read_bytes()[:-7])
    (torn / "recipe.yaml").write_text("old")
    (torn / "neurons" / ".epoch_0004.safetensors.partial").write_text("half")
    kills = 0
    for path in killed_everywhere(tmp_path, lambda path: train(path, recipe, three), torn):
        kills += 1
        # Whole epochs are there all the time: those of the checkpoint at least.
        if (path / "recipe.yaml").read_text() != "old":
            run = read_run(path)
            assert run.epochs >= 1
            assert len(run.layers(run.epochs)) == len(run.neurons(run.epochs)) == 3
        train(path, recipe, three)
        assert same_files(path) == same_files(straight), kills
    assert kills > 2 * 4 * 3


def train(path: Path, recipe: Any, records: Any) -> None:
    """Begin or go on as training does, with a checkpoint after each epoch that only says which one."""
    with RunWriter.reopen(path) as writer:
        last = writer.checkpoint_path("last")
        epoch = int(last.read_bytes()) if last.exists() else 0
        writer.rewind(epoch, yaml.safe_dump(recipe()), {})
        for record in records[epoch:]:
            writer.write_epoch(record)
            atomic_write(last, str(record.epoch).encode())
        writer.finish()


def killed_everywhere(tmp_path: Path, story: Callable[[Path], None], start: Path | None = None) -> Iterator[Path]:
    """Yield what ``story`` leaves when it is killed before its first change to the disk, its second, and so on."""
    for moment in range(1000):
        path = tmp_path / f"killed {moment}"
        if start is not None:
            shutil.copytree(start, path)
        child = os.fork()
        if not child:
            _die_at(moment)
            story(path)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 9)
        if not code:
            return
        yield path
        shutil.rmtree(path, ignore_errors=True)
    raise AssertionError("never came to an end")


def _die_at(moment: int) -> None:
    """End this process as a kill would, at the ``moment``-th change to the disk; a write has come half way."""
    left = moment

    def before(name: str) -> None:
        real = getattr(os, name)

        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            if left == 0:
                if name == "write":
                    real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                os._exit(9)
            left -= 1
            return real(*arguments, **named)

        setattr(os, name, call)

    for name in ("open", "write", "pwrite", "fsync", "replace", "ftruncate", "unlink", "mkdir"):
        before(name)


def written(path: Path, recipe: Any, records: Any) -> Path:
    with RunWriter.create(path, yaml.safe_dump(recipe()), {}) as writer:
        for record in records:
            writer.write_epoch(record)
        writer.finish()
    return path


def everything(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def same_files(path: Path) -> dict[str, bytes]:
    """Everything but what tells of the process and its starts."""
    return {k: v for k, v in everything(path).items() if k not in (".lock", "status.json", "environment.json")}


def _started() -> Any:
    from neq_cli.events import RunStarted

    notes = ("cls_token trains always",)
    policy = "neq epsilon=0.001 mu=0.5"
    return RunStarted("digits", "small on digits", policy, "cpu", 3, 7, "test_top1", {"conv1": 4}, notes)


def test_rows_that_nobody_planned_are_not_said(tmp_path: Path) -> None:
    writer = RunWriter.create(tmp_path / "run", "", {})
    writer.write_started(dataclasses.replace(_started(), epochs=0, unit="observation"))
    environment = json.loads((writer.path / "environment.json").read_text())
    assert environment["unit"] == "observation"
    assert "rows_planned" not in environment
