from __future__ import annotations

import io
import json
import math
import os
import random
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import yaml
from rich.console import Console

from neq_cli.errors import RunDirectoryError
from neq_cli.runs.compare.comparison import compare_runs
from neq_cli.runs.compare.inspection import inspect_run, to_json
from neq_cli.runs.store.paths import RunFiles
from neq_cli.runs.store.run import Run, read_run
from neq_cli.runs.views.tables.comparison import render as render_comparison
from neq_cli.runs.views.tables.inspection import render

FROZEN = {"conv1": [[0, 2], [2], [1, 2, 3]], "bn1": [[], [1], [1]]}
ROUNDS = 60
FILES = (
    "recipe.yaml",
    "environment.json",
    "status.json",
    "metrics.csv",
    "layers.csv",
    "neurons/epoch_0003.safetensors",
)


def look_at_everything(path: Path) -> None:
    """Do what `neq inspect` and `neq compare` do with a run directory."""
    run = read_run(path)
    console = Console(file=io.StringIO(), width=80)
    inspection = inspect_run(run)
    json.dumps(to_json(inspection), allow_nan=False)
    console.print(render(inspection))
    console.print(render_comparison(compare_runs([run])))


def reads_or_refuses(path: Path) -> bool:
    """Whether the run could be read; every exception but a one-line RunDirectoryError is a failure of the test."""
    message = ""
    try:
        look_at_everything(path)
    except RunDirectoryError as error:
        message = str(error)
    assert message.isprintable()
    return not message


def test_what_was_written_is_read_back(make_run: Callable[..., Run], records: Any, recipe: Any) -> None:
    metrics = [{"test_top1": 0.1 + 0.2}, {"test_top1": math.nan}, {"test_top1": 1e-300, "lr": 3}]
    run = make_run(frozen=FROZEN, metrics=metrics, environment={"torch": "2.15"})
    expected = records(3, FROZEN, metrics)
    assert run.recipe == recipe()
    assert (run.epochs, run.epochs_planned, run.metric, run.recipe_name) == (3, 3, "test_top1", "digits")
    assert (run.environment["torch"], run.environment["notes"]) == ("2.15", ["a note"])
    assert (run.setting("optimizer.lr"), run.setting("optimizer.name.no"), run.setting("nothing")) == (0.1, None, None)
    for row, record in zip(run.rows, expected, strict=True):
        assert list(row) == list(record.metrics)
        assert all(row[key] == value or math.isnan(value) for key, value in record.metrics.items())
        assert isinstance(row["neurons"], int)
    assert math.isnan(run.rows[1]["test_top1"])
    np.testing.assert_array_equal(run.column("test_top1"), [0.1 + 0.2, np.nan, 1e-300])
    for record in expected:
        assert [(row.layer, row.neurons, row.frozen, row.flops_paper) for row in run.layers(record.epoch)] == [
            (layer.name, layer.neurons, layer.frozen, layer.flops_paper) for layer in record.layers
        ]
        arrays = run.neurons(record.epoch)
        assert set(arrays) == {layer.name for layer in record.layers}
        for layer in record.layers:
            for field, array in arrays[layer.name].items():
                np.testing.assert_array_equal(array, getattr(layer, field))
    assert list(run.neurons(1, ("trained",))["fc"]) == ["trained"]


def test_layer_names_may_hold_anything(make_run: Callable[..., Run]) -> None:
    names = {'a,"b"': 2, "c/d": 1, "line\nbreak": 3, "": 1}
    run = make_run(sizes=names)
    for epoch in (1, 3):
        assert {row.layer: row.neurons for row in run.layers(epoch)} == names
        assert {name: len(arrays["phi"]) for name, arrays in run.neurons(epoch).items()} == names
    look_at_everything(run.path)


def torn_states(path: Path, whole: Path) -> Iterator[Path]:
    """Every state a kill can leave between the end of epoch 2, in ``path``, and of epoch 3, in ``whole``, by bytes."""
    third = RunFiles(whole).neurons(3)
    partial = RunFiles(path).neurons(3).with_name(f".{third.name}.partial")
    partial.write_bytes(third.read_bytes()[:100])
    yield path
    partial.unlink()
    shutil.copy(third, RunFiles(path).neurons(3))
    yield path
    for name in ("layers.csv", "metrics.csv"):
        begun, full = (path / name).read_bytes(), (whole / name).read_bytes()
        for end in range(len(begun), len(full)):
            (path / name).write_bytes(full[:end])
            yield path
        (path / name).write_bytes(full)


