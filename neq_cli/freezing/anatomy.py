"""One look at a model, before any training, tells its neurons, what one sample showed, and who may never freeze."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from neq_cli.errors import FreezingError, did_you_mean
from neq_cli.freezing.backward.sliced import BackwardMode, why_dense
from neq_cli.freezing.equilibrium import Definition
from neq_cli.freezing.families import is_registered, shares_among_rows
from neq_cli.freezing.flops import Execution, Flops, count_flops, forward_cost
from neq_cli.freezing.model.axes import with_found_axes
from neq_cli.freezing.model.calling import Call, give_shapes, has_no_shapes
from neq_cli.freezing.model.front import Rest, front_of, outside_of, rest_of
from neq_cli.freezing.model.layers import (
    BATCH_NORMS,
    CONVOLUTIONS,
    NOTHING_FOUND,
    TRANSPOSED_CONVOLUTIONS,
    Layer,
)
from neq_cli.freezing.model.neurons import Neurons, find_neurons
from neq_cli.freezing.model.propagation import parameters_reached, propagate
from neq_cli.freezing.model.trace import Trace, trace_model


@dataclass(frozen=True)
class Anatomy:
    """A model's neurons, its trace, and the layers that always train, each with the reason.

    ``attached``: every layer stays part of autograd's graph, whatever is frozen, for what must find it there.
    """

    neurons: Neurons
    trace: Trace
    never_frozen: Mapping[str, str]
    attached: bool

    def flops(
        self,
        trainable: Mapping[str, Tensor | float],
        mode: BackwardMode = "exact",
        *,
        rows_computed: Mapping[str, int] | None = None,
        compiled: bool = False,
        still: Collection[str] = (),
    ) -> Flops:
        """Return one sample's back-propagation with these sets (bool, [neurons]) or trainable shares in force.

        ``rows_computed`` are those that a backward pass really computed, by layer, where one has run. ``compiled``:
        torch.compile runs the model. ``still``: parameters outside neurons that stand still with the front.
        """
        execution = self._execution(mode, compiled, rows_computed or {}, still)
        return count_flops(self.neurons, self.trace, trainable, execution)

    @property
    def notes(self) -> list[str]:
        """What is to be said of layers of which one neuron's freeze cannot isolate its output, a line for each kind."""
        of: dict[str, list[str]] = {}
        for name in self.may_freeze:
            shared = shares_among_rows(self.neurons.layers[name].module)
            if shared is not None:
                of.setdefault(shared, []).append(name)
        return [f"{', '.join(names)}: {why}, so that outputs of frozen neurons still move" for why, names in of.items()]

    @cached_property
    def may_freeze(self) -> tuple[str, ...]:
        """The layers that a policy may freeze, in forward order."""
        return tuple(name for name in self.neurons.layers if name not in self.never_frozen)

    @cached_property
    def costs(self) -> dict[str, int]:
        """Every layer's forward pass on one sample, in the paper's unit."""
        return {name: forward_cost(layer, self.trace) for name, layer in self.neurons.layers.items()}

    def front(self, frozen: Collection[str]) -> frozenset[str]:
        """Return those of the layers to be ``frozen`` whole that nothing which trains lies before.

        Layers that never freeze train, and so does all that is tied to one that is not ``frozen``.
        """
        held = {name for name in frozen if name not in self.never_frozen}
        held -= {name for tie in self.neurons.ties if not tie <= held for name in tie}
        return front_of(self.trace, held | self.neurons.fixed.keys())

    def outside_front(self, trainable: Mapping[str, Tensor]) -> frozenset[str]:
        """Return the parameters outside neurons that lie in the front of what these sets freeze whole."""
        return outside_of(self.trace, self.neurons.outside, self._front_of(trainable))

    def rest(self, model: nn.Module, trainable: Mapping[str, Tensor], still: Collection[str]) -> Rest:
        """Return what of ``model`` may run as at inference while these sets freeze a front."""
        layers = {**self.neurons.layers, **self.neurons.fixed}
        moving = self.neurons.outside.keys() - set(still)
        return rest_of(model, layers, self.trace, self._front_of(trainable), moving)

    def _front_of(self, trainable: Mapping[str, Tensor]) -> frozenset[str]:
        return self.front([name for name, rows in trainable.items() if not bool(rows.any())])

    def reached(
        self,
        trainable: Mapping[str, Tensor],
        mode: BackwardMode,
        *,
        compiled: bool = False,
        still: Collection[str] = (),
    ) -> frozenset[str]:
        """Return the layers that an error reaches: in truncated mode frozen layers may cut others off from it."""
        shares = {name: float(rows.any()) for name, rows in trainable.items()}
        execution = self._execution(mode, compiled, {}, still)
        return propagate(self.trace, shares, execution.blocking(self.neurons, shares), execution.still).reached

    def unreached_outside(self, trainable: Mapping[str, Tensor]) -> list[str]:
        """Return the parameters outside neurons that no error reaches in truncated mode with these sets."""
        shares = {name: float(rows.any()) for name, rows in trainable.items()}
        execution = self._execution("truncated", False, {}, ())
        reached = parameters_reached(self.trace, execution.blocking(self.neurons, shares))
        return [name for name in self.neurons.outside if name not in reached]

    def _execution(
        self, mode: BackwardMode, compiled: bool, rows_computed: Mapping[str, int], still: Collection[str]
    ) -> Execution:
        dense = frozenset([*self.dense_because, *(self.functional if compiled else ())])
        return Execution(mode, dense, rows_computed, compiled, self.attached, frozenset(still))

    @property
    def functional(self) -> dict[str, str]:
        """The name of the module that passes a layer's weight to a function, by layer, where one alone does."""
        users = {name: self.trace.users.get(name, frozenset()) for name in self.neurons.layers}
        return {
            name: next(iter(users[name]))
            for name, layer in self.neurons.layers.items()
            if layer.by_linear and len(users[name]) == 1 and (layer.functional or users[name] != {name})
        }

    @cached_property
    def dense_because(self) -> dict[str, str]:
        """Why a layer's gradients cannot be computed in part, by layer, where they cannot."""
        functional = self.functional
        reasons = {name: why_dense(layer, name in functional) for name, layer in self.neurons.layers.items()}
        return {name: reason for name, reason in reasons.items() if reason is not None}


