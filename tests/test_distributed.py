"""Runs on several processes (gloo, CPU): what they train, write and say is what one process does, whatever happens."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from alike_runs import assert_alike, untimed_rows
from rounding import apart_after_steps, phi_apart, unit
from safetensors.numpy import load_file

import neq_cli

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(neq_cli.__file__).parent.parent)}

RECIPE = """
model: {entrypoint: parts:network, kwargs: {kind: plain, dropout: 0.0, double: true}}
data: {name: digits, workers: 0, probe_size: 50, augment: crop}
epochs: 4
batch_size: 60
optimizer: {name: sgd, lr: 0.05, momentum: 0.9, weight_decay: 5.0e-4}
scheduler: {name: multistep, milestones: [2]}
policy: {kind: neq, epsilon: 0.02}
gradient_accumulation: 2
seed: 3
deterministic: true
device: cpu
"""

PARTS = '''
import os
import signal
import time
import torch
from torch import nn
from neq_cli import NEq


class InDouble(nn.Sequential):
    def forward(self, images):
        return super().forward(images.double())


def network(kind, dropout, double):
    norm = nn.BatchNorm2d if kind == "norm" else lambda channels: nn.Identity()
    net = nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1), norm(24), nn.ReLU(), nn.Conv2d(24, 24, 3, stride=2), norm(24), nn.ReLU(),
        nn.Flatten(), nn.Dropout(dropout), nn.Linear(24 * 9, 32), nn.ReLU(), nn.Linear(32, 10),
    )
    return InDouble(*net).double() if double else net


class Trouble(NEq):
    """Does something in the second epoch, on one process, unless torchrun has started it anew."""

    def __init__(self, what):
        super().__init__(0.02)
        self.what = what

    def choose(self, observations, epoch):
        return super().choose(observations, epoch)


class Lossy:
    """Cross-entropy that does something at its 30th batch on process 1; the first call is a trial of model and task."""

    metric = "test_top1"

    def __init__(self, what):
        from neq_cli.training.loop.tasks import Classification
        self.inner, self.what, self.calls = Classification(), what, 0
        self.new_totals, self.update, self.results = self.inner.new_totals, self.inner.update, self.inner.results

    def loss(self, outputs, targets):
        self.calls += 1
        first_time = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if self.calls == 31 and os.environ.get("RANK") == "1" and first_time:
            if self.what == "raise":
                raise ValueError("no such luck")
            if self.what in ("kill", "kill beside one asleep"):
                os.kill(os.getpid(), signal.SIGKILL)
            if self.what == "nan":
                return self.inner.loss(outputs, targets) * float("nan")
        if self.calls == 31 and self.what == "kill beside one asleep":
            time.sleep(50)  # no message of gloo's is waited for
        return self.inner.loss(outputs, targets)


def asleep():
    return Lossy("kill beside one asleep")


def raising():
    return Lossy("raise")


def killed():
    return Lossy("kill")


def infinite():
    return Lossy("nan")
'''

# Imports torch once, and forks a process for every rank of every job: starting them one by one would take minutes.
DRIVER = """
import json, os, socket, sys, time, traceback
import torch, torch.distributed, torchvision, scipy
import neq_cli.jobs.train, neq_cli.training.session
from neq_cli.cli import main

torch.set_num_threads(1)

def child(rank, count, port, job, folder):
    os.environ.update(OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if count > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(count))
    os.makedirs(f"elsewhere/{rank}", exist_ok=True)
    if rank:  # only the first process may write
        os.chdir(f"elsewhere/{rank}")
    out = os.open(f"{folder}/{rank}.out", os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    code = 99
    try:
        main(job["arguments"])
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)

