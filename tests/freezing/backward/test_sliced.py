"""Convolutions, linear and normalisation layers: exact is the dense gradient's rows, truncated a masked network's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, get_args

import pytest
import torch
from frozen import freeze
from torch import Tensor, nn

from neq_cli import Freezer
from neq_cli.freezing.backward.sliced import MODES, BackwardMode

# Where one side gets more padding, a copy of the input is made, by PyTorch as by us.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

# Sums of at most 2^14 terms, a few layers deep, that differ by their order.
TOLERANCE = 2**16 * torch.finfo(torch.float64).eps


@pytest.fixture(autouse=True)
def _sliced(double: None, force: Callable[[str], None]) -> None:
    """In tests that do not go through all kernels."""
    force("sliced")


def loss_of(outputs: Tensor) -> Tensor:
    outputs = outputs.to(torch.get_default_dtype())
    return outputs.sin().sum() + outputs.square().mean()


def gradients(model: nn.Module, inputs: Tensor, loss: Callable[[Tensor], Tensor] = loss_of) -> dict[str, Tensor | None]:
    model.zero_grad()
    loss(model(inputs)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def rows_frozen(freezer: Freezer, name: str) -> Tensor | None:
    """Return which rows of a parameter are frozen: bool, [rows]; None where it is outside neurons."""
    for layer, found in freezer.layers.items():
        for rows in found.rows:
            if rows.parameter == name:
                return ~freezer.trainable[layer]
    return None


def by_row(freezer: Freezer, name: str, gradient: Tensor) -> Tensor:
    module = freezer.model.get_submodule(name.rpartition(".")[0])
    if isinstance(module, nn.ConvTranspose2d) and gradient.dim() > 1:
        return gradient.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(0, 1)
    return gradient


def assert_rows(
    freezer: Freezer,
    found: Mapping[str, Tensor | None],
    dense: Mapping[str, Tensor | None],
    tolerance: float = TOLERANCE,
) -> None:
    """Trainable rows equal those of ``dense`` to ``tolerance`` of its largest element; frozen ones are zero or none."""
    for name, expected in dense.items():
        gradient, frozen = found[name], rows_frozen(freezer, name)
        if frozen is not None and frozen.all():
            assert gradient is None, name
            continue
        if expected is None or gradient is None:
            # Nothing is computed where no error comes; autograd says none or zero.
            assert all(one is None or not one.any() for one in (gradient, expected)), name
            continue
        own, wanted = by_row(freezer, name, gradient), by_row(freezer, name, expected)
        if frozen is not None:
            assert not own[frozen].any(), name
            own, wanted = own[~frozen], wanted[~frozen]
        # A bias before a normalisation has a gradient of nothing but rounding.
        assert (own - wanted).abs().max() <= tolerance * (float(expected.abs().max()) + 0.01), name


class ConvNet(nn.Module):
    """Every kind of convolution, normalisation and a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24)
        self.grouped = nn.Conv2d(24, 24, 3, padding=1, groups=4, padding_mode="reflect")
        self.depthwise, self.spread = nn.Conv2d(24, 24, 4, groups=24, padding="same", bias=False), nn.GroupNorm(3, 24)
        self.pointwise = nn.Conv2d(24, 40, 1, stride=2)
        self.up = nn.ConvTranspose2d(40, 12, 3, stride=2, groups=2, output_padding=1)
        self.hidden, self.head = nn.Linear(12, 20), nn.Linear(20, 5)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.relu_(self.norm(self.stem(images)))
        hidden = hidden + self.spread(self.depthwise(torch.relu(self.grouped(hidden))))
        hidden = torch.relu(self.up(torch.relu(self.pointwise(hidden))))
        return self.head(torch.tanh(self.hidden(hidden.mean((2, 3)))))


def images(*, channels_last: bool = False) -> Tensor:
    found = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    return found.to(memory_format=torch.channels_last) if channels_last else found


# Exact.


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 1.0])
def test_exact_is_the_dense_gradients_rows(kernel: str, share: float, channels_last: bool) -> None:
    model, inputs = ConvNet(), images(channels_last=channels_last)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    reference = copy.deepcopy(model)
    freezer = freeze(model, inputs, share)
    found, dense = gradients(model, inputs), gradients(reference, inputs)
    assert_rows(freezer, found, dense)
    for name, buffer in reference.named_buffers():  # running statistics keep moving
        assert torch.equal(buffer, model.get_buffer(name))


