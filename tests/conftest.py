"""How tests share a machine; those marked `gpu`; `neq` as a process of its own, and what its runs come to."""

from __future__ import annotations

import csv
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from timings import SECONDS, TIMINGS

# Small tensors: one thread is faster than two, and gives the same bits on every machine.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Give folders a process for each core; none but pytest's own, which is there at once, to files given by name.

    Nor to tests that another `-m` selects: of the slow ones a single one may take most of the memory, or the GPU.
    """
    files = all(argument.partition("::")[0].endswith(".py") for argument in config.args)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if files or config.option.markexpr != "not slow" or cores == 1 else min(cores, 8)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


NETS = """
from torch import nn
from torch.utils.data import TensorDataset


def digits():
    from neq_cli.training.data.digits import load_digits
    (images, labels), (tested, answers) = load_digits()
    return TensorDataset(images[::3][:438], labels[::3][:438]), TensorDataset(tested[:90], answers[:90])


def make(num_classes=10):
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout2d(0.1),
        nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(),
        nn.Linear(144, 64), nn.Dropout(0.2), nn.ReLU(), nn.Linear(64, num_classes),
    )
"""

# 15 steps in an epoch, 8 updates, the last of which has one batch only. With a thousand images in the probe instead of
# out of the data set, two thirds of a run's time would go there.
RICH = """
model: {entrypoint: "nets:make"}
data: {entrypoint: "nets:digits", mean: [0.3], std: [0.35], augment: crop, workers: 0, cache: memory, probe_size: 60}
epochs: 5
batch_size: 24
optimizer: {name: sgd, lr: 0.1, momentum: 0.9, weight_decay: 1e-4}
scheduler: {name: multistep, milestones: [3], gamma: 0.3, warmup_epochs: 1}
policy: {kind: neq, epsilon: 0.1, mu: 0.5}
ema: 0.95
gradient_accumulation: 2
label_smoothing: 0.1
checkpoint_minutes: 0.0002
deterministic: true
channels_last: true
device: cpu
"""


class Server:
    """Forks processes that run `neq`; importing torch for each of them would take seconds."""

    def __init__(self) -> None:
        found = find_spec("neq_cli")
        assert found is not None
        assert found.origin is not None
        path = os.pathsep.join([str(Path(found.origin).parents[1]), os.environ.get("PYTHONPATH", "")])
        one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **one_thread, "PYTHONPATH": path},
            start_new_session=True,
        )
        self.answer(120)

    def answer(self, seconds: float) -> str:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            self.process.kill()
            raise TimeoutError(f"no answer within {seconds} seconds")
        answer = self.process.stdout.readline().decode()
        assert answer, "the server of processes has ended"
        return answer

    def ask(self, order: dict[str, Any], seconds: float = 60) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        self.process.stdin.flush()
        return json.loads(self.answer(seconds))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()


class Neq:
    """One process that runs `neq`, with no terminal and in a process group and session of its own."""

    def __init__(
        self, server: Server, arguments: list[str], folder: Path, before: str, environment: dict[str, str]
    ) -> None:
        self.server = server
        self.output, self.errors = (folder / f".{name}-{time.monotonic_ns()}" for name in ("output", "errors"))
        self.started = time.monotonic()
        self.process: int = server.ask(
            {
                "arguments": [str(argument) for argument in arguments],
                "folder": str(folder),
                "before": before,
                "environment": environment,
                "output": str(self.output),
                "errors": str(self.errors),
            }
        )
        self.code: int | None = None

    def ended(self, seconds: float = 0.0) -> bool:
        if self.code is None:
            self.code = self.server.ask({"wait": self.process, "seconds": seconds}, seconds + 30)
        return self.code is not None

    def wait(self, seconds: float = 60) -> int:
        """Return the exit code, minus the number of a signal that killed it; TimeoutError, and killed, if too slow."""
        if not self.ended(seconds):
            self.kill(signal.SIGKILL, group=True)
            self.ended(10)
            raise TimeoutError(f"still running after {seconds} seconds: {self.text}")
        assert self.code is not None
        return self.code

    def kill(self, number: int, *, group: bool = False) -> None:
        """Send a signal, to all of the process group as a terminal does for Ctrl-C."""
        (os.killpg if group else os.kill)(self.process, number)

    def until(self, condition: Callable[[], object], seconds: float = 30) -> bool:
        """Wait until ``condition`` holds; returns whether it does, False where the process ended before."""
        end = time.monotonic() + seconds
        looked = time.monotonic()
        while not condition():
            if time.monotonic() > looked + 0.05:
                looked = time.monotonic()
                if self.ended():
                    return bool(condition())
            if time.monotonic() > end:
                self.kill(signal.SIGKILL, group=True)
                raise TimeoutError(f"waited {seconds} seconds: {self.text}")
            time.sleep(0.0002)
        return True

    def until_alone(self, seconds: float = 20) -> None:
        """Wait until nothing is left of what it started, which is an error after so long."""
        end = time.monotonic() + seconds
        while left := self.descendants():
            assert time.monotonic() < end, f"processes {left} outlive theirs"
            time.sleep(0.01)

    @property
    def text(self) -> str:
        """All that it has said on stderr."""
        return self.errors.read_text() if self.errors.exists() else ""

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @property
    def result(self) -> str:
        """All that it has said on stdout."""
        return self.output.read_text() if self.output.exists() else ""

    def descendants(self) -> list[int]:
        """The processes of its session that still live, itself left out."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            # State, parent, group, session.
            if int(fields[3]) == self.process and fields[0] not in "ZX" and int(path.parent.name) != self.process:
                found.append(int(path.parent.name))
        return found


