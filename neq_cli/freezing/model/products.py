"""Multiply-adds of layers are counted by closed forms, and those of products that are nobody's as they run.

Counted by hand, with torch's formulas: its FlopCounterMode would need the backward pass to run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from neq_cli.freezing.model import recurrent
from neq_cli.freezing.model.factors import memory_of
from neq_cli.freezing.model.layers import Layer


def multiply_adds(layer: Layer, weight: Tensor, inputs: Tensor, output: Tensor) -> int:
    """Return those of one call's forward pass, the bias not counted."""
    if layer.cost == "recurrent":
        return recurrent.multiply_adds(layer, weight, inputs)
    # A transposed convolution sends each input element, any other layer each output element, through this many.
    if layer.cost == "transposed":
        return weight[0].numel() * inputs.numel()
    return weight.numel() // layer.neurons * output.numel()


def multiplied_with(layers: Iterable[Layer]) -> Iterator[str]:
    """Yield the names of the parameters whose products are layers' own."""
    for layer in layers:
        if layer.cost not in ("norm", "lookup"):
            yield layer.weight
        if layer.cost == "recurrent":
            yield layer.weight.replace("weight_ih", "weight_hh")


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the multiply-adds that the backward pass of all products and convolutions inside will take.

    But for those with one of ``weights``, by name, that are met as they are.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weights = {memory_of(weight): name for name, weight in weights.items()}
        self.skipped: set[str] = set()
        self.backward: defaultdict[str, int] = defaultdict(int)  # by the layer called last
        self.last = ""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        formula = flop_registry.get(function._overloadpacket)
        if formula is not None:
            # What addmm and baddbmm add comes first, a convolution's bias last: only the two factors cost products,
            # one for each that needs a gradient. The formulas take two per multiply-add.
            factors = arguments[1:3] if "add" in function._overloadpacket.__name__ else arguments[:2]
            if own := [self.weights[place] for place in map(memory_of, factors) if place in self.weights]:
                self.skipped.update(own)
                return result
            forward = formula(*arguments, **(keywords or {}), out_val=result) // 2
            self.backward[self.last] += forward * sum(factor.requires_grad for factor in factors)
        return result
