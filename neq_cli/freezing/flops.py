"""The FLOPs of one sample's back-propagation are counted twice: as the paper does, and as they are executed.

The unit is one multiply-add. Counted by hand, since torch's FlopCounterMode counts what has run, not what would with
other sets in force, and knows nothing of the paper's accounting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from neq_cli.freezing.backward.sliced import BackwardMode
from neq_cli.freezing.model.layers import Layer
from neq_cli.freezing.model.neurons import Neurons
from neq_cli.freezing.model.propagation import Propagation, propagate
from neq_cli.freezing.model.trace import Trace

Shares = Mapping[str, Tensor | float]
"""By layer: the set of trainable neurons (bool, [neurons]), or their share."""


@dataclass(frozen=True)
class Execution:
    """How the backward pass is carried out.

    Layers in ``dense`` compute all rows unless none trains (where ``compiled``, even then). Of the others
    ``rows_computed`` tells how many, where that is known already; else as many as train are counted. ``compiled``:
    torch.compile runs the model. There, and where layers are ``attached``, errors go wherever they would with nothing
    frozen, but past layers that pass none on.
    """

    mode: BackwardMode
    dense: frozenset[str]
    rows_computed: Mapping[str, int]
    compiled: bool
    attached: bool
    still: frozenset[str] = frozenset()

    @property
    def whole(self) -> bool:
        """Whether autograd knows nothing of what is frozen, and passes the error on everywhere."""
        return self.mode == "dense" or self.compiled

    def computed(self, layer: Layer, share: float) -> float:
        """Return the share of a layer's weight gradient that is computed where ``share`` of its neurons train."""
        if self.mode == "dense" or (layer.name in self.dense and (share > 0 or self.compiled or self.attached)):
            return 1.0
        rows = self.rows_computed.get(layer.name)
        return share if rows is None else rows / layer.neurons

    def blocking(self, neurons: Neurons, shares: Mapping[str, float]) -> set[str]:
        """Return the layers that pass no error on at all where these ``shares`` of their neurons train."""
        sliced = {name for name, layer in neurons.layers.items() if name not in self.dense}
        return {name for name in sliced if self.mode == "truncated" and not shares[name]}

    def passing(self, layer: Layer, share: float) -> float:
        """Return the share of a layer's input gradient that is computed, where one is needed."""
        sliced = self.mode == "truncated" and layer.name not in self.dense
        return self.computed(layer, share) if sliced else 1.0


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
    """The whole model's, by layer; ``other`` are products outside layers (attention), which the paper leaves out.

    ``forward``: the forward pass of one sample, layers and products, whatever is frozen.
    """

    layers: Mapping[str, LayerFlops]
    other: float
    other_dense: float
    forward: float

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
        return sum(layer.executed_dense for layer in self.layers.values()) + self.other_dense


def forward_cost(layer: Layer, trace: Trace) -> int:
    """Return the layer's forward pass in the paper's unit: multiply-adds, or two per output element of a norm."""
    if layer.cost == "norm":
        return 2 * trace.elements.get(layer.name, 0)
    # A lookup multiplies nothing.
    return trace.multiply_adds.get(layer.name, 0)


def count_flops(neurons: Neurons, trace: Trace, trainable: Shares, execution: Execution) -> Flops:
    """Return both accountings with the given sets in force.

    Layers whose weights do not train have no cost in the paper's accounting; they still pass the error on.
    """
    everything = dict.fromkeys(neurons.layers, 1.0)
    shares = {name: _share(trainable[name]) for name in neurons.layers}
    dense = propagate(trace, everything)
    training = everything if execution.attached else shares
    still = frozenset() if execution.attached else execution.still
    now = dense if execution.whole else propagate(trace, training, execution.blocking(neurons, shares), still)
    layers = {}
    for name, layer in neurons.layers.items():
        cost, share = forward_cost(layer, trace), shares[name]
        weight_trains = any(rows.parameter == layer.weight for rows in layer.rows)
        passing, computed = execution.passing(layer, share), execution.computed(layer, share) * weight_trains
        layers[name] = LayerFlops(
            paper=2 * cost * share,
            executed=_executed(name, cost, now, passing, computed),
            paper_dense=2.0 * cost,
            executed_dense=_executed(name, cost, dense, 1.0, float(weight_trains)),
        )
    for name, layer in neurons.fixed.items():
        cost = forward_cost(layer, trace)
        layers[name] = LayerFlops(
            0.0, _executed(name, cost, now, 1.0, 0.0), 0.0, _executed(name, cost, dense, 1.0, 0.0)
        )
    # What the trace counts of a product is its backward pass, of both factors.
    in_layers = sum(forward_cost(layer, trace) for layer in (*neurons.layers.values(), *neurons.fixed.values()))
    forward = in_layers + sum(trace.products.values()) / 2
    return Flops(layers, _products(trace, now), _products(trace, dense), forward)


def _share(trainable: Tensor | float) -> float:
    return trainable if isinstance(trainable, float) else trainable.sum().item() / len(trainable)


def _executed(name: str, cost: int, propagation: Propagation, passing: float, computed: float) -> float:
    if name not in propagation.reached:
        return 0.0
    return cost * (passing * (name in propagation.passes_on) + computed)


def _products(trace: Trace, propagation: Propagation) -> float:
    return float(sum(count for name, count in trace.products.items() if name == "" or name in propagation.reached))
