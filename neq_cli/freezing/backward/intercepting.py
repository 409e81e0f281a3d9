"""Weights that modules pass to ``torch.nn.functional.linear`` go by their plans, whole or piece by piece."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor, nn

from neq_cli.freezing.backward.gradients import GradientPlan
from neq_cli.freezing.backward.operations import LinearMap


@dataclass(frozen=True)
class Watched:
    """A weight that is passed to a function, by its plan; row i of it goes with ``bias[start + i]``, where one is."""

    plan: GradientPlan
    bias: Tensor | None
    start: int


@dataclass(frozen=True)
class WatchedWeights:
    """Weights that are passed to functions. ``seen``: of a sharded model, what stands in a parameter's place now."""

    weights: Sequence[tuple[Tensor, Watched]]
    seen: Callable[[Tensor], Tensor] | None = None

    def by_identity(self) -> Mapping[int, Watched]:
        """Return them by the identity of what stands in the weights' places."""
        if self.seen is None:
            return {id(weight): watched for weight, watched in self.weights}
        return {
            id(self.seen(weight)): watched if (bias := watched.bias) is None else replace(watched, bias=self.seen(bias))
            for weight, watched in self.weights
        }


class _Running(threading.local):
    """The weights that this thread's running modules pass to functions, by identity."""

    plans: Mapping[int, Watched] = {}


_running = _Running()
_lock = threading.Lock()
_depth = 0
_stock_linear = nn.functional.linear


@contextmanager
def intercepted(plans: Mapping[int, Watched]) -> Iterator[None]:
    """Send ``torch.nn.functional.linear`` with one of these weights, or a piece of one, through its plan."""
    global _depth, _stock_linear
    before, _running.plans = _running.plans, {**_running.plans, **plans}
    with _lock:  # threads, as of DataParallel, may overlap: the first in replaces it, the last out puts it back
        if _depth == 0:
            _stock_linear, nn.functional.linear = nn.functional.linear, _sliced_linear
        _depth += 1
    try:
        yield
    finally:
        _running.plans = before
        with _lock:
            _depth -= 1
            if _depth == 0:
                nn.functional.linear = _stock_linear


def _sliced_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # torch.split and chunk give views; `_base` is the parameter that they were cut from.
    whole = weight if id(weight) in _running.plans else weight._base
    found = _running.plans.get(id(whole))
    if found is None or whole is None or weight.shape[1:] != whole.shape[1:] or weight.stride() != whole.stride():
        return _stock_linear(input, weight, bias)  # not its rows, such as its transpose
    first = (int(weight.storage_offset()) - int(whole.storage_offset())) // max(whole.stride(0), 1)
    owns_bias = _is_piece(bias, found.bias, found.start + first, len(weight))
    return found.plan.chunk(first, len(weight)).apply(LinearMap(), input, weight, bias, owns_bias=owns_bias)


def _is_piece(bias: Tensor | None, own: Tensor | None, first: int, count: int) -> bool:
    """Whether ``bias`` is ``own[first : first + count]`` and not, say, something that was computed from it."""
    if bias is None or own is None or (bias is not own and bias._base is not own):
        return False
    place = int(bias.storage_offset()) - int(own.storage_offset())
    return bias.shape == (count,) and bias.stride() == own.stride() and place == first * own.stride(0)
