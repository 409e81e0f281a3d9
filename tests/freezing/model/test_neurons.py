from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torchvision.models import swin_transformer, vision_transformer
from torchvision.models.convnext import CNBlock
from torchvision.ops import FrozenBatchNorm2d

from neq_cli import Freezer, Observation
from neq_cli.errors import FreezingError
from neq_cli.freezing.model.layouts import RowLayout
from neq_cli.freezing.model.neurons import find_neurons


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1)


class FreezeAll:
    def __init__(self, *but: str) -> None:
        self.but = but

    def choose(self, observations: Mapping[str, Observation], epoch: int) -> Mapping[str, Tensor]:
        return {n: torch.zeros_like(seen.trainable) for n, seen in observations.items() if n not in self.but}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


LAYERS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2), 6),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, bias=False), 6),
    "Conv3d": (lambda: nn.Conv3d(4, 6, 3), 6),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3), 6),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), 6),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(4, 6, 3, groups=2, bias=False), 6),
    "Linear": (lambda: nn.Linear(4, 6), 6),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(6), 6),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(6), 6),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(6), 6),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(6), 6),
    "GroupNorm": (lambda: nn.GroupNorm(2, 6), 6),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(6, affine=True), 6),
    "LayerNorm": (lambda: nn.LayerNorm((2, 3)), 6),
    "RMSNorm": (lambda: nn.RMSNorm(6), 6),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_and_their_neurons(kind: str) -> None:
    make, count = LAYERS[kind]
    module = make()
    neurons = find_neurons(nn.ModuleDict({"part": module}))
    assert list(neurons.layers) == ["part"]
    layer = neurons.layers["part"]
    assert (layer.kind, layer.neurons, layer.module) == (kind, count, module)
    assert [rows.parameter for rows in layer.rows] == [f"part.{name}" for name, _ in module.named_parameters()]
    assert all((rows.start, rows.count) == (0, count) for rows in layer.rows)
    assert (neurons.fixed, neurons.outside, neurons.ties, neurons.always_trainable) == ({}, {}, (), {})


def test_a_model_that_is_one_layer_has_an_empty_name() -> None:
    assert list(find_neurons(nn.Linear(3, 2)).layers) == [""]


def test_subclasses_count_as_what_they_are() -> None:
    class Mine(nn.Conv2d):
        pass

    assert find_neurons(nn.Sequential(Mine(2, 3, 1))).layers["0"].kind == "Conv2d"


def test_what_owns_no_neurons() -> None:
    net = nn.ModuleDict(
        {
            "norm": nn.BatchNorm2d(4, affine=False),
            "layer_norm": nn.LayerNorm(4, elementwise_affine=False),
            "instance": nn.InstanceNorm2d(4),
            "frozen": FrozenBatchNorm2d(4),
            "relu": nn.ReLU(),
            "table": nn.Embedding(5, 4, sparse=True),
            "bags": nn.EmbeddingBag(5, 4, sparse=True),
            "slope": nn.PReLU(),
            "recurrent": parametrizations.spectral_norm(nn.LSTM(4, 3), "weight_ih_l0"),
        }
    )
    neurons = find_neurons(net)
    assert neurons.layers == {}
    assert set(neurons.outside) == {name for name, _ in net.named_parameters()}
    assert neurons.outside["table.weight"] == "its gradients are sparse"
    assert neurons.outside["bags.weight"] == "its gradients are sparse"
    assert "LSTM" in neurons.outside["recurrent.weight_hh_l0"]


@pytest.mark.parametrize("separate", [False, True])
def test_attention_projections(separate: bool) -> None:
    sizes = {"kdim": 5, "vdim": 7} if separate else {}
    neurons = find_neurons(nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, add_bias_kv=True, **sizes)}))
    counts = {name: layer.neurons for name, layer in neurons.layers.items()}
    if separate:
        assert counts == dict.fromkeys((f"attention.{part}_proj" for part in ("q", "k", "v", "out")), 8)
        # The three share one bias: each owns its third.
        starts = [neurons.layers[f"attention.{letter}_proj"].rows[1].start for letter in "qkv"]
        assert starts == [0, 8, 16]
    else:
        assert counts == {"attention.in_proj": 24, "attention.out_proj": 8}
    assert set(neurons.outside) == {"attention.bias_k", "attention.bias_v"}
    assert neurons.ties == ()


def test_attention_without_bias() -> None:
    neurons = find_neurons(nn.MultiheadAttention(8, 2, bias=False))
    assert [rows.parameter for rows in neurons.layers["in_proj"].rows] == ["in_proj_weight"]


