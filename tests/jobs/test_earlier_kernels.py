"""Which kernel choices of earlier runs a run takes over: those timed on the same machine, and nothing damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from neq_cli.freezing.backward import dispatch as dispatch_module
from neq_cli.jobs import train as running
from neq_cli.jobs.earlier_kernels import earlier_choices
from neq_cli.recipe.load import load_recipe
from neq_cli.runs.views.live.progress import Silent
from neq_cli.training.machine.device import describe_device, environment, machine

MACHINE = {"neq": "1", "torch": "2", "cuda": None, "device": "cpu (2 threads)", "processor": "a chip"}
ABOUT = {"neq": "1", "packages": {"torch": "2"}, "cuda": None, "device": "cpu (2 threads)", "processor": "a chip"}
SLICED = {"kernel": "sliced", "milliseconds": {"sliced": 1.0, "dense": 2.0}}
DENSE = {"kernel": "dense", "milliseconds": {"sliced": 2.0, "dense": 1.0}}


def write(folder: Path, name: str, choices: Any, age: int = 0, about: Any = ABOUT) -> Path:
    run = folder / name
    run.mkdir()
    (run / "environment.json").write_text(json.dumps(about))
    (run / "dispatch.json").write_text(json.dumps({"backward": "exact", "choices": choices}))
    os.utime(run / "dispatch.json", (10**9 - age, 10**9 - age))
    return run


def test_all_that_was_timed_is_taken_over_and_the_newest_counts(tmp_path: Path) -> None:
    write(tmp_path, "a", {"x": SLICED, "y": SLICED}, age=2)
    newest = write(tmp_path, "b", {"x": DENSE, "by rule": {"kernel": "sliced", "milliseconds": {}}}, age=1)
    write(tmp_path, "c", {}, age=0)
    write(tmp_path, ".trash", {"z": SLICED})
    own = write(tmp_path, "own", {"z": SLICED})
    found = earlier_choices(tmp_path, MACHINE, own)
    assert {kind: choice.kernel for kind, choice in found.choices.items()} == {"x": "dense", "y": "sliced"}
    assert found.notes == (
        f"kernels: of earlier runs on this machine, where they timed the same (2 kinds; {newest} and 1 more)",
    )


@pytest.mark.parametrize("key", MACHINE)
@pytest.mark.parametrize("resumed", [False, True])
def test_another_machine_or_version_times_anew(tmp_path: Path, key: str, resumed: bool) -> None:
    other: dict[str, Any] = {"packages": {"torch": "other"}} if key == "torch" else {key: "other"}
    about: dict[str, Any] = {**ABOUT, **other}
    if resumed:  # the run was begun here and gone on with there
        device = other.pop("device", ABOUT["device"])
        about = {**ABOUT, "resumed": [{"epoch": 1, "device": device, "changed": other}]}
    write(tmp_path, "a", {"x": SLICED}, about=about)
    assert not earlier_choices(tmp_path, MACHINE).choices
    assert earlier_choices(tmp_path, MACHINE).notes == ()


def test_a_run_gone_on_with_on_the_same_machine_counts(tmp_path: Path) -> None:
    entry = {"epoch": 1, "device": ABOUT["device"], "changed": {"git": None, "packages": {"numpy": "3"}}}
    write(tmp_path, "a", {"x": SLICED}, about={**ABOUT, "resumed": [entry]})
    assert list(earlier_choices(tmp_path, MACHINE).choices) == ["x"]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("dispatch.json", "{"),
        ("dispatch.json", "[" * 100_000),
        ("dispatch.json", '{"choices": []}'),
        ("dispatch.json", '{"choices": {"x": "sliced"}}'),
        ("dispatch.json", '{"choices": {"x": {"kernel": "odd", "milliseconds": {}}}}'),
        ("dispatch.json", '{"choices": {"x": {"kernel": "sliced", "milliseconds": {"sliced": "quick"}}}}'),
        ("environment.json", "not JSON"),
    ],
)
def test_what_is_damaged_is_named_and_left_out(tmp_path: Path, file: str, content: str) -> None:
    good, bad = write(tmp_path, "good", {"x": SLICED}, age=1), write(tmp_path, "bad", {"x": DENSE, "y": DENSE})
    (bad / file).write_text(content)
    found = earlier_choices(tmp_path, MACHINE)
    assert list(found.choices) == ["x"]
    first, second = found.notes
    assert str(good) in first
    assert second.startswith(f"kernels: not taken over: {bad / file}")
    assert "\n" not in second


@pytest.mark.parametrize("about", [{**ABOUT, "packages": 3}, {**ABOUT, "resumed": [3]}, {**ABOUT, "resumed": 3}, {}])
def test_odd_descriptions_are_no_match_or_none_that_matters(tmp_path: Path, about: Any) -> None:
    write(tmp_path, "a", {"x": SLICED}, about=about)
    earlier_choices(tmp_path, MACHINE)


def test_folders_without_runs(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for folder in (tmp_path, tmp_path / "missing", tmp_path / "file"):
        assert not earlier_choices(folder, MACHINE).choices


def test_a_machine_is_described_as_runs_describe_it() -> None:
    cpu = torch.device("cpu")
    written = environment(cpu)
    written = {**written, **written["packages"]}
    assert machine(cpu, 1) == {key: written[key] for key in MACHINE}
    assert machine(cpu, 3)["device"] == f"{describe_device(cpu)} in 3 processes"


RECIPE = """
model: {name: resnet8, kwargs: {num_classes: 10, in_channels: 1, width: 4}}
data: {name: digits, workers: 0, probe_size: 1000}
epochs: 3
batch_size: 64
optimizer: {name: sgd, lr: 0.1}
policy: {kind: stochastic, p: 0.5}
channels_last: true
device: cpu
"""


def train(folder: Path, name: str, *changes: str) -> dict[str, Any]:
    """Train, and return what the run directory says of kernels and notes."""
    (folder / "small.yaml").write_text(RECIPE)
    run = running.train(load_recipe(str(folder / "small.yaml"), changes), folder / "runs" / name, Silent())
    choices = json.loads((run / "dispatch.json").read_text())["choices"]
    return {"choices": choices, "notes": json.loads((run / "environment.json").read_text())["notes"]}


def test_a_second_run_times_nothing_and_says_whose_choices_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train(tmp_path, "first")
    assert first["choices"]
    assert not [note for note in first["notes"] if note.startswith("kernels")]

    def fail(*arguments: object) -> None:
        raise AssertionError("a kernel is timed again")

    monkeypatch.setattr(dispatch_module, "_fastest", fail)
    second = train(tmp_path, "second")
    assert second["choices"] == first["choices"]
    (note,) = [note for note in second["notes"] if note.startswith("kernels")]
    assert note.endswith(f"({len(first['choices'])} kinds; {tmp_path / 'runs' / 'first'})")
    fixed = train(tmp_path, "fixed", "deterministic=true")
    assert {choice["milliseconds"] == {} for choice in fixed["choices"].values()} == {True}
    assert not [note for note in fixed["notes"] if note.startswith("kernels")]
    # What is known is no choice before a call asks for it.
    assert train(tmp_path, "none", "policy={kind: baseline}")["choices"] == {}


def test_a_damaged_neighbour_is_noted_and_hinders_nothing(tmp_path: Path) -> None:
    write(tmp_path, "runs", {})
    bad = tmp_path / "runs" / "bad"
    bad.mkdir()
    (bad / "environment.json").write_text("{")
    (bad / "dispatch.json").write_text("{")
    assert [note for note in train(tmp_path, "run")["notes"] if note.startswith("kernels: not taken over")]
