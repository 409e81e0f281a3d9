"""Weights that a module passes to a function: MultiheadAttention's projections, Swin's and BEiT's attention."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from frozen import Sets, freeze
from torch import Tensor, nn
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

from neq_cli import Freezer
from neq_cli.freezing.backward.sliced import BackwardMode

# Sums of at most 2^14 terms, a few layers deep, that differ by their order.
TOLERANCE = 2**16 * torch.finfo(torch.float64).eps

# Convolutions of one position have a kernel of their own, "pointwise", for which "sliced" stands in elsewhere. What is
# trained or frozen whole is computed by none of them.
KERNELS = ("dense", "dense from the start", "sliced", "rounded")
BY_EACH_KERNEL = pytest.mark.parametrize("kernel", KERNELS, indirect=True)


@pytest.fixture(autouse=True)
def _sliced(double: None, force: Callable[[str], None]) -> None:
    """In tests that do not go through all kernels."""
    force("sliced")


def gradients(model: nn.Module, inputs: Any) -> dict[str, Tensor | None]:
    model.zero_grad()
    torch.manual_seed(0)  # stochastic depth
    model(inputs).to(torch.get_default_dtype()).sin().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def rows_frozen(freezer: Freezer, name: str) -> Tensor | None:
    """Return which rows of a parameter (its first dimension) are frozen; None where it is outside neurons."""
    frozen = torch.zeros(len(freezer.model.get_parameter(name)), dtype=torch.bool)
    owned = [(layer, rows) for layer, one in freezer.layers.items() for rows in one.rows if rows.parameter == name]
    for layer, rows in owned:
        # Queries, keys and values may share one bias, or have one each beside one weight.
        frozen[rows.start : rows.start + rows.count] = ~rows.of(freezer.trainable[layer])
    return frozen if owned else None


def assert_rows(
    freezer: Freezer,
    found: Mapping[str, Tensor | None],
    dense: Mapping[str, Tensor | None],
    tolerance: float = TOLERANCE,
) -> None:
    for name, expected in dense.items():
        gradient, frozen = found[name], rows_frozen(freezer, name)
        if frozen is not None and frozen.all():
            assert gradient is None, name
            continue
        if expected is None or gradient is None:
            assert all(one is None or not one.any() for one in (gradient, expected)), name
            continue
        if frozen is not None:
            assert not gradient[frozen].any(), name
            gradient, expected = gradient[~frozen], expected[~frozen]
        assert (gradient - expected).abs().max() <= tolerance * (float(dense[name].abs().max()) + 0.01), name


@contextmanager
def errors_through_trainable_rows(model: nn.Module, freezer: Freezer) -> Iterator[None]:
    """Have a stock model's linear maps pass errors by weights without the frozen rows: what truncated means."""
    stock = nn.functional.linear
    masks = {layer.weight: freezer.trainable[name] for name, layer in freezer.layers.items() if layer.cost == "linear"}
    weights = {name: model.get_parameter(name) for name in masks}

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        for name, whole in weights.items():
            if weight is whole or weight._base is whole:
                first = weight.storage_offset() // whole.stride(0)
                mask = masks[name][first : first + len(weight), None]
                constant = stock(input, torch.where(mask, weight, 0).detach())
                # The value of the usual one; the input's gradient comes through the constant.
                return stock(input.detach(), weight, bias) + constant - constant.detach()
        return stock(input, weight, bias)

    nn.functional.linear = linear
    try:
        yield
    finally:
        nn.functional.linear = stock


def check(model: nn.Module, inputs: Any, share: float | Mapping[str, Tensor], mode: BackwardMode) -> Freezer:
    reference = copy.deepcopy(model)
    freezer = freeze(model, inputs, share, mode)
    found = gradients(model, inputs)
    if mode == "truncated":
        with errors_through_trainable_rows(reference, freezer):
            dense = gradients(reference, inputs)
    else:
        dense = gradients(reference, inputs)
    assert_rows(freezer, found, dense)
    assert torch.nn.functional.linear.__module__ != "neq_cli.freezing.backward.intercepting"  # nothing is left behind
    return freezer


# MultiheadAttention.


class Attends(nn.Module):
    """Self attention, cross attention to the same tokens for keys and values, or to others for each."""

    def __init__(self, kind: str, **arguments: Any) -> None:
        super().__init__()
        self.kind = kind
        if kind == "apart":
            arguments |= {"kdim": 6, "vdim": 10}
        self.embed = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **arguments)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.embed(tokens))
        memory = hidden.flip(1)[:, :3] * 2
        if self.kind == "self":
            found, _ = self.attention(hidden, hidden, hidden)
        elif self.kind == "self, no weights":
            found, _ = self.attention(hidden, hidden, hidden, need_weights=False)
        elif self.kind == "cross":
            found, _ = self.attention(hidden, memory, memory)
        elif self.kind == "three":
            found, _ = self.attention(hidden, memory, memory.cos())
        else:
            found, _ = self.attention(hidden, memory[..., :6], torch.cat([memory, memory[..., :2]], -1))
        return self.head(torch.tanh(found))