@pytest.fixture(scope="session")
def neq_in() -> Iterator[Callable[..., Neq]]:
    """Start `neq` in a folder: ``neq_in(folder, "train", ..., before="code to run first")``; killed in the end."""
    server = Server()
    started: list[Neq] = []

    def start(folder: Path, *arguments: object, before: str = "", environment: Mapping[str, str] | None = None) -> Neq:
        started.append(Neq(server, [str(one) for one in arguments], folder, before, dict(environment or {})))
        return started[-1]

    yield start
    server.close()


@pytest.fixture
def neq(neq_in: Callable[..., Neq], tmp_path: Path) -> Iterator[Callable[..., Neq]]:
    """Start `neq` in the test's folder; what still runs when the test ends is killed."""
    started: list[Neq] = []

    def start(*arguments: object, **options: Any) -> Neq:
        started.append(neq_in(tmp_path, *arguments, **options))
        return started[-1]

    yield start
    for one in started:
        if not one.ended():
            one.kill(signal.SIGKILL, group=True)
            one.ended(10)


@pytest.fixture(scope="session")
def recipe_folder() -> Callable[[Path], Path]:
    """Return what puts the recipe rich.yaml, with all that has state, and the network it imports into a folder."""

    def fill(folder: Path) -> Path:
        (folder / "nets.py").write_text(NETS)
        (folder / "rich.yaml").write_text(RICH)
        return folder

    return fill


@pytest.fixture
def folder(tmp_path: Path, recipe_folder: Callable[[Path], Path]) -> Path:
    """A folder with the recipe."""
    return recipe_folder(tmp_path)


@pytest.fixture(scope="module")
def straight(
    request: pytest.FixtureRequest,
    neq_in: Callable[..., Neq],
    recipe_folder: Callable[[Path], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The run with the settings in PLAIN of the test file that nothing happened to."""
    place = recipe_folder(tmp_path_factory.mktemp("straight"))
    process = neq_in(place, "train", "rich.yaml", *request.module.PLAIN, "-o", place / "run")
    assert process.wait(120) == 0, process.text
    return place / "run"


AT_A_STEP = """
import os, shutil, signal, time, torch
from neq_cli.training.loop.step import TrainingStep

train, done = TrainingStep.train, 0


def and_then(self, *arguments, **options):
    global done
    loss = train(self, *arguments, **options)
    done += 1
    if done == {step}:
        {action}
    return loss


TrainingStep.train = and_then
"""


@pytest.fixture(scope="session")
def at_step() -> Callable[[int, str], str]:
    """Code for ``before`` that has a training process do something after so many of its steps."""
    return lambda step, action: AT_A_STEP.format(step=step, action=action)


@pytest.fixture(scope="session")
def same_run() -> Callable[..., None]:
    """Return what asserts that two run directories hold the same."""
    return assert_same_run


def assert_same_run(one: Path, other: Path, context: str = "") -> None:
    """Assert that two run directories hold the same, but for clocks, process numbers and the checkpoint before last."""
    from neq_cli.training.loop.checkpoint import load_state

    names = [sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()) for run in (one, other)]
    assert names[0] == names[1], context
    apart = {".lock", "status.json", "environment.json", "metrics.csv", "checkpoints/previous.safetensors"}
    for name in names[0]:
        first, second = one / name, other / name
        if name.startswith("checkpoints/") and name not in apart:
            assert_same(without_seconds(load_state(first)), without_seconds(load_state(second)), f"{name} {context}")
        elif name not in apart:
            assert first.read_bytes() == second.read_bytes(), f"{name} {context}"
    assert untimed(one) == untimed(other), context
    assert [status(run)["state"] for run in (one, other)] == ["finished", "finished"], context


def untimed(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == list(range(1, len(rows) + 1))
    return [{name: cell for name, cell in row.items() if name not in TIMINGS} for row in rows]


def status(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "status.json").read_text())
    return content


def without_seconds(state: Any) -> Any:
    if state["so_far"] is not None:
        state["so_far"] = {key: value for key, value in state["so_far"].items() if key not in SECONDS}
    return state


def assert_same(one: Any, other: Any, place: str) -> None:
    """Assert that nested state is the same, bit for bit and type for type."""
    from torch import Tensor, uint8

    assert type(one) is type(other), place
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype, place
        assert one.shape == other.shape, place
        bits = [tensor.contiguous().reshape(-1).view(uint8).numpy().tobytes() for tensor in (one, other)]
        assert bits[0] == bits[1], f"{place}: {one} and {other}"
    elif isinstance(one, dict):
        assert list(one) == list(other), place
        for key in one:
            assert_same(one[key], other[key], f"{place}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), place
        for number, (first, second) in enumerate(zip(one, other, strict=True)):
            assert_same(first, second, f"{place}/{number}")
    else:
        assert one == other or repr(one) == repr(other), place
