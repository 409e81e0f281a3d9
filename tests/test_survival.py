"""Training that is killed at any moment and resumed ends as if it had never been interrupted, file by file."""

from __future__ import annotations

import csv
import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neq_cli.errors import RunDirectoryError
from neq_cli.training.loop.checkpoint import load_state

Start = Callable[..., Any]


def train(neq: Start, *arguments: object, seconds: float = 120, **options: Any) -> Any:
    """Run `neq train` on the recipe to its end, which must be a good one."""
    process = neq("train", "rich.yaml", *arguments, **options)
    assert process.wait(seconds) == 0, process.text
    return process


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def status(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "status.json").read_text())
    return content


def last(run: Path) -> Any:
    """Return the state that the run goes on with, also where it was killed while a checkpoint takes its place."""
    path = run / "checkpoints" / "last.safetensors"
    try:
        return load_state(path)
    except RunDirectoryError:
        return load_state(path.with_name("previous.safetensors"))


# What a process does to itself just before its k-th change of a file in the run directory. Audit events precede what
# they tell of; writes have none, so that some of them are torn by hand.
DIES_BEFORE_CHANGE = """
import os, signal, sys
run, left, torn = {run!r}, {number}, {torn}
writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
write = os.write


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def changes(event, arguments):
    global left
    if event == "open":
        changed = isinstance(arguments[2], int) and arguments[2] & writing
    else:
        changed = event in ("os.rename", "os.remove", "os.mkdir", "os.truncate", "os.rmdir", "os.link")
    if changed and run in os.path.abspath(str(arguments[0])):
        left -= 1
        if left == 0 and not torn:
            die()


def half(descriptor, content):
    if left <= 0 and run in os.readlink(f"/proc/self/fd/{{descriptor}}"):
        write(descriptor, bytes(content)[: len(content) // 2])
        die()
    return write(descriptor, content)


sys.addaudithook(changes)
if torn:
    os.write = half
"""


def killed_at_change(run: Path, number: int, *, torn: bool = False) -> str:
    return DIES_BEFORE_CHANGE.format(run=str(run), number=number, torn=torn)


class Killer:
    """Starts the run again and again and kills it, each time in a way and at a moment that its seed decides."""

    def __init__(self, neq: Start, run: Path, seed: int, *changes: str) -> None:
        self.neq, self.run, self.changes = neq, run, changes
        self.random = random.Random(seed)
        self.told: list[str] = []

    def once(self) -> bool:
        """Start the run, or go on with it, and kill it; False where it ended before."""
        ways = (self.after_a_while, self.upon_a_file, self.upon_a_file, self.before_a_change, self.within_a_write)
        way = self.random.choice(ways)
        process, moment = way()
        code = process.wait()
        process.until_alone()
        self.told.append(f"{moment} (code {code}, then {self.reached()})")
        assert code in (0, -signal.SIGKILL), f"{self} {process.text}"
        return bool(code)

    def start(self, before: str = "") -> Any:
        return self.neq("train", "rich.yaml", *self.changes, "-o", self.run, "--resume", before=before)

    def after_a_while(self) -> tuple[Any, str]:
        seconds = self.random.uniform(0, 0.15)
        process, found = self.start(), self.run / "status.json"
        before = found.stat().st_mtime_ns if found.exists() else 0
        process.until(lambda: found.exists() and found.stat().st_mtime_ns != before)
        process.ended(seconds)
        return self.kill(process, f"{seconds:.3f} s after its beginning")

    def upon_a_file(self) -> tuple[Any, str]:
        patterns = (
            "checkpoints/.last.*.partial", "checkpoints/.best.*.partial", "neurons/.*.partial", ".status.*.partial",
            "metrics.csv", "layers.csv", "checkpoints/last.safetensors", "checkpoints/best.safetensors",
        )  # fmt: skip
        pattern, seconds = self.random.choice(patterns), self.random.choice((0, 0, 0.001, 0.003, 0.01))
        before = self.seen(pattern)
        process = self.start()
        process.until(lambda: not self.seen(pattern) <= before)
        time.sleep(seconds)
        return self.kill(process, f"{seconds} s after {pattern} appeared or changed")

    def seen(self, pattern: str) -> set[tuple[str, int]]:
        found = set()
        for path in self.run.glob(pattern):
            try:
                found.add((path.name, path.stat().st_mtime_ns))
            except FileNotFoundError:
                continue
        return found

    def before_a_change(self) -> tuple[Any, str]:
        number = self.random.randint(1, 60)
        return self.start(killed_at_change(self.run, number)), f"before change {number} of its files"

    def within_a_write(self) -> tuple[Any, str]:
        number = self.random.randint(1, 60)
        return self.start(killed_at_change(self.run, number, torn=True)), f"within a write after change {number}"

    def kill(self, process: Any, moment: str) -> tuple[Any, str]:
        if not process.ended():
            process.kill(signal.SIGKILL)
        return process, moment

    def reached(self) -> str:
        for name in ("last", "previous"):
            path = self.run / "checkpoints" / f"{name}.safetensors"
            if path.exists():
                state = load_state(path)
                return f"{name}: epoch {state['epoch']}, step {(state['so_far'] or {}).get('steps', 0)}"
        return "no checkpoint"

    def __str__(self) -> str:
        return "killed " + "; ".join(self.told)


