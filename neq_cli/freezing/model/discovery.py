"""What modules' classes do not tell is found while the model runs once: factors by hand, rows beside layers, families.

A leaf module of an unknown class is tried: of each of its parameters a row at a time is disturbed, and where one axis
of its output answers for every row tried, they are neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from neq_cli.freezing.families import Family
from neq_cli.freezing.model.axes import LayerArguments, find_axis
from neq_cli.freezing.model.layers import Found, Layer, Rows, Use
from neq_cli.freezing.model.layouts import Cost, RowLayout
from neq_cli.freezing.model.module_layers import is_sparse
from neq_cli.freezing.model.neurons import SPARSE, Neurons
from neq_cli.freezing.model.uses import Product, Uses


class Discovery:
    """Looks at a running ``model`` for what its ``neurons``, as they are known by class, leave out."""

    def __init__(self, model: nn.Module, neurons: Neurons) -> None:
        self.model = model
        self.neurons = neurons
        self.parameters = dict(model.named_parameters())
        self.layers = {layer.weight: layer for layer in neurons.layers.values()}
        self.uses: dict[str, set[Use]] = {}
        # By the name of what is added: to which product, from which neuron on, each time.
        self.summands: dict[str, list[tuple[str, int]]] = {}
        self.times_used: Mapping[str, int] = {}
        self.rows: dict[str, tuple[Rows, ...]] = {}
        self.families: dict[str, Family | None] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Have what runs inside be looked at."""
        with ExitStack() as stack:
            for name, module in self._unknown():
                hook = module.register_forward_hook(self._trying(name), prepend=True, with_kwargs=True)
                stack.callback(hook.remove)
            uses = stack.enter_context(Uses(self.parameters, self._on_product, self._on_summand))
            self.times_used = uses.times_used
            stack.enter_context(uses.seeing_linear())
            yield

    def found(self, called: frozenset[str]) -> Found:
        """Return what was found; ``called``: the layers that were seen to be called."""
        outside = [name for name, why in self.neurons.outside.items() if why != SPARSE]
        families = {name: family for name, family in self.families.items() if family is not None}
        of_families = {f"{name}.{key}" if name else key for name, one in families.items() for key in one.parameters}
        rows = dict(self.rows)
        taken = of_families | {one.parameter for more in rows.values() for one in more}
        silent = {layer.weight for layer in self.layers.values() if layer.name not in called}
        uses = {
            name: next(iter(found))
            for name, found in self.uses.items()
            if len(found) == 1 and (name in silent or (name in outside and name not in taken))
        }
        for name, found in self.summands.items():
            # What is used in another way as well, as a token that is also attended to, is no bias.
            only_so = len(set(found)) == 1 and len(found) == self.times_used[name]
            if name in outside and name not in taken and name not in uses and only_so:
                weight, first = found[0]
                if more := self._summand(name, weight, first, uses):
                    rows[weight] = (*rows.get(weight, ()), more)
        known = {name.rpartition(".")[0] for name in (*uses, *of_families)}
        in_vain = frozenset(name for name, family in self.families.items() if family is None and name not in known)
        return Found(uses, rows, families, in_vain)

    def look_for_rows(self, layer: Layer, axis: int, call: LayerArguments) -> None:
        """Try parameters of the layer's module that are none of its rows: a class may have more than the stock one."""
        for parameter in layer.module._parameters.values():
            name = next((name for name, one in self.parameters.items() if one is parameter), "")
            if parameter is None or name not in self.neurons.outside or len(parameter) != layer.neurons:
                continue
            rows = Rows(name, RowLayout(), 0, layer.neurons)
            if find_axis(replace(layer, rows=(rows,), tried=True), self.parameters, call) == axis:
                self.rows[layer.weight] = (*self.rows.get(layer.weight, ()), rows)

    def _on_product(self, product: Product) -> None:
        self.uses.setdefault(product.name, set()).add(product.use)

    def _on_summand(self, weight: str, name: str, first: int) -> None:
        self.summands.setdefault(name, []).append((weight, first))

    def _summand(self, name: str, weight: str, first: int, uses: Mapping[str, Use]) -> Rows | None:
        """Return the rows that what is added has in the layer of ``weight``; None where they are none of its."""
        count = self.parameters[name].numel()
        if weight in uses and weight not in self.layers:
            neurons = uses[weight].layout.count(self.parameters[weight])
        elif weight in self.layers and self.layers[weight].cost != "lookup":
            neurons = self.layers[weight].neurons
        else:
            return None
        return Rows(name, RowLayout("flat"), 0, count, first) if first + count <= neurons else None

    def _unknown(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield leaf modules that have parameters, all of them outside neurons."""
        for name, module in self.model.named_modules():
            dot = f"{name}." if name else ""
            own = [f"{dot}{key}" for key, parameter in module._parameters.items() if parameter is not None]
            leaf = not module._modules and not is_sparse(module) and ".parametrizations." not in f".{dot}"
            if leaf and own and all(one in self.neurons.outside for one in own):
                yield name, module

    def _trying(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            if name in self.families or not isinstance(output, Tensor):
                return
            self.families[name] = None
            dot = f"{name}." if name else ""
            known = {key for key in module._parameters if f"{dot}{key}" in self.uses}
            products = {key for key in known for use in self.uses[f"{dot}{key}"] if use.cost != "norm"}
            if not products:  # else they are known by what is done with them, and for what it costs
                self.families[name] = self._family(name, module, LayerArguments(arguments, keywords), output)

        return hook

    def _family(self, name: str, module: nn.Module, call: LayerArguments, output: Tensor) -> Family | None:
        dot = f"{name}." if name else ""
        own = {key: parameter for key, parameter in module._parameters.items() if parameter is not None}
        answers: dict[tuple[int, int], dict[str, RowLayout]] = {}  # by axis and number of rows
        for key, parameter in own.items():
            for layout in _layouts(parameter):
                rows = Rows(f"{dot}{key}", layout, 0, layout.count(parameter))
                layer = Layer(name, "", "norm", module, rows.count, rows.parameter, (rows,), -1, tried=True)
                axis = _axis_by_shape(rows, output) if output.is_meta else find_axis(layer, self.parameters, call)
                if axis is not None and rows.count > 1:
                    answers.setdefault((axis, rows.count), {})[key] = layout
                    break
        if not answers:
            return None
        # Where parameters answer along different axes, those have it that hold the most.
        (axis, _), best = max(answers.items(), key=lambda answer: sum(own[key].numel() for key in answer[1]))
        keys = sorted(best, key=lambda key: best[key].kind == "flat")  # a matrix is what outputs are recognised by
        costs: dict[str, Cost] = {"flat": "norm", "leading": "linear", "transposed": "transposed"}
        return Family({key: best[key] for key in keys}, axis, costs[best[keys[0]].kind])


def _layouts(parameter: Tensor) -> tuple[RowLayout, ...]:
    """Return how the rows of an unknown parameter may lie, the likeliest first."""
    if parameter.numel() in parameter.shape:
        return (RowLayout("flat"),)
    return (RowLayout(), RowLayout("transposed")) if parameter.dim() > 1 else ()


def _axis_by_shape(rows: Rows, output: Tensor) -> int | None:
    """Return the axis that a vector is taken to scale where there are no numbers to try it with."""
    fitting = [axis - output.dim() for axis, size in enumerate(output.shape) if size == rows.count]
    return fitting[-1] if fitting and rows.layout.kind == "flat" else None