@pytest.mark.parametrize(
    ("size", "dilation"),
    [((4,), 1), ((2, 3), 1), ((3, 2), (2, 1)), ((4, 2), 1), ((2, 3, 4), 1), ((4, 3, 2), (1, 2, 3))],
)
def test_same_padding_that_cannot_be_the_same_on_both_sides(size: tuple[int, ...], dilation: Any, kernel: str) -> None:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(size) - 1]
    shape = (2, 3, 7, 6, 5)[: 2 + len(size)]
    for batched in (True, False):
        layer = conv(3, 8, size, padding="same", dilation=dilation)
        model = nn.Sequential(layer, nn.Flatten(), nn.Linear(8 * torch.Size(shape[2:]).numel(), 2))
        reference, inputs = copy.deepcopy(layer), torch.randn(shape)
        freeze(model, inputs, {"0": torch.arange(8) < 5})
        given = inputs if batched else inputs[0]
        mine, other = given.clone().requires_grad_(), given.clone().requires_grad_()
        output, expected = layer(mine), reference(other)
        assert torch.equal(output, expected)
        error = torch.randn_like(expected)
        output.backward(error)
        expected.backward(error)
        torch.testing.assert_close(mine.grad, other.grad)
        torch.testing.assert_close(layer.weight.grad[:5], reference.weight.grad[:5])
        assert not layer.weight.grad[5:].any()


def test_with_nothing_frozen_everything_is_stock_and_bit_for_bit() -> None:
    model = ConvNet()
    reference, classes = copy.deepcopy(model), [type(module) for module in model.modules()]
    freezer = freeze(model, images(), 0.0)
    assert [type(module) for module in model.modules()] == classes
    found, dense = gradients(model, images()), gradients(reference, images())
    assert all(torch.equal(found[name], dense[name]) for name in dense)
    assert freezer.kernels() == {}


def test_a_layer_whose_neurons_all_train_is_stock_beside_others_that_do_not() -> None:
    model = ConvNet()
    freezer = freeze(model, images(), {"grouped": torch.arange(24) > 3})
    classes = {name: type(module) for name, module in model.named_children()}
    assert [name for name, kind in classes.items() if kind is not getattr(nn, kind.__name__)] == ["grouped"]
    assert list(freezer.kernels()) == ["grouped"]


def test_dense_computes_everything_and_discards_it() -> None:
    model = ConvNet()
    reference = copy.deepcopy(model)
    classes = [type(module) for module in model.modules()]
    freezer = freeze(model, images(), 0.5, "dense")
    assert [type(module) for module in model.modules()] == classes
    found, dense = gradients(model, images()), gradients(reference, images())
    assert_rows(freezer, found, dense, tolerance=0.0)
    assert freezer.kernels() == {}


def test_what_each_layer_did_is_told(force: Callable[[str], None]) -> None:
    force("pointwise")
    model = ConvNet()
    freezer = freeze(
        model,
        images(),
        {
            "stem": torch.zeros(24, dtype=torch.bool),
            "norm": torch.zeros(24, dtype=torch.bool),
            "grouped": torch.arange(24) < 2,
            "spread": torch.arange(24) < 2,
            "pointwise": torch.arange(40) < 7,
        },
    )
    before = freezer.kernels()
    assert (before["grouped"].kernel, before["grouped"].rows_computed) == (None, 2)
    gradients(model, images())
    told = {name: (use.kernel, use.rows_computed) for name, use in freezer.kernels().items()}
    assert told == {
        "stem": ("none", 0),
        "norm": ("none", 0),
        "grouped": ("sliced", 2),
        "spread": ("dense", 24),
        "pointwise": ("pointwise", 7),
    }
    assert freezer.kernels()["spread"].reason.startswith("normalisation: ")
    assert freezer.kernels()["stem"].reason == "no neuron trains"


# Truncated: the error path sees the trainable rows only, the weight gradient is the usual one.


