"""Layers own neurons, and each neuron's parameters lie in rows: both are found without a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from neq_cli.errors import FreezingError
from neq_cli.freezing.families import family_of, normed_weight
from neq_cli.freezing.model.layouts import Cost, RowLayout

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
LAST_DIMENSION_NORMS = (nn.LayerNorm, nn.RMSNorm)
STOCK_LAYERS: tuple[type[nn.Module], ...] = (
    *CONVOLUTIONS,
    *TRANSPOSED_CONVOLUTIONS,
    nn.Linear,
    *BATCH_NORMS,
    *INSTANCE_NORMS,
    nn.GroupNorm,
    *LAST_DIMENSION_NORMS,
    nn.Embedding,
)


@dataclass(frozen=True)
class Rows:
    """The rows of one parameter that belong to a layer: ``count`` of them from ``start``."""

    parameter: str  # qualified name in the model
    layout: RowLayout
    start: int
    count: int


@dataclass(frozen=True)
class Layer:
    """A layer that owns neurons.

    ``name`` is its prefix in the state_dict and ``module`` the module it belongs to: its own, or the attention module
    that uses the weight functionally. ``axis`` is the dimension of its output that counts neurons (``axis_dimensions``
    of them from there, where a LayerNorm spans several).
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


@dataclass(frozen=True)
class Neurons:
    """Every layer of a model: those with trainable neurons, those without, and the parameters outside neurons."""

    layers: dict[str, Layer]
    fixed: dict[str, Layer]  # weights that do not train: they own no neurons, but take part in the forward pass
    outside: dict[str, str]  # trainable parameters outside neurons -> why they always train
    ties: tuple[frozenset[str], ...]  # layers that share rows: a row trains if any of them says so
    always_trainable: dict[str, str]  # layers that share a parameter with something that always trains -> why
    without: frozenset[str] = frozenset()  # names of what looks like a layer, but was found to be none

    def tied(self, trainable: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return these sets with every row that several layers share trained where one of them trains it."""
        sets = dict(trainable)
        for tie in self.ties:
            together = torch.stack([sets[name] for name in tie]).any(0)
            sets |= {name: together.clone() for name in tie}
        return sets


def everything(layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """Return the sets in which all neurons train: bool, [neurons], on the CPU."""
    return {name: torch.ones(layer.neurons, dtype=torch.bool, device="cpu") for name, layer in layers.items()}


def find_neurons(
    model: nn.Module, optimized: Iterable[Tensor] | None = None, *, without: Collection[str] = ()
) -> Neurons:
    """Find the layers of ``model`` and who owns which parameter.

    ``optimized`` are the parameters that the optimiser updates (default: all that require gradients); a parameter
    outside it belongs to no neuron. ``without``: names of what looks like a layer, but is none.
    """
    if any(isinstance(parameter, nn.UninitializedParameter) for parameter in model.parameters()):
        raise FreezingError("model: has lazy layers without shapes yet; run one batch through it first")
    made_for_inference = next((name for name, p in model.named_parameters() if p.is_inference()), None)
    if made_for_inference is not None:
        raise FreezingError(
            f"model: parameter {made_for_inference!r} was made in torch.inference_mode, where nothing trains; "
            "build the model outside of it"
        )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    chosen = {id(p) for p in (model.parameters() if optimized is None else optimized) if p.requires_grad}
    candidates = [
        layer
        for prefix, module in model.named_modules()
        for layer in _layers_of_module(prefix, module, lambda p: names[id(p)], lambda p: id(p) in chosen)
        if layer.name not in without
    ]
    layers = {layer.name: layer for layer in candidates if layer.rows}
    fixed = {layer.name: layer for layer in candidates if not layer.rows}
    parameters = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in chosen}
    owned = {rows.parameter for layer in layers.values() for rows in layer.rows}
    outside = {name: _why_outside(model, name) for name in parameters if name not in owned}
    ties, always_trainable = _ties(model, layers)
    return Neurons(layers, fixed, outside, ties, always_trainable, frozenset(without))


def _layers_of_module(
    prefix: str, module: nn.Module, name_of: Callable[[Tensor], str], trains: Callable[[Tensor], bool]
) -> Iterable[Layer]:
    def rows_of(key: str, layout: RowLayout, start: int = 0, count: int | None = None) -> tuple[Rows, ...]:
        parameter = module._parameters.get(key)
        if parameter is None or not trains(parameter):
            return ()
        return (Rows(name_of(parameter), layout, start, layout.count(parameter) if count is None else count),)

    if isinstance(module, nn.MultiheadAttention):
        yield from _attention_projections(prefix, module, name_of, rows_of)
        return
    stock = next((kind for kind in STOCK_LAYERS if isinstance(module, kind)), None)
    if stock is None:
        yield from _layer_of_family(prefix, module, name_of, rows_of)
        return
    cost, layout, axis, axis_dimensions = _geometry(module)
    weight, rows = module._parameters.get("weight"), rows_of("weight", layout)
    if weight is None and layout == RowLayout():
        # A parametrised weight is computed from other parameters, and has rows only where these have the same.
        originals = normed_weight(module)
        weight = originals[0] if originals else None
        rows = tuple(Rows(name_of(one), layout, 0, layout.count(one)) for one in originals if trains(one))
    if weight is None or _is_sparse(module):
        return
    neurons = layout.count(weight)
    if neurons:
        rows += rows_of("bias", RowLayout("flat"))
        yield Layer(prefix, stock.__name__, cost, module, neurons, name_of(weight), rows, axis, axis_dimensions)


def _layer_of_family(
    prefix: str, module: nn.Module, name_of: Callable[[Tensor], str], rows_of: Callable[..., tuple[Rows, ...]]
) -> Iterable[Layer]:
    family = family_of(module)
    if family is None:
        return
    first, layout = next(iter(family.parameters.items()))
    weight = module._parameters.get(first)
    if weight is None:
        return
    rows = tuple(row for key, one in family.parameters.items() for row in rows_of(key, one))
    kind, neurons = type(module).__name__, layout.count(weight)
    if any(row.count != neurons for row in rows):
        raise FreezingError(
            f"families: {kind} {prefix!r} has {neurons} rows in {first!r}, but {[row.count for row in rows]} in its "
            "parameters; a neuron has a row in each"
        )
    if neurons:
        yield Layer(prefix, kind, family.cost, module, neurons, name_of(weight), rows, family.axis, tried=True)


def _is_sparse(module: nn.Module) -> bool:
    """Whether gradients come as a list of tokens' rows, of which a neuron, a column, is no part."""
    return isinstance(module, nn.Embedding) and module.sparse


def _geometry(module: nn.Module) -> tuple[Cost, RowLayout, int, int]:
    """Return cost family, layout of the weight, and first axis and number of axes of the output that count neurons."""
    if isinstance(module, CONVOLUTIONS):
        return "convolution", RowLayout(), -len(module.kernel_size) - 1, 1
    if isinstance(module, TRANSPOSED_CONVOLUTIONS):
        return "transposed", RowLayout("transposed", module.groups), -len(module.kernel_size) - 1, 1
    if isinstance(module, nn.Linear):
        return "linear", RowLayout(), -1, 1
    if isinstance(module, nn.Embedding):
        return "lookup", RowLayout("transposed"), -1, 1
    if isinstance(module, LAST_DIMENSION_NORMS):
        dimensions = len(module.normalized_shape)
        return "norm", RowLayout("flat"), -dimensions, dimensions
    if isinstance(module, INSTANCE_NORMS):
        spatial = 1 + next(i for i, kind in enumerate(INSTANCE_NORMS) if isinstance(module, kind))
        return "norm", RowLayout(), -spatial - 1, 1
    return "norm", RowLayout(), 1, 1


def _attention_projections(
    prefix: str,
    module: nn.MultiheadAttention,
    name_of: Callable[[Tensor], str],
    rows_of: Callable[..., tuple[Rows, ...]],
) -> Iterable[Layer]:
    """Yield the query/key/value projections, whose weights ``MultiheadAttention`` passes to functions."""
    dot = f"{prefix}." if prefix else ""
    if module.in_proj_weight is not None:
        rows = rows_of("in_proj_weight", RowLayout()) + rows_of("in_proj_bias", RowLayout("flat"))
        parts = [("in_proj", module.in_proj_weight, rows)]
    else:
        parts = [
            (
                f"{letter}_proj",
                getattr(module, f"{letter}_proj_weight"),
                rows_of(f"{letter}_proj_weight", RowLayout())
                + rows_of("in_proj_bias", RowLayout("flat"), number * module.embed_dim, module.embed_dim),
            )
            for number, letter in enumerate("qkv")
        ]
    for name, weight, rows in parts:
        if not isinstance(weight, nn.Parameter):  # parametrised
            continue
        yield Layer(
            f"{dot}{name}",
            "MultiheadAttention",
            "linear",
            module,
            weight.shape[0],
            name_of(weight),
            rows,
            -1,
            functional=True,
        )


def _why_outside(model: nn.Module, name: str) -> str:
    if not model.get_parameter(name).numel():
        return "has no elements"
    owner = model.get_submodule(name.rpartition(".")[0])
    if _is_sparse(owner):
        return "its gradients are sparse"
    if isinstance(owner, (*STOCK_LAYERS, ParametrizationList)):
        return "belongs to a parametrised weight"
    return f"parameter of {type(owner).__name__}"


def _ties(model: nn.Module, layers: dict[str, Layer]) -> tuple[tuple[frozenset[str], ...], dict[str, str]]:
    """Return groups of layers with shared rows, and layers that share a parameter with something outside neurons."""
    owners: dict[str, list[tuple[Layer, Rows]]] = {}
    for layer in layers.values():
        for rows in layer.rows:
            owners.setdefault(rows.parameter, []).append((layer, rows))
    using_modules = _modules_using(model)
    ties: list[frozenset[str]] = []
    always: dict[str, str] = {}
    for parameter, owned in owners.items():
        names = frozenset(layer.name for layer, _ in owned)
        modules = {id(layer.module) for layer, _ in owned}
        if using_modules[parameter] > modules:
            always |= dict.fromkeys(names, f"{parameter} is shared with a module that has no neurons")
        elif len(modules) > 1 and len({(rows.layout, rows.start) for _, rows in owned}) > 1:
            always |= dict.fromkeys(names, f"{parameter} is shared along different dimensions")
        elif len(modules) > 1:
            ties.append(names)
    return _merge(ties), always


def _modules_using(model: nn.Module) -> dict[str, set[int]]:
    """Return for each parameter's name the identities of all modules that register it."""
    first_name = {id(parameter): name for name, parameter in model.named_parameters()}
    using: dict[str, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            using.setdefault(first_name[id(parameter)], set()).add(id(module))
    return using


def _merge(groups: Iterable[frozenset[str]]) -> tuple[frozenset[str], ...]:
    """Join groups that overlap."""
    merged: list[frozenset[str]] = []
    for group in groups:
        apart = [other for other in merged if not other & group]
        merged = [*apart, group.union(*(other for other in merged if other & group))]
    return tuple(merged)


def rows_by_neuron(output: Tensor, axis: int, axis_dimensions: int = 1) -> Tensor:
    """Return ``output`` as [neurons, everything else]; ``axis`` and ``axis_dimensions`` as in ``Layer``."""
    if axis_dimensions > 1:
        output, axis = output.flatten(axis), -1
    return torch.movedim(output, axis, 0).flatten(1)
