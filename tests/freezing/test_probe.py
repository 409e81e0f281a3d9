from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from rounding import phi_apart, unit
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.swin_transformer import ShiftedWindowAttention, SwinTransformerBlock, SwinTransformerBlockV2

from neq_cli import Baseline, Freezer, NEq, Observation
from neq_cli.freezing import comparison
from neq_cli.freezing.equilibrium import Definition

# No net here rounds a value more than 500 times on its way, no neuron has more than 1,000 outputs. Observations are
# handed out in single precision, which rounds once more.
PHI = phi_apart(roundings=500, values=1000) + unit(torch.float32)
VELOCITY = 8 * PHI  # delta: two errors; their differences: four; and 1 / (1 - mu) of them, mu being 0.4


# All nets and inputs are in double precision, but where a test says otherwise.
pytestmark = pytest.mark.usefixtures("double")

# The oracle below shares nothing with neq: it loads the weights saved after two consecutive epochs into two fresh
# networks, records what their modules put out with hooks of its own, and works in float64 with NumPy only.

Outputs = dict[str, list[np.ndarray]]  # layer -> one array [samples, neurons, positions] for every call


def record(net: nn.Module, weights: Mapping[str, Tensor], probe: Tensor, axes: Mapping[str, int]) -> Outputs:
    """Return the outputs of the layers in ``axes``, whose values are the dimension that counts neurons."""
    net.load_state_dict(weights)
    net.eval()
    seen: Outputs = {}

    def note(name: str, output: Tensor, axis: int) -> None:
        array = output.detach().numpy().astype(np.float64)
        array = np.moveaxis(array, axis, 1)
        seen.setdefault(name, []).append(array.reshape(array.shape[0], array.shape[1], -1).copy())

    def attention(name: str) -> Callable[..., None]:
        def hook(module: nn.MultiheadAttention, positional: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
            query, key, value = (tensor.detach().double() for tensor in positional[:3])
            size = module.embed_dim
            bias = module.in_proj_bias.detach().double()
            if module.in_proj_weight is None:
                weights = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
                layers = [f"{name}.{letter}_proj" for letter in "qkv"]
            else:
                weights = list(module.in_proj_weight.chunk(3))
                layers = [f"{name}.in_proj.{letter}" for letter in "qkv"]
            for number, (layer, inputs) in enumerate(zip(layers, (query, key, value), strict=True)):
                rows = slice(number * size, (number + 1) * size)
                note(layer, inputs @ weights[number].detach().double().T + bias[rows], -1)
            note(f"{name}.out_proj", output[0], -1)

        return hook

    def swin_attention(name: str) -> Callable[..., None]:
        # Windows without padding hold every position once; a cosine does not mind their order.
        def hook(module: ShiftedWindowAttention, positional: tuple[Tensor, ...], output: Tensor) -> None:
            weight, bias = (getattr(module.qkv, part).detach().double() for part in ("weight", "bias"))
            if type(module).__name__.endswith("V2"):
                bias = bias.clone()
                bias[len(bias) // 3 : 2 * len(bias) // 3] = 0
            note(f"{name}.qkv", positional[0].detach().double() @ weight.T + bias, -1)
            note(f"{name}.proj", output, -1)

        return hook

    for name, module in net.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            module.register_forward_hook(attention(name))
        elif isinstance(module, ShiftedWindowAttention):
            module.register_forward_hook(swin_attention(name))
        elif name in axes and not name.endswith(("out_proj", "qkv", "proj")):
            module.register_forward_hook(lambda module, inputs, output, name=name: note(name, output, axes[name]))
    # With gradients, so that attention takes no fast path.
    net(probe.clone().requires_grad_())
    for name in [name for name in seen if name.endswith(".in_proj.q")]:
        whole = name.removesuffix(".q")
        query, key, value = (seen.pop(f"{whole}.{letter}")[0] for letter in "qkv")
        seen[whole] = [np.concatenate([query, key, value], 1)]
    return seen


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    lengths = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    if lengths == (0.0, 0.0):
        return 1.0
    return float(a @ b) / (lengths[0] * lengths[1]) if 0.0 not in lengths else 0.0


def phi_by_hand(new: list[np.ndarray], old: list[np.ndarray], definition: Definition) -> np.ndarray:
    neurons = range(new[0].shape[1])
    if definition == "paper":
        flat_new, flat_old = (
            [np.concatenate([call[:, i].ravel() for call in calls]) for i in neurons] for calls in (new, old)
        )
        return np.array([cosine(flat_new[i], flat_old[i]) for i in neurons])
    by_sample_new, by_sample_old = (np.concatenate(calls, 2) for calls in (new, old))
    samples = range(len(by_sample_new))
    return np.array([np.mean([cosine(by_sample_new[s, i], by_sample_old[s, i]) for s in samples]) for i in neurons])


def phi_of(
    make: Callable[[], nn.Module], old: Any, new: Any, probe: Tensor, axes: Mapping[str, int], d: Definition
) -> Any:
    outputs = record(make(), new, probe, axes), record(make(), old, probe, axes)
    return {name: phi_by_hand(outputs[0][name], outputs[1][name], d) for name in axes}


class ConvNet(nn.Module):
    """In-place ReLU right behind layers, groups, and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.Conv2d(6, 8, 3, groups=2),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(2),
        )
        self.head = nn.Linear(32, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).flatten(1))


class TokenNet(nn.Module):
    """``nn.TransformerEncoderLayer``: attention with packed weights, fast paths in eval mode, LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.embed(tokens)).mean(1))


