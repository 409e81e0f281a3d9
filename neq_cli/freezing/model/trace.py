"""One sample runs through the model once and shows call order, output layers, multiply-adds and output axes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointFunction

from neq_cli.freezing.model.axes import LayerArguments, computes_its_own_way, find_axis
from neq_cli.freezing.model.calling import Call, call_model, call_with_parameters, refused
from neq_cli.freezing.model.discovery import Discovery
from neq_cli.freezing.model.layers import NOTHING_FOUND, Found, Layer
from neq_cli.freezing.model.neurons import Neurons
from neq_cli.freezing.model.observing import LayerCall, map_tensors, results_in, tensors_in, undisturbed, watch_calls
from neq_cli.freezing.model.products import Products, multiplied_with, multiply_adds
from neq_cli.freezing.model.restoring import found_again

NOT_KNOWN = "?"
"""Stands for the layers before a module that takes no tensors."""


@dataclass
class Trace:
    """What one sample showed. Counts are per sample; multiply-adds are those of the forward pass."""

    order: list[str] = field(default_factory=list)  # layers by first call
    multiply_adds: dict[str, int] = field(default_factory=dict)  # convolutions and linear layers, bias not counted
    elements: dict[str, int] = field(default_factory=dict)  # output elements, all calls together
    input_gradient: dict[str, bool] = field(default_factory=dict)  # something trainable lies before the layer
    axes: dict[str, int | None] = field(default_factory=dict)  # found by experiment; None where none was found
    before: dict[str, frozenset[str]] = field(default_factory=dict)  # layers whose outputs reach a layer first
    after_outside: frozenset[str] = frozenset()  # layers that parameters outside neurons reach before another layer
    # Parameters by the layer whose input depends on them, and by the one whose own forward uses them; no layer between.
    parameters_before: dict[str, frozenset[str]] = field(default_factory=dict)
    parameters_inside: dict[str, frozenset[str]] = field(default_factory=dict)
    parameters_after: frozenset[str] = frozenset()  # those that outputs depend on, no layer between
    users: dict[str, frozenset[str]] = field(default_factory=dict)  # modules in whose forward a layer's weight is used
    # Multiply-adds of the backward pass of products without a layer, such as attention's, by the layer called before.
    products: dict[str, int] = field(default_factory=dict)
    output_layers: frozenset[str] = frozenset()
    direct: dict[str, str] = field(default_factory=dict)  # layers whose input is another's output as it is
    # Layers, and parameters, that reach the inputs of a module without parameters first, by its name.
    before_bare: dict[str, tuple[frozenset[str], frozenset[str]]] = field(default_factory=dict)
    ordered: bool = True  # autograd told which layer comes before which
    reentrant: bool = False  # the model uses reentrant activation checkpoints
    reached: frozenset[str] = frozenset()  # layers that eval mode calls, as the probe will
    unused: frozenset[str] = frozenset()  # parameters that require gradients and that no output depends on
    found: Found = NOTHING_FOUND  # what modules' classes do not tell, where it was looked for

    def after(self) -> dict[str, set[str]]:
        """Return the layers that a layer's output reaches first, by its name; those without any are left out."""
        found: dict[str, set[str]] = {}
        for name, sources in self.before.items():
            for source in sources:
                found.setdefault(source, set()).add(name)
        return found