def truncated_reference(model: nn.Module, freezer: Freezer) -> nn.Module:
    """Return a copy of a stock ``model`` whose convolution and linear layers pass errors by masked weights."""
    reference = copy.deepcopy(model)
    for name, module in reference.named_modules():
        if name not in freezer.trainable or isinstance(module, (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)):
            continue
        mask = freezer.trainable[name]
        if isinstance(module, nn.ConvTranspose2d):
            mask = mask.view(module.groups, 1, -1).expand(-1, module.in_channels // module.groups, -1).flatten(0, 1)
            mask = mask[:, :, None, None]
        else:
            mask = mask.view(-1, *[1] * (module.weight.dim() - 1))
        module.forward = _masked(module, mask)
    return reference


def _masked(module: nn.Module, mask: Tensor) -> Callable[[Tensor], Tensor]:
    own = copy.deepcopy(module)  # the layer with constants for parameters

    def forward(inputs: Tensor) -> Tensor:
        own.weight.data = torch.where(mask, module.weight, 0).detach()
        constant = type(module).forward(own.requires_grad_(False), inputs)
        usual = type(module).forward(module, inputs.detach())
        # The value of the usual one; the input's gradient comes through the constant, the weight's through the usual.
        return usual + constant - constant.detach()

    return forward


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 1.0])
def test_truncated_passes_errors_by_the_trainable_rows(kernel: str, share: float) -> None:
    model = ConvNet()
    stock = copy.deepcopy(model)
    freezer = freeze(model, images(), share, "truncated")
    reference = truncated_reference(stock, freezer)
    assert_rows(freezer, gradients(model, images()), gradients(reference, images()))


def test_truncated_differs_from_exact_where_something_is_frozen() -> None:
    found = []
    for mode in ("exact", "truncated"):
        torch.manual_seed(0)
        model = ConvNet()
        freeze(model, images(), {"pointwise": torch.arange(40) < 20}, mode)
        found.append(gradients(model, images()))
    for name in (name for name in found[0] if name.endswith("weight")):
        below = name.startswith(("stem", "norm", "grouped", "depthwise", "spread"))
        assert torch.allclose(found[0][name], found[1][name], rtol=1e-3, atol=1e-6) != below, name


@pytest.mark.parametrize("layer", ["stem", "grouped", "depthwise", "pointwise", "up", "hidden"])
def test_a_wholly_frozen_layer_passes_nothing_on_in_truncated_mode(layer: str, kernel: str) -> None:
    model = ConvNet()
    whole = {layer: torch.zeros(getattr(model, layer).weight.shape[0], dtype=torch.bool)}
    if layer == "up":
        whole[layer] = torch.zeros(12, dtype=torch.bool)
    stock = copy.deepcopy(model)
    freezer = freeze(model, images(), whole, "truncated")
    seen: list[bool] = []
    model.get_submodule(layer).register_forward_hook(lambda _, __, output: seen.append(output.requires_grad))
    found = gradients(model, images())
    assert seen == [False]
    assert_rows(freezer, found, gradients(truncated_reference(stock, freezer), images()))
    below = {"stem": [], "up": ["stem", "pointwise"], "hidden": ["stem", "up"], "pointwise": ["stem", "grouped"]}
    for name in below.get(layer, []):
        assert found[f"{name}.weight"] is None or not found[f"{name}.weight"].any()


# Normalisation layers.

NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "batch": (lambda: nn.BatchNorm2d(6), (4, 6, 3, 3)),
    "batch over one dimension": (lambda: nn.BatchNorm1d(6), (4, 6)),
    "batch over three dimensions": (lambda: nn.BatchNorm3d(6), (4, 6, 2, 3, 2)),
    "batch without statistics": (lambda: nn.BatchNorm2d(6, track_running_stats=False), (4, 6, 3, 3)),
    "group": (lambda: nn.GroupNorm(2, 6), (4, 6, 3, 3)),
    "layer": (lambda: nn.LayerNorm(6), (4, 5, 6)),
    "layer over two dimensions": (lambda: nn.LayerNorm((2, 3)), (4, 5, 2, 3)),
    "layer without bias": (lambda: nn.LayerNorm(6, bias=False), (4, 5, 6)),
    "root mean square": (lambda: nn.RMSNorm(6), (4, 5, 6)),
    "instance": (lambda: nn.InstanceNorm2d(6, affine=True), (4, 6, 3, 3)),
    "instance with statistics": (lambda: nn.InstanceNorm1d(6, affine=True, track_running_stats=True), (4, 6, 5)),
}


class Flat(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.flatten(1)


def normed(name: str) -> tuple[nn.Module, Tensor]:
    make, shape = NORMS[name]
    norm = make()
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 1.0)
    for buffer in norm.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return nn.Sequential(norm, nn.Tanh(), Flat(), nn.Linear(torch.Size(shape[1:]).numel(), 2)), torch.randn(shape)


