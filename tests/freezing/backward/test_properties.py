"""Any convolution and any linear layer, any frozen set, any kernel: the dense gradient's rows, and zeros.

A convolution with some trainable neurons is bit for bit, in exact mode, in its output and its input gradient, which the
same calls of PyTorch compute, and by the dense kernel in all gradients. Else, where fewer rows are computed, or other
calls of a library are made, these may add up in another order: to within ``ROUNDING`` of the tensor's largest element,
or of one.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from frozen import Sets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from neq_cli import Freezer
from neq_cli.freezing.backward.sliced import BackwardMode

# Where one side gets more padding, a copy of the input is made, by PyTorch as by us.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

ROUNDING = {torch.float32: 4e-6, torch.float64: 1e-14, torch.bfloat16: 2**-7}  # bfloat16: one unit in the last place
SETTINGS = settings(
    deadline=None,
    derandomize=True,
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


class Head(nn.Module):
    """An output layer for whatever comes: it is never frozen, so that something must be behind the layer drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear(inputs.reshape(len(inputs), -1).mean(1, keepdim=True))


def rows_of(layer: nn.Module, gradient: Tensor) -> Tensor:
    """Return the gradient of a weight as [rows, everything else]; a transposed one's rows run along dimension 1."""
    if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        groups = gradient.unflatten(0, (layer.groups, -1))
        gradient = groups.transpose(1, 2).flatten(0, 1)
    return gradient.flatten(1)