def trace_model(
    model: nn.Module, neurons: Neurons, inputs: Any, call: Call | None = None, *, single: bool = False
) -> Trace:
    """Trace ``model`` on the first sample of ``inputs`` (tensors of [samples, ...]); works on the meta device too.

    Where it takes none of one, as a list of images, on all of them. ``single``: ``inputs`` are one sample as they are.
    ``call``: how it is called, if not with ``inputs``.
    Auxiliary heads that only train are seen as well: the modules are in training mode, but for normalisation and
    dropout, which would need more than one sample or draw random numbers. A model whose training mode wants other
    inputs is traced in eval mode.
    """
    sample = inputs if single else map_tensors(lambda tensor: tensor[:1] if tensor.dim() else tensor, inputs)
    layers = {**neurons.layers, **neurons.fixed}
    with undisturbed(model):
        reached: set[str] = set()
        axes: dict[str, int | None] = {}
        parameters = dict(model.named_parameters())
        discovery, looks_for_more = Discovery(model, neurons), neurons.found == NOTHING_FOUND

        def on_call(seen: LayerCall) -> None:
            layer = seen.layer
            reached.add(layer.name)
            if layer.name not in axes and computes_its_own_way(layer) and seen.output.device.type != "meta":
                given = LayerArguments((seen.inputs,))
                axes[layer.name] = axis = find_axis(layer, parameters, given)
                if axis is not None and looks_for_more:
                    discovery.look_for_rows(layer, axis, given)

        def look(at: Any) -> None:
            with found_again(model), torch.no_grad():
                model.eval()
                with watch_calls(layers.values(), parameters, on_call), ExitStack() as stack:
                    if looks_for_more:
                        stack.enter_context(discovery.watching())
                    call_model(model, map_tensors(torch.clone, at), call)

        try:
            look(sample)
        except Exception as error:
            sample = inputs
            try:
                look(sample)
            except Exception:
                # What is wrong inside of a model is its own to tell.
                another_kind = call is not None or not isinstance(inputs, Tensor)
                if another_kind or isinstance(error, (TypeError, AttributeError)):
                    raise refused(model, inputs, call, error) from error
                raise
        try:
            with found_again(model):
                trace = _trace_gradients(model, layers, sample, call, training=True)
        except Exception:
            # The eval pass above succeeded: this model's training mode takes something else than its inputs alone.
            trace = _trace_gradients(model, layers, sample, call, training=False)
    trace.reached, trace.axes = frozenset(reached), axes
    trace.found = discovery.found(trace.reached) if looks_for_more else NOTHING_FOUND
    return trace


def _trace_gradients(
    model: nn.Module, layers: Mapping[str, Layer], sample: Any, call: Call | None, *, training: bool
) -> Trace:
    trace = Trace()
    producers: dict[Node, str] = {}
    sources: dict[str, set[str]] = {}
    before: dict[str, set[int]] = {}  # leaves of the graph, by the layer whose input depends on them
    inside: dict[str, set[int]] = {}  # by the layer whose output does
    running: list[nn.Module] = []
    calls: dict[str, int] = {}
    bare: dict[str, tuple[set[str], set[int]]] = {}  # before modules without parameters: layers, and leaves

    def on_call(seen: LayerCall) -> None:
        layer, inputs, output = seen.layer, seen.inputs, seen.output
        name = layer.name
        if name not in trace.elements:
            trace.order.append(name)
        trace.elements[name] = trace.elements.get(name, 0) + output.numel()
        if layer.cost not in ("norm", "lookup"):
            count = multiply_adds(layer, parameters[layer.weight], inputs, output)
            trace.multiply_adds[name] = trace.multiply_adds.get(name, 0) + count
            if layer.weight not in products.skipped:  # computed from others, as a parametrised one is
                gradients = inputs.requires_grad + parameters[layer.weight].requires_grad
                products.backward[products.last] -= count * gradients
        products.last = name
        trace.input_gradient[name] = trace.input_gradient.get(name, False) or inputs.requires_grad
        calls[name] = calls.get(name, 0) + 1
        if inputs.grad_fn in producers:
            trace.direct[name] = producers[inputs.grad_fn]
        for tensor, leaves in ((inputs, before), (output, inside)):
            found, known = _sources_of([tensor], producers)
            leaves.setdefault(name, set()).update(known)
            if tensor is inputs:
                sources.setdefault(name, set()).update(found)
        trace.users[name] = trace.users.get(name, frozenset()) | {names[running[-1]]}
        if output.grad_fn is not None:
            producers[output.grad_fn] = name
        # What overwrites a view, as a linear layer's output may be one, continues from what it is a view of.
        if output._is_view() and output._base is not None and output._base.grad_fn is not None:
            producers.setdefault(output._base.grad_fn, name)

    model.train(training)
    for module in model.modules():
        if next(module.children(), None) is None:
            # Not by its own `eval`, which may merge weights: their parts would be cut from the graph.
            module.training = False
    # Leaves of their own, so that no hook on the real parameters fires and no gradient is left behind.
    parameters = {
        name: parameter.detach().requires_grad_(parameter.requires_grad) for name, parameter in model.named_parameters()
    }
    names = {module: name for name, module in model.named_modules()}
    products = Products({one: parameters[one] for one in multiplied_with(layers.values())})
    with (
        _keeping_track(model, running),
        _bare_modules_seen(model, producers, bare),
        torch.enable_grad(),
        sdpa_kernel(SDPBackend.MATH),
        checkpointing_seen_through() as seen_through,
        products,
        watch_calls(layers.values(), parameters, on_call),
    ):
        outputs = results_in(call_with_parameters(model, parameters, map_tensors(torch.clone, sample), call))
    trace.reentrant = bool(seen_through)
    trace.products = {name: count for name, count in products.backward.items() if count > 0}
    trace.before = {name: frozenset(found) for name, found in sources.items()}
    trace.after_outside = frozenset(name for name, leaves in before.items() if leaves)
    by_id = {id(parameter): name for name, parameter in parameters.items()}

    def named(leaves: set[int]) -> frozenset[str]:
        return frozenset(by_id[leaf] for leaf in leaves if leaf in by_id)

    trace.parameters_before = {name: named(leaves) for name, leaves in before.items()}
    trace.parameters_inside = {name: named(leaves - before[name]) for name, leaves in inside.items()}
    trace.before_bare = {name: (frozenset(layers), named(leaves)) for name, (layers, leaves) in bare.items()}
    trace.direct = {name: one for name, one in trace.direct.items() if calls[name] == calls[one] == 1}
    used = _leaves_of(outputs)
    trace.unused = frozenset(
        name for name, parameter in parameters.items() if parameter.requires_grad and id(parameter) not in used
    )
    producing, after = _sources_of(outputs, producers)
    trace.parameters_after = named(after)
    # Without a graph (everything fixed, or a forward pass under no_grad) the layer called last is the output layer.
    trace.output_layers = _with_those_scaled(producing, trace.before, layers) or frozenset(trace.order[-1:])
    trace.ordered = bool(producing)
    return trace


