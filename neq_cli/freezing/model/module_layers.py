"""Which layers a module makes, by its class and its parameters' shapes: torch's own kinds, and the families."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from neq_cli.errors import FreezingError, did_you_mean
from neq_cli.freezing.families import Family, family_of, originals_of
from neq_cli.freezing.model.layers import (
    CONVOLUTIONS,
    INSTANCE_NORMS,
    LAST_DIMENSION_NORMS,
    LOOKUPS,
    STOCK_LAYERS,
    TRANSPOSED_CONVOLUTIONS,
    Found,
    Layer,
    Rows,
    Use,
)
from neq_cli.freezing.model.layouts import Cost, RowLayout


@dataclass(frozen=True)
class Owner:
    """A module, its qualified name, what the model calls parameters, and which of them train."""

    prefix: str
    module: nn.Module
    name_of: Callable[[Tensor], str]
    trains: Callable[[Tensor], bool]

    @property
    def dot(self) -> str:
        return f"{self.prefix}." if self.prefix else ""

    @property
    def kind(self) -> str:
        return type(self.module).__name__

    def rows_of(self, key: str, layout: RowLayout, start: int = 0, count: int | None = None) -> tuple[Rows, ...]:
        """Return the rows of the module's own parameter ``key``; none where it has none, or it does not train."""
        parameter = self.module._parameters.get(key)
        if parameter is None or not self.trains(parameter):
            return ()
        return (Rows(self.name_of(parameter), layout, start, layout.count(parameter) if count is None else count),)


def layers_of(owner: Owner, found: Found) -> Iterable[Layer]:
    """Yield the layers that the module of ``owner`` makes, with what only a look ``found`` of them, and by it alone."""
    family = found.families.get(owner.prefix)
    layers = list(_by_class(owner) if family is None else _of_family(owner, family))
    known = {layer.weight for layer in layers} | {rows.parameter for layer in layers for rows in layer.rows}
    for layer in layers:
        use = found.uses.get(layer.weight)
        if use is not None and any((rows.parameter, rows.layout) == (layer.weight, use.layout) for rows in layer.rows):
            layer = replace(layer, axis=use.axis, functional=True, use=use)
        yield replace(layer, rows=layer.rows + found.rows.get(layer.weight, ()))
    for key, parameter in owner.module._parameters.items():
        name = f"{owner.dot}{key}"
        if parameter is not None and name in found.uses and name not in known:
            yield from _by_hand(owner, key, parameter, found.uses[name], found.rows.get(name, ()))


def _by_class(owner: Owner) -> Iterable[Layer]:
    module = owner.module
    if isinstance(module, nn.MultiheadAttention):
        return _attention_projections(owner)
    if isinstance(module, nn.RNNBase):
        return _recurrent_units(owner, module)
    if isinstance(module, nn.RNNCellBase):
        return _units(owner, owner.prefix or "cell", "", module.hidden_size)
    family = family_of(module)
    if family is not None:
        return _of_family(owner, family)
    stock = next((kind for kind in STOCK_LAYERS if isinstance(module, kind)), None)
    return () if stock is None else _stock(owner, stock.__name__)


def _stock(owner: Owner, kind: str) -> Iterable[Layer]:
    cost, layout, axis, axis_dimensions = _geometry(owner.module)
    weight, rows = owner.module._parameters.get("weight"), owner.rows_of("weight", layout)
    if weight is None and (originals := originals_of(owner.module, layout)):
        # A parametrised weight is computed from other parameters, and has rows where these have the same.
        weight = originals[0]
        rows = tuple(Rows(owner.name_of(one), layout, 0, layout.count(one)) for one in originals if owner.trains(one))
    if weight is None or is_sparse(owner.module):
        return
    neurons = layout.count(weight)
    if neurons:
        rows += owner.rows_of("bias", RowLayout("flat"))
        weight_name = owner.name_of(weight)
        yield Layer(owner.prefix, kind, cost, owner.module, neurons, weight_name, rows, axis, axis_dimensions)


def _of_family(owner: Owner, family: Family) -> Iterable[Layer]:
    first, layout = next(iter(family.parameters.items()))
    for key in family.parameters:
        if key not in owner.module._parameters:
            hint = did_you_mean(key, owner.module._parameters) or "; name its own, not those of modules inside"
            raise FreezingError(f"families: {owner.kind} {owner.prefix!r} has no parameter {key!r}{hint}")
    weight = owner.module._parameters[first]
    if weight is None:
        return
    rows = tuple(row for key, one in family.parameters.items() for row in owner.rows_of(key, one))
    neurons = layout.count(weight)
    if any(row.count != neurons for row in rows):
        raise FreezingError(
            f"families: {owner.kind} {owner.prefix!r} has {neurons} rows in {first!r}, but "
            f"{[row.count for row in rows]} in its parameters; a neuron has a row in each"
        )
    if neurons:
        weight_name = owner.name_of(weight)
        yield Layer(
            owner.prefix, owner.kind, family.cost, owner.module, neurons, weight_name, rows, family.axis, tried=True
        )


