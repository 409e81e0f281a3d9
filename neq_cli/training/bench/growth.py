"""How the cost of the bookkeeping grows: measured beside training steps of a transformer, on several processes or one.

``torchrun --nproc-per-node 2 -m neq_cli.training.bench.growth 10M`` prints one line of JSON; CPU and gloo only.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import distributed_c10d
from torch.nn.parallel import DistributedDataParallel

from neq_cli.freed_memory import keep_freed_memory
from neq_cli.freezing import Freezer, Observation
from neq_cli.freezing.processes.replica import Replica
from neq_cli.training.batches.sampling import Share

SIZES = {"1M": (96, 8), "10M": (320, 8), "100M": (768, 14), "500M": (1600, 16)}
"""Width and depth of the transformers, by about how many parameters they have."""
SHARES = (0.0, 0.5)
"""What shares of every layer's neurons are frozen, at random."""
_SYMBOLS, _HEAD = 512, 32


class Block(nn.Module):
    """A transformer's: attention and two linear layers, each after a norm and beside what comes in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // _HEAD
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.attend(self.before(x)).unflatten(-1, (3, self.heads, _HEAD)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        x = x + self.project(attended.transpose(1, 2).flatten(2))
        found: Tensor = x + self.down(nn.functional.gelu(self.up(self.between(x))))
        return found


def transformer(width: int, depth: int) -> nn.Module:
    """Return a transformer that says of every symbol what another one is: [n, length] -> [n, length, symbols]."""
    blocks = [Block(width) for _ in range(depth)]
    return nn.Sequential(nn.Embedding(_SYMBOLS, width), *blocks, nn.LayerNorm(width), nn.Linear(width, _SYMBOLS))


class AtRandom:
    """A policy that freezes the ``share`` of every layer, others each time."""

    def __init__(self) -> None:
        self.share = 0.0
        self._drawn = torch.Generator().manual_seed(1)

    def choose(self, observations: Mapping[str, Observation], epoch: int) -> dict[str, Tensor]:
        """Return who trains, bool, [neurons], by layer."""
        sizes = {name: len(one.phi) for name, one in observations.items()}
        orders = {name: torch.randperm(size, generator=self._drawn) for name, size in sizes.items()}
        return {name: order >= int(self.share * len(order)) for name, order in orders.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: no run of it goes on."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take nothing back."""


@dataclass
class Exchanged:
    """What a process has handed to collective operations: how often and how many bytes, by operation; seconds there."""

    calls: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0


