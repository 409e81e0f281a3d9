"""Trainable rows take an optimiser's step by themselves: no frozen row's weight, gradient or state is read or written.

Around the step a parameter is its trainable rows alone, with their gradient. Its row-shaped state has these rows only
for as long as the set is in force; the others' lies beside it, and ``state_dict()`` and pickles have the whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neq_cli.freezing.rows.frozen_rows import FrozenRows, put_rows, take_rows
from neq_cli.freezing.rows.handed_over import rows_alone, whole_gradient

# So many bytes of weights are stepped with at a time: enough for the calls not to count, and on a CPU few enough for
# what was gathered to be in the cache still. Measured on a Zen 4 core; elsewhere it bounds the memory for a moment.
_AT_A_TIME = {"cpu": 2**21}
_AT_A_TIME_ELSEWHERE = 2**28


class TrainableRows:
    """A parameter with frozen rows, and how its optimiser's state is split up meanwhile."""

    def __init__(self, frozen: FrozenRows) -> None:
        assert frozen.dimension is not None
        self.parameter = frozen.parameter
        self.dimension = frozen.dimension
        self.resting: dict[str, Tensor] = {}  # the frozen rows' state, by key
        self._frozen = frozen
        self.shape, count = self.parameter.shape, int((~frozen.frozen).sum())
        self.own_shape = torch.Size(
            count if number == self.dimension else size for number, size in enumerate(self.shape)
        )
        self.bytes = self.own_shape.numel() * self.parameter.element_size()

    @cached_property
    def training(self) -> Tensor:
        """The trainable rows' numbers: int64, on the parameter's device."""
        return (~self._frozen.frozen).nonzero().squeeze(1).to(self.parameter.device)

    def gradient(self, gradient: Tensor) -> Tensor:
        """Return the trainable rows of a gradient, laid out in memory as ``take`` lays out those of the parameter."""
        values = rows_alone(gradient)
        if values is None:
            values = self.take(whole_gradient(gradient))
        own = self.parameter.detach()
        return values if values.stride() == own.stride() else torch.empty_like(own).copy_(values)

    def take(self, tensor: Tensor) -> Tensor:
        """Return a copy of the trainable rows of ``tensor``, of the parameter's shape."""
        return take_rows(tensor, self.dimension, self.training)

    def put(self, whole: Tensor, values: Tensor) -> None:
        """Write ``values`` into the trainable rows of ``whole``, of the parameter's shape."""
        put_rows(whole, self.dimension, self.training, values)

    def split(self, state: MutableMapping[str, Any]) -> None:
        """Leave the trainable rows alone in ``state``."""
        for key, tensor in state.items():
            if isinstance(tensor, Tensor) and tensor.shape == self.shape:
                self.resting[key] = take_rows(tensor, self.dimension, self._frozen.rows)
                state[key] = self.take(tensor)

    def joined(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return copies of what is split of ``state``, whole. What was born without frozen rows is zero there."""
        return {
            key: self._whole(key, tensor)
            for key, tensor in state.items()
            if isinstance(tensor, Tensor) and tensor.shape == self.own_shape
        }

    def _whole(self, key: str, training: Tensor) -> Tensor:
        like = self.parameter.detach()
        whole = torch.zeros_like(like, dtype=training.dtype, device=training.device)
        self.put(whole, training)
        if key in self.resting:
            put_rows(whole, self.dimension, self._frozen.rows, self.resting[key].to(whole.device))
        return whole


class SteppingRows:
    """Steps of one ``optimizer`` in which some parameters' trainable rows go first, by themselves.

    For optimisers of torch.optim that treat every element by itself: what they do is known.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.rows: dict[int, TrainableRows] = {}  # by the parameter's identity
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []

    def add(self, frozen: Iterable[FrozenRows]) -> None:
        """Have the trainable rows of these go by themselves from now on."""
        for one in frozen:
            rows = self.rows[id(one.parameter)] = TrainableRows(one)
            rows.split(self.optimizer.state.get(one.parameter, {}))

    def remove(self) -> None:
        """Make the optimiser's state whole again; every row takes part in its steps."""
        for rows in self.rows.values():
            state = self.optimizer.state.get(rows.parameter, {})
            state.update(rows.joined(state))
        self.rows = {}

    def with_closure_called(self, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
        """Return the arguments of a step with what its closure returns in the closure's place, if it has one."""
        closure: Callable[[], Any] | None = keywords.get("closure") or (arguments[1] if len(arguments) > 1 else None)
        if not self.rows or closure is None:
            return None
        with torch.enable_grad():
            loss = closure()
        return (arguments[0], lambda: loss), {key: value for key, value in keywords.items() if key != "closure"}

    @torch.no_grad()
    def step(self) -> float:
        """Step with the trainable rows; returns the seconds that the optimiser's own code took.

        Their parameters have no gradient then, until ``give_gradients_back``.
        """
        if not self.rows:
            return 0.0
        seconds = 0.0
        groups = self.optimizer.param_groups
        step: Any = type(self.optimizer).step
        step = step.__wrapped__ if getattr(step, "hooked", False) else step  # without the hooks around it
        try:
            for group in groups:
                for some in self._some_at_a_time(group["params"]):
                    self.optimizer.param_groups = [{**group, "params": [rows.parameter for rows in some]}]
                    seconds += self._step_with(some, step)
        finally:
            self.optimizer.param_groups = groups
        return seconds

    def give_gradients_back(self) -> None:
        """Put the gradients where they were before ``step``."""
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        self._gradients = []

    def complete(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """Put whole state into a ``state_dict``, which numbers the parameters as their groups list them."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state = state_dict["state"]
        state |= {number: self._whole(one, state[number]) for number, one in enumerate(parameters) if number in state}

    def state_for_copies(self) -> dict[str, Any]:
        """Return what copies and pickles of the optimiser are made from: their parameters are whole."""
        own: dict[str, Any] = type(self.optimizer).__getstate__(self.optimizer)
        state = own["state"].copy()
        state.update({one: self._whole(one, state[one]) for one in state if isinstance(one, Tensor)})
        return {**own, "state": state}

    def _whole(self, parameter: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        rows = self.rows.get(id(parameter))
        return state if rows is None else {**state, **rows.joined(state)}

    def _some_at_a_time(self, parameters: Iterable[nn.Parameter]) -> Iterator[list[TrainableRows]]:
        some: list[TrainableRows] = []
        for parameter in parameters:
            rows = self.rows.get(id(parameter))
            if rows is None or parameter.grad is None:
                continue
            most = _AT_A_TIME.get(parameter.device.type, _AT_A_TIME_ELSEWHERE)
            if some and sum(one.bytes for one in some) + rows.bytes > most:
                yield some
                some = []
            some.append(rows)
        if some:
            yield some

    def _step_with(self, some: Sequence[TrainableRows], step: Callable[[Optimizer], Any]) -> float:
        wholes = [one.parameter.detach() for one in some]
        try:
            for one, whole in zip(some, wholes, strict=True):
                gradient, one.parameter.grad = one.parameter.grad, None
                assert gradient is not None
                self._gradients.append((one.parameter, gradient))
                one.parameter.data = one.take(whole)
                one.parameter.grad = one.gradient(gradient)
            started = time.perf_counter()
            step(self.optimizer)
            seconds = time.perf_counter() - started
            for one, whole in zip(some, wholes, strict=True):
                one.put(whole, one.parameter.detach())
        finally:
            for one, whole in zip(some, wholes, strict=True):
                one.parameter.grad = None
                one.parameter.data = whole
        return seconds
