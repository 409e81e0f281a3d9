"""When backward ends, frozen rows of gradients are zero, and what is frozen whole or cut off has no gradient at all."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils.hooks import RemovableHandle

from neq_cli.freezing.rows.frozen_rows import FrozenRows, bits
from neq_cli.freezing.rows.handed_over import rows_alone, whole_gradient
from neq_cli.freezing.rows.shards import local

Hook = Callable[[Tensor], None]
Zero = Callable[[Tensor], Tensor]
# So many of the rows are filled with zeros one by one in less time than all of them are multiplied: measured on a CPU.
_FEW = 0.2


class Discarding:
    """Discards frozen rows' gradients in every backward pass until ``remove``: hooks on the parameters.

    Large gradients are zeroed as they come, while they are in the cache; the small ones all at once when backward ends.
    That is after whatever was put off to its end before, such as DistributedDataParallel's writing of averages.
    """

    def __init__(self, frozen: Iterable[FrozenRows]) -> None:
        self.whole: list[nn.Parameter] = []
        self.large: list[tuple[nn.Parameter, Zero]] = []
        self.small: dict[tuple[torch.device, torch.dtype], list[tuple[nn.Parameter, Tensor]]] = {}
        self.hooks: list[tuple[nn.Parameter, Hook]] = []
        self.handles: list[RemovableHandle] = []
        self._pass = -1  # the backward pass at whose end the small ones are already due
        # Hooks know neither a parameter nor this object, which does: autograd would keep them in memory for ever, since
        # it holds hooks where Python's garbage collector does not look.
        me = weakref.ref(self)
        for one in frozen:
            if one.whole:
                self.whole.append(one.parameter)
                hook = _drop_now(me)
            elif one.by_row:
                zero = _zeroing(one)
                self.large.append((one.parameter, zero))
                hook = _zero_now(zero)
            else:
                place = (one.parameter.device, one.trains.dtype)
                self.small.setdefault(place, []).append((one.parameter, one.trains))
                hook = _zero_later(_zeroing(one), me)
            self.hooks.append((one.parameter, hook))
        self.attach()

    def attach(self) -> None:
        """Discard from now on."""
        self.handles += [put_on(parameter, hook) for parameter, hook in self.hooks]

    def remove(self) -> None:
        """Take the hooks off again."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def everything(self) -> None:
        """Discard what is there now."""
        self.late()
        for parameter, zero in self.large:
            _apply(zero, parameter)

    def drop_whole(self) -> None:
        """Drop the gradients of parameters whose rows are all frozen."""
        for parameter in self.whole:
            parameter.grad = None

    @torch.no_grad()
    def late(self) -> None:
        """Discard what is discarded when backward ends."""
        self.drop_whole()
        for pairs in self.small.values():
            there = [(gradient, trains) for one, trains in pairs if (gradient := one.grad) is not None]
            if there:
                torch._foreach_mul_([bits(local(gradient)) for gradient, _ in there], [trains for _, trains in there])

    def when_backward_ends(self) -> None:
        """Have ``late`` called before the running backward pass returns; at once where none runs."""
        number = graph_task()
        if number == -1:
            self.late()
        elif number != self._pass:
            self._pass = number
            when_backward_has_ended(self.late)


class Unreached:
    """Takes the gradients of ``parameters`` away when backward ends, until ``remove``; hooks on the ``others``.

    Those that had a gradient before the backward pass keep it: it is somebody's, or zeros that zero_grad left there.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], others: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self._pass = -1
        me = weakref.ref(self)  # autograd keeps hooks where Python's garbage collector does not look
        self.handles = [
            put_on(parameter, _look_at(me))
            for parameter in (others if self.parameters else ())
            if parameter.is_floating_point() or parameter.is_complex()
        ]

    def look(self) -> None:
        """Note whose gradient is to be taken away, the first time in a backward pass: nothing has reached them yet."""
        number = graph_task()
        if number not in (-1, self._pass):
            self._pass = number
            without = [parameter for parameter in self.parameters if parameter.grad is None]
            when_backward_has_ended(lambda: _drop_gradients(without))

    def remove(self) -> None:
        """Take the hooks off again."""
        for handle in self.handles:
            handle.remove()
        self.handles = []


def graph_task() -> int:
    """Return the number of the running backward pass, -1 where none runs."""
    return int(torch._C._current_graph_task_id())


def when_backward_has_ended(call: Callable[[], None]) -> None:
    """Have ``call`` called before the running backward pass returns, behind all that other hooks put off during it."""
    queue = Variable._execution_engine.queue_callback
    queue(lambda: queue(call))


def put_on(parameter: nn.Parameter, hook: Hook) -> RemovableHandle:
    """Have ``hook`` called with each gradient, also where gradients are off now and come back later."""
    wanted = parameter.requires_grad
    # No tensor without gradients takes a hook, but every one keeps it.
    parameter.requires_grad_(True)
    try:
        handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    finally:
        parameter.requires_grad_(wanted)
    return handle


def _zeroing(frozen: FrozenRows) -> Zero:
    trains, rows = frozen.trains, frozen.rows
    if frozen.by_row and len(rows) <= _FEW * len(frozen.frozen):
        return lambda gradient: gradient.detach().index_fill_(0, rows, 0.0)
    return lambda gradient: bits(gradient).mul_(trains)


def _apply(zero: Zero, parameter: Tensor) -> None:
    gradient = parameter.grad
    if gradient is not None and rows_alone(gradient) is None:
        zero(local(whole_gradient(gradient)))


def _zero_now(zero: Zero) -> Hook:
    return lambda parameter: _apply(zero, parameter)


def _zero_later(zero: Zero, discarding: weakref.ref[Discarding]) -> Hook:
    def hook(parameter: Tensor) -> None:
        if torch.compiler.is_compiling():  # a traced backward pass (compiled autograd) has no end to put it off to
            _apply(zero, parameter)
        elif (there := discarding()) is not None:
            there.when_backward_ends()

    return hook


def _drop_now(discarding: weakref.ref[Discarding]) -> Hook:
    def hook(parameter: Tensor) -> None:
        parameter.grad = None
        if not torch.compiler.is_compiling() and (there := discarding()) is not None:
            there.when_backward_ends()

    return hook


def _look_at(unreached: weakref.ref[Unreached]) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        if (there := unreached()) is not None:
            there.look()

    return hook


def _drop_gradients(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None