def test_parameters_outside_neurons_are_listed() -> None:
    vit = vision_transformer.VisionTransformer(8, 4, 1, 2, 8, 16)
    assert set(find_neurons(vit).outside) == {"class_token", "encoder.pos_embedding"}
    swin = swin_transformer.SwinTransformerBlock(8, 2, [2, 2], [0, 0])
    assert set(find_neurons(swin).outside) == {"attn.relative_position_bias_table"}
    assert {"attn.qkv", "attn.proj", "norm1", "mlp.0"} < set(find_neurons(swin).layers)
    assert set(find_neurons(CNBlock(4, 1e-6, 0.0)).outside) == {"layer_scale"}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_parametrised_weights_that_have_rows_of_their_own() -> None:
    net = nn.ModuleDict(
        {
            "one length": torch.nn.utils.weight_norm(nn.Linear(3, 4, bias=False), dim=None),
            "across rows": parametrizations.weight_norm(nn.Conv2d(3, 4, 1, bias=False), dim=1),
            "transposed": parametrizations.weight_norm(nn.ConvTranspose2d(3, 4, 1, bias=False), dim=1),
            "old spectral": torch.nn.utils.spectral_norm(nn.ConvTranspose2d(3, 4, 1, bias=False)),
            "orthogonal": parametrizations.orthogonal(nn.Linear(3, 4, bias=False)),
            "row by row": parametrizations.weight_norm(nn.Conv2d(3, 4, 1, bias=False)),
            "spectral": parametrizations.spectral_norm(nn.Linear(3, 4, bias=False)),
            "pruned": prune.l1_unstructured(nn.Linear(3, 4, bias=False), "weight", 0.5),
            "attention": parametrizations.spectral_norm(nn.MultiheadAttention(4, 2), "in_proj_weight"),
            "plain": nn.Linear(3, 4),
        }
    )
    neurons = find_neurons(net)
    rows = {name: {one.parameter for one in layer.rows} for name, layer in neurons.layers.items()}
    both = (".parametrizations.weight.original1", ".parametrizations.weight.original0")
    assert rows == {
        # A length that is not each row's own stays outside.
        "one length": {"one length.weight_v"},
        "across rows": {f"across rows{both[0]}"},
        "row by row": {f"row by row{one}" for one in both},
        "transposed": {f"transposed{one}" for one in both},
        "old spectral": {"old spectral.weight_orig"},
        "spectral": {"spectral.parametrizations.weight.original"},
        "attention.out_proj": {"attention.out_proj.weight", "attention.out_proj.bias"},
        "plain": {"plain.weight", "plain.bias"},
    }
    assert all(one.count == layer.neurons == 4 for layer in neurons.layers.values() for one in layer.rows)
    assert set(neurons.outside) == {name for name, _ in net.named_parameters()} - set().union(*rows.values())
    assert neurons.outside["across rows.parametrizations.weight.original0"] == "belongs to a parametrised weight"
    assert neurons.outside["one length.weight_g"] == "belongs to a parametrised weight"


# Tied weights.


def test_linear_layers_with_one_weight_are_tied() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    net[2].weight = net[0].weight
    net[3].bias = net[2].bias
    neurons = find_neurons(net)
    assert neurons.ties == (frozenset({"0", "2", "3"}),)
    assert neurons.always_trainable == {}
    freezer = Freezer(net, sgd(net), [torch.randn(3, 4)], FreezeAll())
    assert not any(freezer.step()[name].trainable.any() for name in "023")
    # A row trains if any of them says so.
    freezer.policy = FreezeAll("2")
    assert all(freezer.step()[name].trainable.all() for name in "023")


