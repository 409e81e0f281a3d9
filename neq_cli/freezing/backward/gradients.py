"""A GradientPlan computes one layer's gradients while a set is in force: which rows, by which kernel.

By hand, since PyTorch computes the gradient of a weight whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from neq_cli.freezing.backward import kernels
from neq_cli.freezing.backward.dispatch import BLOCK, MOST_BLOCKS, Dispatch, Kernel, KernelChoice
from neq_cli.freezing.backward.functions import InputOnly, SomeRows, cast_for_autocast, is_vectorised, memory_format_of
from neq_cli.freezing.backward.kernels import BackwardCall
from neq_cli.freezing.backward.operations import (
    Convolution,
    Gradients,
    Operation,
    Slice,
    slice_rows,
)
from neq_cli.freezing.rows.handed_over import Hand

FRIENDLY = {"cpu": 16, "cuda": 8}
"""Channels that libraries compute at a time: a vector register's floats, a tensor core's side."""
_WIDE = {"cuda": 64}
"""Where whole tiles of a matrix product may do better still, their rows."""


Operand = Literal["weight", "bias"]
OPERANDS: frozenset[Operand] = frozenset(("weight", "bias"))


class GradientPlan:
    """How the gradients of one use of a layer's weight are computed.

    ``trainable``: bool, [rows of the weight], on the CPU. ``truncated``: frozen rows pass no error to the input.
    ``attached``: the output stays part of autograd's graph where nothing of the layer trains either. ``owns``: which
    operands are rows of the neurons; another one's gradient is computed whole. ``settled``: the choices, by kind of
    call, that forward passes may go by. They change between steps only: within one, a forward pass that activation
    checkpointing repeats must save what it saved the first time. ``hand`` tells in a backward pass who takes the
    gradient of the neurons' own weight, None where autograd does.
    """

    def __init__(
        self,
        trainable: Tensor,
        *,
        truncated: bool,
        dispatch: Dispatch,
        attached: bool = False,
        owns: frozenset[Operand] = OPERANDS,
        settled: Mapping[str, KernelChoice] | None = None,
        hand: Callable[[], Hand | None] = lambda: None,
    ) -> None:
        self.hand = hand
        self.trainable = trainable
        self.truncated = truncated
        self.attached = attached
        self.dispatch = dispatch
        self.owns = owns
        self.settled = {} if settled is None else settled
        self.rows = int(trainable.sum())
        self.computed: int | None = None  # rows computed in the last backward; None before the first
        self.choice: KernelChoice | None = None
        self._averaged = False
        self._pytorch: dict[object, KernelChoice] = {}
        self._kinds: dict[object, str] = {}
        self._parts: dict[tuple[object, ...], Slice] = {}
        self._ones: dict[tuple[object, ...], Tensor] = {}
        self._chunks: dict[tuple[int, int], GradientPlan] = {}

    def apply(
        self,
        operation: Operation,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        owns_bias: bool = True,
        own_weight: bool = False,
        call: object = None,
    ) -> Tensor:
        """Return the operation's output, recorded for the backward pass as the plan wants it.

        ``owns_bias``: the bias is the one that the plan ``owns``, not another that was put in its place.
        ``own_weight``: the weight is the neurons' parameter itself. ``call``: what ``is_pytorch`` will be asked by.
        """
        own_weight = own_weight and not self._is_averaged()
        input, weight, bias = cast_for_autocast(input, weight, bias)
        owns_bias = owns_bias and "bias" in self.owns
        if self.rows == len(self.trainable):
            return operation.forward(input, weight, bias)
        if weight.requires_grad and "weight" not in self.owns:
            self.computed = len(self.trainable)
            return operation.forward(input, weight, bias)
        if not self.rows:
            return self._apply_frozen(operation, input, weight, bias, owns_bias=owns_bias)
        choice = self._settled_choice(operation, input, weight)
        if choice is not None and choice.kernel == "dense" and not self.truncated:
            self._note(choice, operation, weight)
            if call is not None:
                self._pytorch[call] = choice
            return operation.forward(input, weight, bias)
        return cast(Tensor, SomeRows.apply(input, weight, bias, operation, self, owns_bias, own_weight))

    def is_pytorch(self, call: object) -> bool:
        """Whether such a call of a module was left to PyTorch before, as settled; then it is that every time."""
        choice = self._pytorch.get(call)
        if choice is None:
            return False
        self.choice, self.computed = choice, len(self.trainable)
        return True

    def _is_averaged(self) -> bool:
        """Whether a DistributedDataParallel runs the model, or has run it, which waits for autograd's gradients."""
        self._averaged = self._averaged or DistributedDataParallel._active_ddp_module is not None
        return self._averaged

    def _apply_frozen(
        self, operation: Operation, input: Tensor, weight: Tensor, bias: Tensor | None, *, owns_bias: bool
    ) -> Tensor:
        self.computed = 0
        if self.attached:
            return cast(Tensor, InputOnly.apply(input, weight, bias, operation, self.truncated, owns_bias))
        weight = weight.detach()
        if bias is not None and owns_bias:
            bias = bias.detach()
        if self.truncated:
            input = input.detach()
        # Autograd keeps a convolution's input even where its weight needs no gradient.
        if isinstance(operation, Convolution) and (input.requires_grad or (bias is not None and bias.requires_grad)):
            return cast(Tensor, InputOnly.apply(input, weight, bias, operation, self.truncated, owns_bias))
        return operation.forward(input, weight, bias)

    def chunk(self, first: int, count: int) -> GradientPlan:
        """Return the plan for ``count`` rows from ``first``, of a weight that is used piece by piece."""
        if count == len(self.trainable):
            return self
        if (first, count) not in self._chunks:
            trainable = self.trainable[first : first + count]
            self._chunks[first, count] = GradientPlan(
                trainable,
                truncated=self.truncated,
                dispatch=self.dispatch,
                attached=self.attached,
                owns=self.owns,
                settled=self.settled,
            )
        return self._chunks[first, count]

    def rows_computed(self) -> int | None:
        """Return how many rows' weight gradients the last backward computed; None before the first one."""
        if not self._chunks:
            return self.computed
        return sum(plan.rows if plan.computed is None else plan.computed for plan in self._chunks.values())

    def last_choice(self) -> KernelChoice | None:
        """Return the choice of the last backward pass; None before the first, and where nothing is chosen."""
        return next((plan.choice for plan in (self, *self._chunks.values()) if plan.choice is not None), None)

    def _settled_choice(self, operation: Operation, input: Tensor, weight: Tensor) -> KernelChoice | None:
        """Return what was chosen for such a call in an earlier step; None where nothing was."""
        return self.settled.get(self._kind(operation, input, weight, of_input=input.requires_grad))

    def _note(self, choice: KernelChoice, operation: Operation, weight: Tensor) -> None:
        self.choice = choice
        dense = choice.kernel == "dense"
        self.computed = len(self.trainable if dense else self._part(choice.kernel, operation, weight).computed)

    def gradients(
        self,
        operation: Operation,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor,
        wanted: tuple[bool, bool, bool],
        *,
        rows_alone: bool = False,
    ) -> Gradients:
        """Return the gradients ``wanted`` of input, weight and bias; those of frozen rows are zero or of no meaning.

        ``rows_alone``: of the weight's, return the trainable rows alone.
        """
        vectorised = is_vectorised(grad_output)
        call = BackwardCall(
            operation,
            grad_output,
            input,
            weight,
            *wanted,
            truncated=self.truncated,
            rows=len(self.trainable),
            rows_alone=rows_alone and not vectorised,
        )
        if vectorised:  # which can neither be timed nor be written into memory of ours
            return self._run("dense", call)
        run = partial(self._run, call=call)
        kind = self._kind(operation, input, weight, of_input=wanted[0])
        choice = self.dispatch.find(kind)
        if choice is None:
            candidates, by_rule = self._candidates(operation, input, weight), self._by_rule(operation, weight)
            choice = self.dispatch.choose(kind, candidates, run, by_rule, input.device)
        self._note(choice, operation, weight)
        return run(choice.kernel)

    def all_gradients(
        self, operation: Operation, grad_output: Tensor, input: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]
    ) -> Gradients:
        """Return what ``gradients`` does, also where all rows train or none does, or an operand is not the neurons'."""
        of_input, of_weight, of_bias = wanted
        if self.rows == len(self.trainable) or "weight" not in self.owns:
            self.computed = len(self.trainable)
            return operation.backward(
                grad_output, input, weight, of_input=of_input, of_weight=of_weight, of_bias=of_bias
            )
        owns_bias = "bias" in self.owns
        if self.rows:
            own = (of_input, of_weight, of_bias and owns_bias)
            through, of_rows, of_biases = self.gradients(operation, grad_output, input, weight, own)
        else:
            self.computed, of_rows, of_biases = 0, None, None
            through, _, _ = operation.backward(
                grad_output, input, weight, of_input=of_input and not self.truncated, of_weight=False, of_bias=False
            )
        if of_bias and not owns_bias:
            of_biases = operation.gradient_of_bias(grad_output, torch.Size([len(self.trainable)]))
        return through, of_rows, of_biases

    def _candidates(self, operation: Operation, input: Tensor, weight: Tensor) -> list[Kernel]:
        found: list[Kernel] = ["dense", "sliced"]
        rows = len(self._part("sliced", operation, weight).computed)
        more: tuple[Kernel, ...] = ("rounded", "rounded64") if weight.device.type in _WIDE else ("rounded",)
        for kernel in more:
            before, rows = rows, len(self._part(kernel, operation, weight).computed)
            if rows > before:
                found.append(kernel)
        if _is_pointwise(operation, weight):
            found.append("pointwise")
        if kernels.can_go_by_index(operation, input, weight):
            found.append("indexed")
        return found

    def _by_rule(self, operation: Operation, weight: Tensor) -> Kernel:
        # Measured on a Zen 4 core over ResNet-18's layers: up to three quarters of the rows are cheaper than all.
        return (
            "sliced"
            if 4 * len(self._part("rounded", operation, weight).computed) <= 3 * len(self.trainable)
            else "dense"
        )

    def _part(self, kernel: Kernel, operation: Operation, weight: Tensor) -> Slice:
        kind = weight.device.type
        multiple = {"rounded": FRIENDLY.get(kind, 8), "rounded64": _WIDE.get(kind, 1)}.get(kernel, 1)
        key = (operation.groups, multiple, weight.device)
        if key not in self._parts:
            self._parts[key] = slice_rows(
                self.trainable,
                groups=operation.groups,
                inputs=operation.inputs_per_group(weight),
                multiple=multiple,
                device=weight.device,
            )
        return self._parts[key]

    def _run(self, kernel: Kernel, call: BackwardCall) -> Gradients:
        operation, weight = call.operation, call.weight
        if kernel == "dense":
            masked = weight * self._trains(operation, weight) if self.truncated and call.of_input else weight
            return kernels.dense(call, masked, self._part("sliced", operation, weight) if call.rows_alone else None)
        part = self._part(kernel, operation, weight)
        if kernel == "indexed":
            return kernels.by_index(call, part)
        return kernels.sliced(call, part, pointwise=kernel == "pointwise")

    def _trains(self, operation: Operation, weight: Tensor) -> Tensor:
        """Return ones in the trainable rows of ``weight`` and zeros in the others, to be multiplied with it."""
        key = (operation.layout, weight.shape, weight.stride(), weight.dtype, weight.device)
        if key not in self._ones:
            part = self._part("sliced", operation, weight)
            ones = torch.zeros_like(weight)
            operation.layout.view(ones)[operation.layout.index(ones, part.trainable)] = 1
            self._ones[key] = ones
        return self._ones[key]

    def _kind(self, operation: Operation, input: Tensor, weight: Tensor, *, of_input: bool) -> str:
        """Describe the call: everything that its time depends on."""
        call = (operation, input.shape, input.stride(), input.dtype, input.device, of_input)
        if call not in self._kinds:
            self._kinds[call] = self._describe(operation, input, weight, of_input=of_input)
        return self._kinds[call]

    def _describe(self, operation: Operation, input: Tensor, weight: Tensor, *, of_input: bool) -> str:
        rows = len(self._part("sliced", operation, weight).computed)
        block = max(BLOCK, len(self.trainable) // MOST_BLOCKS)
        rows = min(-(-rows // block) * block, len(self.trainable))
        layout = "" if memory_format_of(input) is torch.contiguous_format else " channels_last"
        form = "x".join(map(str, input.shape)) + layout
        error = ("truncated" if self.truncated else "exact") + ("" if of_input else ", no input gradient")
        return (
            f"{operation} weight {'x'.join(map(str, weight.shape))} input {form} {str(input.dtype)[6:]} "
            f"on {_machine(input.device)}, {error}, {rows} of {len(self.trainable)} rows"
        )


def _is_pointwise(operation: Operation, weight: Tensor) -> bool:
    return (
        isinstance(operation, Convolution)
        and operation.groups == 1
        and not operation.transposed
        and not any(operation.padding)
        and weight[0, 0].numel() == 1
    )


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu with {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