class SwinNet(nn.Module):
    """torchvision's Swin block, whose attention passes its linear layers' weights to a function."""

    def __init__(self, block: type[SwinTransformerBlock]) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 2, 2)
        self.block = block(8, 2, [2, 2], [1, 1], mlp_ratio=2.0)
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.block(self.embed(images).permute(0, 2, 3, 1)).mean((1, 2)))


CONV_AXES = {"features.0": 1, "features.1": 1, "features.3": 1, "head": 1}
TOKEN_AXES = dict.fromkeys(
    ["embed", "block.self_attn.in_proj", "block.self_attn.out_proj", "block.linear1", "block.linear2"], -1
) | {"block.norm1": -1, "block.norm2": -1, "head": -1}
SWIN_AXES = {
    "embed": 1,
    **dict.fromkeys(["block.norm1", "block.norm2", "block.attn.qkv", "block.attn.proj"], -1),
    **dict.fromkeys(["block.mlp.0", "block.mlp.3", "head"], -1),
}
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, int]]] = {
    "conv": (ConvNet, (3, 8, 8), CONV_AXES),
    "attention": (TokenNet, (6, 5), TOKEN_AXES),
    "swin": (lambda: SwinNet(SwinTransformerBlock), (3, 8, 8), SWIN_AXES),
    "swin_v2": (lambda: SwinNet(SwinTransformerBlockV2).double(), (3, 8, 8), SWIN_AXES),
}


