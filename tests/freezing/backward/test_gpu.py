"""Every kernel path on a CUDA device: the dense gradient's rows, errors of truncated mode, timing, and no waiting."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from frozen import freeze
from torch import Tensor, nn

from neq_cli import Freezer
from neq_cli.freezing.backward.dispatch import Dispatch, Kernel, KernelChoice
from neq_cli.freezing.backward.sliced import BackwardMode

pytestmark = pytest.mark.gpu

KERNELS: tuple[Kernel, ...] = ("dense", "sliced", "rounded", "rounded64", "pointwise", "indexed")
# Of a tensor's largest element: sums in another order, in float32 without TF32; three significant digits of bfloat16.
TOLERANCE = {"fp32": 2e-4, "bf16": 0.03}


@pytest.fixture(autouse=True)
def _without_tf32() -> Iterator[None]:
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    yield
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed


class Forced(Dispatch):
    """Chooses one kernel for every call that it is made for."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self.kernel = kernel

    def choose(self, kind: str, kernels: Sequence[Kernel], run: Callable[[Kernel], object], *_: Any) -> KernelChoice:
        return KernelChoice(self.kernel if self.kernel in kernels else "sliced", {})


def backward(model: nn.Module, inputs: Tensor, precision: str) -> dict[str, Tensor | None]:
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
        outputs = model(inputs)
    outputs.float().sin().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def close(found: Tensor, expected: Tensor, whole: Tensor, precision: str) -> bool:
    largest = float(whole.detach().abs().max()) + 0.01
    return float((found.detach().float() - expected.detach().float()).abs().max()) <= TOLERANCE[precision] * largest


# One layer at a time.

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (lambda: nn.Conv2d(16, 40, 3, padding=1), (8, 16, 14, 14)),
    "strided, dilated conv": (lambda: nn.Conv2d(16, 40, 3, 2, 2, 2, bias=False), (8, 16, 14, 14)),
    "mirrored conv": (lambda: nn.Conv2d(16, 40, 3, padding=1, padding_mode="reflect"), (8, 16, 14, 14)),
    "pointwise conv": (lambda: nn.Conv2d(16, 40, 1), (8, 16, 14, 14)),
    "strided pointwise conv": (lambda: nn.Conv2d(16, 40, 1, 2, bias=False), (8, 16, 14, 14)),
    "grouped conv": (lambda: nn.Conv2d(16, 40, 3, groups=4), (8, 16, 14, 14)),
    "depthwise conv": (lambda: nn.Conv2d(40, 40, 3, padding=1, groups=40), (8, 40, 14, 14)),
    "transposed conv": (lambda: nn.ConvTranspose2d(16, 40, 3, 2), (8, 16, 7, 7)),
    "grouped transposed conv": (lambda: nn.ConvTranspose2d(16, 40, 2, 2, groups=4), (8, 16, 7, 7)),
    "conv over one dimension": (lambda: nn.Conv1d(16, 40, 5), (8, 16, 30)),
    "conv over three dimensions": (lambda: nn.Conv3d(8, 40, 2), (4, 8, 6, 6, 6)),
    "linear": (lambda: nn.Linear(16, 40), (32, 16)),
    "linear on tokens": (lambda: nn.Linear(16, 40), (8, 9, 16)),
}


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear(inputs.reshape(len(inputs), -1).mean(1, keepdim=True))


def by_row(layer: nn.Module, tensor: Tensor) -> Tensor:
    if isinstance(layer, nn.ConvTranspose2d) and tensor.dim() > 1:
        return tensor.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)
    return tensor


