"""Parameters that a forward pass multiplies with by hand are seen as factors: whose rows make which of the results.

Products, convolutions, and scales along one axis, of parameters, views of them, and what is computed from one of them
element by element. Functions are known by their names: what PyTorch calls them is the same however they are called.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from neq_cli.freezing.model.factors import Factor, Factors, memory_of
from neq_cli.freezing.model.layers import Use
from neq_cli.freezing.model.layouts import RowLayout

_SCALES = {"mul", "mul_", "multiply", "multiply_"}
_PRODUCTS = {"matmul", "mm", "bmm", "linear"}
_GROUPED = {"grouped_mm", "_grouped_mm", "grouped_mm_fallback"}
_CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}
_MULTIPLYING = _PRODUCTS | _GROUPED | _CONVOLUTIONS
_BIASED = {"linear", *_CONVOLUTIONS}
_SUMS = {"add", "add_"}
_JOINS = {"cat", "concat", "concatenate"}
# From each element of a parameter one of the result, and nothing else.
_BY_ELEMENT = {
    *("abs", "add", "bfloat16", "clamp", "clone", "contiguous", "detach", "div", "double", "exp", "float", "half"),
    *("log", "mul", "neg", "__rsub__", "rsub", "sigmoid", "softplus", "sqrt", "square", "sub", "tanh", "to", "type"),
}


_KEYWORDS = ("tensors", "input", "other", "mat2", "mat_a", "mat_b", "weight", "dim", "index", "bias", "offs")
"""Operands that are given by keyword, in the order in which functions take them."""


@dataclass(frozen=True)
class Product:
    """One product with a parameter, or with one expert's part of it.

    ``name``: the parameter's. ``first``: the number of the first row that takes part. ``tokens``: int64, [n], which
    rows of a larger tensor the ``other`` factor's are, where that is known.
    """

    name: str
    use: Use
    first: int
    other: Tensor
    output: Tensor
    tokens: Tensor | None = None


OnProduct = Callable[[Product], None]
OnSummand = Callable[[str, str, int], None]
"""Called with the names of a product's parameter and of one added to it, and the first neuron that has a part of it."""


