"""Layers that are none of torch's own: found, observed, frozen to the bit, and as ever where they train."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from frozen import freeze
from rounding import apart_behind_layers
from states import whole_state
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from neq_cli import Freezer
from neq_cli.errors import FreezingError
from neq_cli.freezing import families
from neq_cli.freezing.families import Family, register
from neq_cli.freezing.model.layouts import RowLayout

pytestmark = pytest.mark.usefixtures("double")


class RMSNorm(nn.Module):
    """As Llama, Qwen and T5 have it; Gemma's multiplies by 1 + weight."""

    def __init__(self, size: int, plus: float = 0.0) -> None:
        super().__init__()
        self.weight, self.plus = nn.Parameter(torch.randn(size)), plus

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6) * (self.plus + self.weight)


class LayerScale(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(size))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.gamma


class OwnNorm(nn.Module):
    """A norm over channels in the middle, with two vectors of other names than torch's."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(size)), nn.Parameter(torch.randn(size))

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = (hidden - hidden.mean(1, keepdim=True)) / (1 + hidden.var(1, keepdim=True))
        return hidden * self.scale[:, None] + self.shift[:, None]


class Conv1D(nn.Module):
    """A linear map whose weight is stored [inputs, outputs], as GPT-2's."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ self.weight + self.bias


Conv1D.__module__ = "transformers.pytorch_utils"


class Mixing(nn.Module):
    """Looks like a scale, but each element moves every output."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.weight.sum()


class Gated(Mixing):
    """A scale that takes two inputs."""

    def forward(self, hidden: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return hidden * gate * self.weight


class Bags(nn.EmbeddingBag):
    """Bags of words, which are told by numbers."""

    def forward(self, hidden: Tensor) -> Tensor:  # type: ignore[override]
        words = (100 * hidden).long().remainder(7)
        return super().forward(words.flatten(0, 1)).view(len(hidden), -1, 6)


class Squares(nn.Bilinear):
    """Products of inputs with each other."""

    def forward(self, hidden: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(hidden, hidden)


class Gained(nn.Linear):
    """Standardises its weight row by row, and gives each row a gain, as timm's ScaledStdConv2d does."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.gain = nn.Parameter(torch.randn(outputs, 1))

    def forward(self, hidden: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean(1, keepdim=True)
        return nn.functional.linear(hidden, self.gain * weight / weight.norm(dim=1, keepdim=True), self.bias)


class Stored(nn.Module):
    """A linear map by a function that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.offset = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6))

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.einsum("...i,io->...o", hidden, self.kernel) + self.offset


class Affine(nn.Module):
    """As ResMLP's."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.alpha, self.beta = nn.Parameter(torch.randn(1, 1, size)), nn.Parameter(torch.randn(1, 1, size))

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.addcmul(self.beta, self.alpha, hidden)


TOKENS, IMAGES = (3, 5, 6), (3, 6, 4)
SIX: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "RMSNorm": (lambda: RMSNorm(6), TOKENS, -1),
    "1 + weight": (lambda: RMSNorm(6, 1.0), TOKENS, -1),
    "LayerScale": (lambda: LayerScale(6), TOKENS, -1),
    "OwnNorm": (lambda: OwnNorm(6), IMAGES, -2),
    "PReLU": (lambda: nn.PReLU(6), IMAGES, -2),
    "Conv1D": (lambda: Conv1D(6, 4), IMAGES, -1),
    "EmbeddingBag": (lambda: Bags(7, 6), IMAGES, -1),
    "Bilinear": (lambda: Squares(4, 4, 6), IMAGES, -1),
    "own gain": (lambda: Gained(4, 6), IMAGES, -1),
    "stored by inputs": (Stored, IMAGES, -1),
    "three dimensions": (lambda: Affine(6), TOKENS, -1),
}
FROZEN = torch.tensor([True, False, False, True, True, False])


class Net(nn.Module):
    def __init__(self, layer: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.layer = layer
        with torch.no_grad():
            self.head = nn.Linear(layer(torch.randn(shape))[0].numel(), 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(inputs)).flatten(1))


