"""Recurrent layers run layer by layer under watch, so that all hidden units are seen, not the last layer's alone.

A hidden unit's output is what it is at every step; where a projection follows, which hides it, its cell at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from neq_cli.freezing.model.layers import RECURRENT, Layer

_STACKS = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
_CELLS = {"lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"}
OnOutput = Callable[[Layer, Tensor, Tensor], None]
"""Called with layer, input and output."""


def recurrent_among(layers: Iterable[Layer]) -> list[Layer]:
    """Return the layers that are parts of torch's recurrent modules."""
    return [layer for layer in layers if isinstance(layer.module, RECURRENT)]


def multiply_adds(layer: Layer, weight: Tensor, inputs: Tensor) -> int:
    """Return those of a call of hidden units, whose ``weight`` [gates x units, inputs] it is, on [..., inputs]."""
    hidden: Any = getattr(layer.module, "proj_size", 0) or layer.module.hidden_size
    return inputs.numel() // inputs.shape[-1] * (weight.numel() + len(weight) * int(hidden))


class RecurrentCalls(TorchFunctionMode):
    """Calls ``on_output`` at every call of every one of ``layers``; ``parameters``: the model's, by qualified name."""

    def __init__(self, layers: Iterable[Layer], parameters: Mapping[str, Tensor], on_output: OnOutput) -> None:
        super().__init__()
        self.layers = {id(parameters[layer.weight]): layer for layer in layers}
        self.on_output = on_output

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in _STACKS:
            return self._run(function, *arguments, **(keywords or {}))
        output = function(*arguments, **(keywords or {}))
        if name in _CELLS and (layer := self.layers.get(id(arguments[2]))):
            self.on_output(layer, arguments[0], output[0] if isinstance(output, tuple) else output)
        return output

    def _run(self, function: Any, inputs: Tensor, *arguments: Any) -> Any:
        """Run a stack: (inputs, states, weights, ...), or, of packed data, (inputs, lengths, states, weights, ...)."""
        is_packed = isinstance(arguments[0], Tensor) and not arguments[0].is_floating_point()
        packed, arguments = arguments[:is_packed], arguments[is_packed:]
        states, weights, biased, layers, dropout, training, both = arguments[:7]
        single = isinstance(states, Tensor)
        states = [states] if single else list(states)
        each = len(weights) // layers
        after: list[list[Tensor]] = [[] for _ in states]
        for number in range(layers):
            start, count = number * (1 + both), 1 + both
            own = [state[start : start + count] for state in states]
            of_layer = weights[number * each : (number + 1) * each]
            given = (*packed, own[0] if single else own, of_layer, biased, 1, 0.0, training, both)
            output, *ends = function(inputs, *given, *arguments[7:])
            for kept, end in zip(after, ends, strict=True):
                kept.append(end)
            # What follows is made of what was told of, for who looks which layer comes before which.
            output = torch.cat(self._told(of_layer, count, inputs, output, ends), -1)
            inputs = nn.functional.dropout(output, dropout, training) if number + 1 < layers else output
        return (inputs, *(torch.cat(kept) for kept in after))

    def _told(
        self, weights: Sequence[Tensor], directions: int, inputs: Tensor, output: Tensor, ends: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return the output of each direction, after it was told of."""
        each, size = len(weights) // directions, output.shape[-1] // directions
        # One by one, so that each is its own place in autograd's graph.
        parts = [output.narrow(-1, direction * size, size) for direction in range(directions)]
        for direction, part in enumerate(parts):
            own = [self.layers.get(id(weight)) for weight in weights[direction * each : (direction + 1) * each]]
            units, projection = own[0], own[-1]
            if units is not None and projection is None:
                self.on_output(units, inputs, part)
            elif units is not None and projection is not None:
                cell = ends[-1][direction]
                self.on_output(units, inputs, cell)
                self.on_output(projection, cell, part)
        return parts