KINDS = ["self", "self, no weights", "cross", "three", "apart"]


@pytest.mark.parametrize("mode", ["exact", "truncated"])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_multihead_attention(kind: str, share: float, mode: BackwardMode) -> None:
    for arguments in ({}, {"bias": False}, {"add_bias_kv": True}):
        model = Attends(kind, **arguments)
        freezer = check(model, torch.randn(3, 5, 8), share, mode)
        told = {name.rpartition(".")[2]: use.kernel for name, use in freezer.kernels().items()}
        names = {"q_proj", "k_proj", "v_proj"} if kind == "apart" else {"in_proj"}
        expected = {"sliced"} if share == 0.4 else {"none"}
        assert set(told) == (names | {"embed", "out_proj"} if share else set())
        # What is blocked from above computes nothing.
        assert set(told.values()) <= expected | {None} if mode == "truncated" else set(told.values()) <= expected


@pytest.mark.parametrize("mode", ["exact", "truncated"])
@BY_EACH_KERNEL
def test_every_kernel(mode: BackwardMode, kernel: str) -> None:
    for kind in KINDS:
        check(Attends(kind), torch.randn(3, 5, 8), 0.5, mode)


@pytest.mark.parametrize("mode", ["exact", "truncated"])
@pytest.mark.parametrize("letters", ["q", "k", "v", "qk", "qkv"])
@pytest.mark.parametrize("kind", KINDS)
def test_whole_projections_frozen(kind: str, letters: str, mode: BackwardMode) -> None:
    """The packed weight's rows of the queries, keys or values; the other projections train."""
    model = Attends(kind)
    sets = {f"{letter}_proj": torch.full((8,), letter not in letters) for letter in "qkv"}
    if kind == "apart":
        chosen = {f"attention.{name}": trains for name, trains in sets.items()}
    else:
        chosen = {"attention.in_proj": torch.cat(list(sets.values()))}
    freezer = check(model, torch.randn(3, 5, 8), chosen, mode)
    computed = sum(use.rows_computed for name, use in freezer.kernels().items() if "proj" in name)
    assert computed == (0 if letters == "qkv" else 8 * (3 - len(letters)) if kind != "apart" else 0)


@pytest.mark.parametrize("mode", ["exact", "truncated"])
@pytest.mark.usefixtures("single")
@pytest.mark.parametrize("kind", KINDS)
def test_attention_under_autocast(kind: str, mode: BackwardMode) -> None:
    model, tokens = Attends(kind), torch.randn(3, 5, 8)
    reference = copy.deepcopy(model)
    freezer = freeze(model, tokens, 0.4, mode)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model, tokens)
        if mode == "truncated":
            with errors_through_trainable_rows(reference, freezer):
                dense = gradients(reference, tokens)
        else:
            dense = gradients(reference, tokens)
    # A product of two numbers of eight bits each, summed over a few layers.
    assert_rows(freezer, found, dense, tolerance=2**-4)


def test_the_function_is_stock_outside_the_module_that_is_watched() -> None:
    stock = nn.functional.linear
    model, tokens = Attends("self"), torch.randn(3, 5, 8)
    freezer = freeze(model, tokens, 0.4)
    seen: list[bool] = []
    model.attention.register_forward_pre_hook(lambda *_: seen.append(nn.functional.linear is stock))
    model.attention.register_forward_hook(lambda *_: seen.append(nn.functional.linear is stock))
    model(tokens)
    assert nn.functional.linear is stock
    # An error inside leaves nothing behind either.
    with pytest.raises(AssertionError):
        model.attention(tokens[..., :5], tokens[..., :5], tokens[..., :5])
    assert nn.functional.linear is stock
    freezer.detach()
    assert type(model.attention) is nn.MultiheadAttention
    assert type(model.attention.out_proj).__name__ == "NonDynamicallyQuantizableLinear"