def net_of(name: str) -> tuple[Net, Tensor, int]:
    make, shape, axis = SIX[name]
    return Net(make(), shape), torch.randn(shape), axis


# Where a parameter has its neurons, if not in the first dimension, or in its only one.
DIMENSION = {"Conv1D": 1, "EmbeddingBag": 1, "stored by inputs": 1, "three dimensions": 2}


def by_neuron(name: str, tensor: Tensor) -> Tensor:
    return tensor.movedim(DIMENSION.get(name, 0), 0) if tensor.dim() > 1 else tensor


@pytest.mark.parametrize("name", SIX)
def test_phi_is_that_of_equation_1(name: str) -> None:
    net, inputs, axis = net_of(name)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    freezer = Freezer(net, optimizer, [inputs])
    layer = freezer.layers["layer"]
    assert (layer.neurons, layer.axis % 3) == (6, axis % 3)
    before = net.layer(inputs)
    net(inputs).square().sum().backward()
    optimizer.step()
    after = net.layer(inputs)
    old, new = (output.detach().movedim(axis, 0).flatten(1) for output in (before, after))
    expected = (old * new).sum(1) / (old.norm(dim=1) * new.norm(dim=1))
    freezer.step()
    phi = freezer.dynamics["layer"].phi
    assert torch.allclose(phi, expected, rtol=0, atol=apart_behind_layers(100))
    assert "layer" in freezer.anatomy.may_freeze
    assert freezer.coverage().outside == ()


@pytest.mark.parametrize(
    "make",
    [
        lambda some: torch.optim.SGD(some, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda some: torch.optim.AdamW(some, lr=0.1),
        lambda some: torch.optim.AdamW(some, lr=0.1, fused=True),
    ],
    ids=["SGD", "AdamW", "fused"],
)
@pytest.mark.parametrize("mode", ["exact", "truncated"])
@pytest.mark.parametrize("name", SIX)
def test_frozen_neurons_keep_every_bit_and_the_others_train_as_ever(
    name: str, mode: str, make: Callable[..., torch.optim.Optimizer]
) -> None:
    net, inputs, _ = net_of(name)
    twin = copy.deepcopy(net)
    optimizer, other = make(net.parameters()), make(twin.parameters())
    for model, one in ((net, optimizer), (twin, other)):
        model(inputs).square().sum().backward()
        one.step()
    freeze(net, inputs, {"layer": ~FROZEN}, mode, optimizer=optimizer)  # type: ignore[arg-type]
    start = {key: by_neuron(name, one.detach())[FROZEN].clone() for key, one in net.layer.named_parameters()}
    state = {key: whole_state(optimizer)[one] for key, one in net.layer.named_parameters()}
    state = copy.deepcopy(state)
    for model, one in ((net, optimizer), (twin, other)):
        one.zero_grad()
        model(inputs).square().sum().backward()
    for (key, ours), dense in zip(net.layer.named_parameters(), twin.layer.parameters(), strict=True):
        assert ours.grad is not None
        assert dense.grad is not None
        found, expected = by_neuron(name, ours.grad), by_neuron(name, dense.grad)
        assert not found[FROZEN].any()
        assert torch.allclose(found[~FROZEN], expected[~FROZEN], rtol=0, atol=apart_behind_layers(1000)), key
    optimizer.step()
    for key, one in net.layer.named_parameters():
        rows = by_neuron(name, one.detach())
        assert torch.equal(rows[FROZEN], start[key])
        now = whole_state(optimizer)[one]
        for what, value in state[key].items():
            if isinstance(value, Tensor) and value.shape == one.shape:
                assert torch.equal(by_neuron(name, now[what])[FROZEN], by_neuron(name, value)[FROZEN]), what


NORMED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: parametrizations.weight_norm(nn.Linear(4, 6)), IMAGES),
    "convolution": (lambda: parametrizations.weight_norm(nn.Conv1d(6, 6, 3, bias=False)), IMAGES),
    "old": (lambda: nn.utils.weight_norm(nn.Linear(4, 6)), IMAGES),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", NORMED)
