"""Calls of layers are watched, also where weights are passed to a function, and no trace of it is left."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from neq_cli.freezing.model.layers import Layer
from neq_cli.freezing.model.recurrent import RecurrentCalls, recurrent_among
from neq_cli.freezing.model.restoring import found_again
from neq_cli.freezing.model.uses import Product, Uses

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer, or of its neurons from the ``first`` on, with its raw output.

    ``tokens``: int64, [n], which of a model's tokens came to one of several experts, where that is known.
    """

    layer: Layer
    first: int
    inputs: Tensor
    output: Tensor
    tokens: Tensor | None = None


OnCall = Callable[[LayerCall], None]


@contextmanager
def watch_calls(layers: Iterable[Layer], parameters: Mapping[str, Tensor], on_call: OnCall) -> Iterator[None]:
    """Call ``on_call`` at every call of every layer, before anything downstream can overwrite its output.

    Modules are hooked. ``nn.MultiheadAttention`` and torchvision's Swin attention never call their linear modules but
    pass the weights to ``torch.nn.functional.linear``, which is therefore wrapped too: a weight is recognised by being
    one of ``parameters`` (by qualified name; what the forward pass really uses) or a slice of one. Recurrent modules
    run layer by layer, and of weights that are used in other ways by hand the products are seen.
    """
    layers = list(layers)
    recurrent = recurrent_among(layers)
    by_hand = {layer.weight: layer for layer in layers if layer.use is not None}
    called = [layer for layer in layers if not layer.functional]
    by_weight = {id(parameters[layer.weight]): layer for layer in layers if layer.by_linear}
    running: list[Layer] = []
    stock_linear = nn.functional.linear

    def watched_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        output: Tensor = stock_linear(input, weight, bias)
        # torch.split gives views; `_base` is the parameter they were cut from.
        layer = by_weight.get(id(weight)) or by_weight.get(id(weight._base))
        # A module's own call is its hook's; the same weight may be another layer's too (tied weights).
        if layer is not None and all(layer.weight != other.weight for other in running):
            offset = weight.storage_offset() - parameters[layer.weight].storage_offset()
            first = int(offset) // max(weight.stride(0), 1)
            on_call(LayerCall(layer, first, input, output))
        return output

    def on_product(product: Product) -> None:
        layer = by_hand[product.name]
        if product.use == layer.use:
            on_call(LayerCall(layer, product.first, product.other, product.output, product.tokens))

    def before(layer: Layer) -> Callable[..., None]:
        return lambda module, arguments: running.append(layer)

    def after(layer: Layer) -> Callable[..., None]:
        def hook(module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            running.remove(layer)
            inputs = next(tensors_in([positional, named]), None)
            if inputs is not None and isinstance(output, Tensor):
                on_call(LayerCall(layer, 0, inputs, output))

        return hook

    with ExitStack() as stack:
        for layer in called:
            stack.callback(layer.module.register_forward_pre_hook(before(layer), prepend=True).remove)
            # First in line: another hook may replace or overwrite the output.
            stack.callback(layer.module.register_forward_hook(after(layer), prepend=True, with_kwargs=True).remove)
        nn.functional.linear = watched_linear
        stack.callback(setattr, nn.functional, "linear", stock_linear)
        if by_hand:
            stack.enter_context(Uses({name: parameters[name] for name in by_hand}, on_product))
        if recurrent:
            stack.enter_context(RecurrentCalls(recurrent, parameters, lambda *call: on_call(_whole(*call))))
        yield


def _whole(layer: Layer, inputs: Tensor, output: Tensor) -> LayerCall:
    return LayerCall(layer, 0, inputs, output)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run the model as one likes inside and find it again as it was; RNG states and attention's fast path too.

    The fast paths of ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` are off inside, because they hide the
    outputs of inner layers; compiled models run eagerly, so that hooks fire.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    python_state = random.getstate()
    numpy_random = sys.modules.get("numpy.random")
    numpy_state = numpy_random.get_state() if numpy_random else None
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    accelerated = device.type not in ("cpu", "meta")
    with (
        torch.random.fork_rng([device] if accelerated else [], device_type=device.type if accelerated else "cuda"),
        torch.compiler.set_stance("force_eager"),
    ):
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with found_again(model):
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            random.setstate(python_state)
            if numpy_random:
                numpy_random.set_state(numpy_state)


def outside_inference_mode(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Return ``function`` run outside of ``torch.inference_mode``, whose tensors could not be used in training."""

    @wraps(function)
    def run(*arguments: Parameters.args, **keywords: Parameters.kwargs) -> Result:
        if not torch.is_inference_mode_enabled():
            return function(*arguments, **keywords)
        with torch.inference_mode(False), torch.no_grad():
            return function(*arguments, **keywords)

    return run


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside DistributedDataParallel, DataParallel and torch.compile's wrapper."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def is_wrapped(model: nn.Module) -> bool:
    """Return whether DistributedDataParallel wraps the model, outside or inside of other wrappers."""
    while not isinstance(model, nn.parallel.DistributedDataParallel):
        inner = model.module if isinstance(model, nn.DataParallel) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return False
        model = inner
    return True


def is_compiled(model: nn.Module) -> bool:
    """Return whether torch.compile runs ``model`` or a part of it: by its wrapper, or by ``compile()``."""
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def first_input(batch: Any) -> Any:
    """Return the inputs of a batch: the batch itself, or its first element where it is (inputs, targets...)."""
    return batch[0] if isinstance(batch, (tuple, list)) else batch


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply ``function`` to every tensor in nested tuples, lists, dictionaries and dataclasses."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, PackedSequence):
        return value._replace(data=function(value.data))  # lengths and order are not data
    if isinstance(value, Mapping):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(function, item) for item in value))
    if isinstance(value, (tuple, list)):
        return [map_tensors(function, item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        changed = {one.name: map_tensors(function, getattr(value, one.name)) for one in fields(value) if one.init}
        return replace(value, **changed)
    return value


def results_in(outputs: Any) -> list[Tensor]:
    """Return the tensors that a model is trained by: what it names loss or logits, else all that it puts out.

    Models of transformers put out hidden states beside, which are made of what many layers add up.
    """
    named = outputs if isinstance(outputs, Mapping) else {}
    trained = [value for key, value in named.items() if key == "loss" or "logits" in str(key)]
    return list(tensors_in(trained)) or list(tensors_in(outputs))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield every tensor in nested tuples, lists, dictionaries and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "__dataclass_fields__"):
        for field in value.__dataclass_fields__:
            yield from tensors_in(getattr(value, field))
