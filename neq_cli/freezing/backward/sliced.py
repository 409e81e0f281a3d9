"""SlicedBackward puts frozen sets in force in a model's modules, and tells how each layer's gradients are computed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from neq_cli.freezing.backward.compiled import Slot
from neq_cli.freezing.backward.dispatch import Dispatch, Kernel, KernelChoice
from neq_cli.freezing.backward.gradients import GradientPlan, Operand
from neq_cli.freezing.backward.intercepting import Watched, WatchedWeights
from neq_cli.freezing.backward.resting import swap_folded, swap_resting, swap_skipped
from neq_cli.freezing.backward.sliced_layers import SlicedOperands, swap_sliced
from neq_cli.freezing.backward.swapping import (
    Identities,
    restore,
    swap_frozen,
    swap_intercepting,
    swap_root,
    swap_still,
)
from neq_cli.freezing.model.front import NO_REST, Rest
from neq_cli.freezing.model.layers import RECURRENT, Layer
from neq_cli.freezing.rows.handed_over import Hand

BackwardMode = Literal["exact", "truncated", "dense"]
"""Named for recipes in recipe/values.py once more, since neither room may import the other; a test compares them."""
COMPILED_FUNCTIONAL = "its weight is passed to a function, inside what torch.compile made"
MODES: tuple[BackwardMode, ...] = get_args(BackwardMode)


@dataclass(frozen=True)
class KernelUse:
    """How a layer with frozen neurons computed its gradients last."""

    kernel: Kernel | Literal["none"] | None  # none: no weight gradient at all; None: not known before a backward pass
    rows_computed: int
    reason: str  # in words


class SlicedBackward:
    """Puts frozen sets in force in the modules of a model, and takes them off again.

    ``exact``: only the trainable rows' weight gradients are computed, input gradients are whole. ``truncated``: frozen
    neurons of convolutions and linear layers pass no error to their inputs either, which is an approximation.
    ``dense``: nothing changes. Layers in ``dense_because`` cannot be sliced; they too stop computing their weight
    gradient where all of their neurons are frozen.

    ``functional`` names, for each layer whose weight is passed to a function, the module in whose forward that happens.
    ``compiled``: torch.compile runs the model. Then modules stay what they are whatever is frozen, so that nothing is
    compiled again; it costs the saving of memory, of errors that nobody needs, and of functional weights.
    ``attached``: every layer stays part of autograd's graph, whatever is frozen, for what must find it there. ``hand``:
    who takes the gradient of the trainable rows of a parameter, by its name, in the running backward pass; None where
    autograd does. ``seen``: of a sharded model, what stands in a parameter's place while its module runs.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Layer],
        functional: Mapping[str, str],
        dense_because: Mapping[str, str],
        mode: BackwardMode,
        dispatch: Dispatch,
        *,
        compiled: bool,
        attached: bool,
        hand: Callable[[str], Hand | None] = lambda name: None,
        seen: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.hand = hand
        self.seen = seen
        self.model = model
        self.mode = mode
        self.layers = layers if mode != "dense" else {}
        self.truncated = mode == "truncated"
        self.dispatch = dispatch
        self.parameters = dict(model.named_parameters())
        self.functional = {
            name: model.get_submodule(owner) for name, owner in functional.items() if name not in dense_because
        }
        self.dense_because = dense_because
        self.compiled = compiled
        self.attached = attached
        self.slots = {
            name: Slot() for name in self.layers if name not in self.functional and name not in self.dense_because
        }
        self.plans: dict[str, GradientPlan] = {}  # of the layers with frozen neurons that can be sliced
        self.settled: dict[str, KernelChoice] = {}  # what forward passes may go by
        self.swaps: list[tuple[nn.Module, Callable[[], None]]] = []  # modules, and what changes their class
        self.suspended = False

    def put_in_force(self, trainable: Mapping[str, Tensor], still: Collection[str] = (), rest: Rest = NO_REST) -> None:
        """From now on, or as soon as ``resume`` is called, compute what ``trainable`` (bool, [neurons]) asks for.

        ``still``: parameters outside neurons that take no part in the backward pass either. ``rest``: what runs as at
        inference, without what is compiled.
        """
        self.remove()
        self.settled = dict(self.dispatch.choices)
        for name, slot in self.slots.items():
            plan = self._plan(name, trainable[name])
            slot.put(plan)
            if self.compiled or plan.rows < len(plan.trainable):
                self.plans[name] = plan
                layer = self.layers[name]
                sliced = SlicedOperands(plan, self.parameters[layer.weight], self._bias(layer)[0], self.seen)
                swap = partial(swap_sliced, layer.module, layer.cost, sliced, slot.number)
                self.swaps.append((layer.module, swap))
        if not self.compiled:
            self._put_functional_in_force(trainable)
            if not self.attached:
                self._put_dense_in_force(trainable)
                self._put_still_in_force({*still, *self._used_by_hand(trainable)})
            self._put_to_rest(rest)
        if not self.suspended:
            self.resume()

    def settle(self, *_: object) -> None:
        """Have forward passes go by the choices made so far; called between steps, as a hook after the optimiser's."""
        if torch._C._current_graph_task_id() == -1:  # an optimiser may step inside of a backward pass
            self.settled.update(self.dispatch.choices)

    def suspend(self) -> None:
        """Give every module its own class back until ``resume``; plans and what is known of them stay."""
        self.suspended = True
        for module, _ in self.swaps:
            restore(module)

    def resume(self) -> None:
        """Have every module compute what the sets in force ask for."""
        self.suspended = False
        for _, swap in self.swaps:
            swap()

    def remove(self) -> None:
        """Give every module its own class back."""
        for module, _ in self.swaps:
            restore(module)
        self.swaps = []
        self.plans = {}

    def _plan(self, name: str, trainable: Tensor) -> GradientPlan:
        return GradientPlan(
            trainable,
            truncated=self.truncated,
            dispatch=self.dispatch,
            # Compiled code has a graph for every set, and so must what torch.compile leaves to Python.
            attached=self.attached or self.compiled,
            owns=owned_operands(self.layers[name]),
            settled=self.settled,
            hand=partial(self.hand, self.layers[name].weight),
        )

    def _put_functional_in_force(self, trainable: Mapping[str, Tensor]) -> None:
        by_owner: dict[nn.Module, list[tuple[Tensor, Watched]]] = {}
        for name, owner in self.functional.items():
            if name in self.layers and not bool(trainable[name].all()):
                layer = self.layers[name]
                self.plans[name] = plan = self._plan(name, trainable[name])
                watched = Watched(plan, *self._bias(layer))
                by_owner.setdefault(owner, []).append((self.parameters[layer.weight], watched))
        for owner, plans in by_owner.items():
            weights = WatchedWeights(plans, self.seen)
            self.swaps.append((owner, partial(swap_intercepting, owner, weights)))

    def _put_dense_in_force(self, trainable: Mapping[str, Tensor]) -> None:
        taken = {module for module, _ in self.swaps}
        owned: dict[nn.Module, list[Tensor]] = {}  # of several layers, where a module holds a recurrent stack
        for name in self.dense_because:
            layer = self.layers.get(name)
            if layer is None or bool(trainable[name].any()) or layer.module in taken:
                continue
            if not layer.functional or isinstance(layer.module, RECURRENT):
                owned.setdefault(layer.module, []).extend(self.parameters[rows.parameter] for rows in layer.rows)
        self.swaps += [
            (module, partial(swap_frozen, module, Identities(own, self.seen))) for module, own in owned.items()
        ]

    def _used_by_hand(self, trainable: Mapping[str, Tensor]) -> set[str]:
        """Return the parameters of layers without a trainable neuron that are factors in somebody's forward pass."""
        frozen = [layer for name, layer in self.layers.items() if layer.use is not None and not trainable[name].any()]
        return {rows.parameter for layer in frozen for rows in layer.rows}

    def _put_still_in_force(self, still: Collection[str]) -> None:
        if not still or self.mode == "dense":
            return
        parameters = Identities([self.parameters[name] for name in still], self.seen)
        owners = {name.rpartition(".")[0] for name in still}
        self.swaps += [(one, partial(swap_still, one, parameters)) for one in map(self.model.get_submodule, owners)]
        self.swaps.append((self.model, partial(swap_root, self.model)))

    def _put_to_rest(self, rest: Rest) -> None:
        for convolution, norm in (rest.folds or {}).items():
            # Last, on top of all else: what they compute is another thing.
            self.swaps.append((convolution, partial(swap_folded, convolution, norm)))
            self.swaps.append((norm, partial(swap_skipped, norm)))
        self.swaps += [(module, partial(swap_resting, module)) for module in rest.modules]

    def _bias(self, layer: Layer) -> tuple[Tensor | None, int]:
        """Return the bias that the layer's neurons own, None where they own none, and which of it is the first's."""
        others = [rows for rows in layer.rows if rows.parameter != layer.weight and rows.count == layer.neurons]
        rows = next((rows for rows in others if rows.layout.kind == "flat"), None)
        return (None, 0) if rows is None else (self.parameters[rows.parameter], rows.start)

    def kernels(self, trainable: Mapping[str, Tensor]) -> dict[str, KernelUse]:
        """Return for every layer with frozen neurons how its gradients were computed last, and why."""
        frozen = {name: layer for name, layer in self.layers.items() if not bool(trainable[name].all())}
        return {name: self._kernel(name, layer, int(trainable[name].sum())) for name, layer in frozen.items()}

    def _kernel(self, name: str, layer: Layer, rows: int) -> KernelUse:
        plan = self.plans.get(name)
        if rows == 0 and (plan is not None or not (layer.functional or self.compiled or self.attached)):
            return KernelUse("none", 0, "no neuron trains")
        if plan is None:
            return KernelUse("dense", layer.neurons, self.dense_because.get(name, COMPILED_FUNCTIONAL))
        computed, choice = plan.rows_computed(), plan.last_choice()
        if computed is None or choice is None:
            return KernelUse(None, rows, "chosen in the first backward pass")
        return KernelUse(choice.kernel, computed, choice.reason)