def only(layer: nn.Module, trainable: Tensor) -> Tensor:
    """Return the weight with zeros in the rows of frozen neurons."""
    weight = layer.weight.detach()
    if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        mask = trainable.view(layer.groups, 1, -1).expand(-1, len(weight) // layer.groups, -1).flatten(0, 1)
        return torch.where(mask.view(*mask.shape, *[1] * (weight.dim() - 2)), weight, 0)
    return torch.where(trainable.view(-1, *[1] * (weight.dim() - 1)), weight, 0)


def assert_close(found: Tensor, expected: Tensor, scale: Tensor, *, exactly: bool) -> None:
    if exactly:
        assert torch.equal(found, expected)
    elif expected.numel():
        largest = max(1.0, float(scale.detach().abs().max()))  # inputs, weights and errors are of that size
        assert float((found.double() - expected.double()).abs().max()) <= ROUNDING[expected.dtype] * largest


def check(
    layer: nn.Module, inputs: Tensor, trainable: Tensor, kernel: str, mode: BackwardMode, *,
    probe: Tensor, of_input: bool, memory_format: torch.memory_format, bits: bool,
) -> None:  # fmt: skip
    """Compare one backward pass with plain autograd's on a copy of the layer."""
    layer = layer.to(memory_format=memory_format)
    reference = copy.deepcopy(layer)
    model = nn.Sequential(layer, Head().to(inputs.dtype))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freezer = Freezer(model, optimizer, [probe], Sets({"0": trainable}), backward=mode)
    freezer.step()
    mine, other = (inputs.clone(memory_format=torch.preserve_format).requires_grad_(of_input) for _ in range(2))
    output, expected = layer(mine), reference(other)
    assert_close(output.detach(), expected.detach(), expected, exactly=bits)
    assert output.stride() == expected.stride()
    error = torch.randn_like(expected)
    expected.backward(error)
    if output.requires_grad:
        output.backward(error)

    some = bool(trainable.any())
    for name, dense in reference.named_parameters():
        gradient = layer.get_parameter(name).grad
        if not some:
            assert gradient is None
            continue
        assert gradient.dtype == dense.dtype
        found, wanted = (rows_of(reference, g) if name == "weight" else g[:, None] for g in (gradient, dense.grad))
        assert not found[~trainable].any()
        exactly = bits and (bool(trainable.all()) or (kernel == "dense" and mode == "exact"))
        assert_close(found[trainable], wanted[trainable], dense.grad, exactly=exactly)
    if not of_input:
        assert mine.grad is None
    elif mode == "exact":
        assert_close(mine.grad, other.grad, other.grad, exactly=bits and some)
    elif not some:
        assert mine.grad is None
    else:
        # The error path sees a weight without the frozen rows; the weight gradient above is the usual one.
        reference.weight.data = only(reference, trainable)
        other.grad = None
        reference(other).backward(error)
        assert_close(mine.grad, other.grad, other.grad, exactly=False)
    freezer.detach()


@st.composite
def frozen_sets(draw: st.DrawFn, neurons: int) -> Tensor:
    """None, some or all neurons train; whole blocks of them too, so that groups stay out."""
    kind = draw(st.sampled_from(["some", "some", "some", "block", "one", "all", "none"]))
    if kind in ("all", "none"):
        return torch.full((neurons,), kind == "all")
    if kind == "some":
        return torch.tensor(draw(st.lists(st.booleans(), min_size=neurons, max_size=neurons)))
    first = draw(st.integers(0, neurons - 1))
    count = 1 if kind == "one" else draw(st.integers(1, neurons - first))
    trainable = torch.zeros(neurons, dtype=torch.bool)
    trainable[first : first + count] = True
    return trainable


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """A layer in float32 and the shape of one input sample that it takes."""
    dimensions = draw(st.sampled_from([1, 2, 2, 3]))
    transposed = draw(st.sampled_from([False, False, True]))

    def sizes(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.integers(low, high), min_size=dimensions, max_size=dimensions)))

    groups = draw(st.sampled_from([1, 1, 2, 3]))
    inputs, outputs = groups * draw(st.integers(1, 6)), groups * draw(st.integers(1, 24 // groups))
    if draw(st.sampled_from([False, False, False, True])):  # depthwise
        inputs = groups = draw(st.integers(2, 12))
        outputs = groups * draw(st.integers(1, 3))
    # One position often enough, for the kernel of 1x1 convolutions.
    kernel = (1,) * dimensions if draw(st.sampled_from([False, False, True])) else sizes(1, 4)
    stride, dilation = sizes(1, 3), sizes(1, 2)
    common = {"groups": groups, "bias": draw(st.booleans()), "dilation": dilation}
    if transposed:
        output_padding = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
        padding = tuple(draw(st.integers(0, min(1, (k - 1) * d))) for k, d in zip(kernel, dilation, strict=True))
        make = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dimensions - 1]
        layer = make(inputs, outputs, kernel, stride, padding, output_padding, **common)
        return layer, (inputs, *sizes(2, 5))
    mode = draw(st.sampled_from(["zeros"] * 6 + ["reflect", "replicate", "circular"]))
    padding: Any = draw(st.sampled_from(["tuple", "same", 0, "valid"]))
    if padding == "same":
        stride = (1,) * dimensions
    # What is reflected or wrapped around is at most as long as the input.
    shape = tuple(d * (k - 1) + draw(st.integers(2, 4)) for k, d in zip(kernel, dilation, strict=True))
    make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    if padding == "tuple":
        padding = sizes(0, 1)
    layer = make(inputs, outputs, kernel, stride, padding, padding_mode=mode, **common)
    return layer, (inputs, *shape)


@pytest.mark.parametrize("mode", ["exact", "truncated"])
def test_any_convolution(kernel: str, mode: BackwardMode) -> None:
    @SETTINGS
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        torch.manual_seed(0)
        layer, shape = data.draw(convolutions())
        dtype = data.draw(st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16]))
        layer = layer.to(dtype)
        probe = torch.randn(1, *shape).to(dtype)
        batch = data.draw(st.sampled_from([None, 1, 2, 5]))  # None: one sample without a batch dimension
        inputs = torch.randn(*(() if batch is None else (batch,)), *shape).to(dtype)
        memory_format = torch.contiguous_format
        # PyTorch's own channels_last output is wrong on some machines (oneDNN 3, AVX-512) for one channel per group and
        # an output of one column.
        if data.draw(st.booleans()) and len(shape) > 2 and layer.in_channels > layer.groups:
            memory_format = torch.channels_last if len(shape) == 3 else torch.channels_last_3d
            if batch is not None:
                inputs = inputs.to(memory_format=memory_format)
        neurons = layer.out_channels
        check(
            layer, inputs, data.draw(frozen_sets(neurons)), kernel, mode, probe=probe, memory_format=memory_format,
            of_input=data.draw(st.booleans()), bits=True,
        )  # fmt: skip

    holds()


# A kernel of its own, "pointwise", is only for convolutions.
@pytest.mark.parametrize("kernel", ["dense", "dense from the start", "sliced", "rounded"], indirect=True)
@pytest.mark.parametrize("mode", ["exact", "truncated"])
def test_any_linear_layer(kernel: str, mode: BackwardMode) -> None:
    @SETTINGS
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        torch.manual_seed(0)
        layer = nn.Linear(data.draw(st.integers(1, 20)), data.draw(st.integers(1, 40)), bias=data.draw(st.booleans()))
        dtype = data.draw(st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16]))
        layer = layer.to(dtype)
        leading = data.draw(st.lists(st.integers(1, 4), max_size=3))
        inputs = torch.randn(*leading, layer.in_features).to(dtype)
        if leading and data.draw(st.booleans()):  # as attention's transposed tokens
            inputs = inputs.transpose(0, -1).contiguous().transpose(0, -1)
        check(
            layer, inputs, data.draw(frozen_sets(layer.out_features)), kernel, mode,
            probe=torch.randn(1, layer.in_features).to(dtype), memory_format=torch.contiguous_format,
            of_input=data.draw(st.booleans()), bits=False,
        )  # fmt: skip

    holds()