def test_a_tied_row_trains_if_any_owner_says_so() -> None:
    class Different(FreezeAll):
        def choose(self, observations: Mapping[str, Observation], epoch: int) -> Mapping[str, Tensor]:
            first, second = torch.tensor([True, False, False, True]), torch.tensor([True, True, False, False])
            return {"0": first, "2": second}

    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2))
    net[2].weight = net[0].weight
    optimizer = sgd(net)
    freezer = Freezer(net, optimizer, [torch.randn(3, 4)], Different())
    seen = freezer.step()
    expected = [True, True, False, True]
    assert seen["0"].trainable.tolist() == seen["2"].trainable.tolist() == expected
    before = net[0].weight.detach().clone(), net[2].bias.detach().clone()
    net(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    assert (net[0].weight != before[0]).any(1).tolist() == expected
    assert (net[2].bias != before[1]).tolist() == expected


def test_a_layer_tied_to_the_output_layer_trains() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    freezer = Freezer(net, sgd(net), [torch.randn(3, 4)], FreezeAll())
    assert all(seen.trainable.all() for seen in freezer.step().values())


def test_a_linear_layer_tied_to_an_embedding_always_trains() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(6, 4)
            self.hidden = nn.Linear(4, 4)
            self.decode = nn.Linear(4, 6)
            self.decode.weight = self.table.weight
            self.head = nn.Linear(6, 2)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.decode(self.hidden(self.table(tokens))))

    net = Language()
    freezer = Freezer(net, sgd(net), [torch.tensor([[1, 2], [3, 4]])], FreezeAll())
    assert set(freezer.layers) == {"table", "hidden", "decode", "head"}
    assert all("shared along different" in freezer.anatomy.never_frozen[name] for name in ("table", "decode"))
    seen = freezer.step()
    assert {name for name in seen if seen[name].trainable.all()} == {"table", "decode", "head"}
    assert freezer.anatomy.neurons.outside == {}


def test_a_weight_shared_along_different_dimensions_always_trains() -> None:
    # A tied autoencoder: the same [4, 6, 3] has 4 neurons in the one and 6 in the other.
    net = nn.Sequential(nn.Conv1d(6, 4, 3), nn.ConvTranspose1d(4, 6, 3), nn.Conv1d(6, 2, 1))
    net[1].weight = net[0].weight
    optimizer = sgd(net)
    freezer = Freezer(net, optimizer, [torch.randn(3, 6, 9)], FreezeAll())
    assert {name: layer.neurons for name, layer in freezer.layers.items()} == {"0": 4, "1": 6, "2": 2}
    for _ in range(2):
        assert all(seen.trainable.all() for seen in freezer.step().values())
        before = net[0].weight.detach().clone()
        optimizer.zero_grad()
        net(torch.randn(3, 6, 9)).sum().backward()
        optimizer.step()
        assert (net[0].weight != before).all()


def test_a_module_under_two_names_is_one_layer() -> None:
    shared = nn.Conv2d(3, 3, 3, padding=1)
    net = nn.Sequential(shared, nn.ReLU(), shared, nn.Conv2d(3, 2, 1))
    neurons = find_neurons(net)
    assert list(neurons.layers) == ["0", "3"]
    assert neurons.ties == ()
    freezer = Freezer(net, sgd(net), [torch.randn(2, 3, 4, 4)], FreezeAll())
    assert not freezer.step()["0"].trainable.any()


# What does not train.


def test_layers_that_need_no_gradients_own_no_neurons() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    net[0].requires_grad_(False)
    net[1].weight.requires_grad_(False)
    neurons = find_neurons(net)
    assert set(neurons.layers) == {"1", "2"}
    assert set(neurons.fixed) == {"0"}
    # Of layer 1 the bias trains, and only it is held.
    assert [rows.parameter for rows in neurons.layers["1"].rows] == ["1.bias"]
    optimizer = sgd(net)
    freezer = Freezer(net, optimizer, [torch.randn(3, 4)], FreezeAll())
    assert set(freezer.step()) == {"1", "2"}
    before = [parameter.detach().clone() for parameter in net.parameters()]
    net(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    changed = [not torch.equal(old, new) for old, new in zip(before, net.parameters(), strict=True)]
    assert changed == [False, False, False, False, True, True]


def test_layers_outside_the_optimiser_own_no_neurons() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD([{"params": net[2].parameters()}, {"params": [net[1].weight], "lr": 0.2}], lr=0.1)
    freezer = Freezer(net, optimizer, [torch.randn(3, 4)], FreezeAll())
    assert set(freezer.layers) == {"1", "2"}
    assert set(freezer.anatomy.neurons.fixed) == {"0"}
    assert freezer.anatomy.neurons.outside == {}


def test_a_model_without_neurons_that_train_is_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.PReLU())
    optimizer = torch.optim.SGD(net[1].parameters(), lr=0.1)
    with pytest.raises(FreezingError, match=r"^model: no layer has neurons that train"):
        Freezer(net, optimizer, [torch.randn(3, 4)])


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_zero_size_layers_and_empty_groups() -> None:
    class Hollow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.nothing, self.head = nn.Linear(3, 4), nn.Linear(3, 0), nn.Linear(4, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.head(torch.cat([self.first(inputs), self.nothing(inputs)], 1))

    net = Hollow()
    neurons = find_neurons(net)
    assert set(neurons.layers) == {"first", "head"}
    assert neurons.outside == dict.fromkeys(["nothing.weight", "nothing.bias"], "has no elements")
    groups = [{"params": list(net.first.parameters())}, {"params": []}, {"params": list(net.head.parameters())}]
    groups.append({"params": list(net.nothing.parameters())})
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    freezer = Freezer(net, optimizer, [torch.randn(3, 3)], FreezeAll())
    for _ in range(2):
        assert not freezer.step()["first"].trainable.any()
        net(torch.randn(3, 3)).sum().backward()
        optimizer.step()


def test_lazy_modules_get_their_shapes_from_the_probe() -> None:
    def make() -> nn.Sequential:
        return nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Dropout(), nn.Flatten(), nn.LazyLinear(2))

    images = torch.randn(1, 2, 5, 5)
    torch.manual_seed(0)
    by_hand = make().eval()
    by_hand(images)
    torch.manual_seed(0)
    net = make()
    freezer = Freezer(net, torch.optim.SGD(net.parameters(), lr=0.1), [images])
    assert set(freezer.layers) == {"0", "1", "4"}
    assert all(module.training for module in net.modules())
    for name, tensor in by_hand.state_dict().items():
        assert torch.equal(net.state_dict()[name], tensor), name
    freezer.step()
    assert freezer.notes == []
    for moved in freezer.dynamics.values():
        assert torch.allclose(moved.phi, torch.ones_like(moved.phi), rtol=0, atol=1e-12), "nothing was drawn anew"


