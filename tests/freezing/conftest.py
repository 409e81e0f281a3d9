"""A seed for every test, kernels to be forced, and processes that train together, started once."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import pytest
import torch
from torch import Tensor

from neq_cli import Freezer
from neq_cli.freezing.backward.dispatch import Dispatch, Kernel, KernelChoice
from neq_cli.freezing.backward.gradients import GradientPlan

SECONDS = 60
KERNELS = ("dense", "dense from the start", "sliced", "rounded", "pointwise")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def double() -> Iterator[None]:
    """Double precision for all that is made without saying which: a wrong gradient is no matter of rounding then."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def single(double: None) -> Iterator[None]:
    """Single precision in a module whose other tests take the double one: autocast leaves doubles alone."""
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float64)


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Force a kernel on all calls; where it does not apply (``rounded``, ``pointwise``), ``sliced`` stands in for it.

    ``dense from the start``: forward passes know of the choice from the first on, so that PyTorch's own path is taken;
    else they learn of it in the next step.
    """

    def force(forced: str) -> None:
        wanted = forced.partition(" ")[0]

        def choose(dispatch: Dispatch, kind: str, kernels: Sequence[Kernel], *_: Any) -> KernelChoice:
            choice = KernelChoice(next((one for one in kernels if one == wanted), "sliced"), {})
            return dispatch.choices.setdefault(kind, choice)

        monkeypatch.setattr(Dispatch, "choose", choose)
        if forced == "dense from the start":
            monkeypatch.setattr(GradientPlan, "_settled_choice", lambda *_: KernelChoice("dense", {}))

    return force


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, force: Callable[[str], None]) -> str:
    """Run the test with each kernel forced in turn: what is computed must not depend on which one wins."""
    force(request.param)
    return str(request.param).partition(" ")[0]


def trains(freezer: Freezer, name: str) -> Tensor:
    """Return which elements of a parameter train: bool, in its shape."""
    parameter = freezer.model.get_parameter(name).detach()
    found = torch.zeros(parameter.shape, dtype=torch.bool)
    owned = torch.zeros(parameter.shape, dtype=torch.bool)
    for layer, trainable in freezer.trainable.items():
        for rows in freezer.layers[layer].rows:
            if rows.parameter == name:
                every = torch.arange(rows.start, rows.start + rows.count)
                for target, chosen in ((owned, every), (found, every[trainable])):
                    rows.layout.view(target)[rows.layout.index(target, chosen)] = True
    return found | ~owned


@pytest.fixture
def assert_gradients() -> Callable[..., None]:
    """Return what compares gradients of all parameters with a plain model's, by name, where they train.

    Frozen rows are zero and what is frozen whole has none. Sums of at most 2^14 terms, a few layers deep, differ by
    their order only: by ``tolerance`` of a tensor's largest element, or of a hundredth.
    """

    def check(
        freezer: Freezer,
        found: Mapping[str, Tensor | None],
        dense: Mapping[str, Tensor | None],
        tolerance: float = 2**16 * torch.finfo(torch.float64).eps,
    ) -> None:
        assert list(found) == list(dense)
        for name, expected in dense.items():
            gradient, mask = found[name], trains(freezer, name)
            if not mask.any():
                assert gradient is None, name
            elif gradient is None or expected is None:
                # Nothing is computed where no error comes; autograd says none or zero.
                assert all(one is None or not one.any() for one in (gradient, expected)), name
            else:
                assert not gradient[~mask].any(), name
                difference = (gradient - expected)[mask].abs().max()
                assert difference <= tolerance * (float(expected.abs().max()) + 0.01), (name, float(difference))

    return check


class Worker:
    """A process that runs functions of test files, forked from one that has imported torch."""

    def __init__(self, parent: subprocess.Popen[str], pipes: Path) -> None:
        names = [f"{pipes}.{way}" for way in ("orders", "answers")]
        for name in names:
            os.mkfifo(name)
        assert parent.stdin is not None
        parent.stdin.write(json.dumps(names) + "\n")
        parent.stdin.flush()
        self.orders = os.fdopen(os.open(names[0], os.O_WRONLY), "w")
        self.answers = os.fdopen(os.open(names[1], os.O_RDONLY))

    def stop(self) -> None:
        for pipe in (self.orders, self.answers):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


class Workers:
    """Processes that import torch once for all and then run functions of test files together, by gloo."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parent: subprocess.Popen[str] | None = None
        self.running: list[Worker] = []
        self.jobs = 0

    def __call__(self, count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return what ``function(*arguments)``, defined in a test file, returns in each of ``count`` processes."""
        self.jobs += 1
        job = self.folder / str(self.jobs)
        job.mkdir()
        (job / "arguments").write_bytes(pickle.dumps(arguments))
        if self.parent is None:
            self.parent = self._start()
        while len(self.running) < count:
            self.running.append(Worker(self.parent, job / f"worker{len(self.running)}"))
        workers = self.running[:count]
        for rank, worker in enumerate(workers):
            order = {
                "file": function.__code__.co_filename, "function": function.__name__, "rank": rank, "count": count,
                "job": str(job),
            }  # fmt: skip
            worker.orders.write(json.dumps(order) + "\n")
            worker.orders.flush()
        results = []
        for rank, worker in enumerate(workers):
            while (said := worker.answers.readline()) != "done\n":
                if not said:
                    self.stop()
                    pytest.fail(f"process {rank} ended")
            ok, result = pickle.loads((job / f"result{rank}").read_bytes())
            if not ok:
                self.stop()
                pytest.fail(f"process {rank}:\n{result}")
            results.append(result)
        return results

    def _start(self) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(Path.cwd()), *filter(None, sys.path)])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path}
        pipe, command = subprocess.PIPE, [sys.executable, __file__]
        parent = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment, start_new_session=True)
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        return parent

    def stop(self) -> None:
        """End all of them, whatever they do."""
        for worker in self.running:
            worker.stop()
        self.running = []
        if self.parent is not None:
            try:
                self.parent.communicate(timeout=5)
            except subprocess.TimeoutExpired:
                os.killpg(self.parent.pid, signal.SIGKILL)
                self.parent.communicate()
            self.parent = None


@pytest.fixture(scope="session")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    pool = Workers(tmp_path_factory.mktemp("workers"))
    yield pool
    pool.stop()


def fork_workers() -> None:
    import torch._dynamo  # what every worker's first wrapper would import

    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        orders, answers = json.loads(line)
        if not os.fork():
            os.dup2(2, 1)  # gloo has something to say
            with Path(orders).open() as read, Path(answers).open("w") as write:
                serve(read, write)
            os._exit(0)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


def serve(orders: TextIO, answers: TextIO) -> None:
    modules: dict[str, Any] = {}
    for line in orders:
        order = json.loads(line)
        job, rank = Path(order["job"]), order["rank"]
        try:
            if order["file"] not in modules:
                spec = importlib.util.spec_from_file_location(f"worker_{Path(order['file']).stem}", order["file"])
                assert spec is not None
                assert spec.loader is not None
                modules[order["file"]] = module = importlib.util.module_from_spec(spec)
                sys.modules[spec.name] = module
                spec.loader.exec_module(module)
            # Who waits for one that failed gives up after a while.
            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{job / 'store'}", rank=rank, world_size=order["count"],
                timeout=timedelta(seconds=SECONDS / 2),
            )  # fmt: skip
            torch.manual_seed(0)
            arguments = pickle.loads((job / "arguments").read_bytes())
            result = (True, getattr(modules[order["file"]], order["function"])(*arguments))
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
        except BaseException:
            result = (False, traceback.format_exc())
        (job / f"result{rank}").write_bytes(pickle.dumps(result))
        print("done", file=answers, flush=True)


if __name__ == "__main__":
    fork_workers()
