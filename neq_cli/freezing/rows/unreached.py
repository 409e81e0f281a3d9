"""Parameters that no error reaches keep no gradient where DistributedDataParallel would give them zeros."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

from torch import Tensor, nn

from neq_cli.freezing.rows.zeroed import graph_task, put_on, when_backward_has_ended


class Unreached:
    """Takes the gradients of ``parameters`` away when backward ends, until ``remove``; hooks on the ``others``.

    Those that had a gradient before the backward pass keep it: it is somebody's, or zeros that zero_grad left there.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], others: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self._pass = -1
        me = weakref.ref(self)  # autograd keeps hooks where Python's garbage collector does not look
        self.handles = [
            put_on(parameter, _look(me))
            for parameter in (others if self.parameters else ())
            if parameter.is_floating_point() or parameter.is_complex()
        ]

    def look(self) -> None:
        """Note whose gradient is to be taken away, the first time in a backward pass: nothing has reached them yet."""
        number = graph_task()
        if number not in (-1, self._pass):
            self._pass = number
            without = [parameter for parameter in self.parameters if parameter.grad is None]
            when_backward_has_ended(lambda: _drop(without))

    def remove(self) -> None:
        """Take the hooks off again."""
        for handle in self.handles:
            handle.remove()
        self.handles = []


def _look(unreached: weakref.ref[Unreached]) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        if (there := unreached()) is not None:
            there.look()

    return hook


def _drop(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None