def test_two_models_with_watched_weights_side_by_side() -> None:
    """One module runs inside another's: each finds its own rows."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight_owner, self.inner, self.head = nn.Linear(8, 8), Attends("self"), nn.Linear(3, 2)

        def forward(self, tokens: Tensor) -> Tensor:
            hidden = nn.functional.linear(tokens, self.weight_owner.weight, self.weight_owner.bias)
            return self.head(torch.tanh(self.inner(torch.tanh(hidden))))

    model, tokens = Outer(), torch.randn(3, 5, 8)
    freezer = check(model, tokens, 0.4, "exact")
    assert freezer.anatomy.functional["weight_owner"] == ""
    assert freezer.anatomy.functional["inner.attention.in_proj"] == "inner.attention"
    assert {use.kernel for use in freezer.kernels().values()} == {"sliced"}


# Models built of it.


def encoder(*, norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 3))


def decoder() -> nn.Module:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerDecoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
            self.head = nn.Linear(16, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.layer(tokens, tokens.flip(1)[:, :4].sin()))

    return Decoder()


SMALL_SWIN = partial(SwinTransformer, [2, 2], 8, [2, 2], [2, 2], [2, 2], num_classes=5)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "encoder": (lambda: encoder(norm_first=False), (3, 5, 16)),
    "encoder, norms first": (lambda: encoder(norm_first=True), (3, 5, 16)),
    "decoder": (decoder, (3, 5, 16)),
    "small swin": (SMALL_SWIN, (2, 3, 16, 16)),
    "small swin v2": (partial(SMALL_SWIN, block=SwinTransformerBlockV2), (2, 3, 16, 16)),
}


@pytest.mark.parametrize("mode", ["exact", "truncated"])
@pytest.mark.parametrize(
    ("share", "kernel"), [(0.0, "sliced"), *((0.5, kernel) for kernel in KERNELS), (1.0, "sliced")], indirect=["kernel"]
)
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, share: float, mode: BackwardMode, kernel: str) -> None:
    make, shape = MODELS[name]
    freezer = check(make().double(), torch.randn(shape), share, mode)
    # Every projection is sliced or computes nothing: attention is not an exception.
    uses = {layer: use for layer, use in freezer.kernels().items() if freezer.layers[layer].cost == "linear"}
    assert bool(uses) == bool(share)
    applied = {kernel, "sliced" if kernel == "rounded" else kernel}
    assert {use.kernel for use in uses.values()} <= {*applied, "none", None}
    if share == 1.0:
        assert {use.kernel for use in uses.values()} == {"none"}


# Torchvision's swin_t and swin_v2_t, a quarter as wide.
NARROW = partial(SwinTransformer, [4, 4], 24, [2, 2, 6, 2], [3, 6, 12, 24], stochastic_depth_prob=0.2, num_classes=5)
SWINS = {
    "swin_t": partial(NARROW, window_size=[7, 7]),
    "swin_v2_t": partial(NARROW, [8, 8], block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2),
}


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("name", SWINS)
def test_torchvision_swin(name: str, share: float) -> None:
    check(SWINS[name]().double(), torch.randn(1, 3, 32, 32), share, "exact")


# Operands beside the weight that are not the neurons' own.


class Beit(nn.Module):
    """BEiT's attention: queries and values have biases outside of the layer that owns the weight, keys have none."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24, bias=False), nn.Linear(8, 8)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))

    def forward(self, tokens: Tensor) -> Tensor:
        bias = torch.cat((self.q_bias, torch.zeros(8), self.v_bias))
        q, k, v = nn.functional.linear(tokens, self.qkv.weight, bias).chunk(3, -1)
        return self.proj(torch.softmax(q @ k.transpose(-2, -1), -1) @ v)


class Given(nn.Module):
    """Passes one weight to a function, in one or two calls, together with what ``biases`` makes of the module."""

    def __init__(self, *biases: Callable[[Any], Tensor | None]) -> None:
        super().__init__()
        self.biases = biases
        self.map, self.elsewhere = nn.Linear(8, 8), nn.Linear(8, 8)
        self.other, self.scalar = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(1))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.elsewhere(tokens)
        for bias in self.biases:
            hidden = nn.functional.linear(torch.tanh(hidden), self.map.weight, bias(self))
        # The weight and the bias are used otherwise too.
        return hidden + self.map.bias + tokens @ self.map.weight


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Linear(8, 8), inner, nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(torch.tanh(self.embed(tokens)))))


BESIDE: dict[str, Callable[[], nn.Module]] = {
    "concatenated": Beit,
    "none": lambda: Given(lambda own: None),
    "own": lambda: Given(lambda own: own.map.bias),
    "another parameter": lambda: Given(lambda own: own.other),
    "another layer's": lambda: Given(lambda own: own.elsewhere.bias),
    "computed from its own": lambda: Given(lambda own: own.map.bias.flip(0) * 2),
    "its own, copied": lambda: Given(lambda own: own.map.bias.clone()),
    "one number for all": lambda: Given(lambda own: own.scalar),
    "of two dimensions": lambda: Given(lambda own: own.other.view(1, 8)),
    "its own and another": lambda: Given(lambda own: own.map.bias, lambda own: own.other),
}


