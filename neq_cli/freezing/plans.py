"""One layer's gradients while a frozen set is in force: which rows are computed, by which kernel, and what is kept."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from neq_cli.freezing.dispatch import BLOCK, MOST_BLOCKS, Choice, Dispatch, Kernel
from neq_cli.freezing.operations import Convolution, Gradients, Operation, PointwiseConvolution
from neq_cli.freezing.slices import Slice, slice_rows

FRIENDLY = {"cpu": 16, "cuda": 8}
"""Channels that libraries compute at a time: a vector register's floats, a tensor core's side."""


class Plan:
    """How the gradients of one use of a layer's weight are computed.

    ``trainable``: bool, [rows of the weight], on the CPU. ``truncated``: frozen rows pass no error to the input.
    ``attached``: the output stays part of autograd's graph where nothing of the layer trains either.
    """

    def __init__(self, trainable: Tensor, *, truncated: bool, dispatch: Dispatch, attached: bool = False) -> None:
        self.trainable = trainable
        self.truncated = truncated
        self.attached = attached
        self.dispatch = dispatch
        self.rows = int(trainable.sum())
        self.computed: int | None = None  # rows computed in the last backward; None before the first
        self.choice: Choice | None = None
        self._choices: dict[object, Choice] = {}
        self._parts: dict[tuple[object, ...], Slice] = {}
        self._ones: dict[tuple[object, ...], Tensor] = {}
        self._chunks: dict[tuple[int, int], Plan] = {}

    def apply(self, operation: Operation, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the operation's output, recorded for the backward pass as the plan wants it."""
        input, weight, bias = cast_for_autocast(input, weight, bias)
        if self.rows == len(self.trainable):
            return operation.forward(input, weight, bias)
        if not self.rows:
            return self._apply_frozen(operation, input, weight, bias)
        choice = self._known_choice(operation, input, weight)
        if choice is not None and choice.kernel == "dense" and not self.truncated:
            self._note(choice, operation, weight)
            return operation.forward(input, weight, bias)
        return cast(Tensor, _SomeRows.apply(input, weight, bias, operation, self))

    def _apply_frozen(self, operation: Operation, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        self.computed = 0
        if self.attached:
            return cast(Tensor, _InputOnly.apply(input, weight, bias, operation, self.truncated))
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        if self.truncated:
            return operation.forward(input.detach(), weight, bias)
        # Autograd keeps a convolution's input even where its weight needs no gradient.
        if isinstance(operation, Convolution) and input.requires_grad:
            return cast(Tensor, _InputOnly.apply(input, weight, bias, operation, False))
        return operation.forward(input, weight, bias)

    def chunk(self, first: int, count: int) -> Plan:
        """Return the plan for ``count`` rows from ``first``, of a weight that is used piece by piece."""
        if count == len(self.trainable):
            return self
        if (first, count) not in self._chunks:
            trainable = self.trainable[first : first + count]
            self._chunks[first, count] = Plan(
                trainable, truncated=self.truncated, dispatch=self.dispatch, attached=self.attached
            )
        return self._chunks[first, count]

    def rows_computed(self) -> int | None:
        """Return how many rows' weight gradients the last backward computed; None before the first one."""
        if not self._chunks:
            return self.computed
        return sum(plan.rows if plan.computed is None else plan.computed for plan in self._chunks.values())

    def last_choice(self) -> Choice | None:
        """Return the choice of the last backward pass; None before the first, and where nothing is chosen."""
        return next((plan.choice for plan in (self, *self._chunks.values()) if plan.choice is not None), None)

    def _known_choice(self, operation: Operation, input: Tensor, weight: Tensor) -> Choice | None:
        """Return what was chosen for such a call; None where that is still to come, in the backward pass."""
        call = (operation, input.shape, input.stride(), input.dtype, input.requires_grad)
        choice = self._choices.get(call)
        if choice is None:
            choice = self.dispatch.find(self._kind(operation, input, weight, of_input=input.requires_grad))
            if choice is not None:
                self._choices[call] = choice
        return choice

    def _note(self, choice: Choice, operation: Operation, weight: Tensor) -> None:
        self.choice = choice
        dense = choice.kernel == "dense"
        self.computed = len(self.trainable if dense else self._part(choice.kernel, operation, weight).computed)

    def gradients(
        self, operation: Operation, grad_output: Tensor, input: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]
    ) -> Gradients:
        """Return the gradients ``wanted`` of input, weight and bias; those of frozen rows are zero or of no meaning."""

        def run(kernel: Kernel) -> Gradients:
            return self._run(kernel, operation, grad_output, input, weight, wanted)

        kind = self._kind(operation, input, weight, of_input=wanted[0])
        kernels, by_rule = self._candidates(operation, weight), self._by_rule(operation, weight)
        choice = self.dispatch.choose(kind, kernels, run, by_rule, input.device)
        self._note(choice, operation, weight)
        return run(choice.kernel)

    def all_gradients(
        self, operation: Operation, grad_output: Tensor, input: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]
    ) -> Gradients:
        """Return what ``gradients`` does, also where all rows train or none does."""
        if 0 < self.rows < len(self.trainable):
            return self.gradients(operation, grad_output, input, weight, wanted)
        self.computed = self.rows
        if not self.rows and self.truncated:
            return None, None, None
        of_input, of_weight, of_bias = (flag and (bool(self.rows) or place == 0) for place, flag in enumerate(wanted))
        return operation.backward(grad_output, input, weight, of_input=of_input, of_weight=of_weight, of_bias=of_bias)

    def _candidates(self, operation: Operation, weight: Tensor) -> list[Kernel]:
        kernels: list[Kernel] = ["dense", "sliced"]
        sliced, rounded = (len(self._part(kernel, operation, weight).computed) for kernel in ("sliced", "rounded"))
        if rounded > sliced:
            kernels.append("rounded")
        if _is_pointwise(operation, weight):
            kernels.append("pointwise")
        return kernels

    def _by_rule(self, operation: Operation, weight: Tensor) -> Kernel:
        # Measured on a Zen 4 core over ResNet-18's layers: up to three quarters of the rows are cheaper than all.
        return (
            "sliced"
            if 4 * len(self._part("rounded", operation, weight).computed) <= 3 * len(self.trainable)
            else "dense"
        )

    def _part(self, kernel: Kernel, operation: Operation, weight: Tensor) -> Slice:
        multiple = FRIENDLY.get(weight.device.type, 8) if kernel == "rounded" else 1
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

    def _run(
        self,
        kernel: Kernel,
        operation: Operation,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor,
        wanted: tuple[bool, bool, bool],
    ) -> Gradients:
        of_input, of_weight, of_bias = wanted
        if kernel == "dense":
            if self.truncated and of_input:
                weight = weight * self._trains(operation, weight)
            return operation.backward(
                grad_output, input, weight, of_input=of_input, of_weight=of_weight, of_bias=of_bias
            )
        part = self._part(kernel, operation, weight)
        smaller = operation.sliced(part)
        if kernel == "pointwise" and isinstance(smaller, Convolution):
            smaller = _pointwise(smaller)
        rows = part.rows_of_weight(weight, operation.layout)
        errors, seen = operation.outputs(grad_output, part), operation.inputs(input, part)
        input_gradient = None
        if of_input and not self.truncated:
            input_gradient = operation.backward(
                grad_output, input, weight, of_input=True, of_weight=False, of_bias=False
            )[0]
        partly = of_input and self.truncated
        if partly:
            rows = part.only_trainable(rows, operation.layout)
        through, of_rows, of_biases = smaller.backward(
            errors, seen, rows, of_input=partly, of_weight=of_weight, of_bias=of_bias
        )
        if through is not None:
            input_gradient = operation.whole_input_gradient(through, input, part)
        return (
            input_gradient,
            None if of_rows is None else part.gradient_of_weight(of_rows, weight, operation.layout),
            None if of_biases is None else part.gradient_of_bias(of_biases, len(self.trainable)),
        )

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