def why_dense(layer: Layer, functional: bool) -> str | None:
    """Return why the gradients of ``layer`` cannot be computed in part; None where they can.

    ``functional``: its weight is passed to a function, always in the forward of the same module.
    """
    if layer.cost == "norm":
        return "normalisation: the gradients of its few parameters come with its input's"
    if layer.cost == "lookup":
        return "embedding: the gradient of its table is added up token by token, whatever the columns"
    if layer.cost == "bilinear":
        return "bilinear: its gradients are computed whole"
    if isinstance(layer.module, RECURRENT):
        return "recurrent: the gradients of all gates come from one walk back through the steps"
    if layer.use is not None:
        return "a factor in the forward pass of another module"
    if _uses_more_than_its_rows(layer):
        return "its weight or its bias trains, but not as a parameter of this optimiser"
    if functional:
        return None
    module, kind = layer.module, getattr(nn, layer.kind, None)
    if layer.functional:
        return "its weight is used by several modules, or by none that was seen"
    if not layer.tried and "weight" not in module._parameters:
        return "its weight is computed from other parameters"
    own_way = kind is None or type(module).forward is not kind.forward or "forward" in vars(module)
    if own_way or getattr(type(module), "_conv_forward", None) is not getattr(kind, "_conv_forward", None):
        return f"{type(module).__name__} computes its output its own way"
    return None


def owned_operands(layer: Layer) -> frozenset[Operand]:
    """Return which of weight and bias are rows of the layer's neurons."""
    return frozenset("weight" if rows.parameter == layer.weight else "bias" for rows in layer.rows)


def _uses_more_than_its_rows(layer: Layer) -> bool:
    """Whether weight and bias both need gradients but one of them is not the neurons', which needs all of its own."""
    weight, bias = "weight", "bias"
    if layer.functional:
        weight, bias = f"{layer.name.rpartition('.')[2]}_weight", "in_proj_bias"
    used = [tensor for key in (weight, bias) if (tensor := layer.module._parameters.get(key)) is not None]
    return sum(bool(tensor.requires_grad) for tensor in used) > len(layer.rows)