@pytest.mark.parametrize("mode", ["exact", "truncated"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", ["some", "all"])
@pytest.mark.parametrize("name", NORMS)
def test_norm_layers(name: str, frozen: str, training: bool, mode: BackwardMode) -> None:
    model, inputs = normed(name)
    reference = copy.deepcopy(model)
    trainable = torch.arange(6) < (3 if frozen == "some" else 0)
    freezer = freeze(model, inputs, {"0": trainable}, mode)
    model.train(training)
    reference.train(training)
    mine, other = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
    found, dense = gradients(model, mine), gradients(reference, other)
    if frozen == "some":
        flat = {key: None if g is None else g.flatten() if key.startswith("0.") else g for key, g in found.items()}
        for key, gradient in dense.items():
            expected = gradient.flatten() * trainable if key.startswith("0.") else gradient
            assert torch.equal(flat[key], expected), key
        assert freezer.kernels()["0"].kernel == "dense"
    else:
        assert all(found[key] is None for key in dense if key.startswith("0."))
        assert all(torch.equal(found[key], dense[key]) for key in dense if not key.startswith("0."))
        assert freezer.kernels()["0"].kernel == "none"
    # They are exact in every mode; a fixed scale and shift differs from PyTorch's formula by rounding.
    torch.testing.assert_close(mine.grad, other.grad, rtol=1e-13, atol=1e-14)
    for buffer, expected in zip(model.buffers(), reference.buffers(), strict=True):
        assert torch.equal(buffer, expected)


# What surrounds a layer.


@pytest.mark.parametrize("mode", ["exact", "truncated"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.usefixtures("single")
def test_autocast(dtype: torch.dtype, share: float, mode: BackwardMode, kernel: str) -> None:
    model = ConvNet()
    stock = copy.deepcopy(model)
    freezer = freeze(model, images(), share, mode)
    reference = stock if mode == "exact" else truncated_reference(stock, freezer)

    def gradients_of(net: nn.Module, context: torch.dtype | None) -> dict[str, Tensor | None]:
        net.zero_grad()
        with torch.autocast("cpu", context or torch.bfloat16, enabled=context is not None):
            output = net(images())
        assert output.dtype == (context or torch.float32)
        loss_of(output).backward()
        return {name: parameter.grad for name, parameter in net.named_parameters()}

    found = gradients_of(model, dtype)
    assert all(gradient is None or gradient.dtype == torch.float32 for gradient in found.values())
    # To the same rounding as the dense gradient in that precision: three significant digits in bfloat16.
    assert_rows(freezer, found, gradients_of(reference, dtype), tolerance=0.03 if dtype == torch.bfloat16 else 0.004)


def test_other_precisions(kernel: str) -> None:
    for dtype, tolerance in ((torch.float32, 2**16 * torch.finfo(torch.float32).eps), (torch.bfloat16, 0.03)):
        model = ConvNet().to(dtype)
        reference = copy.deepcopy(model)
        freezer = freeze(model, images().to(dtype), 0.5)
        found, dense = gradients(model, images().to(dtype)), gradients(reference, images().to(dtype))
        assert_rows(freezer, found, dense, tolerance)


@pytest.mark.parametrize("mode", ["exact", "truncated"])
def test_gradients_accumulate_over_batches(mode: BackwardMode, kernel: str) -> None:
    model = ConvNet()
    stock = copy.deepcopy(model)
    freezer = freeze(model, images(), 0.5, mode)
    reference = stock if mode == "exact" else truncated_reference(stock, freezer)
    for batch in (images(), 2 * images(), images().flip(3), images()[:2]):
        for net in (model, reference):
            loss_of(net(batch)).backward()
    found, dense = ({n: p.grad for n, p in net.named_parameters()} for net in (model, reference))
    assert_rows(freezer, found, dense)


class Twice(nn.Module):
    """One convolution and one linear layer, each used twice, on inputs of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.relu(self.conv(images))
        hidden = self.conv(nn.functional.avg_pool2d(hidden, 2)).mean((2, 3))
        return self.head(self.linear(torch.tanh(self.linear(hidden))))


class Tied(nn.Module):
    """Two layers with one weight, and biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.second.weight = self.first.weight

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.second(torch.tanh(self.first(images.mean((2, 3))))))


@pytest.mark.parametrize("mode", ["exact", "truncated"])
@pytest.mark.parametrize("frozen", [1, 2, 4])
def test_a_layer_that_is_used_twice(frozen: int, mode: BackwardMode, kernel: str) -> None:
    inputs = torch.randn(3, 4, 6, 6)
    model = Twice()
    stock = copy.deepcopy(model)
    trainable = torch.arange(4) >= frozen
    freezer = freeze(model, inputs, {"conv": trainable, "linear": trainable}, mode)
    reference = stock if mode == "exact" else truncated_reference(stock, freezer)
    assert_rows(freezer, gradients(model, inputs), gradients(reference, inputs))


@pytest.mark.parametrize("frozen", [1, 2, 4])
def test_tied_weights(frozen: int, kernel: str) -> None:
    inputs = torch.randn(3, 4, 6, 6)
    model = Tied()
    reference = copy.deepcopy(model)
    late, early = torch.arange(4) >= frozen, torch.arange(4) < 4 - frozen
    freezer = freeze(model, inputs, {"first": late, "second": early})
    # A row trains if either of its owners says so.
    assert torch.equal(freezer.trainable["first"], late | early)
    assert_rows(freezer, gradients(model, inputs), gradients(reference, inputs))
    same = freeze(copy.deepcopy(reference), inputs, {"first": late, "second": late})
    assert_rows(same, gradients(same.model, inputs), gradients(reference, inputs))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_double_backward(share: float, kernel: str) -> None:
    """A gradient penalty: the loss holds the gradient with respect to the images."""

    class Smooth(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 20, 3, groups=1), nn.BatchNorm2d(20)
            self.grouped, self.point = nn.Conv2d(20, 20, 3, groups=2), nn.Conv2d(20, 12, 1)
            self.up, self.head = nn.ConvTranspose2d(12, 6, 2, groups=2), nn.Linear(6, 2)

        def forward(self, images: Tensor) -> Tensor:
            hidden = torch.tanh(self.point(torch.tanh(self.grouped(torch.tanh(self.norm(self.conv(images)))))))
            return self.head(torch.tanh(self.up(hidden)).mean((2, 3)))

    def penalised(model: nn.Module) -> dict[str, Tensor | None]:
        inputs = images().double().requires_grad_()
        output = model(inputs).square().sum()
        (through,) = torch.autograd.grad(output, inputs, create_graph=True)
        (output + through.square().sum()).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    for training in (True, False):
        model = Smooth().double().train(training)
        reference = copy.deepcopy(model)
        freezer = freeze(model, images().double(), share)
        found = penalised(model)
        assert_rows(freezer, found, penalised(reference), tolerance=1e-11)


def test_the_gradient_of_a_gradient_of_weights(kernel: str) -> None:
    """As in meta-learning: differentiate through an update of the trainable rows."""
    inputs = torch.randn(5, 6, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    reference = copy.deepcopy(model)
    trainable = torch.arange(8) % 2 == 0
    freeze(model, inputs, {"0": trainable})
    second = []
    for net in (model, reference):
        (weight,) = torch.autograd.grad(net(inputs).square().sum(), net[0].weight, create_graph=True)
        (found,) = torch.autograd.grad(weight[trainable].pow(3).sum(), net[2].weight)
        second.append(found)
    torch.testing.assert_close(second[0], second[1])


def test_only_some_gradients_are_asked_for(kernel: str) -> None:
    model, inputs = ConvNet(), images().requires_grad_()
    reference = copy.deepcopy(model)
    freezer = freeze(model, images(), 0.5)
    for names in (["stem.weight"], ["up.bias", "head.weight"], ["hidden.weight", "norm.weight"]):
        for net_inputs in ((), (inputs,)):
            found, dense = (
                torch.autograd.grad(loss_of(net(inputs)), [*map(net.get_parameter, names), *net_inputs])
                for net in (model, reference)
            )
            for name, one, other in zip(names, found, dense, strict=False):
                frozen = rows_frozen(freezer, name)
                keep = ... if frozen is None else ~frozen
                own, wanted = by_row(freezer, name, one), by_row(freezer, name, other)
                torch.testing.assert_close(own[keep], wanted[keep], rtol=TOLERANCE, atol=TOLERANCE)
            if net_inputs:
                torch.testing.assert_close(found[-1], dense[-1], rtol=TOLERANCE, atol=TOLERANCE)
    for name in ("stem", "grouped"):
        model.get_submodule(name).weight.requires_grad_(False)
        reference.get_submodule(name).weight.requires_grad_(False)
    found, dense = gradients(model, images()), gradients(reference, images())
    assert found["stem.weight"] is found["grouped.weight"] is None
    assert_rows(freezer, found, dense)


def test_recipes_and_the_bench_name_the_same_modes() -> None:
    from neq_cli.recipe import values
    from neq_cli.training.bench import options

    assert MODES == get_args(values.BackwardMode) == options.MODES