class _SomeRows(torch.autograd.Function):
    """The operation, with the gradients of a plan."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, operation: Operation, plan: Plan
    ) -> Tensor:
        ctx.operation, ctx.plan = operation, plan
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight)
        return operation.forward(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return None, None, None, None, None
        input, weight = ctx.saved_tensors
        gradients = ctx.plan.gradients(ctx.operation, grad_output, input, weight, ctx.needs_input_grad[:3])
        return *gradients, None, None


class _InputOnly(torch.autograd.Function):
    """An operation that passes the error on, or nothing where it is ``blocked``; of its input it keeps the shape."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, operation: Operation, blocked: bool
    ) -> Tensor:
        ctx.operation, ctx.blocked = operation, blocked
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight)
        ctx.shape, ctx.memory_format = input.shape, memory_format_of(input)
        return operation.forward(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None or ctx.blocked or not ctx.needs_input_grad[0]:
            return (None,) * 5
        (weight,) = ctx.saved_tensors
        # Memory of the input's shape and format, which no kernel reads: it is not even initialised.
        like = torch.empty(
            ctx.shape, dtype=grad_output.dtype, device=grad_output.device, memory_format=ctx.memory_format
        )
        gradients = ctx.operation.backward(grad_output, like, weight, of_input=True, of_weight=False, of_bias=False)
        return gradients[0], None, None, None, None


def memory_format_of(tensor: Tensor) -> torch.memory_format:
    """Return the channels_last format that ``tensor`` is in, else the contiguous one."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    memory_format = formats.get(tensor.dim(), torch.contiguous_format)
    if tensor.is_contiguous() or not tensor.is_contiguous(memory_format=memory_format):
        return torch.contiguous_format
    return memory_format


def _is_pointwise(operation: Operation, weight: Tensor) -> bool:
    return (
        isinstance(operation, Convolution)
        and operation.groups == 1
        and not operation.transposed
        and not any(operation.padding)
        and weight[0, 0].numel() == 1
    )


def _pointwise(operation: Convolution) -> PointwiseConvolution:
    return PointwiseConvolution(**vars(operation))


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu with {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def cast_for_autocast(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast as autocast would inside the operation: there, in an autograd function, the casts would not be recorded."""
    kind = input.device.type
    if not torch.is_autocast_enabled(kind):
        return input, weight, bias
    dtype = torch.get_autocast_dtype(kind)

    def cast(tensor: Tensor) -> Tensor:
        eligible = tensor.is_floating_point() and tensor.dtype != torch.float64 and tensor.device.type == kind
        return tensor.to(dtype) if eligible else tensor

    return cast(input), cast(weight), None if bias is None else cast(bias)