def train_epoch(net: nn.Module, optimizer: torch.optim.Optimizer, data: Tensor, targets: Tensor) -> None:
    net.train()
    for images, labels in zip(data.split(8), targets.split(8), strict=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()


def saved(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


@pytest.mark.parametrize("definition", ["paper", "reference"])
@pytest.mark.parametrize("net_name", NETS)
def test_training_agrees_with_an_independent_oracle(net_name: str, definition: Definition) -> None:
    make, shape, axes = NETS[net_name]
    if definition == "reference":
        # It counts samples along dimension 0, which attention uses for tokens and windows; it never freezes those.
        axes = {name: axis for name, axis in axes.items() if "attn" not in name}
    mu, epsilon = 0.4, 1e-3
    net = make()
    data, targets, probe = torch.randn(32, *shape), torch.randint(4, (32,)), torch.randn(7, *shape)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    freezer = Freezer(net, optimizer, [probe[:3], probe[3:]], NEq(epsilon, mu, definition))

    before = saved(net)
    previous_phi = dict.fromkeys(axes, 1.0)
    previous_delta = dict.fromkeys(axes, 0.0)
    velocity = dict.fromkeys(axes, 0.0)
    froze = 0
    for epoch in range(1, 6):
        train_epoch(net, optimizer, data, targets)
        now = saved(net)
        observations = freezer.step()
        expected = phi_of(make, before, now, probe, axes, definition)
        for name in axes:
            phi = expected[name]
            delta = phi - previous_phi[name]
            velocity[name] = (
                delta - mu * velocity[name]
                if definition == "paper"
                else delta - previous_delta[name] + mu * velocity[name]
            )
            got = observations[name]
            assert got.phi.numpy() == pytest.approx(phi, abs=PHI), (epoch, name)
            assert got.delta_phi.numpy() == pytest.approx(delta, abs=2 * PHI), (epoch, name)
            assert got.velocity.numpy() == pytest.approx(velocity[name], abs=VELOCITY), (epoch, name)
            previous_phi[name], previous_delta[name] = phi, delta
            froze += sum(int((~seen.trainable).sum()) for seen in observations.values())
        before = now
    # The comparison says nothing where nothing moved or nothing ever froze.
    assert min(float(seen.phi.min()) for seen in observations.values()) < 1 - 1e-5
    assert (froze > 0) == (definition == "paper" or net_name != "attention")  # the reference: convolutions, batch norms
    others = ("cpb_mlp.0", "cpb_mlp.2", "logit_scale")
    extra = {f"block.attn.{one}" for one in others} if net_name == "swin_v2" else set()
    assert set(observations) == {*NETS[net_name][2], *extra}


def move(net: nn.Module, share: float = 0.3) -> None:
    """Stand in for an epoch of training: change every parameter and buffer of ``net``."""
    with torch.no_grad():
        for tensor in [*net.parameters(), *net.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(share * torch.randn_like(tensor) * tensor.abs().mean().clamp_min(0.1))
        for name, buffer in net.named_buffers():
            if name.endswith("running_var"):
                buffer.abs_()


def freezer_for(net: nn.Module, probe: Any, policy: Any = None, **arguments: Any) -> Freezer:
    batches = probe if isinstance(probe, (list, DataLoader)) else [probe]
    return Freezer(net, torch.optim.SGD(net.parameters(), lr=0.1), batches, policy or Baseline(), **arguments)


def observe(net: nn.Module, probe: Any, policy: Any = None, share: float = 0.3) -> dict[str, Observation]:
    freezer = freezer_for(net, probe, policy)
    move(net, share)
    return freezer.step()


class Warp(nn.Module):
    """Changes every element of the input its own way, for layers that alone would only scale their outputs."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(shape))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.scale


SINGLE_LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2), (4, 9), 1),
    "Conv3d": (lambda: nn.Conv3d(2, 5, 2), (2, 3, 4, 3), 1),
    "Conv2d, circular padding": (lambda: nn.Conv2d(2, 5, 3, padding=1, padding_mode="circular"), (2, 4, 4), 1),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (4, 5), 1),
    "ConvTranspose2d, groups": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (4, 5, 5), 1),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (2, 3, 3, 3), 1),
    "Linear": (lambda: nn.Linear(5, 7), (5,), 1),
    "Linear on tokens": (lambda: nn.Linear(5, 7), (3, 2, 5), -1),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(5), (5,), 1),
    "BatchNorm1d, positions": (lambda: nn.BatchNorm1d(5), (5, 4), 1),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(5), (5, 4, 3), 1),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(5), (5, 2, 3, 2), 1),
    "GroupNorm": (lambda: nn.GroupNorm(2, 6), (6, 4, 3), 1),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(5, affine=True), (5, 4, 3), 1),
    "LayerNorm": (lambda: nn.LayerNorm(5), (4, 5), -1),
    "RMSNorm": (lambda: nn.RMSNorm(5), (4, 5), -1),
    "LayerNorm2d": (lambda: LayerNorm2d(6), (6, 4, 3), 1),
    "LayerNorm2d, square": (lambda: LayerNorm2d(4), (4, 4, 4), 1),
}


@pytest.mark.parametrize("definition", ["paper", "reference"])
@pytest.mark.parametrize("name", SINGLE_LAYERS)
def test_neurons_lie_along_the_layers_own_axis(name: str, definition: Definition) -> None:
    make_layer, shape, axis = SINGLE_LAYERS[name]

    def make() -> nn.Module:
        return nn.Sequential(Warp(shape), make_layer())

    net, probe = make(), torch.randn(5, *shape)
    before = saved(net)
    observations = observe(net, [probe[:2], probe[2:]], NEq(definition=definition), share=1.5)
    expected = phi_of(make, before, saved(net), probe, {"1": axis}, definition)["1"]
    assert observations["1"].phi.numpy() == pytest.approx(expected, abs=PHI)
    assert np.ptp(expected) > 1e-3  # neurons differ, so that a wrong axis would show


@pytest.mark.parametrize("definition", ["paper", "reference"])
def test_layer_norm_over_several_dimensions_has_a_neuron_per_element(definition: Definition) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.LayerNorm((2, 3, 4)), nn.Flatten())

    net, probe = make(), torch.randn(5, 2, 3, 4)
    before = saved(net)
    observations = observe(net, probe, NEq(definition=definition))
    # nn.Flatten puts out the same elements, one column per neuron.
    expected = phi_of(make, before, saved(net), probe, {"1": 1}, definition)["1"]
    assert observations["0"].phi.shape == (24,)
    assert observations["0"].phi.numpy() == pytest.approx(expected, abs=PHI)


class Attending(nn.Module):
    """Encoder-decoder attention: queries from one tensor, keys and values from others."""

    def __init__(self, kind: str, batch_first: bool) -> None:
        super().__init__()
        sizes = {"kdim": 6, "vdim": 4} if kind == "separate" else {}
        self.query, self.key, self.value = nn.Linear(3, 8), nn.Linear(3, sizes.get("kdim", 8)), None
        if kind != "shared memory":
            self.value = nn.Linear(3, sizes.get("vdim", 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, **sizes)
        self.head = nn.Linear(8, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        key = self.key(tokens[:, 1:])
        # `key` twice takes a path of its own, which uses two thirds of the weight in one product.
        value = key if self.value is None else self.value(tokens[:, 1:])
        query = self.query(tokens)
        if not self.attention.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        return self.head(self.attention(query, key, value)[0].mean(int(self.attention.batch_first)))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["shared memory", "packed", "separate"])
def test_attention_projections_of_different_inputs(kind: str, batch_first: bool) -> None:
    def make() -> nn.Module:
        return Attending(kind, batch_first)

    parts = ["q_proj", "k_proj", "v_proj"] if kind == "separate" else ["in_proj"]
    layers = [f"attention.{part}" for part in [*parts, "out_proj"]]
    net, probe = make(), torch.randn(5, 4, 3)
    before = saved(net)
    observations = observe(net, [probe[:2], probe[2:]])
    # The oracle stacks the three projections' outputs, which have different numbers of tokens: one at a time.
    new, old = (record_projections(make(), weights, probe) for weights in (saved(net), before))
    for layer in layers:
        expected = np.concatenate([phi_by_hand([a], [b], "paper") for a, b in zip(new[layer], old[layer], strict=True)])
        assert observations[layer].phi.numpy() == pytest.approx(expected, abs=PHI), layer


def record_projections(net: Attending, weights: Mapping[str, Tensor], probe: Tensor) -> Outputs:
    """Return the attention's projections written out, one array [tokens, neurons, 1] per slice of the weight."""
    net.load_state_dict(weights)
    net.eval()
    attention = net.attention
    with torch.no_grad():
        query, key = net.query(probe), net.key(probe[:, 1:])
        value = key if net.value is None else net.value(probe[:, 1:])
        inputs = [tensor.reshape(-1, tensor.shape[-1]).double() for tensor in (query, key, value)]
        matrices = (
            [attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight]
            if attention.in_proj_weight is None
            else list(attention.in_proj_weight.chunk(3))
        )
        biases = attention.in_proj_bias.double().chunk(3)
        arrays = [
            (tokens @ matrix.double().T + bias).numpy()[:, :, None]
            for tokens, matrix, bias in zip(inputs, matrices, biases, strict=True)
        ]
        attended = []
        attention.register_forward_hook(lambda module, inputs, output: attended.append(output[0]))
        with torch.enable_grad():
            net(probe)
    seen = {"attention.out_proj": [attended[0].detach().double().reshape(-1, 8).numpy()[:, :, None]]}
    if attention.in_proj_weight is None:
        return seen | {f"attention.{letter}_proj": [array] for letter, array in zip("qkv", arrays, strict=True)}
    return seen | {"attention.in_proj": arrays}


class Twice(nn.Module):
    """One layer called twice on different inputs, and one linear layer called through its weight once."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Linear(3, 2)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.relu_(self.norm(self.conv(images)))
        hidden = self.norm(self.conv(hidden[:, :, ::2]))
        return self.head(hidden.mean((2, 3)))


@pytest.mark.parametrize("definition", ["paper", "reference"])
def test_outputs_of_a_layer_used_twice_are_concatenated(definition: Definition) -> None:
    net, probe = Twice(), torch.randn(5, 3, 6, 6)
    before = saved(net)
    observations = observe(net, probe, NEq(definition=definition))
    expected = phi_of(Twice, before, saved(net), probe, {"conv": 1, "norm": 1}, definition)
    for name, phi in expected.items():
        assert observations[name].phi.numpy() == pytest.approx(phi, abs=PHI), name


def test_tied_layers_are_each_observed_on_their_own_outputs() -> None:
    def make() -> nn.Module:
        net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2))
        net[2].weight = net[0].weight
        return net

    net, probe = make(), torch.randn(6, 4)
    before = saved(net)
    observations = observe(net, probe)
    expected = phi_of(make, before, saved(net), probe, dict.fromkeys(["0", "2", "3"], 1), "paper")
    for name, phi in expected.items():
        assert observations[name].phi.numpy() == pytest.approx(phi, abs=PHI), name


class WithReparametrisations(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.old_style = torch.nn.utils.weight_norm(nn.Linear(6, 6))
        self.new_style = torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        torch.nn.utils.parametrizations.spectral_norm(self.attention, "in_proj_weight")
        self.last = nn.Linear(6, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.relu(self.new_style(torch.relu(self.old_style(self.first(inputs)))))
        return self.last(self.attention(hidden, hidden, hidden)[0])


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_reparametrised_weights_run_with_their_own_epochs_values() -> None:
    net, probe = WithReparametrisations().double(), torch.randn(5, 1, 4, dtype=torch.float64)
    net(probe)
    before = saved(net)
    freezer = freezer_for(net, probe)
    move(net)
    noted_down, bits = net.old_style.weight, net.old_style.weight.detach().clone()
    observations = freezer.step()
    # Both weights under weight_norm are neurons', a weight under any other parametrisation is not.
    axes = dict.fromkeys(("first", "old_style", "new_style", "attention.out_proj", "last"), -1)
    assert set(observations) == set(axes)

    def make() -> nn.Module:
        return WithReparametrisations().double()

    expected = phi_of(make, before, saved(net), probe, axes, "paper")
    for name, phi in expected.items():
        assert observations[name].phi.numpy() == pytest.approx(phi, abs=PHI), name
    # What old-style weight_norm noted down in training is what the module has again.
    assert net.old_style.weight is noted_down
    assert torch.equal(noted_down.detach(), bits)


def test_probe_in_several_batches_equals_one_batch() -> None:
    for definition in ("paper", "reference"):
        found = []
        for sizes in ([10], [4, 4, 2], [1] * 10):
            torch.manual_seed(3)
            net, probe = ConvNet(), torch.randn(10, 3, 8, 8)
            found.append(observe(net, list(probe.split(sizes)), NEq(definition=definition)))
        for name in found[0]:
            for other in found[1:]:
                assert torch.allclose(found[0][name].phi, other[name].phi, rtol=0, atol=2 * PHI), (definition, name)


@pytest.mark.parametrize("definition", ["paper", "reference"])
def test_summing_in_small_pieces_equals_one_piece(definition: Definition, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_default_dtype(torch.float32)  # the same outputs each time, of which sums are to be in double precision
    found = []
    for piece in (comparison.CHUNK, 200, 1):
        monkeypatch.setattr(comparison, "CHUNK", piece)
        torch.manual_seed(3)
        net, probe = ConvNet(), torch.randn(7, 3, 8, 8)
        freezer = freezer_for(net, probe, NEq(definition=definition))
        move(net)
        freezer.step()
        found.append(freezer.dynamics)
    for name in found[0]:
        for other in found[1:]:
            assert torch.allclose(found[0][name].phi, other[name].phi, rtol=0, atol=phi_apart(0, 1000)), name


def test_inputs_may_come_with_targets_in_dictionaries_and_from_a_loader() -> None:
    class Named(ConvNet):
        def forward(self, inputs: Any) -> Tensor:
            return super().forward(inputs["image"] if isinstance(inputs, dict) else inputs)

    probe, targets = torch.randn(6, 3, 8, 8), torch.arange(6)
    forms: list[Any] = [
        [probe],
        [(probe, targets)],
        [[probe, targets, targets]],
        [({"image": probe}, targets)],
        [{"image": probe}],
        DataLoader(TensorDataset(probe, targets), batch_size=4),
    ]
    phis = []
    for form in forms:
        torch.manual_seed(3)
        phis.append(observe(Named(), form)["features.3"].phi)
    assert all(torch.allclose(phi, phis[0], rtol=0, atol=2 * PHI) for phi in phis[1:])


def test_layers_called_with_keyword_arguments_are_observed() -> None:
    class Keyword(ConvNet):
        def forward(self, images: Tensor) -> Tensor:
            return self.head(input=self.features(images).flatten(1))

    probe = torch.randn(6, 3, 8, 8)
    net = Keyword()
    before = saved(net)
    freezer = freezer_for(net, probe)
    move(net)
    expected = phi_of(ConvNet, before, saved(net), probe, {"head": 1}, "paper")["head"]
    assert freezer.step()["head"].phi.numpy() == pytest.approx(expected, abs=PHI)
    assert freezer.anatomy.never_frozen == {"head": "output layer"}


def test_a_model_may_take_its_samples_one_at_a_time() -> None:
    class OneByOne(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(2, 3, 1), nn.Linear(3, 2)

        def forward(self, images: Tensor) -> Tensor:
            return torch.stack([self.head(self.conv(image).mean((1, 2))) for image in images])

    class AllTogether(OneByOne):
        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.conv(images).mean((2, 3)))

    net, probe = OneByOne(), torch.randn(4, 2, 3, 3)
    before = saved(net)
    seen = observe(net, probe)
    expected = phi_of(AllTogether, before, saved(net), probe, {"conv": 1, "head": 1}, "paper")
    for name, phi in expected.items():
        assert seen[name].phi.numpy() == pytest.approx(phi, abs=PHI), name


def test_the_probe_set_itself_is_not_changed() -> None:
    class InPlace(ConvNet):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images.sub_(1.0).div_(2.0))

    net, probe = InPlace(), torch.randn(5, 3, 8, 8)
    kept = probe.clone()
    before = saved(net)
    observations = observe(net, probe)
    assert torch.equal(probe, kept)
    expected = phi_of(ConvNet, before, saved(net), (kept - 1) / 2, CONV_AXES, "paper")
    for name, phi in expected.items():
        assert observations[name].phi.numpy() == pytest.approx(phi, abs=PHI), name


def test_hooks_of_the_user_do_not_change_what_is_observed() -> None:
    net, probe = ConvNet(), torch.randn(5, 3, 8, 8)
    net.features[0].register_forward_hook(lambda module, inputs, output: output.mul_(0.0).add_(1.0))
    before = saved(net)
    observations = observe(net, probe)
    expected = phi_of(ConvNet, before, saved(net), probe, {"features.0": 1}, "paper")["features.0"]
    assert observations["features.0"].phi.numpy() == pytest.approx(expected, abs=PHI)


def test_probe_runs_without_autocast_unless_asked() -> None:
    torch.set_default_dtype(torch.float32)
    seen: list[torch.dtype] = []

    class Watching(ConvNet):
        def forward(self, images: Tensor) -> Tensor:
            hidden = self.features(images)
            seen.append(hidden.dtype)
            return self.head(hidden.flatten(1))

    phis = []
    for autocast in (None, torch.bfloat16):
        torch.manual_seed(3)
        net, probe = Watching(), torch.randn(5, 3, 8, 8)
        freezer = freezer_for(net, probe, probe_autocast=autocast)
        move(net)
        seen.clear()
        with torch.autocast("cpu", torch.bfloat16):  # as a careless loop would
            phis.append(freezer.step()["features.0"].phi)
        assert set(seen) == {autocast or torch.float32}
    assert not torch.equal(phis[0], phis[1])
    # Eight roundings to 8 bits: of inputs, weight and output of two convolutions and of a norm between them.
    assert torch.allclose(phis[0], phis[1], rtol=0, atol=phi_apart(8, 1000, torch.bfloat16, growth=1.0))
