"""One thread and a seed for every test, and processes that train together: started once, given functions to run."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

SECONDS = 60


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> Iterator[None]:
    """Tiny tensors: one thread is faster than two, and gives the same bits on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


class Workers:
    """Processes that import torch once and then run functions of test files together, by gloo."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: list[subprocess.Popen[str]] = []
        self.jobs = 0

    def __call__(self, count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return what ``function(*arguments)``, defined in a test file, returns in each of ``count`` processes."""
        self.jobs += 1
        job = self.folder / str(self.jobs)
        job.mkdir()
        (job / "arguments").write_bytes(pickle.dumps(arguments))
        while len(self.running) < count:
            self.running.append(self._start())
        workers = self.running[:count]
        for rank, worker in enumerate(workers):
            assert worker.stdin is not None
            order = {
                "file": function.__code__.co_filename, "function": function.__name__, "rank": rank, "count": count,
                "job": str(job),
            }  # fmt: skip
            worker.stdin.write(json.dumps(order) + "\n")
            worker.stdin.flush()
        results = []
        for rank, worker in enumerate(workers):
            assert worker.stdout is not None
            while (said := worker.stdout.readline()) != "done\n":  # gloo has something to say too
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
        return subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def stop(self) -> None:
        for worker in self.running:
            worker.kill()
            worker.communicate()
        self.running = []


@pytest.fixture(scope="session")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    pool = Workers(tmp_path_factory.mktemp("workers"))
    yield pool
    pool.stop()


def serve() -> None:
    modules: dict[str, Any] = {}
    torch.set_num_threads(1)
    for line in sys.stdin:
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
        print("done", flush=True)


if __name__ == "__main__":
    serve()