def _by_hand(owner: Owner, key: str, parameter: nn.Parameter, use: Use, more: tuple[Rows, ...]) -> Iterable[Layer]:
    """Yield the layer of a parameter that its module, or one around it, multiplies with by itself."""
    rows = owner.rows_of(key, use.layout)
    if not rows:
        return
    yield Layer(
        owner.prefix if key == "weight" and owner.prefix else f"{owner.dot}{key}",
        owner.kind,
        use.cost,
        owner.module,
        use.layout.count(parameter),
        owner.name_of(parameter),
        rows + more,
        use.axis,
        functional=True,
        use=None if use.by_linear else use,
    )


def _geometry(module: nn.Module) -> tuple[Cost, RowLayout, int, int]:
    """Return cost family, layout of the weight, and first axis and number of axes of the output that count neurons."""
    if isinstance(module, CONVOLUTIONS):
        return "convolution", RowLayout(), -len(module.kernel_size) - 1, 1
    if isinstance(module, TRANSPOSED_CONVOLUTIONS):
        return "transposed", RowLayout("transposed", module.groups), -len(module.kernel_size) - 1, 1
    if isinstance(module, nn.Linear):
        return "linear", RowLayout(), -1, 1
    if isinstance(module, nn.Bilinear):
        return "bilinear", RowLayout(), -1, 1
    if isinstance(module, LOOKUPS):
        return "lookup", RowLayout("transposed"), -1, 1
    if isinstance(module, LAST_DIMENSION_NORMS):
        dimensions = len(module.normalized_shape)
        return "norm", RowLayout("flat"), -dimensions, dimensions
    if isinstance(module, INSTANCE_NORMS):
        spatial = 1 + next(i for i, kind in enumerate(INSTANCE_NORMS) if isinstance(module, kind))
        return "norm", RowLayout(), -spatial - 1, 1
    return "norm", RowLayout(), 1, 1


def _attention_projections(owner: Owner) -> Iterable[Layer]:
    """Yield the query/key/value projections, whose weights ``MultiheadAttention`` passes to functions."""
    module = owner.module
    if module.in_proj_weight is not None:
        rows = owner.rows_of("in_proj_weight", RowLayout()) + owner.rows_of("in_proj_bias", RowLayout("flat"))
        parts = [("in_proj", module.in_proj_weight, rows)]
    else:
        parts = [
            (
                f"{letter}_proj",
                getattr(module, f"{letter}_proj_weight"),
                owner.rows_of(f"{letter}_proj_weight", RowLayout())
                + owner.rows_of("in_proj_bias", RowLayout("flat"), number * module.embed_dim, module.embed_dim),
            )
            for number, letter in enumerate("qkv")
        ]
    for name, weight, rows in parts:
        if isinstance(weight, nn.Parameter):  # else it is parametrised
            yield _functional(owner, f"{owner.dot}{name}", "MultiheadAttention", "linear", weight, rows)


def _recurrent_units(owner: Owner, module: nn.RNNBase) -> Iterable[Layer]:
    """Yield, for each layer and direction, the hidden units and, where there is one, their projection."""
    for number in range(module.num_layers):
        for end in ("", "_reverse")[: 1 + module.bidirectional]:
            yield from _units(owner, f"{owner.dot}l{number}{end}", f"_l{number}{end}", module.hidden_size)
            projection = module._parameters.get(f"weight_hr_l{number}{end}")
            if projection is not None:
                rows = owner.rows_of(f"weight_hr_l{number}{end}", RowLayout())
                name = f"{owner.dot}hr_l{number}{end}"
                yield _functional(owner, name, _recurrent_kind(module), "linear", projection, rows)


def _units(owner: Owner, name: str, end: str, hidden: int) -> Iterable[Layer]:
    """Yield the hidden units with their rows in every gate."""
    weight = owner.module._parameters.get(f"weight_ih{end}")
    if weight is None or not hidden:  # parametrised
        return
    gates = len(weight) // hidden
    layout = RowLayout("gates", gates) if gates > 1 else RowLayout()
    keys = (f"{part}{end}" for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    rows = tuple(row for key in keys for row in owner.rows_of(key, layout))
    yield replace(_functional(owner, name, _recurrent_kind(owner.module), "recurrent", weight, rows), neurons=hidden)


def _functional(owner: Owner, name: str, kind: str, cost: Cost, weight: nn.Parameter, rows: tuple[Rows, ...]) -> Layer:
    weight_name = owner.name_of(weight)
    return Layer(name, kind, cost, owner.module, weight.shape[0], weight_name, rows, -1, functional=True)


def _recurrent_kind(module: nn.Module) -> str:
    """Return which of torch's recurrent classes a module is of."""
    kinds = (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)
    return next((kind.__name__ for kind in kinds if isinstance(module, kind)), type(module).__name__)


def is_sparse(module: nn.Module) -> bool:
    """Return whether gradients come as a list of tokens' rows, of which a neuron, a column, is no part."""
    return isinstance(module, LOOKUPS) and module.sparse