def assert_survives(neq: Start, same_run: Start, folder: Path, kills: int, seed: int, *changes: str) -> None:
    """Assert that a run that is killed so often ends as one that is left alone."""
    straight, run = folder / "straight", folder / "run"
    train(neq, *changes, "-o", straight)
    killer = Killer(neq, run, seed, *changes)
    for number in range(kills):
        assert killer.once(), f"finished before kill {number + 1} of {kills}: {killer}"
    process = train(neq, *changes, "-o", run, "--resume")
    assert len(killer.told) == kills
    same_run(straight, run, f"{killer} {process.text}")


def test_a_run_killed_six_times_ends_as_one_left_alone(neq: Start, same_run: Start, folder: Path) -> None:
    assert_survives(neq, same_run, folder, 6, 1, "epochs=7")


def test_a_run_observed_by_steps_and_killed_ends_as_one_left_alone(neq: Start, same_run: Start, folder: Path) -> None:
    assert_survives(neq, same_run, folder, 4, 2, "epochs=5", "probe_every=7", "gradient_accumulation=3")


def test_the_recipe_of_these_tests_freezes_slices_and_pauses(neq: Start, folder: Path) -> None:
    run = folder / "run"
    process = neq("train", "rich.yaml", "-o", run)
    paused = process.until(lambda: (run / "checkpoints/last.safetensors").exists() and last(run)["so_far"] is not None)
    assert paused
    assert process.wait() == 0
    table = rows(run)
    assert any(0 < int(row["frozen"]) < int(row["neurons"]) - 10 for row in table)
    assert any(float(row["flops_executed"]) < float(row["flops_executed_dense"]) for row in table)
    kernels = {choice["kernel"] for choice in json.loads((run / "dispatch.json").read_text())["choices"].values()}
    assert kernels == {"dense", "sliced"}
    lr = [float(row["lr"]) for row in table]
    assert lr == pytest.approx([0.05, 0.1, 0.1, 0.03, 0.03])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_killed_twenty_times_ends_as_one_left_alone(neq: Start, same_run: Start, folder: Path, seed: int) -> None:
    assert_survives(neq, same_run, folder, 20, seed, "epochs=16")


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        ("policy={kind: stochastic, p: 0.6}",),
        ("policy.definition=reference", "clip_grad_norm=1.0"),
        ("optimizer={name: adam, lr: 0.01}", "scheduler={name: cosine}"),
        ("optimizer={name: adamw, lr: 0.01, amsgrad: true}", "scheduler={name: exponential, gamma: 0.9}"),
        ("precision=bf16",),
        ("precision=fp16",),
        ("data.workers=2", "data.cache=none", "data.image_size=9"),
        ("backward=truncated",),
        ("backward=dense", "channels_last=false", "eval_every=2"),
        ("ema=null", "gradient_accumulation=4", "optimizer={name: sgd, lr: 0.1, momentum: 0.9, nesterov: true}"),
    ],
    ids=lambda changes: changes[0],
)
def test_whatever_the_recipe_a_killed_run_ends_as_one_left_alone(
    neq: Start, same_run: Start, folder: Path, changes: tuple[str, ...]
) -> None:
    assert_survives(neq, same_run, folder, 8, 3, "epochs=9", *changes)