def without_frozen_rows(layer: nn.Module, trainable: Tensor) -> Tensor:
    weight, mask = layer.weight.detach(), trainable.to(layer.weight.device)
    if isinstance(layer, nn.ConvTranspose2d):
        mask = mask.view(layer.groups, 1, -1).expand(-1, len(weight) // layer.groups, -1).flatten(0, 1)
        return torch.where(mask[:, :, None, None], weight, 0)
    return torch.where(mask.view(-1, *[1] * (weight.dim() - 1)), weight, 0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, kernel: Kernel, channels_last: bool, precision: str) -> None:
    make, shape = LAYERS[name]
    if channels_last and len(shape) != 4:
        pytest.skip("has no such format")
    for mode in ("exact", "truncated"):
        for trainable in (torch.arange(40) % 3 == 0, torch.arange(40) >= 17, torch.zeros(40, dtype=torch.bool)):
            torch.manual_seed(0)
            model, inputs = nn.Sequential(make(), Head()).cuda(), torch.randn(shape, device="cuda")
            if channels_last:
                model, inputs = (one.to(memory_format=torch.channels_last) for one in (model, inputs))
            reference = copy.deepcopy(model[0])
            freezer = freeze(model, inputs, {"0": trainable}, mode, dispatch=Forced(kernel))
            mine, other = (inputs.clone().requires_grad_() for _ in range(2))
            with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
                output, expected = model[0](mine), reference(other)
            assert output.dtype == expected.dtype
            assert output.stride() == expected.stride()
            assert close(output, expected, expected, precision)
            error = torch.randn_like(expected)
            expected.backward(error)
            if output.requires_grad:
                output.backward(error)
            for key, dense in reference.named_parameters():
                gradient = model[0].get_parameter(key).grad
                if not trainable.any():
                    assert gradient is None
                    continue
                found, wanted = by_row(reference, gradient), by_row(reference, dense.grad)
                assert not found[~trainable].any()
                assert close(found[trainable], wanted[trainable], dense.grad, precision), (mode, key)
            if mode == "truncated":
                if not trainable.any():
                    assert mine.grad is None
                    continue
                reference.weight.data = without_frozen_rows(reference, trainable)
                other.grad = None
                with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
                    expected = reference(other)
                expected.backward(error)
            assert close(mine.grad, other.grad, other.grad, precision), mode
            freezer.detach()


# Whole models.


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.grouped = nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.Conv2d(32, 32, 3, groups=4)
        self.depthwise, self.pointwise = nn.Conv2d(32, 32, 3, groups=32), nn.Conv2d(32, 48, 1)
        self.up, self.head = nn.ConvTranspose2d(48, 24, 2, 2), nn.Linear(24, 5)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.grouped(torch.relu(self.norm(self.stem(images))))
        hidden = torch.relu(self.pointwise(self.depthwise(torch.relu(hidden))))
        return self.head(torch.relu(self.up(hidden)).mean((2, 3)))


class Attends(nn.Module):
    """Self attention with packed projections and cross attention to other tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(24, 32), nn.Linear(32, 5)
        self.own, self.cross = (nn.MultiheadAttention(32, 4, batch_first=True) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        hidden = hidden + self.own(hidden, hidden, hidden, need_weights=False)[0]
        memory = hidden.flip(1)[:, :7]
        return self.head(hidden + self.cross(hidden, memory, memory)[0])


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutions": (ConvNet, (8, 3, 20, 20)),
    "attention": (Attends, (8, 12, 24)),
    "encoder": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(24, 4, 64, 0.0, batch_first=True), nn.Linear(24, 5)),
        (8, 12, 24),
    ),
}


def layer_of(freezer: Freezer, name: str) -> str | None:
    for layer, found in freezer.layers.items():
        if any(rows.parameter == name for rows in found.rows):
            return layer
    return None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("name", MODELS)
def test_models_in_exact_mode(name: str, share: float, precision: str) -> None:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model, inputs = make().cuda(), torch.randn(shape, device="cuda")
    if name == "convolutions":
        model, inputs = model.to(memory_format=torch.channels_last), inputs.to(memory_format=torch.channels_last)
    reference = copy.deepcopy(model)
    freezer = freeze(model, inputs, share, "exact", dispatch=Forced("sliced"))
    found, dense = backward(model, inputs, precision), backward(reference, inputs, precision)
    for key, expected in dense.items():
        layer = layer_of(freezer, key)
        trainable = freezer.trainable[layer]
        if not trainable.any():
            assert found[key] is None, key
            continue
        own, wanted = (by_row(model.get_submodule(key.rpartition(".")[0]), one) for one in (found[key], expected))
        assert not own[~trainable].any(), key
        assert close(own[trainable], wanted[trainable], expected, precision), key
    kinds = {use.kernel for layer, use in freezer.kernels().items() if freezer.layers[layer].cost != "norm"}
    assert kinds == {"sliced" if share < 1 else "none"}


@pytest.mark.parametrize("name", MODELS)
def test_truncated_mode_agrees_with_the_cpu(name: str) -> None:
    """Where it is compared with an oracle of its own."""
    make, shape = MODELS[name]
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model, inputs = make().to(device), torch.randn(shape).to(device)
        freeze(model, inputs, 0.5, "truncated", dispatch=Forced("sliced"))
        results.append(backward(model, inputs, "fp32"))
    for key, expected in results[0].items():
        if expected is None:
            assert results[1][key] is None, key
        else:
            assert close(results[1][key].cpu(), expected, expected, "fp32"), key


# The choice of kernels, and what a step waits for.


@pytest.mark.parametrize("mode", ["exact", "truncated"])
def test_kernels_are_timed_once_and_by_the_device(mode: BackwardMode) -> None:
    model, inputs = ConvNet().cuda(), torch.randn(8, 3, 20, 20, device="cuda")
    dispatch = Dispatch()
    freezer = freeze(model, inputs, 0.5, mode, dispatch=dispatch)
    backward(model, inputs, "fp32")
    assert len(dispatch.choices) == 5  # stem, grouped, depthwise, pointwise, up
    assert all(torch.cuda.get_device_name() in kind for kind in dispatch.choices)
    assert all(choice.milliseconds["dense"] > 0 for choice in dispatch.choices.values())
    seconds, choices = dispatch.seconds, dict(dispatch.choices)
    assert seconds > 0
    backward(model, inputs, "fp32")
    assert (dispatch.seconds, dispatch.choices) == (seconds, choices)
    table = Dispatch()
    table.load_state_dict(dispatch.state_dict())
    freezer.detach()
    freezer = freeze(model, inputs, 0.5, mode, dispatch=table)
    backward(model, inputs, "fp32")
    assert table.seconds == 0
    told = {use.kernel for layer, use in freezer.kernels().items() if freezer.layers[layer].cost != "norm"}
    assert told <= {choice.kernel for choice in choices.values()}


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", ["exact", "truncated", "dense"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", MODELS)
def test_a_step_whose_kernels_are_known_never_waits(name: str, kernel: Kernel, mode: BackwardMode) -> None:
    make, shape = MODELS[name]
    model, inputs = make().cuda(), torch.randn(shape, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    freezer = freeze(model, inputs, 0.5, mode, dispatch=Forced(kernel), optimizer=optimizer)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            outputs = model(inputs)
        outputs.float().square().sum().backward()
        optimizer.step()

    for _ in range(2):
        freezer.step()  # other rows, of which the first step sends the numbers to the device
        step()
        with no_waiting():
            for _ in range(3):
                step()


def test_a_wholly_frozen_network_keeps_and_propagates_nothing() -> None:
    model, inputs = ConvNet().cuda(), torch.randn(8, 3, 20, 20, device="cuda")
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor.detach()  # the very tensor would hold itself where a node saves its output

    freeze(model, inputs, 1.0, "exact", dispatch=Forced("sliced"))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(inputs)
    assert sum(kept) == 8 * 24  # the head's input
    output.sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == {
        "head.weight", "head.bias"
    }  # fmt: skip


def test_nine_tenths_frozen_from_the_front_leave_a_third_of_a_steps_memory() -> None:
    from torchvision.models import resnet50

    model, inputs = resnet50().cuda(), torch.randn(32, 3, 224, 224, device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def most() -> int:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(inputs).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return torch.cuda.max_memory_allocated() - before

    most()
    plain = most()
    freezer = Freezer(model, optimizer, [inputs[:2]])
    total, so_far, sets = sum(layer.neurons for layer in freezer.layers.values()), 0, {}
    for name, layer in freezer.layers.items():
        so_far += layer.neurons
        sets[name] = torch.full((layer.neurons,), so_far > 0.9 * total)
    freezer.detach()
    freeze(model, inputs[:2], sets, optimizer=optimizer)
    most()
    assert most() <= 0.35 * plain