def _with_those_scaled(
    producing: set[str], before: Mapping[str, frozenset[str]], layers: Mapping[str, Layer]
) -> frozenset[str]:
    """Return the layers that outputs come from, those included whose outputs are only scaled on the way."""
    found, pending = set[str](), list(producing)
    while pending:
        name = pending.pop()
        if name not in found:
            found.add(name)
            use = layers[name].use
            pending.extend(before[name] if use is not None and use.cost == "norm" else ())
    return frozenset(found)


@contextmanager
def checkpointing_seen_through() -> Iterator[list[Any]]:
    """Run reentrant activation checkpoints without checkpointing, which would hide their inside from the graph.

    Yields the functions that were met so, in order.
    """
    met: list[Any] = []

    def run_through(run: Any, preserve_rng_state: bool, *inputs: Any) -> Any:
        met.append(run)
        return run(*inputs)

    with ExitStack() as stack:
        stack.callback(delattr, CheckpointFunction, "apply")
        setattr(CheckpointFunction, "apply", staticmethod(run_through))  # noqa: B010
        yield met


@contextmanager
def _keeping_track(model: nn.Module, running: list[nn.Module]) -> Iterator[None]:
    """Keep ``running`` the modules whose forward is under way, the innermost last."""
    with ExitStack() as stack:
        for module in model.modules():
            enter = module.register_forward_pre_hook(lambda module, _: running.append(module), prepend=True)
            leave = module.register_forward_hook(lambda *_: running.pop() and None)
            stack.callback(enter.remove)
            stack.callback(leave.remove)
        yield


@contextmanager
def _bare_modules_seen(
    model: nn.Module, producers: Mapping[Node, str], seen: dict[str, tuple[set[str], set[int]]]
) -> Iterator[None]:
    """Note in ``seen`` what comes first before the inputs of every module without parameters."""

    def note(name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, keywords: Any) -> None:
            layers, leaves = seen.setdefault(name, (set(), set()))
            inputs = list(tensors_in((arguments, keywords)))
            found, known = _sources_of(inputs, producers)
            layers.update(found if inputs else {NOT_KNOWN})
            leaves.update(known)

        return hook

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if next(module.parameters(), None) is None:
                stack.callback(module.register_forward_pre_hook(note(name), with_kwargs=True).remove)
        yield


def _sources_of(tensors: list[Tensor], producers: Mapping[Node, str]) -> tuple[set[str], set[int]]:
    """Walk the graph back from ``tensors``; return the first layer met on every path, or the leaf's identity."""
    found: set[str] = set()
    leaves: set[int] = set()
    seen: set[Node] = set()
    pending = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in producers:
            found.add(producers[node])
        elif hasattr(node, "variable"):
            leaves.add(id(node.variable))
        else:
            pending.extend(next_node for next_node, _ in node.next_functions if next_node is not None)
    return found, leaves


def _leaves_of(tensors: list[Tensor]) -> set[int]:
    """Return the identities of all tensors that gradients of ``tensors`` would be accumulated in."""
    seen: set[Node] = set()
    pending = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending.extend(next_node for next_node, _ in node.next_functions if next_node is not None)
    return {id(node.variable) for node in seen if hasattr(node, "variable")}
