"""An experiment finds which axis of an output counts neurons, where a layer's class computes it its own way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from neq_cli.freezing.model.layers import STOCK_LAYERS, Layer, rows_by_neuron
from neq_cli.freezing.model.neurons import Neurons
from neq_cli.freezing.model.observing import map_tensors

_AMOUNTS = (1.0, -1.0, 64.0, -64.0)
"""What a row is changed by, as a multiple of its largest element and one: both ways and far, since an activation
inside the layer may be flat on one side, or all around where the neuron is."""


def computes_its_own_way(layer: Layer) -> bool:
    """Return whether the layer's class computes its output its own way, as torchvision's LayerNorm2d does."""
    if layer.tried or layer.functional:
        return layer.tried
    stock = next(kind for kind in STOCK_LAYERS if kind.__name__ == layer.kind)
    return type(layer.module).forward is not stock.forward


@dataclass(frozen=True)
class LayerArguments:
    """What a module was called with."""

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any] = field(default_factory=dict)


def find_axis(layer: Layer, parameters: Mapping[str, Tensor], at_hand: LayerArguments) -> int | None:
    """Change several neurons' parameters, one at a time, and see along which axis only that neuron's index changes.

    ``parameters`` are the model's by name; they stay what they are. The layer is called as it was (``at_hand``) and
    with noise of the same shapes, so that what is found does not hang on what its neurons happen to put out. The axis
    is the one that the stock class has (``layer.axis``) where that fits, or, but for one that is only tried, where no
    change shows at all; None where no axis fits, or several do, or the layer takes more than it was called with.
    """
    fitting: list[int] | None = None  # axes from the end; `layer.axis` as it is, for it may span several
    for call in _calls(at_hand):
        try:
            changes = list(_changes(layer, parameters, call))
        except Exception:  # noise of this kind may be no input for this layer, but the model's own must be
            if call is at_hand:
                return None
            continue
        for neuron, changed in changes:
            found = [axis for axis in _axes(layer, changed) if _only(changed, axis, layer, neuron)]
            fitting = found if fitting is None else [axis for axis in fitting if axis in found]
    if fitting is None and layer.tried:
        return None  # nothing is known of it
    if fitting is None or layer.axis in fitting:
        return layer.axis
    return fitting[0] if len(fitting) == 1 else None


def with_found_axes(neurons: Neurons, order: Sequence[str], axes: Mapping[str, int | None]) -> Neurons:
    """Return ``neurons`` in the ``order`` of first call, with the ``axes`` that were found by experiment."""
    place = {name: number for number, name in enumerate(order)}
    names = sorted(neurons.layers, key=lambda name: place.get(name, len(place)))
    layers = {name: neurons.layers[name] for name in names}
    for name, axis in axes.items():
        if name in layers and axis is not None and axis != layers[name].axis:
            layers[name] = replace(layers[name], axis=axis, axis_dimensions=1)
    return replace(neurons, layers=layers)


def _calls(at_hand: LayerArguments) -> Iterator[LayerArguments]:
    yield at_hand
    generator = torch.Generator().manual_seed(0)

    def noise(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return torch.randn(tensor.shape, generator=generator, device="cpu").to(tensor)

    yield LayerArguments(*map_tensors(noise, (at_hand.arguments, dict(at_hand.keywords))))


def _changes(layer: Layer, parameters: Mapping[str, Tensor], call: LayerArguments) -> Iterator[tuple[int, Tensor]]:
    """Yield neurons and which elements of the output change with them: bool, of the output's shape; none if silent."""
    module = layer.module
    kept = dict(module._parameters)

    def output() -> Tensor:
        arguments, keywords = map_tensors(torch.clone, (call.arguments, dict(call.keywords)))
        found: Tensor = type(module).forward(module, *arguments, **keywords)
        return found

    try:
        module._parameters.update(_copies(kept))
        before = output()
        for neuron in sorted({0, layer.neurons // 3, 2 * layer.neurons // 3, layer.neurons - 1}):
            for amount in _AMOUNTS:
                module._parameters.update(_copies(kept))
                _disturb(layer, {id(parameters[name]): name for name in parameters}, kept, neuron, amount)
                after = output()
                changed = (before != after) & ~(before.isnan() & after.isnan())
                if changed.any():
                    yield neuron, changed
                    break
    finally:
        module._parameters.update(kept)


def _copies(parameters: Mapping[str, nn.Parameter | None]) -> dict[str, nn.Parameter]:
    return {
        key: nn.Parameter(parameter.detach().clone(), requires_grad=False)
        for key, parameter in parameters.items()
        if parameter is not None
    }


def _disturb(
    layer: Layer, names: Mapping[int, str], own: Mapping[str, nn.Parameter | None], neuron: int, amount: float
) -> None:
    """Change the neuron's rows in the copies that the module holds of its ``own`` parameters."""
    generator = torch.Generator().manual_seed(neuron)
    for key, parameter in own.items():
        for rows in layer.rows:
            place = neuron - rows.first
            if parameter is None or names.get(id(parameter)) != rows.parameter or not 0 <= place < rows.count:
                continue
            copy = layer.module._parameters[key]
            assert copy is not None
            view, index = rows.layout.view(copy.data), torch.tensor([rows.start + place], device=copy.device)
            where = rows.layout.index(copy, index)
            row = view[where]
            # Not by a constant: a class may take a weight's mean off.
            pattern = 1 + torch.rand(row.shape, generator=generator, device="cpu")
            view[where] = row + amount * (1 + row.abs().max()) * pattern.to(row)


def _axes(layer: Layer, changed: Tensor) -> Iterable[int]:
    """Return the axes that have as many places as the layer has neurons, the stock class's own among them."""
    first = layer.axis % changed.dim() if -changed.dim() <= layer.axis < changed.dim() else changed.dim()
    own = changed.shape[first : first + layer.axis_dimensions]
    if own.numel() == layer.neurons and len(own) == layer.axis_dimensions:
        yield layer.axis
    for axis, size in enumerate(changed.shape):
        if size == layer.neurons and (axis != first or layer.axis_dimensions > 1):
            yield axis - changed.dim()


def _only(changed: Tensor, axis: int, layer: Layer, neuron: int) -> bool:
    """Return whether along ``axis`` the place of ``neuron`` changed and no other."""
    dimensions = layer.axis_dimensions if axis == layer.axis else 1
    places = rows_by_neuron(changed, axis, dimensions).any(1)
    places[neuron] = ~places[neuron]
    return not bool(places.any())