@pytest.mark.slow
def test_with_the_same_kernel_choices_timings_decide_nothing(neq: Start, same_run: Start, folder: Path) -> None:
    run, straight = folder / "run", folder / "straight"
    changes = ("deterministic=false", "channels_last=auto", "epochs=9")
    killer = Killer(neq, run, 4, *changes)
    for _ in range(8):
        assert killer.once(), str(killer)
    train(neq, *changes, "-o", run, "--resume")
    # The choices are made when a kind of call comes up first, so that only the finished run has them all.
    straight.mkdir()
    for name in ("recipe.yaml", "dispatch.json", "nets.py"):
        shutil.copy(run / name, straight / name)
    train(neq, *changes, "-o", straight, "--resume")
    same_run(straight, run, str(killer))


@pytest.mark.slow
@pytest.mark.parametrize("torn", [False, True])
def test_a_kill_before_or_within_any_change_of_a_file_does_no_harm(
    neq: Start, same_run: Start, folder: Path, torn: bool
) -> None:
    straight, changes = folder / "straight", ("epochs=2", "checkpoint_minutes=0.001")
    train(neq, *changes, "-o", straight)
    number, code = 0, -signal.SIGKILL
    while code:
        number += 1
        run = folder / f"run-{number}"
        code = neq("train", "rich.yaml", *changes, "-o", run, before=killed_at_change(run, number, torn=torn)).wait()
        again = killed_at_change(run, number % 7 + 1, torn=torn)  # and once more as it is about to go on
        assert neq("train", "rich.yaml", *changes, "-o", run, "--resume", before=again).wait() in (0, -signal.SIGKILL)
        process = train(neq, *changes, "-o", run, "--resume")
        same_run(straight, run, f"killed at change {number}, torn: {torn}: {process.text}")
        shutil.rmtree(run)
    assert number > 20


# Resuming as a user does it.

PLAIN = ("checkpoint_minutes=15", "epochs=2")