def test_weight_norm_leaves_every_neuron_its_own_direction_and_length(name: str, whole: bool) -> None:
    make, shape = NORMED[name]
    net, inputs = Net(make(), shape), torch.randn(shape)
    names = [key for key, _ in net.layer.named_parameters()]
    plain = {key: one.detach().clone() for key, one in net.layer.named_parameters()}
    frozen = torch.ones(6, dtype=torch.bool) if whole else FROZEN
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    net(inputs).square().sum().backward()
    dense = {key: one.grad.clone() for key, one in net.layer.named_parameters() if one.grad is not None}
    optimizer.zero_grad()
    freezer = freeze(net, inputs, {"layer": ~frozen}, optimizer=optimizer)
    assert freezer.coverage().outside == ()
    assert len(freezer.layers["layer"].rows) == len(names)
    net(inputs).square().sum().backward()
    for key, one in net.layer.named_parameters():
        if whole:
            assert one.grad is None
            continue
        assert one.grad is not None
        assert not one.grad[frozen].any()
        assert torch.allclose(one.grad[~frozen], dense[key][~frozen], rtol=0, atol=apart_behind_layers(1000)), key
    before = net.layer(inputs).detach()
    optimizer.step()
    after = net.layer(inputs).detach()
    axis = 1 if name == "convolution" else -1
    still = (before == after).movedim(axis, 0).flatten(1).all(1)
    assert torch.equal(still, frozen), "a frozen neuron's output stands still, whatever becomes of the others"
    for key, one in net.layer.named_parameters():
        assert torch.equal(one.detach()[frozen], plain[key][frozen]), key


