"""A layer owns neurons, and each neuron's parameters lie in rows of the layer's parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from neq_cli.freezing.families import Family
from neq_cli.freezing.model.layouts import Cost, RowLayout

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
LAST_DIMENSION_NORMS = (nn.LayerNorm, nn.RMSNorm)
LOOKUPS = (nn.Embedding, nn.EmbeddingBag)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
STOCK_LAYERS: tuple[type[nn.Module], ...] = (
    *CONVOLUTIONS,
    *TRANSPOSED_CONVOLUTIONS,
    nn.Linear,
    nn.Bilinear,
    *BATCH_NORMS,
    *INSTANCE_NORMS,
    nn.GroupNorm,
    *LAST_DIMENSION_NORMS,
    *LOOKUPS,
)


@dataclass(frozen=True)
class Rows:
    """The rows of one parameter that belong to a layer: ``count`` of them from ``start``, those of its neurons from
    ``first``."""

    parameter: str  # qualified name in the model
    layout: RowLayout
    start: int
    count: int
    first: int = 0

    def of(self, neurons: Tensor) -> Tensor:
        """Return what ``neurons`` ([neurons of the layer]) tells of these rows: [count]."""
        return neurons[self.first : self.first + self.count]


@dataclass(frozen=True)
class Use:
    """A parameter that is no module's weight, but a factor in somebody's forward: its rows by ``layout`` are neurons.

    ``axis`` of the product counts them (of one expert's, where experts are stacked); ``cost``: what it is like;
    ``by_linear``: ``torch.nn.functional.linear`` makes it.
    """

    layout: RowLayout
    axis: int
    cost: Cost
    by_linear: bool = False


@dataclass(frozen=True)
class Layer:
    """A layer that owns neurons.

    ``name`` is its prefix in the state_dict and ``module`` the module it belongs to: its own, or the one that uses the
    weight functionally. ``axis`` is the dimension of its output that counts neurons (``axis_dimensions`` of them from
    there, where a LayerNorm spans several).
    """

    name: str
    kind: str
    cost: Cost
    module: nn.Module
    neurons: int
    weight: str  # qualified name of the parameter that its outputs are recognised by
    rows: tuple[Rows, ...]  # empty where nothing of the layer trains
    axis: int
    axis_dimensions: int = 1
    functional: bool = False  # no module of its own is called
    tried: bool = False  # whether its axis is one is known from a trial only
    use: Use | None = None  # how its weight is a factor, where no call of a module or of linear stands for it

    @property
    def by_linear(self) -> bool:
        """Whether its outputs come from a linear module of its own, or from ``torch.nn.functional.linear``."""
        return self.cost == "linear" and self.use is None and not isinstance(self.module, RECURRENT)

    @property
    def of_experts(self) -> bool:
        """Whether its neurons are several experts', each of which gets its own tokens."""
        return self.use is not None and self.use.layout.kind.startswith("stacked")


@dataclass(frozen=True)
class Found:
    """What only a look at the running model tells, by qualified names of parameters, layers and modules.

    ``uses``: of parameters that no call of a layer stands for. ``rows``: more rows of layers, such as biases that
    another module holds. ``families``: how leaf modules of an unknown class hold neurons; ``in_vain``: those that were
    tried and hold none.
    """

    uses: Mapping[str, Use] = field(default_factory=dict)
    rows: Mapping[str, tuple[Rows, ...]] = field(default_factory=dict)
    families: Mapping[str, Family] = field(default_factory=dict)
    in_vain: frozenset[str] = frozenset()


NOTHING_FOUND = Found()


def everything(layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """Return the sets in which all neurons train: bool, [neurons], on the CPU."""
    return {name: torch.ones(layer.neurons, dtype=torch.bool, device="cpu") for name, layer in layers.items()}


def rows_by_neuron(output: Tensor, axis: int, axis_dimensions: int = 1) -> Tensor:
    """Return ``output`` as [neurons, everything else]; ``axis`` and ``axis_dimensions`` as in ``Layer``."""
    if axis_dimensions > 1:
        output, axis = output.flatten(axis), -1
    return torch.movedim(output, axis, 0).flatten(1)