class Uses(TorchFunctionMode):
    """Tells of every product with one of ``parameters``, by name, and, where that is asked for, of what is added to it.

    Who only watches products known already, as the probe does in every batch, asks for nothing more.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], on_product: OnProduct, on_summand: OnSummand | None = None
    ) -> None:
        super().__init__()
        self.parameters = parameters
        self.on_product = on_product
        self.looks_for_summands = on_summand is not None
        self.on_summand: OnSummand = on_summand or (lambda *_: None)
        self.factors = Factors(parameters)
        self._joined: list[tuple[Tensor, list[tuple[str, int]]]] = []  # vectors put together of parameters and others
        self._product: Product | None = None  # the last, which something may be added to
        self.times_used: Counter[str] = Counter()  # in how many calls, views and what is made of one alone left out
        self._gathered: Tensor | None = None  # which rows the last gathering took
        self.by_linear = False  # whether torch.nn.functional.linear runs

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        output = function(*arguments, **(keywords or {}))
        name = getattr(function, "__name__", "")
        operands = [*arguments, *(keywords[key] for key in _KEYWORDS if key in (keywords or {}))]
        if isinstance(output, Tensor):
            if self.looks_for_summands:
                self._look_for_summands(name, operands, output)
            if name in _BY_ELEMENT:
                self._derive(operands, output)
            if name in ("__getitem__", "index_select"):
                self._gather(operands, output)
            elif name in _SCALES:
                self._tell(self._scales(operands, output))
            elif name in _MULTIPLYING:
                self._product = None
                self._tell(self._products(name, operands, output))
                if name in _BIASED and self.looks_for_summands:
                    self._biased(operands)
        return output

    def _look_for_summands(self, name: str, operands: list[Any], output: Tensor) -> None:
        self._count(operands, output)
        if name in _SUMS and self._product is not None:
            self._add(self._product, operands)
        if name in _JOINS:
            self._join(operands[0], output)

    @contextmanager
    def seeing_linear(self) -> Iterator[None]:
        """Know inside which products ``torch.nn.functional.linear`` makes, by which name it is called in modules."""
        stock = nn.functional.linear

        def linear(*arguments: Any, **keywords: Any) -> Tensor:
            self.by_linear = True
            try:
                return stock(*arguments, **keywords)
            finally:
                self.by_linear = False

        nn.functional.linear = linear
        try:
            yield
        finally:
            nn.functional.linear = stock

    def _count(self, operands: list[Any], output: Tensor) -> None:
        several = [one for each in operands for one in (each if isinstance(each, tuple | list) else (each,))]
        tensors = [one for one in several if isinstance(one, Tensor)]
        memory = memory_of(output)
        for tensor in tensors if len(tensors) > 1 else ():
            if memory_of(tensor) != memory and (factor := self.factors.of(tensor)):
                self.times_used[factor.name] += 1

    def _derive(self, operands: list[Any], output: Tensor) -> None:
        tensors = [one for one in operands if isinstance(one, Tensor)]
        if len(tensors) == 1:
            self.factors.derive(tensors[0], output)

    def _join(self, parts: Any, output: Tensor) -> None:
        if not isinstance(parts, (tuple, list)) or any(part.dim() != 1 for part in parts):
            return
        found, first = [], 0
        for part in parts:
            factor = self.factors.of(part)
            if factor is not None and factor.expert is None:
                found.append((factor.name, first))
            first += len(part)
        if found:
            self._joined.append((output, found))

    def _gather(self, operands: list[Any], output: Tensor) -> None:
        rows = operands[-1]
        if isinstance(rows, Tensor) and rows.dim() == 1 and not rows.is_floating_point() and rows.dtype != torch.bool:
            self._gathered = rows if output.dim() > 1 and len(output) == len(rows) else self._gathered

    def _tell(self, products: Iterable[Product]) -> None:
        for product in products:
            self._product = product
            self.on_product(product)

    def _scales(self, operands: list[Any], output: Tensor) -> Iterator[Product]:
        pairs = [(operands[0], operands[-1]), (operands[-1], operands[0])]
        factors = [self.factors.of(one) for one, _ in pairs]
        for factor, (own, other) in zip(factors, pairs, strict=True):
            # What a vector alone is scaled by comes from no sample.
            if factor is None or not isinstance(other, Tensor) or other.dim() < 2 or None not in factors:
                continue
            shape = self.parameters[factor.name].shape
            long = [i for i, size in enumerate(shape) if size > 1]
            if factor.expert is not None or not long or long[0] not in factor.dimensions:
                continue
            # A table may be scaled itself, as by a mask; it scales samples where there is more than it has numbers.
            if len(long) > 1 and (len(shape) > 2 or long[0] or output.numel() <= own.numel()):
                continue
            axis = factor.dimensions.index(long[0]) - own.dim()
            layout = RowLayout("flat") if len(long) == 1 else RowLayout()
            if output.shape[axis] == shape[long[0]]:
                yield Product(factor.name, Use(layout, axis, "norm"), 0, other, output)

    def _products(self, name: str, operands: list[Any], output: Tensor) -> Iterator[Product]:
        first, second = operands[:2]
        factor = self.factors.of(second)
        if factor is not None and self.factors.of(first) is not None:
            return  # a weight that is computed from two
        if name in _CONVOLUTIONS:
            if factor is not None and factor.expert is None and factor.dimensions[0] == 0:
                yield Product(factor.name, Use(RowLayout(), 1 - second.dim(), "convolution"), 0, first, output)
        elif name == "linear":
            yield from self._product_of(second, first, output, rows=-2, along=-1, axis=-1)
        elif name in _GROUPED:
            offsets = next((one for one in operands[2:] if isinstance(one, Tensor)), None)
            yield from self._product_of(second, first, output, rows=-1, along=-2, axis=-1, offsets=offsets)
        else:
            yield from self._product_of(second, first, output, rows=-1, along=-2, axis=-1)
            yield from self._product_of(first, second, output, rows=-2, along=-1, axis=-1 if second.dim() == 1 else -2)

    def _product_of(
        self,
        weight: Tensor,
        other: Tensor,
        output: Tensor,
        *,
        rows: int,
        along: int,
        axis: int,
        offsets: Tensor | None = None,
    ) -> Iterator[Product]:
        """Yield the products of ``weight``, whose dimension ``rows`` makes ``axis`` of the output, and ``along`` is
        summed over."""
        factor = self.factors.of(weight)
        if factor is None or weight.dim() < 2 or weight.dim() > 3:
            return
        shape = self.parameters[factor.name].shape
        place, summed = factor.dimensions[rows], factor.dimensions[along]
        if len(shape) == 3 and (place, summed) in ((1, 2), (2, 1)):
            layout = RowLayout("stacked" if place == 1 else "stacked_transposed")
            outputs = weight.shape[rows]
            yield from self._of_experts(factor, Use(layout, axis, "linear"), outputs, other, output, offsets)
        elif factor.expert is None and place == 0 and weight.dim() == 2:
            by_linear = self.by_linear and factor.own
            yield Product(factor.name, Use(RowLayout(), axis, "linear", by_linear), 0, other, output)
        elif factor.expert is None and (place, summed, len(shape)) == (1, 0, 2):
            yield Product(factor.name, Use(RowLayout("transposed"), axis, "linear"), 0, other, output)

    def _of_experts(
        self, factor: Factor, use: Use, outputs: int, other: Tensor, output: Tensor, offsets: Tensor | None
    ) -> Iterator[Product]:
        gathered = self._gathered
        if factor.expert is not None:
            tokens = gathered if gathered is not None and len(gathered) == len(output) else None
            yield Product(factor.name, use, factor.expert * outputs, other, output, tokens)
        elif factor.dimensions[0] == 0 and offsets is not None:
            ends = offsets.tolist()
            for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
                whole = gathered is not None and len(gathered) == len(output)
                tokens = gathered[start:end] if whole and gathered is not None else None
                yield Product(factor.name, use, expert * outputs, other[start:end], output[start:end], tokens)
        elif factor.dimensions[0] == 0 and output.dim() == 3 and len(output) == len(other):
            for expert in range(len(output)):
                yield Product(factor.name, use, expert * outputs, other[expert], output[expert])

    def _biased(self, operands: list[Any]) -> None:
        weight = self.factors.of(operands[1])
        if weight is None or len(operands) < 3:
            return
        for joined, parts in self._joined:
            if joined is operands[2]:
                for part, first in parts:
                    self.on_summand(weight.name, part, first)
        self._sum(weight.name, operands[2], -1)

    def _add(self, product: Product, operands: list[Any]) -> None:
        summands = [one for one in operands[:2] if one is not product.output]
        if len(summands) == 1:
            self._sum(product.name, summands[0], product.use.axis)

    def _sum(self, name: str, summand: Any, axis: int) -> None:
        """Tell of a vector, or one expert's, that is added along ``axis`` to a product with the parameter ``name``."""
        factor = self.factors.of(summand)
        if factor is not None:
            places = [i - summand.dim() for i, place in enumerate(factor.dimensions) if place is not None]
            if places == [axis]:
                self.on_summand(name, factor.name, 0)