def test_lazy_modules_that_cannot_be_called_or_are_not() -> None:
    net = nn.Sequential(nn.LazyConv2d(4, 3))
    with pytest.raises(FreezingError, match=r"^probe_loader: a tensor of shape \[2, 3\] cannot be passed to the model"):
        Freezer(net, torch.optim.SGD(net.parameters(), lr=0.1), [torch.randn(2, 3)])

    class Leaves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.left = nn.LazyLinear(3), nn.LazyLinear(3)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.used(inputs)

    model = Leaves()
    with pytest.raises(FreezingError, match=r"^model: has lazy layers that no call gave a shape"):
        Freezer(model, torch.optim.SGD(model.parameters(), lr=0.1), [torch.randn(2, 3)])


def test_exclude_globs() -> None:
    net = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts, self.head = net, nn.Linear(4, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.head(self.parts["b"][1](self.parts["b"][0](self.parts["a"](inputs))))

    model = Chain()

    def frozen(*globs: str) -> set[str]:
        freezer = Freezer(model, sgd(model), [torch.randn(3, 4)], FreezeAll(), exclude=globs)
        names = {name for name, seen in freezer.step().items() if not seen.trainable.any()}
        freezer.detach()
        return names

    assert frozen() == {"parts.a", "parts.b.0", "parts.b.1"}
    assert frozen("parts.a") == {"parts.b.0", "parts.b.1"}
    assert frozen("parts.b.*") == {"parts.a"}
    assert frozen("*.0", "parts.a") == {"parts.b.1"}
    assert frozen("*") == set()
    with pytest.raises(FreezingError, match=r"^exclude: 'partz.a' matches no layer.*parts\.a"):
        frozen("partz.a")
    with pytest.raises(FreezingError, match=r"^exclude: 'xyz' matches no layer"):
        frozen("parts.a", "xyz")


# Where a neuron's numbers lie in a parameter.


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_rows_of_a_transposed_convolution(groups: int) -> None:
    # What changes output channel i, found by experiment, is neuron i.
    conv = nn.ConvTranspose2d(8, 12, 2, groups=groups, bias=False).double()
    inputs = torch.rand(1, 8, 3, 3, dtype=torch.float64) + 0.1
    layout = RowLayout("transposed", groups)
    assert layout.count(conv.weight) == 12
    with torch.no_grad():
        plain = conv(inputs)
        for i in range(12):
            view = layout.view(conv.weight)
            index = layout.index(conv.weight, torch.tensor([i]))
            kept = view[index].clone()
            assert kept.numel() == conv.weight.numel() // 12
            view[index] = kept + 1
            changed = (conv(inputs) != plain).any(0).flatten(1)
            assert changed.any(1).nonzero().flatten().tolist() == [i]
            assert changed[i].all()
            view[index] = kept
        assert torch.equal(conv(inputs), plain)
