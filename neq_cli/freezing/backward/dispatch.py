"""A Dispatch chooses the kernel of a layer's gradients: the fastest, timed once a kind of call, or by rule.

Timed by hand: torch.utils.benchmark times one statement after the other, here all take turns, so that what else slows
the machine slows all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from operator import itemgetter
from typing import Any, Literal, get_args

import torch

from neq_cli.errors import FreezingError

Kernel = Literal["dense", "sliced", "rounded", "rounded64", "pointwise", "indexed"]
"""``dense``: PyTorch's own, all rows. ``sliced``: the trainable rows. ``rounded``: frozen ones added up to a multiple
that the hardware likes; ``rounded64``: to one of 64. ``pointwise``: the trainable rows of a 1x1 convolution as one
matrix product. ``indexed``: a matrix product that loads the trainable rows by their number."""

BLOCK, MOST_BLOCKS = 8, 8
"""Rows are counted in blocks for a choice, at least so large and at most so many: libraries compute whole blocks of
channels, and few kinds are soon timed."""

_FEWEST_ROUNDS, _MOST_ROUNDS = 3, 8
_SECONDS = 0.02
"""For one kernel; what takes longer is timed in the fewest rounds, unless its times disagree."""
_AGREEMENT = 1.05
"""Times agree where the second best is not longer than the best by more than this."""
_MARGIN = 0.97
"""Another kernel must be this much faster than the dense one: timings differ from one run to the next."""
_OVERHEAD = 60e-6
"""Seconds that leaving PyTorch's own path costs per call, forward and backward (measured on a Zen 4 core)."""
_HOPELESS = 1.5
"""A kernel this much slower than the best one after the fewest rounds is not timed again."""


@dataclass(frozen=True)
class KernelChoice:
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
    before its first use, so that it can be written down first; ``on_timing`` before a kind is timed. ``agree`` is given
    the kind of call and what times it, and returns what several processes are to use together. ``known`` is what was
    timed elsewhere, the same in all processes, and becomes a choice where it is asked for.
    """

    def __init__(
        self,
        *,
        fixed: bool = False,
        on_choice: Callable[[Dispatch], None] | None = None,
        on_timing: Callable[[], None] | None = None,
        agree: Callable[[str, Callable[[], KernelChoice]], KernelChoice] | None = None,
        known: Mapping[str, KernelChoice] | None = None,
    ) -> None:
        self.fixed = fixed
        self.on_choice = on_choice
        self.on_timing = on_timing
        self.agree = agree
        self.known = {} if known is None else known
        self.choices: dict[str, KernelChoice] = {}
        self.seconds = 0.0  # spent timing so far

    def find(self, kind: str) -> KernelChoice | None:
        """Return what was chosen for ``kind``; None where nothing was yet."""
        return self.choices.get(kind)

    def choose(
        self,
        kind: str,
        kernels: Sequence[Kernel],
        run: Callable[[Kernel], object],
        by_rule: Kernel,
        device: torch.device,
    ) -> KernelChoice:
        """Return the choice for ``kind``: that made before, ``by_rule`` if fixed, what is known, else the fastest."""
        found = self.find(kind)
        if found is not None:
            return found
        if self.fixed:
            choice = KernelChoice(by_rule, {})
        elif kind in self.known:
            choice = self.known[kind]
        else:
            if self.on_timing is not None:
                self.on_timing()
            started = time.perf_counter()
            timing = partial(_fastest, kernels, run, device)
            choice = timing() if self.agree is None else self.agree(kind, timing)
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
            self.choices = {str(kind): read_choice(choice) for kind, choice in state.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise FreezingError(f"dispatch: not a table of kernel choices ({error})") from error


def read_choice(state: Mapping[str, Any]) -> KernelChoice:
    """Return the choice that ``dataclasses.asdict`` made ``state`` of."""
    timings = {str(name): float(value) for name, value in state["milliseconds"].items()}
    return KernelChoice(_kernel(state["kernel"]), timings)


def _kernel(name: str) -> Kernel:
    known: tuple[Kernel, ...] = get_args(Kernel)
    for kernel in known:
        if kernel == name:
            return kernel
    raise ValueError(f"no kernel {name!r}")


def _fastest(kernels: Sequence[Kernel], run: Callable[[Kernel], object], device: torch.device) -> KernelChoice:
    """Time all kernels in turn, a warm-up round first, and keep the dense one unless another is clearly faster.

    The shortest time counts: whatever else the machine does can only add to it.
    """
    seconds: dict[Kernel, list[float]] = {kernel: [] for kernel in kernels}
    for kernel in kernels:
        _timed(partial(run, kernel), device)
    remaining = list(kernels)
    for number in range(1, _MOST_ROUNDS + 1):
        for kernel in remaining:
            seconds[kernel].append(_timed(partial(run, kernel), device))
        shortest = min(map(min, seconds.values()))
        if number >= _FEWEST_ROUNDS:
            remaining = [kernel for kernel in remaining if min(seconds[kernel]) <= _HOPELESS * shortest]
            enough = number * shortest >= _SECONDS
            if enough and all(_agree(seconds[kernel]) for kernel in remaining):
                break
    best = {kernel: min(times) for kernel, times in seconds.items()}
    kernel = min(best, key=best.__getitem__)
    if best[kernel] + _OVERHEAD > _MARGIN * best["dense"]:
        kernel = "dense"
    return KernelChoice(kernel, {name: round(1e3 * value, 4) for name, value in best.items()})


def _agree(times: Sequence[float]) -> bool:
    best, second = sorted(times)[:2]
    return second <= _AGREEMENT * best


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
