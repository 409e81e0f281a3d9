"""Which kernel computes a layer's gradients: the fastest, timed once for each kind of call, or by a fixed rule."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from operator import itemgetter
from typing import Any, Literal

import torch

from neq_cli.errors import FreezingError

Kernel = Literal["dense", "sliced", "rounded", "pointwise"]
"""``dense``: PyTorch's own, all rows. ``sliced``: the trainable rows. ``rounded``: frozen ones added up to a multiple
that the hardware likes. ``pointwise``: the trainable rows of a 1x1 convolution as one matrix product."""

BLOCK = 8
"""Rows are counted in blocks for a choice: libraries compute whole blocks of channels, and few kinds are soon timed."""

_FEWEST_ROUNDS, _MOST_ROUNDS = 3, 10
_SECONDS = 0.02
"""For one kernel; what takes longer is timed in the fewest rounds."""
_MARGIN = 0.97
"""Another kernel must be this much faster than the dense one: timings differ from one run to the next."""
_OVERHEAD = 60e-6
"""Seconds that leaving PyTorch's own path costs per call, forward and backward (measured on a Zen 4 core)."""
_HOPELESS = 1.5
"""A kernel this much slower than the best one in its first round is not timed again."""


@dataclass(frozen=True)
class Choice:
    """What was chosen for a kind of call, and from which timings (milliseconds; empty where a rule decided)."""

    kernel: Kernel
    milliseconds: Mapping[str, float]

    @property
    def reason(self) -> str:
        """The choice in words: "sliced 5.1 ms, dense 7.9 ms"."""
        if not self.milliseconds:
            return "by rule"
        return ", ".join(
            f"{name} {value:.3g} ms" for name, value in sorted(self.milliseconds.items(), key=itemgetter(1))
        )


class Dispatch:
    """The choices made so far, by a text that names the kind of call.

    ``fixed`` chooses by rule, without timing: the same in every run. ``on_choice`` is called after every new choice and
    before its first use, so that it can be written down first.
    """

    def __init__(self, *, fixed: bool = False, on_choice: Callable[[Dispatch], None] | None = None) -> None:
        self.fixed = fixed
        self.on_choice = on_choice
        self.choices: dict[str, Choice] = {}
        self.seconds = 0.0  # spent timing so far

    def find(self, kind: str) -> Choice | None:
        """Return what was chosen for ``kind``; None where nothing was yet."""
        return self.choices.get(kind)

    def choose(
        self,
        kind: str,
        kernels: Sequence[Kernel],
        run: Callable[[Kernel], object],
        by_rule: Kernel,
        device: torch.device,
    ) -> Choice:
        """Return the choice for ``kind``: the one made before, ``by_rule`` where fixed, else the fastest kernel."""
        found = self.find(kind)
        if found is not None:
            return found
        if self.fixed:
            choice = Choice(by_rule, {})
        else:
            started = time.perf_counter()
            choice = _fastest(kernels, run, device)
            self.seconds += time.perf_counter() - started
        self.choices[kind] = choice
        if self.on_choice is not None:
            self.on_choice(self)
        return choice

    def state_dict(self) -> dict[str, Any]:
        """Return all choices as plain values, for JSON too."""
        return {kind: asdict(choice) for kind, choice in self.choices.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over choices made elsewhere, which are then not timed again."""
        try:
            self.choices = {
                str(kind): Choice(
                    _kernel(choice["kernel"]),
                    {str(name): float(value) for name, value in choice["milliseconds"].items()},
                )
                for kind, choice in state.items()
            }
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise FreezingError(f"dispatch: not a table of kernel choices ({error})") from error


def _kernel(name: str) -> Kernel:
    for kernel in ("dense", "sliced", "rounded", "pointwise"):
        if kernel == name:
            return kernel
    raise ValueError(f"no kernel {name!r}")


def _fastest(kernels: Sequence[Kernel], run: Callable[[Kernel], object], device: torch.device) -> Choice:
    """Time all kernels in turn, a warm-up round first, and keep the dense one unless another is clearly faster.

    The shortest time counts: whatever else the machine does can only add to it.
    """
    best = dict.fromkeys(kernels, math.inf)
    remaining, rounds, number = list(kernels), _FEWEST_ROUNDS, 0
    while number <= rounds:
        for kernel in remaining:
            seconds = _timed(partial(run, kernel), device)
            if number:
                best[kernel] = min(best[kernel], seconds)
        if number == 1:
            shortest = min(best.values())
            remaining = [kernel for kernel in remaining if best[kernel] <= _HOPELESS * shortest]
            rounds = max(_FEWEST_ROUNDS, min(_MOST_ROUNDS, int(_SECONDS / max(shortest, 1e-9))))
        number += 1
    kernel = min(best, key=best.__getitem__)
    if best[kernel] + _OVERHEAD > _MARGIN * best["dense"]:
        kernel = "dense"
    return Choice(kernel, {name: round(1e3 * value, 4) for name, value in best.items()})


def _timed(run: Callable[[], object], device: torch.device) -> float:
    _wait_for(device)
    started = time.perf_counter()
    run()
    _wait_for(device)
    return time.perf_counter() - started


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