SHARED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "spectral": (lambda: parametrizations.spectral_norm(nn.Linear(4, 6)), "largest singular value"),
    "old spectral": (lambda: nn.utils.spectral_norm(nn.Linear(4, 6)), "largest singular value"),
    "lengths across rows": (lambda: parametrizations.weight_norm(nn.Linear(4, 6), dim=1), "lengths across rows"),
    "one length": (lambda: nn.utils.weight_norm(nn.Linear(4, 6), dim=None), "lengths across rows"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("name", SHARED)
def test_what_all_rows_of_a_weight_share_is_said_and_rows_stand_still_all_the_same(name: str) -> None:
    make, said = SHARED[name]
    net, inputs = Net(make(), IMAGES), torch.randn(IMAGES)
    twin = copy.deepcopy(net)
    freezer = freeze(net, inputs, {"layer": ~FROZEN}, optimizer=torch.optim.SGD(net.parameters(), lr=0.1))
    assert len(freezer.notes) == 1
    assert freezer.notes[0].startswith("layer: ")
    assert said in freezer.notes[0]
    rows = freezer.layers["layer"].rows[0].parameter
    for model in (net, twin):
        model(inputs).square().sum().backward()
    found, dense = net.get_parameter(rows).grad, twin.get_parameter(rows).grad
    assert found is not None
    assert dense is not None
    assert not found[FROZEN].any()
    assert torch.allclose(found[~FROZEN], dense[~FROZEN], rtol=0, atol=apart_behind_layers(1000))
    before = net.get_parameter(rows).detach().clone()
    freezer.optimizer.step()
    assert torch.equal((net.get_parameter(rows) == before).all(1), FROZEN)


def test_a_scale_that_is_frozen_whole_has_no_gradient() -> None:
    net, inputs, _ = net_of("RMSNorm")
    freeze(net, inputs, {"layer": torch.zeros(6, dtype=torch.bool)})
    net(inputs).sum().backward()
    assert net.layer.weight.grad is None


def test_multiply_adds_of_a_map_that_is_stored_by_its_inputs() -> None:
    net, inputs, _ = net_of("Conv1D")
    flops = freeze(net, inputs, {}).flops()
    assert flops.layers["layer"].paper_dense == 2 * 6 * 6 * 4  # six positions of a sample, 4 inputs to 6 outputs


def test_a_scale_that_takes_two_inputs() -> None:
    class Both(Net):
        def forward(self, inputs: Tensor) -> Tensor:
            return self.head(self.layer(inputs, gate=inputs).flatten(1))

    net = Both(RMSNorm(6), TOKENS)
    net.layer = Gated(6)
    freezer = Freezer(net, torch.optim.SGD(net.parameters(), lr=0.1), [torch.randn(TOKENS)])
    assert (freezer.layers["layer"].neurons, freezer.layers["layer"].axis) == (6, -1)
    assert freezer.coverage().outside == ()


def test_what_only_looks_like_a_scale_stays_outside() -> None:
    net, inputs = Net(Mixing(6), TOKENS), torch.randn(TOKENS)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    freezer = Freezer(net, optimizer, [inputs])
    assert list(freezer.layers) == ["head"]
    assert (
        freezer.coverage().outside[0].reason
        == "parameter of Mixing, tried in vain: families.register takes what you know of it"
    )
    net(inputs).sum().backward()
    optimizer.step()
    freezer.step()
    assert set(freezer.state_dict()["layers"]) == {"head"}


# What a user knows better.


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_registered", {})


@pytest.mark.usefixtures("registry")
def test_a_family_that_is_registered() -> None:
    net, inputs = Net(Stored(), IMAGES), torch.randn(IMAGES)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = Freezer(net, optimizer, [inputs])
    assert before.layers["layer"].kind == "Stored", "its user knows no better: it is found by a trial"
    before.detach()
    family = Family({"kernel": RowLayout("transposed"), "offset": RowLayout("flat")}, cost="transposed")
    register(Stored, family)
    register(Stored, family)  # once more, the same
    freezer = freeze(net, inputs, {"layer": ~FROZEN}, optimizer=optimizer)
    assert freezer.coverage().outside == ()
    net(inputs).sum().backward()
    assert net.layer.kernel.grad[:, ~FROZEN].any()
    assert not net.layer.kernel.grad[:, FROZEN].any()


@pytest.mark.usefixtures("registry")
def test_mistakes_in_families_are_one_line() -> None:
    register(Stored, Family({"kernel": RowLayout()}))
    with pytest.raises(FreezingError, match="Stored is registered already, with another family; register it once"):
        register(Stored, Family({"offset": RowLayout()}))
    with pytest.raises(FreezingError, match="Mixing: no parameter holds neurons; name one"):
        register(Mixing, Family({}))
    families._registered.clear()
    register(Stored, Family({"kernel": RowLayout(), "offset": RowLayout("flat")}))
    net = Net(Stored(), IMAGES)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(FreezingError, match=r"families: Stored 'layer' has 4 rows in 'kernel', but \[4, 6\] in its"):
        Freezer(net, optimizer, [torch.randn(IMAGES)])
    families._registered.clear()
    register(Stored, Family({"kernal": RowLayout()}))
    with pytest.raises(FreezingError, match="Stored 'layer' has no parameter 'kernal'; did you mean 'kernel'"):
        Freezer(net, optimizer, [torch.randn(IMAGES)])
    families._registered.clear()
    register(Stored, Family({"head.weight": RowLayout()}))
    with pytest.raises(FreezingError, match=r"no parameter 'head.weight'; name its own, not those of modules inside"):
        Freezer(net, optimizer, [torch.randn(IMAGES)])


@pytest.mark.usefixtures("registry")
def test_a_family_that_does_not_answer_on_the_probe() -> None:
    register(Stored, Family({"kernel": RowLayout()}))  # by inputs: a row of it moves every output
    net = Net(Stored(), IMAGES)
    with pytest.raises(
        FreezingError, match=r"^families: Stored 'layer' does not answer on the probe: .* 'layer.kernel'"
    ):
        Freezer(net, torch.optim.SGD(net.parameters(), lr=0.1), [torch.randn(IMAGES)])


@pytest.mark.usefixtures("registry")
def test_a_family_that_divides_what_another_layer_has_already() -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__(Stored(), IMAGES)
            self.before = nn.Linear(6, 4, bias=False)
            self.layer.kernel = self.before.weight

        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(self.before(self.layer(inputs)))

    net = Tied()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    register(Stored, Family({"kernel": RowLayout("transposed"), "offset": RowLayout("flat")}))
    with pytest.raises(
        FreezingError, match=r"^families: Stored 'layer' and Linear 'before' hold rows of 'layer.kernel'"
    ):
        Freezer(net, optimizer, [torch.randn(IMAGES)])