def anatomy_of(
    model: nn.Module,
    inputs: Any,
    *,
    optimized: Iterable[Tensor] | None = None,
    exclude: Sequence[str] = (),
    definition: Definition = "paper",
    attached: bool = False,
    call: Call | None = None,
    single: bool = False,
) -> Anatomy:
    """Look at ``model`` with one sample of ``inputs`` ([samples, ...]); it may be on the meta device.

    ``optimized`` are the parameters the optimiser updates (default: all), ``exclude`` globs of layers that never
    freeze. ``attached``: something outside the model needs every layer in autograd's graph, as reentrant activation
    checkpoints inside do. ``call``: how the model is called with ``inputs``, if not with them alone. ``single``:
    ``inputs`` are one sample as they are, whatever the first dimension of their tensors is.
    Raises FreezingError where no layer has neurons that train, a glob matches none, or the model does not take them.
    """
    optimized = None if optimized is None else list(optimized)
    if has_no_shapes(model):
        give_shapes(model, inputs, call)
    neurons = find_neurons(model, optimized)
    if not neurons.layers:
        raise FreezingError(
            "model: no layer has neurons that train; it needs a convolution, linear, normalisation or embedding layer "
            "whose parameters require gradients and are in the optimiser"
        )
    trace = trace_model(model, neurons, inputs, call, single=single)
    if trace.found != NOTHING_FOUND:
        neurons = find_neurons(model, optimized, trace.found)
        trace = trace_model(model, neurons, inputs, call, single=single)
    _check_families(neurons, trace)
    neurons = with_found_axes(neurons, trace.order, trace.axes)
    never_frozen = {
        **neurons.always_trainable,
        **_excluded(neurons, exclude),
        **{name: why for name, layer in neurons.layers.items() if (why := _why_never(layer, trace, definition))},
        **_last_before_fixed(neurons, trace),
    }
    return Anatomy(neurons, trace, never_frozen, attached or trace.reentrant)


def _check_families(neurons: Neurons, trace: Trace) -> None:
    for name, layer in neurons.layers.items():
        if is_registered(layer.module) and name in trace.reached and trace.axes.get(name, layer.axis) is None:
            raise FreezingError(
                f"families: {layer.kind} {name!r} does not answer on the probe: no one axis of its output moves with "
                f"the rows of {layer.weight!r} that its family names; mend what families.register was given for it"
            )


def _last_before_fixed(neurons: Neurons, trace: Trace) -> dict[str, str]:
    """Return the layer that takes the output layer's place where that is fixed, with the reason why it never freezes.

    A loss that depends on nothing that trains cannot be differentiated.
    """
    if any(name in neurons.layers for name in trace.output_layers):
        return {}
    reached = propagate(trace, dict.fromkeys(neurons.layers, 1.0)).reached
    last = next((name for name in reversed(trace.order) if name in neurons.layers and name in reached), None)
    return {} if last is None else {last: "the last layer that trains"}


def _excluded(neurons: Neurons, exclude: Sequence[str]) -> dict[str, str]:
    excluded: dict[str, str] = {}
    for pattern in exclude:
        matches = fnmatch.filter(neurons.layers, pattern)
        if not matches:
            known = f"the layers are {', '.join(neurons.layers)}"
            hint = did_you_mean(pattern, neurons.layers) or f"; {known}"
            raise FreezingError(f"exclude: {pattern!r} matches no layer{hint}")
        excluded |= dict.fromkeys(matches, f"excluded by {pattern!r}")
    return excluded


def _why_never(layer: Layer, trace: Trace, definition: Definition) -> str | None:
    if layer.name in trace.output_layers:
        return "output layer"
    if layer.name not in trace.reached:
        return "not reached by the probe"
    if getattr(layer.module, "max_norm", None) is not None:
        return "every forward pass brings its weight to max_norm"
    if trace.axes.get(layer.name, 0) is None:
        return "which axis of its output counts neurons could not be found"
    followed = (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS, *BATCH_NORMS)
    if definition == "reference" and not isinstance(layer.module, followed):
        return "definition reference freezes convolutions and BatchNorm only"
    return None
