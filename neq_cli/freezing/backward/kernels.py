"""The kernels that a dispatch chooses from: each computes one layer's gradients, of all rows or of those of a slice."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from neq_cli.freezing.backward import indexed
from neq_cli.freezing.backward.operations import Convolution, Gradients, Operation, PointwiseConvolution, Slice


@dataclass(frozen=True)
class BackwardCall:
    """What one use of a weight has in its backward pass, and what is asked for.

    ``truncated``: frozen rows pass no error to the input. ``rows``: of the whole weight. ``rows_alone``: of its
    gradient, the trainable rows are wanted alone, else all, with zeros.
    """

    operation: Operation
    grad_output: Tensor
    input: Tensor
    weight: Tensor
    of_input: bool
    of_weight: bool
    of_bias: bool
    truncated: bool
    rows: int
    rows_alone: bool

    def of_whole_input(self) -> Tensor | None:
        """Return the input's gradient as if nothing was frozen."""
        gradient, _, _ = self.operation.backward(
            self.grad_output, self.input, self.weight, of_input=True, of_weight=False, of_bias=False
        )
        return gradient


def dense(call: BackwardCall, weight: Tensor, part: Slice | None) -> Gradients:
    """Compute all rows. ``weight``: without what passes no error. ``part``: has the rows that are wanted alone."""
    through, of_rows, of_biases = call.operation.backward(
        call.grad_output, call.input, weight, of_input=call.of_input, of_weight=call.of_weight, of_bias=call.of_bias
    )
    if part is not None and of_rows is not None:
        of_rows = of_rows.index_select(0, part.trainable)
    return through, of_rows, of_biases


def sliced(call: BackwardCall, part: Slice, *, pointwise: bool = False) -> Gradients:
    """Compute the rows of ``part``, as a smaller layer; as one matrix product if ``pointwise``."""
    operation, layout = call.operation, call.operation.layout
    smaller = operation.sliced(part)
    if pointwise and isinstance(smaller, Convolution):
        smaller = PointwiseConvolution(**vars(smaller))
    errors, seen = operation.outputs(call.grad_output, part), operation.inputs(call.input, part)
    through = call.of_whole_input() if call.of_input and not call.truncated else None
    partly = call.of_input and call.truncated
    if partly:
        rows = part.only_trainable(part.rows_of_weight(call.weight, layout), layout)
    else:
        rows = part.in_place_of_weight(call.weight, layout)
    of_part, of_rows, of_biases = smaller.backward(
        errors, seen, rows, of_input=partly, of_weight=call.of_weight, of_bias=call.of_bias
    )
    if of_part is not None:
        through = operation.whole_input_gradient(of_part, call.input, part)
    if of_rows is not None and call.rows_alone:
        of_rows = part.those_that_train(of_rows)
    elif of_rows is not None:
        of_rows = part.gradient_of_weight(of_rows, call.weight, layout)
    return through, of_rows, None if of_biases is None else part.gradient_of_bias(of_biases, call.rows)


def by_index(call: BackwardCall, part: Slice) -> Gradients:
    """Compute the rows of ``part``, of which all train, by products that load them by their number."""
    operation = call.operation
    errors, values = operation.as_matrix(call.grad_output), operation.as_matrix(call.input)
    if errors is None or values is None:  # an error in another memory format than what it is the error of
        return sliced(call, part)
    through = of_rows = of_biases = None
    if call.of_input and call.truncated:
        matrix = call.weight.flatten(1)
        through = operation.from_matrix(indexed.input_gradient(errors, part.trainable, matrix), call.input)
    elif call.of_input:
        through = call.of_whole_input()
    if call.of_weight:
        of_rows = indexed.weight_gradient(errors, part.trainable, values).view(-1, *call.weight.shape[1:])
        of_rows = of_rows if call.rows_alone else part.gradient_of_weight(of_rows, call.weight, operation.layout)
    if call.of_bias:
        of_biases = part.gradient_of_bias(errors.sum(0).index_select(0, part.trainable), call.rows)
    return through, of_rows, of_biases


def can_go_by_index(operation: Operation, input: Tensor, weight: Tensor) -> bool:
    """Whether ``by_index`` is for such a call, on this device."""
    is_product = weight[0, 0].numel() == 1 and operation.as_matrix(input) is not None
    return is_product and input.dtype == weight.dtype and indexed.can_multiply(weight)