@contextmanager
def counted() -> Iterator[Exchanged]:
    """Count what torch.distributed's own functions are given inside, each by the message that it comes to."""
    found = Exchanged()
    before = {name: getattr(distributed_c10d, name) for name in ("all_reduce", "broadcast")}

    def counting(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
            found.calls[name] += 1
            found.bytes[name] += tensor.numel() * tensor.element_size()
            started = time.perf_counter()
            try:
                return operation(tensor, *arguments, **options)
            finally:
                found.seconds += time.perf_counter() - started

        return call

    try:
        for name, operation in before.items():
            for module in (distributed, distributed_c10d):  # objects are broadcast by the second one's
                setattr(module, name, counting(name, operation))
        yield found
    finally:
        for name, operation in before.items():
            for module in (distributed, distributed_c10d):
                setattr(module, name, operation)


@dataclass(frozen=True)
class Seconds:
    """What something took: ``passed`` on the clock, ``computing`` of this process's own, whatever else there runs."""

    passed: float
    computing: float


def timed(run: Callable[[], Any]) -> Seconds:
    """Return what a call of ``run`` took."""
    passed, computing = time.perf_counter(), time.process_time()
    run()
    return Seconds(time.perf_counter() - passed, time.process_time() - computing)


def memory_at_most() -> int:
    """Return the most bytes of memory that this process has had so far; Linux only."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


class Rig:
    """A model that trains in this process and others, and what is kept of its books: the steps and observations."""

    def __init__(self, width: int, depth: int, *, batch: int, length: int, probe: int) -> None:
        self.group = distributed.group.WORLD if distributed.is_initialized() else None
        rank, processes = (self.group.rank(), self.group.size()) if self.group is not None else (0, 1)
        torch.manual_seed(0)
        self.model = transformer(width, depth)
        self.parameters = sum(one.numel() for one in self.model.parameters())
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        held_out = torch.randint(_SYMBOLS, (probe, length))[Share(rank, processes).part(probe)]
        self.probe = [*torch.split(held_out, batch)]
        torch.manual_seed(1 + rank)
        self.inputs, self.targets = (torch.randint(_SYMBOLS, (batch, length)) for _ in range(2))
        self.policy = AtRandom()
        plain = self.model if self.group is None else DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        for _ in range(2):
            self._step(plain)
        self.plain_most = memory_at_most()
        del plain
        gc.collect()  # a wrapper's buckets lie in cycles
        self.freezer = Freezer(self.model, self.optimizer, self.probe, self.policy, process_group=self.group)
        self.replica = None if self.group is None else Replica(self.model, self.freezer, self.group)

    def _step(self, wrapper: nn.Module) -> None:
        outputs = wrapper(self.inputs)
        loss = nn.functional.cross_entropy(outputs.flatten(0, 1), self.targets.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()

    def train(self) -> tuple[Seconds, float]:
        """Take a step; returns its seconds, and those of them in which rows were held."""
        wrapper = self.model if self.replica is None else self.replica.current()
        kept = self.freezer.bookkeeping_seconds
        took = timed(lambda: self._step(wrapper))
        return took, self.freezer.bookkeeping_seconds - kept

    @torch.no_grad()
    def forward_twice(self) -> None:
        """Run the model plainly over this process's share of the probe, and once more."""
        for batch in (*self.probe, *self.probe):
            self.model(batch)

    def measured(self, rounds: int, steps: int) -> dict[str, Any]:
        """Return medians of all rounds, in seconds and bytes, by share that was frozen meanwhile."""
        seconds: dict[float, dict[str, list[float]]] = {share: {} for share in SHARES}
        exchanged = Exchanged()
        for number in range(len(SHARES) * (rounds + 1)):
            share, self.policy.share = (SHARES[one % len(SHARES)] for one in (number, number + 1))
            trained = [self.train() for _ in range(1 + steps)][1:]
            with counted() as found:
                observation = timed(self.freezer.step)
            exchanged = found
            if number < len(SHARES):  # kernels have been timed, and memory is where it stays
                continue
            forward = timed(self.forward_twice)
            took = {
                "step": [step.passed for step, _ in trained],
                "step_computing": [step.computing for step, _ in trained],
                "rows": [rows for _, rows in trained],
                "observation": [observation.passed],
                "observation_computing": [observation.computing],
                "exchanging": [exchanged.seconds],
                "two_forward_passes": [forward.passed],
                "two_forward_passes_computing": [forward.computing],
            }
            for what, some in took.items():
                seconds[share].setdefault(what, []).extend(some)
        return {
            "parameters": self.parameters,
            "neurons": sum(layer.neurons for layer in self.freezer.layers.values()),
            "layers": len(self.freezer.layers),
            "processes": 1 if self.group is None else self.group.size(),
            "seconds": {
                str(share): {what: round(statistics.median(some), 6) for what, some in found.items()}
                for share, found in seconds.items()
            },
            "exchanged_bytes": dict(exchanged.bytes),
            "exchanged_calls": dict(exchanged.calls),
            "more_memory": memory_at_most() - self.plain_most,
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one size of model, and print what was found in the first process."""
    parser = argparse.ArgumentParser(prog="python -m neq_cli.training.bench.growth", description=__doc__)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="timed steps in each round, for each share")
    parser.add_argument("--batch", type=int, default=8, help="samples of a step, in each process")
    parser.add_argument("--length", type=int, default=32, help="symbols of a sample")
    parser.add_argument("--probe", type=int, default=50, help="samples of the probe set, of all processes together")
    options = parser.parse_args(arguments)
    keep_freed_memory()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        distributed.init_process_group("gloo")
    width, depth = SIZES[options.size]
    rig = Rig(width, depth, batch=options.batch, length=options.length, probe=options.probe)
    found = rig.measured(options.rounds, options.steps)
    if rig.group is None or rig.group.rank() == 0:
        print(json.dumps({"size": options.size, "torch": torch.__version__, **vars(options), **found}))
    if rig.group is not None:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
