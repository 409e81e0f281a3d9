"""FLOPs of one sample's back-propagation, one multiply-add each: the paper's accounting and what really runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from neq_cli.freezing.neurons import Layer, Neurons
from neq_cli.freezing.trace import Trace


@dataclass(frozen=True)
class LayerFlops:
    """One layer's back-propagation for one sample, in multiply-adds.

    ``paper``: twice the forward pass, less the frozen share of all of it. ``executed``: the input gradient where one is
    needed, and the weight gradient of the rows that are computed. ``*_dense``: the same with nothing frozen.
    """

    paper: float
    executed: float
    paper_dense: float
    executed_dense: float


@dataclass(frozen=True)
class Flops:
    """The whole model's, by layer; ``other`` are products outside layers (attention), which the paper leaves out."""

    layers: Mapping[str, LayerFlops]
    other: float

    @property
    def paper(self) -> float:
        return sum(layer.paper for layer in self.layers.values())

    @property
    def paper_dense(self) -> float:
        return sum(layer.paper_dense for layer in self.layers.values())

    @property
    def executed(self) -> float:
        return sum(layer.executed for layer in self.layers.values()) + self.other

    @property
    def executed_dense(self) -> float:
        return sum(layer.executed_dense for layer in self.layers.values()) + self.other


def forward_cost(layer: Layer, trace: Trace) -> int:
    """Return the layer's forward pass in the paper's unit: multiply-adds, or two per output element of a norm."""
    if layer.cost == "norm":
        return 2 * trace.elements.get(layer.name, 0)
    return trace.multiply_adds.get(layer.name, 0)


def count_flops(neurons: Neurons, trace: Trace, trainable: Mapping[str, Tensor | float]) -> Flops:
    """Return both accountings with the given sets (bool, [neurons]) or shares of trainable neurons in force.

    Layers whose weights do not train have no cost in the paper's accounting; they still pass the error on.
    """
    layers = {}
    for name, layer in neurons.layers.items():
        cost, passes_on = forward_cost(layer, trace), trace.input_gradient.get(name, False)
        weight_trains = any(rows.parameter == layer.weight for rows in layer.rows)
        layers[name] = _layer_flops(cost, passes_on + weight_trains, _share(trainable[name]))
    for name, layer in neurons.fixed.items():
        passed_on = float(forward_cost(layer, trace) * trace.input_gradient.get(name, False))
        layers[name] = LayerFlops(0.0, passed_on, 0.0, passed_on)
    return Flops(layers, other=float(trace.other_backward))


def _share(trainable: Tensor | float) -> float:
    return trainable if isinstance(trainable, float) else trainable.sum().item() / len(trainable)


def _layer_flops(cost: int, gradients: int, share: float) -> LayerFlops:
    dense = float(cost * gradients)
    # backward: dense computes the weight gradient of frozen rows too, and discards it.
    return LayerFlops(paper=2 * cost * share, executed=dense, paper_dense=2.0 * cost, executed_dense=dense)