@pytest.mark.parametrize("mode", ["exact", "truncated"])
@pytest.mark.parametrize("beside", BESIDE)
@BY_EACH_KERNEL
def test_what_is_passed_beside_the_weight_has_its_whole_gradient(beside: str, mode: BackwardMode, kernel: str) -> None:
    for share in (0.5, 1.0):
        freezer = check(Around(BESIDE[beside]()), torch.randn(3, 5, 8), share, mode)
        assert any(name in freezer.hold.slicing.plans for name in ("inner.qkv", "inner.map"))


@pytest.mark.usefixtures("single")
@pytest.mark.parametrize("share", [0.5, 1.0])
@BY_EACH_KERNEL
def test_what_is_passed_beside_the_weight_under_autocast(share: float, kernel: str) -> None:
    model, tokens = Around(Beit()), torch.randn(3, 5, 8)
    reference = copy.deepcopy(model)
    freezer = freeze(model, tokens, share)
    with torch.autocast("cpu", torch.bfloat16):
        found, dense = gradients(model, tokens), gradients(reference, tokens)
    assert_rows(freezer, found, dense, tolerance=2**-4)


class LateBias(nn.Module):
    """Sets the bias of its layer to what it computes, before every call but in the first ones."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Conv2d(8, 8, 1) if isinstance(layer, nn.Conv2d) else nn.Linear(8, 8)
        self.layer, self.head, self.logits = layer, nn.Linear(8, 2), nn.Parameter(torch.randn(8))
        del self.layer._parameters["bias"]
        self.layer.bias, self.late = None, False

    def forward(self, inputs: Tensor) -> Tensor:
        if self.late:
            self.layer.bias = self.logits.tanh()
        return self.head(self.layer(torch.tanh(self.embed(inputs))).flatten(1))


@BY_EACH_KERNEL
@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("mode", ["exact", "truncated"])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_bias_that_is_no_neurons_parameter(share: float, mode: BackwardMode, attached: bool, kernel: str) -> None:
    for layer, shape in ((nn.Linear(8, 8, bias=False), (3, 8)), (nn.Conv2d(8, 8, 2, bias=False), (3, 8, 2, 2))):
        model, inputs = LateBias(layer), torch.randn(shape)
        freezer = freeze(model, inputs, 0.0, mode)
        freezer.hold.slicing.attached = attached
        freezer.policy = Sets({"layer": torch.arange(8) < 8 * (1 - share)})
        freezer.step()
        assert "layer" in freezer.hold.slicing.plans
        model.late = True
        reference = copy.deepcopy(model)
        found, dense = gradients(model, inputs), gradients(reference, inputs)
        if mode == "truncated":  # another error reaches what is below
            for net in (found, dense):
                del net["embed.weight"], net["embed.bias"]
        assert_rows(freezer, found, dense)


def test_a_convolution_with_a_bias_from_elsewhere(kernel: str) -> None:
    class Elsewhere(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(4, 8, 1, bias=False)
            self.other = nn.Parameter(torch.randn(8))

        def forward(self, input: Tensor) -> Tensor:
            return nn.functional.conv2d(input, self.weight, self.other)

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Elsewhere(), nn.Flatten(), nn.Linear(32, 2))
    for share in (0.5, 1.0):
        check(copy.deepcopy(model), torch.randn(2, 3, 2, 2), share, "exact")


@pytest.mark.parametrize(
    ("share", "kernel"), [*((0.5, kernel) for kernel in KERNELS), (1.0, "sliced")], indirect=["kernel"]
)
@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva02_tiny_patch14_224"])
def test_timms_models_with_biases_apart(name: str, share: float, kernel: str) -> None:
    timm = pytest.importorskip("timm")
    patch = 16 if "beit" in name else 14
    small = {"img_size": 2 * patch, "depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 3}
    model = timm.create_model(name, **small).double()
    # What those models have for it, whichever defaults they come with.
    assert {"q_bias", "v_bias"} & {key.rpartition(".")[2] for key, _ in model.named_parameters()}
    check(model, torch.randn(2, 3, 2 * patch, 2 * patch), share, "exact")


def test_attention_in_eval_mode_keeps_its_fast_path_and_its_bits() -> None:
    model, tokens = encoder(norm_first=False).eval(), torch.randn(3, 5, 16)
    reference = copy.deepcopy(model)
    freeze(model, tokens, 0.5)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(model(tokens), reference(tokens))
    assert torch.backends.mha.get_fastpath_enabled()


def test_attention_with_masks_and_keywords() -> None:
    class Masked(Attends):
        def forward(self, tokens: Tensor) -> Tensor:
            hidden = torch.tanh(self.embed(tokens))
            causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
            padding = torch.zeros(len(tokens), 5, dtype=torch.bool)
            padding[:, -1] = True
            found, _ = self.attention(
                query=hidden, key=hidden, value=hidden, attn_mask=causal, key_padding_mask=padding, need_weights=False
            )
            return self.head(found)

    check(Masked("self"), torch.randn(3, 5, 8), 0.4, "exact")