def test_an_epoch_is_there_once_its_metrics_row_is_complete(
    make_run: Callable[..., Run],
) -> None:
    run = make_run(epochs=2, frozen=FROZEN, finish=False)
    whole = make_run("whole", epochs=3, frozen=FROZEN, finish=False).path
    before = to_json(inspect_run(run))
    states = 0
    for path in torn_states(run.path, whole):
        torn = read_run(path)
        assert torn.epochs == 2
        assert to_json(inspect_run(torn)) == before
        states += 1
    assert states > 200
    assert inspect_run(read_run(run.path)).epochs_done == 3


@pytest.mark.parametrize("name", FILES)
def test_files_cut_anywhere_read_or_are_refused(make_run: Callable[..., Run], name: str) -> None:
    path = make_run(frozen=FROZEN).path
    whole = (path / name).read_bytes()
    steps = max(1, len(whole) // 70)
    refused = 0
    for end in range(0, len(whole), steps):
        (path / name).write_bytes(whole[:end])
        refused += not reads_or_refuses(path)
    assert refused
    (path / name).write_bytes(whole)
    assert reads_or_refuses(path)


@pytest.mark.parametrize("name", FILES)
def test_files_with_wrong_bytes_read_or_are_refused(make_run: Callable[..., Run], name: str) -> None:
    path = make_run(frozen=FROZEN).path
    whole = (path / name).read_bytes()
    chance = random.Random(name)
    for _ in range(ROUNDS):
        broken = bytearray(whole)
        for _ in range(chance.choice((1, 1, 3, 20))):
            at = chance.randrange(len(broken))
            broken[at : at + chance.choice((0, 1, 1, 4))] = chance.choice(
                (b"", b"\n", b",", b'"', b"-", b"9" * 30, b"\x00", b"\xff", b"\x1b[31m", b"nan", b"[", b"- ", b"e999")
            )
        (path / name).write_bytes(broken)
        reads_or_refuses(path)


def replace(name: str, old: str, new: str) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        text = (path / name).read_text()
        assert text.count(old) >= 1
        (path / name).write_text(text.replace(old, new, 1))

    return edit


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda path: (path / name).write_bytes(content) and None


def remove(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def fifo(name: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        (path / name).unlink()
        os.mkfifo(path / name)

    return make


def neurons(change: Callable[[dict[str, Any]], object], schema: str = "1") -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        file = path / "neurons" / "epoch_0003.safetensors"
        arrays = safetensors.numpy.load_file(file)
        change(arrays)
        safetensors.numpy.save_file(arrays, file, {"schema": schema})

    return edit


BOMB = "\n".join(["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"] + [
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)
])  # fmt: skip
MERGE_BOMB = "a0: &a0 {x: 1}\n" + "\n".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (remove("recipe.yaml"), "not a run directory: no recipe.yaml"),
        (remove("metrics.csv"), "no finished epoch yet (status: finished); train it further or anew"),
        (write("metrics.csv", b""), "no finished epoch yet"),
        (write("metrics.csv", b"epoch,lr"), "no finished epoch yet"),
        (write("metrics.csv", b"epoch,lr\n1,2\n"), "metrics.csv:1: no column neurons, frozen"),
        (replace("metrics.csv", "epoch,lr", "epoch,epoch"), "metrics.csv:1: a column stands twice"),
        (replace("metrics.csv", "\n2,", "\n2,zero"), "metrics.csv:3: lr: 'zero0.1' is not a number"),
        (replace("metrics.csv", "\n2,", "\n3,"), "metrics.csv:3: epoch 3 after epoch 1"),
        (replace("metrics.csv", "\n2,0.1", "\n2"), "metrics.csv:3: 10 cells where 11 belong"),
        (replace("metrics.csv", "test_top1", "test_top9"), "metrics.csv: no column test_top1 or test_miou"),
        (replace("metrics.csv", "\n2,", "\n\n2,"), "metrics.csv:3: 0 cells"),
        (write("metrics.csv", b"x" * 70000 + b"\n"), "metrics.csv:1: a line of more than 65536 bytes"),
        (write("metrics.csv", b"epoch\xff\n"), "metrics.csv:1: not UTF-8"),
        (fifo("metrics.csv"), "metrics.csv: not a regular file"),
        (fifo("recipe.yaml"), "recipe.yaml: not a regular file"),
        (remove("layers.csv"), "layers.csv: missing"),
        (replace("layers.csv", "\n3,bn1,Conv2d,3", "\n3,bn1,Conv2d,-3"), "layers.csv:9: neurons: '-3' is not a whole"),
        (replace("layers.csv", "\n3,bn1,Conv2d,3,1", "\n3,bn1,Conv2d,3,4"), "layers.csv:9: 4 frozen of 3 neurons"),
        (replace("layers.csv", "\n3,bn1,Conv2d,3", "\n3,bn2,Conv2d,3"), "not the same layers"),
        (replace("layers.csv", "\n3,bn1,Conv2d,3", "\n3,bn1,Conv2d,4"), "not the same layers"),
        (replace("layers.csv", "phi_mean", "psi_mean"), "layers.csv:1: no column phi_mean"),
        (remove("neurons/epoch_0002.safetensors"), "epoch_0002.safetensors: missing"),
        (neurons(lambda a: a.pop("fc/phi")), "fc: its phi, delta_phi, velocity, trained, trainable do not belong"),
        (neurons(lambda a: a.update({"fc/phi": a["fc/phi"][:1]})), "do not belong together"),
        (neurons(lambda a: a.update({"fc/phi": a["fc/phi"].astype("f2")})), "fc/phi: F16[2] where F32[neurons]"),
        (neurons(lambda a: a.update({"fc/phi": a["fc/phi"][None]})), "fc/phi: F32[1, 2] where F32[neurons]"),
        (neurons(lambda a: a, schema="2"), "schema '2' where this neq reads 1"),
        (write("neurons/epoch_0003.safetensors", b"\xff" * 8 + b"{}"), "not a safetensors file"),
        (write("recipe.yaml", b"epochs: [1\n"), "recipe.yaml:2: not YAML"),
        (write("recipe.yaml", b"epochs: many\n"), "recipe.yaml: epochs: 'many' is not a whole number above 0"),
        (write("recipe.yaml", b"- a\n"), "recipe.yaml: not a mapping"),
        (write("recipe.yaml", b"\xff\xfe"), "recipe.yaml: not UTF-8"),
        (write("recipe.yaml", b"epochs: !!python/object:os.system {}\n"), "recipe.yaml:1: not YAML"),
        (write("recipe.yaml", BOMB.encode()), "recipe.yaml: more than 100000 values"),
        (write("recipe.yaml", MERGE_BOMB.encode()), "recipe.yaml:2: not YAML"),
        (write("recipe.yaml", b"epochs: &a [*a]"), "recipe.yaml: "),
        (write("recipe.yaml", b"[" * 2000), "recipe.yaml: not YAML"),
        (write("recipe.yaml", b"x" * 300_000), "recipe.yaml: 300000 bytes, more than"),
        (write("recipe.yaml", b"epochs: 0x" + b"f" * 9000), "recipe.yaml:1: not YAML: 'a whole number of more than 64"),
        (write("environment.json", b'{"a": ' + b"9" * 400 + b"}"), "environment.json: a whole number of 1329 bits"),
        (write("environment.json", b"{"), "environment.json:1: not JSON"),
        (write("environment.json", b"[" * 100000), "environment.json: not JSON"),
        (write("environment.json", b"[]"), "environment.json: not a mapping"),
        (write("status.json", b'{"state": "\\u001b[31mhappy"}'), r"status.json: state: '\x1b[31mhappy' is not one of"),
    ],
)
def test_damage_is_named_with_file_and_line(
    make_run: Callable[..., Run], damage: Callable[[Path], None], says: str
) -> None:
    path = make_run(frozen=FROZEN).path
    damage(path)
    with pytest.raises(RunDirectoryError) as caught:
        look_at_everything(path)
    message = str(caught.value)
    assert says in message
    assert str(path) in message
    assert message.isprintable()