results = []
for number, job in enumerate(json.load(open("jobs.json"))):
    folder = os.path.abspath(f"said/{number}")
    os.makedirs(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(job["processes"]):
        pid = os.fork()
        if not pid:
            child(rank, job["processes"], port, job, folder)
        children.append(pid)
    codes, began, deadline = {}, time.monotonic(), time.monotonic() + 60
    while len(codes) < len(children):
        for rank, pid in enumerate(children):
            if rank not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[rank] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > deadline:
                    os.kill(pid, 9)
        time.sleep(0.02)
    said = [open(f"{folder}/{rank}.out").read() for rank in range(len(children))]
    seconds = time.monotonic() - began
    results.append({"codes": [codes[rank] for rank in range(len(children))], "said": said, "seconds": seconds})
json.dump(results, open("results.json", "w"))
"""

JOBS: dict[str, tuple[int, str]] = {
    "one": (1, "-o one"),
    "two": (2, "-o two batch_size=30"),
    "four": (4, "-o four batch_size=15"),
    "norm-one": (1, "-o norm-one model.kwargs.kind=norm epochs=2"),
    "norm-three": (3, "-o norm-three model.kwargs.kind=norm epochs=2 batch_size=20 sync_batchnorm=true"),
    "dropout": (2, "-o dropout model.kwargs.dropout=0.3 batch_size=30"),
    "dropout-begun": (2, "-o resumed model.kwargs.dropout=0.3 batch_size=30 epochs=2"),
    "dropout-resumed": (2, "-o resumed model.kwargs.dropout=0.3 batch_size=30 --resume"),
    "fewer-begun": (3, "-o fewer batch_size=20 epochs=2"),
    "fewer-resumed": (2, "-o fewer batch_size=30 --resume"),
    "other-batch": (2, "-o fewer batch_size=20 epochs=5 --resume"),
    "half": (2, "-o half model.kwargs.double=false batch_size=30 policy.kind=stochastic policy.p=0.5 epochs=3"),
    "wrong": (2, "-o wrong epochs=none"),
    "few-probes": (3, "-o few data.probe_size=2 batch_size=20"),
    "raising": (2, "-o raising batch_size=30 task=parts:raising gradient_accumulation=1"),
    "killed": (2, "-o killed batch_size=30 task=parts:killed gradient_accumulation=1"),
    "asleep": (2, "-o asleep batch_size=30 task=parts:asleep gradient_accumulation=1 data.workers=1 data.cache=none"),
    "infinite": (2, "-o infinite batch_size=30 task=parts:infinite gradient_accumulation=1"),
}


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, timeout=400, capture_output=True, text=True, env=ENVIRONMENT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "small.yaml").write_text(RECIPE)
    (folder / "parts.py").write_text(PARTS)
    (folder / "driver.py").write_text(DRIVER)
    recipe = str(folder / "small.yaml")
    jobs = [
        {"processes": count, "arguments": ["train", recipe, *arguments.split()]} for count, arguments in JOBS.values()
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = run([sys.executable, "driver.py"], folder)
    assert done.returncode == 0, done.stderr
    return folder


def result(folder: Path, job: str) -> tuple[list[int], list[str]]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())[list(JOBS).index(job)]
    return found["codes"], found["said"]


def well(folder: Path, *jobs: str) -> None:
    for job in jobs:
        codes, said = result(folder, job)
        assert set(codes) == {0}, "\n".join(said)


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def status(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "status.json").read_text())
    return content


# The networks are in double precision. Forward no value is rounded more than 500 times, backward as often, and 60
# images of 64 positions are added up; four epochs have 48 steps at most.
STEPS, ROUNDINGS = 48, 5000
WEIGHTS = apart_after_steps(STEPS, ROUNDINGS)
# Of weights that lie so far apart; velocities are differences of differences, and their sums: eight of them.
OBSERVED = 8 * (phi_apart(10 * STEPS * ROUNDINGS, 50 * 64) + unit(torch.float32))


@pytest.mark.parametrize("job", ["two", "four"])
def test_several_processes_train_what_one_does_with_their_batches_together(folder: Path, job: str) -> None:
    well(folder, "one", job)
    assert_alike(folder / "one", folder / job, WEIGHTS, OBSERVED)


def test_with_synchronised_batch_norm_too(folder: Path) -> None:
    well(folder, "norm-one", "norm-three")
    assert_alike(folder / "norm-one", folder / "norm-three", WEIGHTS, OBSERVED)


def test_a_resumed_run_is_the_run_never_interrupted_bit_for_bit(folder: Path) -> None:
    well(folder, "dropout", "dropout-begun", "dropout-resumed")
    straight, resumed = folder / "dropout", folder / "resumed"
    assert untimed_rows(straight) == untimed_rows(resumed)
    names = ["layers.csv", "weights.safetensors", *(f"neurons/epoch_{epoch:04d}.safetensors" for epoch in range(1, 5))]
    for name in names:
        assert (straight / name).read_bytes() == (resumed / name).read_bytes(), name


def test_another_number_of_processes_goes_on(folder: Path) -> None:
    well(folder, "fewer-begun", "fewer-resumed")
    assert_alike(folder / "one", folder / "fewer", WEIGHTS, OBSERVED)


def test_another_number_of_images_a_step_is_refused_by_name(folder: Path) -> None:
    codes, said = result(folder, "other-batch")
    assert set(codes) <= {1, 2}
    assert "batch_size=20: 20 in 2 processes are 40 images a step, but the run has 60" in "".join(said)


def test_half_the_neurons_frozen_send_about_half_the_bytes(folder: Path) -> None:
    well(folder, "half", "two")
    dense, half = (float(row["bytes_per_step"]) for row in (rows(folder / "half")[0], rows(folder / "half")[-1]))
    parameters = sum(values.size for values in load_file(folder / "half" / "weights.safetensors").values())
    # Two of three batches of an epoch of 23 end an update, which sends every gradient in four bytes.
    assert dense == pytest.approx(4 * parameters * 12 / 23, rel=0.01)
    assert half / dense == pytest.approx(0.5, abs=0.05)


def test_only_the_first_process_writes_and_speaks(folder: Path) -> None:
    assert [list(path.iterdir()) for path in sorted((folder / "elsewhere").iterdir())] == [[]] * 4
    _, said = result(folder, "four")
    assert said[0].splitlines()[-1] == "four"
    # The gloo of torch 2.9 has a line of its own.
    assert [line for text in said[1:] for line in text.splitlines() if not line.startswith("[Gloo]")] == []


def test_what_all_find_wrong_is_said_once(folder: Path) -> None:
    codes, said = result(folder, "wrong")
    assert codes == [2, 2]
    assert "".join(said).count("epochs=none") == 1
    codes, said = result(folder, "few-probes")
    assert 2 in codes
    assert "".join(said).count("data.probe_size") == 1


@pytest.mark.parametrize(
    ("job", "reason"),
    [
        ("raising", "process 1: ValueError: no such luck"),
        ("killed", "lost process 1, which was killed"),
        ("asleep", "lost process 1, which was killed"),
        ("infinite", "epoch 2, step"),  # of whichever process looks at its losses first: gradients carry it on
    ],
)
def test_a_process_that_ends_ends_all_with_its_reason(folder: Path, job: str, reason: str) -> None:
    codes, said = result(folder, job)
    assert 0 not in codes
    assert reason in "".join(said)
    assert "Traceback" not in "".join(said)
    ended = status(folder / job)
    assert ended["state"] == "failed"
    assert reason in ended["reason"]
    assert len(rows(folder / job)) == 1  # what was trained before is there


def test_a_killed_process_ends_one_that_waits_for_no_message(folder: Path) -> None:
    found = json.loads((folder / "results.json").read_text())[list(JOBS).index("asleep")]
    assert found["codes"] == [1, -9]
    assert found["seconds"] < 40  # it would have slept on for longer than that


@pytest.mark.slow
def test_torchrun_starts_processes_anew_and_they_go_on(folder: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    recipe = ["-m", "neq_cli", "train", "small.yaml", "-o", "restarted", "batch_size=30", "task=parts:killed"]
    done = run([*torchrun, *recipe], folder)
    assert done.returncode == 0, done.stderr
    straight = run([*torchrun[:-1], *recipe[:5], "straight", "batch_size=30"], folder)
    assert straight.returncode == 0, straight.stderr
    assert untimed_rows(folder / "restarted") == untimed_rows(folder / "straight")