@pytest.fixture(scope="module")
def finished(neq_in: Start, recipe_folder: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs; to be copied, not changed."""
    place = tmp_path_factory.mktemp("finished")
    process = neq_in(recipe_folder(place), "train", "rich.yaml", *PLAIN, "-o", place / "run")
    assert process.wait(120) == 0, process.text
    return place / "run"


@pytest.fixture(scope="module")
def longer(neq_in: Start, finished: Path) -> Path:
    """The same for four epochs."""
    run = finished.with_name("longer")
    process = neq_in(finished.parent, "train", "rich.yaml", *PLAIN, "epochs=4", "-o", run)
    assert process.wait(120) == 0, process.text
    return run


def contents(run: Path) -> dict[str, tuple[int, bytes]]:
    """Everything in a folder, with the time at which it was changed."""
    files = [path for path in run.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(run)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def copied(run: Path, target: Path) -> Path:
    shutil.copytree(run, target)
    return target


def assert_refused(process: Any, *said: str) -> None:
    assert process.wait() == 2, process.text
    assert len(process.lines) == 1, process.text
    for words in said:
        assert words in process.text


def test_without_o_the_newest_unfinished_run_is_resumed(
    neq: Start, same_run: Start, folder: Path, finished: Path
) -> None:
    process = train(neq, *PLAIN, "--resume", "--progress", "plain")
    assert "nothing to resume of rich with seed 1; beginning" in process.text
    begun = folder / process.result.strip()
    same_run(finished, begun)
    assert begun.parent == folder / "runs" / "rich"
    before = contents(begun)
    process = train(neq, *PLAIN, "--resume")
    assert process.result.strip() == str(begun.relative_to(folder))
    assert "finished already" in process.text
    assert contents(begun) == before
    # A later one that was stopped goes first, of the same seed only.
    later = copied(begun, begun.with_name("29990101-000000-s1"))
    (later / "status.json").write_text(
        json.dumps({**status(later), "state": "interrupted", "started": "2999-01-01T00:00:00+00:00"})
    )
    assert train(neq, *PLAIN, "--resume").result.strip() == str(later.relative_to(folder))
    same_run(begun, later)
    other = train(neq, *PLAIN, "--resume", "seed=2", "epochs=1").result.strip()
    assert other.endswith("-s2")


def test_a_folder_that_is_missing_or_empty_is_begun_and_a_strangers_refused(
    neq: Start, same_run: Start, folder: Path, finished: Path
) -> None:
    (folder / "empty").mkdir()
    for name in ("missing", "empty"):
        train(neq, *PLAIN, "-o", name, "--resume")
        same_run(finished, folder / name)
    before = contents(folder / "empty")
    train(neq, *PLAIN, "-o", "empty", "--resume")
    assert contents(folder / "empty") == before
    (folder / "foreign").mkdir()
    (folder / "foreign" / "thesis.tex").write_text("precious")
    assert_refused(neq("train", "rich.yaml", *PLAIN, "-o", "foreign", "--resume"), "foreign: no recipe.yaml")
    assert contents(folder / "foreign").keys() == {"thesis.tex"}
    assert_refused(neq("train", "rich.yaml", *PLAIN, "-o", "empty"), "empty: already exists and is not empty")


def test_more_epochs_extend_a_finished_run_to_what_a_longer_one_is(
    neq: Start, same_run: Start, folder: Path, finished: Path, longer: Path
) -> None:
    run = copied(finished, folder / "run")
    process = train(neq, *PLAIN, "epochs=4", "-o", run, "--resume")
    same_run(longer, run, process.text)
    environment = json.loads((run / "environment.json").read_text())
    assert [entry["epoch"] for entry in environment["resumed"]] == [2]
    assert environment["argv"] == json.loads((finished / "environment.json").read_text())["argv"]
    assert (status(run)["state"], status(run)["reason"]) == ("finished", None)
    before = contents(run)
    # The command that began it asks for what is there.
    last = float(rows(run)[-1]["test_top1"])
    for epochs in (2, 3):
        process = train(neq, *PLAIN, f"epochs={epochs}", "-o", run, "--resume")
        said = f"finished already: 4 epochs, test_top1 {last:.2f}, the {epochs} asked for among them; more epochs"
        assert said in " ".join(process.lines)
        assert process.result.strip() == str(run)
        assert str(run) not in process.text.replace(process.result, "")  # stdout tells it
    assert "among them" not in train(neq, *PLAIN, "epochs=4", "-o", run, "--resume").text
    assert contents(run) == before
    # Where the longer one was stopped, either may be meant.
    (run / "status.json").write_text(json.dumps({**status(run), "state": "interrupted"}))
    process = neq("train", "rich.yaml", *PLAIN, "epochs=3", "-o", run, "--resume")
    assert_refused(process, "epochs=3: 3, but epoch 4 is trained, on the way to 4; give 4 to go on")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("optimizer.lr=0.2", "optimizer.lr=0.2: 0.2, but "),
        ("seed=7", "seed=7: 7, but "),
        ("model.kwargs={num_classes: 11}", "num_classes"),
        ("policy.epsilon=0.5", "policy.epsilon=0.5: 0.5, but "),
        ("batch_size=12", "batch_size=12: 12 in 1 processes are 12 images a step"),
        ("scheduler.name=cosine", "scheduler.name=cosine"),
    ],
)
def test_changes_that_would_make_it_another_run_are_refused_by_name(
    neq: Start, folder: Path, finished: Path, change: str, said: str
) -> None:
    run = copied(finished, folder / "run")
    before = contents(run)
    process = neq("train", "rich.yaml", *PLAIN, "epochs=3", change, "-o", run, "--resume")
    assert process.wait() == 2, process.text
    assert said in process.text
    assert contents(run) == before


def test_a_cosine_schedule_cannot_be_made_longer(neq: Start, folder: Path) -> None:
    changes = ("checkpoint_minutes=15", "scheduler={name: cosine}")
    train(neq, *changes, "epochs=1", "-o", "run")
    process = neq("train", "rich.yaml", *changes, "epochs=3", "-o", "run", "--resume")
    assert_refused(process, "epochs=3: 3, but ", "cosine")


def test_what_does_not_change_the_result_may_change(
    neq: Start, same_run: Start, folder: Path, finished: Path, longer: Path
) -> None:
    run = copied(finished, folder / "run")
    changes = ("data.workers=1", "data.cache=none", "data.root=/moved/elsewhere", "checkpoint_minutes=7")
    train(neq, *PLAIN, "epochs=4", *changes, "-o", run, "--resume")
    (run / "recipe.yaml").write_bytes((longer / "recipe.yaml").read_bytes())
    same_run(longer, run)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    neq: Start, same_run: Start, folder: Path, finished: Path, longer: Path
) -> None:
    run = copied(finished, folder / "run")
    flip(run / "checkpoints" / "last.safetensors", -100)
    process = train(neq, *PLAIN, "epochs=4", "-o", run, "--resume")
    assert "last.safetensors: " in process.text
    assert "going on from previous.safetensors" in process.text
    assert "after epoch 1" in process.text
    same_run(longer, run)


def test_when_both_checkpoints_are_damaged_nothing_is_touched(neq: Start, folder: Path, finished: Path) -> None:
    run = copied(finished, folder / "run")
    for name in ("last", "previous"):
        flip(run / "checkpoints" / f"{name}.safetensors", -100)
    before = contents(run)
    process = neq("train", "rich.yaml", *PLAIN, "epochs=4", "-o", run, "--resume")
    assert process.wait() == 2
    assert "no checkpoint is whole" in process.text
    assert "Traceback" not in process.text
    assert contents(run) == before


def test_a_second_process_waits_for_the_first_to_die(neq: Start, folder: Path) -> None:
    changes = ("checkpoint_minutes=15", "epochs=300")
    first = neq("train", "rich.yaml", *changes, "-o", "run")
    first.until(lambda: (folder / "run" / "checkpoints" / "last.safetensors").exists())
    second = neq("train", "rich.yaml", *changes, "-o", "run", "--resume")
    assert_refused(second, f"run: being trained by process {first.process} on host")
    third = neq("train", "rich.yaml", *changes, "-o", "run")
    assert_refused(third, "run: already exists and is not empty")
    assert not first.ended()
    first.kill(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    epochs = last(folder / "run")["epoch"]
    process = train(neq, *changes, f"epochs={epochs + 1}", "-o", "run", "--resume")
    assert f"resuming run after epoch {epochs}" in process.text
    assert len(rows(folder / "run")) == epochs + 1


DIES_BEFORE_IT_IS_LAST = """
import os, signal, sys


def die(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith("last.safetensors"):
        os.kill(os.getpid(), signal.SIGKILL)


sys.addaudithook(die)
"""


def test_a_damaged_checkpoint_never_takes_the_place_of_the_one_before(
    neq: Start, same_run: Start, folder: Path, finished: Path, longer: Path
) -> None:
    run = copied(finished, folder / "run")
    flip(run / "checkpoints" / "last.safetensors", -100)
    arguments = ("train", "rich.yaml", *PLAIN, "epochs=4", "-o", run, "--resume")
    assert neq(*arguments, before=DIES_BEFORE_IT_IS_LAST).wait() == -signal.SIGKILL
    process = neq(*arguments)
    assert process.wait() == 0, process.text
    same_run(longer, run)