def test_places_that_are_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, says in (("gone", "no such run directory"), ("", "not a run directory"), ("file", "not a run directory")):
        with pytest.raises(RunDirectoryError, match=says):
            read_run(tmp_path / name)


def test_run_without_environment_and_status_reads(make_run: Callable[..., Run]) -> None:
    path = make_run().path
    (path / "environment.json").unlink()
    (path / "status.json").unlink()
    run = read_run(path)
    assert (run.environment, str(run.status), run.metric) == ({}, "unknown", "test_top1")
    assert run.recipe_name == path.parent.name
    look_at_everything(path)


@pytest.mark.parametrize(
    ("status", "says"),
    [
        pytest.param({"pid": os.getpid()}, f"running: process {os.getpid()}", id="this process"),
        ({"pid": 2**22 + 1}, f"killed: process {2**22 + 1} is gone"),  # above Linux' largest
        ({"host": "far\x1baway", "pid": 1}, "running or killed: started on far�away, which cannot be asked from here"),
        ({"pid": 0}, "running or killed"),
        ({"pid": 2**70}, "running or killed"),
        ({"pid": "1"}, "running or killed"),
        ({}, "running or killed"),
        ({"state": "failed", "reason": 7, "pid": os.getpid()}, "failed: 7"),
    ],
)
def test_status_is_checked_against_the_process(make_run: Callable[..., Run], status: Any, says: str) -> None:
    path = make_run().path
    (path / "status.json").write_text(json.dumps({"state": "running", "host": socket.gethostname(), **status}))
    assert str(read_run(path).status).startswith(says)


def test_a_task_of_ones_own_names_its_metric(make_run: Callable[..., Run]) -> None:
    run = make_run(metrics=[{"psnr": 31.5}] * 3)
    environment = json.loads((run.path / "environment.json").read_text())
    (run.path / "environment.json").write_text(json.dumps({**environment, "metric": "psnr"}))
    assert read_run(run.path).metric == "psnr"
    (run.path / "environment.json").write_text(json.dumps({**environment, "metric": ["psnr"]}))
    assert read_run(run.path).metric == "test_top1"


def test_odd_yaml_becomes_plain_values(make_run: Callable[..., Run], recipe: Any) -> None:
    path = make_run().path
    extra = "seen: 2026-01-02\nset: !!set {a, b}\n1: one\nnested: {shared: &s [1, 2], again: *s}\n"
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe()) + extra)
    run = read_run(path)
    assert run.setting("seen") == "2026-01-02"
    assert run.setting("1") == "one"
    assert run.setting("nested") == {"shared": [1, 2], "again": [1, 2]}
    assert sorted(run.setting("set")) == ["a", "b"]


def test_rows_are_epochs_unless_the_run_says_otherwise(make_run: Callable[..., Run], recipe: Any) -> None:
    run = make_run(recipe=recipe(epochs=5), epochs=3)
    assert (run.unit, run.epochs, run.epochs_planned) == ("epoch", 3, 5)
    assert run.passed_epochs is not None
    assert run.passed_epochs.tolist() == [1, 2, 3]


def test_a_run_of_observations(make_observed: Callable[..., Run], recipe: Any) -> None:
    run = make_observed(recipe=recipe(epochs=3))
    assert (run.unit, run.epochs, run.epochs_planned) == ("observation", 8, 12)
    assert run.passed_epochs is not None
    assert run.passed_epochs.tolist() == [0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2]
    assert run.column("step")[-1] == 800


RECORDED = {"recorded": True, "name": "mine", "seed": 1, "epochs": None, "policy": {"kind": "neq"}}


@pytest.mark.parametrize(
    ("passed", "unit", "known"),
    [
        ([1.0, 2.0, 3.0], "epoch", [1, 2, 3]),
        ([0.4, 0.8, 1.2], "observation", [0.4, 0.8, 1.2]),
        ([math.nan, math.nan, math.nan], "observation", None),  # data without a length
        ([2.0, 1.0, 1.0], "epoch", [1, 2, 3]),  # whatever somebody's column of that name is
        ([0.4, 0.3, 1.2], "observation", None),
        ([0.0, 0.5, 1.0], "observation", None),
        ([-0.5, 0.5, 1.0], "observation", None),
        ([0.5, 1.0, math.inf], "observation", None),
        ([0.5, 1.0, 1e99], "observation", None),
    ],
)
def test_rows_of_recorded_runs_tell_what_they_are(
    make_run: Callable[..., Run], passed: list[float], unit: str, known: list[float] | None
) -> None:
    run = make_run(recipe=RECORDED, metrics=[{"passed_epochs": value} for value in passed])
    assert (run.unit, run.epochs_planned) == (unit, 3)
    told = run.passed_epochs
    assert (None if told is None else told.tolist()) == known


def test_a_loop_that_counts_parts_of_epochs_in_a_recipe_of_neqs_is_by_epoch(make_run: Callable[..., Run]) -> None:
    assert make_run(metrics=[{"passed_epochs": value} for value in (0.5, 1.0)]).unit == "epoch"


@pytest.mark.parametrize("planned", [True, "12", 0, -3, 1.5, 10**10, [12], None])
def test_rows_planned_that_are_no_number_are_those_there_are(make_observed: Callable[..., Run], planned: Any) -> None:
    run = make_observed()
    environment = json.loads(run.files.environment.read_text())
    run.files.environment.write_text(json.dumps({**environment, "rows_planned": planned}))
    assert read_run(run.path).epochs_planned == 8


@pytest.mark.parametrize("unit", [["observation"], {"observation": 1}, "", None, 3, "observations"])
def test_a_unit_of_no_meaning_is_the_epoch(make_run: Callable[..., Run], unit: Any) -> None:
    run = make_run()
    environment = json.loads(run.files.environment.read_text())
    run.files.environment.write_text(json.dumps({**environment, "unit": unit}))
    assert read_run(run.path).unit == "epoch"


def test_a_run_without_an_observation_is_refused_in_its_word(make_observed: Callable[..., Run]) -> None:
    run = make_observed()
    run.files.metrics.unlink()
    with pytest.raises(RunDirectoryError, match="no finished observation yet"):
        read_run(run.path)
