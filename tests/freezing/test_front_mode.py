"""A frozen front as at inference: what it computes, what stands still in it, and that thawing undoes all of it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from frozen import Sets
from rounding import GROWTH, gamma
from torch import Tensor, nn

from neq_cli import Freezer, NEq
from neq_cli.errors import FreezingError
from neq_cli.freezing.backward.sliced import BackwardMode


class Rests(Sets):
    scope = "front"
    front_mode = "inference"


class Block(nn.Module):
    """A convolution with its norm, a branch whose convolution is also passed on as it is, and dropout."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding="same", padding_mode="circular"), nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        branch = self.conv2(x)
        return self.drop(torch.relu(self.bn2(branch) + branch))  # type: ignore[no-any-return]


class Net(nn.Module):
    """Two blocks, dropout before, between and after them, and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between, self.after = nn.Dropout(0.3), nn.Dropout(0.3), nn.Dropout(0.3)
        self.first, self.second = Block(2), Block(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.between(self.first(self.before(x))))
        return self.head(self.after(input=x).mean((2, 3)))  # type: ignore[no-any-return]


FIRST = ("first.conv1", "first.bn1", "first.conv2", "first.bn2")


@pytest.fixture(autouse=True)
def _double(double: None) -> None:
    """What is folded differs by rounding alone."""


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 2, 6, 6)


def made(images: Tensor, mode: BackwardMode = "exact", kind: Any = torch.optim.SGD) -> tuple[Net, Freezer]:
    net = Net()
    for _ in range(3):  # running statistics of their own
        net(images * 3 + 1)
    optimizer = kind(net.parameters(), lr=0.05, weight_decay=0.1)
    return net, Freezer(net, optimizer, [images], Rests({}), backward=mode)


def freeze(freezer: Freezer, names: tuple[str, ...] = FIRST) -> None:
    sets = {name: torch.full((layer.neurons,), name not in names) for name, layer in freezer.layers.items()}
    freezer.policy.sets = sets  # type: ignore[attr-defined]
    freezer.step()


def output_of_first(net: Net, images: Tensor) -> Tensor:
    """Return what the second block gets while the model trains."""
    seen: list[Tensor] = []
    hook = net.between.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].detach().clone()))
    net(images)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("mode", ["exact", "truncated", "dense"])
def test_a_front_computes_what_it_does_at_inference(mode: BackwardMode, images: Tensor) -> None:
    net, freezer = made(images, mode)
    with torch.no_grad():
        expected = copy.deepcopy(net.first).eval()(images)
    freeze(freezer)
    assert net.training
    statistics = copy.deepcopy(dict(net.first.named_buffers()))
    others = copy.deepcopy(dict(net.second.named_buffers()))
    found = output_of_first(net, images)  # dropout before and in it is off
    torch.testing.assert_close(found, expected, rtol=0, atol=gamma(200) * GROWTH * float(expected.abs().max()))
    assert all(torch.equal(net.first.get_buffer(name), value) for name, value in statistics.items())
    assert not torch.equal(net.second.bn1.running_mean, others["bn1.running_mean"]), "what trains goes on as ever"
    assert all(module.training for module in net.modules())


def test_dropout_rests_where_nothing_before_it_trains(images: Tensor) -> None:
    net, freezer = made(images)
    off: dict[str, bool] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, given: Any, named: Any, output: Tensor) -> None:
            off[name] = torch.equal(next(iter((*given, *named.values()))), output)

        return hook

    for name, module in net.named_modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(note(name), with_kwargs=True)
    freeze(freezer)
    net(images)
    assert off == {"before": True, "first.drop": True, "between": True, "second.drop": False, "after": False}
    freeze(freezer, ())
    net(images)
    assert off == dict.fromkeys(off, False)


def test_norms_are_folded_where_nobody_else_sees_what_comes_before_them(images: Tensor) -> None:
    net, freezer = made(images)
    freeze(freezer)
    folded = [name for name, module in net.named_modules() if "_neq_fold" in vars(module)]
    assert folded == ["first.conv1"], "the second convolution's output is added to the norm's as well"
    called: list[Tensor] = []
    original = nn.functional.batch_norm
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "batch_norm", lambda *a, **k: called.append(a[0]) or original(*a, **k))
        net(images)
    assert len(called) == 3


def test_a_fold_follows_what_is_loaded(images: Tensor) -> None:
    net, freezer = made(images)
    freeze(freezer)
    net(images)
    other = Net()
    other(images * 2)
    net.load_state_dict(other.state_dict())
    with torch.no_grad():
        expected = copy.deepcopy(other.first).eval()(images)
    found = output_of_first(net, images)
    torch.testing.assert_close(found, expected, rtol=0, atol=gamma(200) * GROWTH * float(expected.abs().max()))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_thawing_undoes_all_of_it(kind: Any, images: Tensor) -> None:
    net, freezer = made(images, kind=kind)
    before = copy.deepcopy(net.state_dict())
    state = copy.deepcopy(freezer.optimizer.state_dict()["state"])
    freeze(freezer)
    for _ in range(3):
        freezer.optimizer.zero_grad()
        net(images).square().sum().backward()
        freezer.optimizer.step()
    assert all(parameter.grad is None for parameter in net.first.parameters())
    freeze(freezer, ())
    after = net.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if name.startswith("first."))
    for key, value in state.items():
        if key < len(list(net.first.parameters())):
            assert str(freezer.optimizer.state_dict()["state"][key]) == str(value)
    assert type(net.first) is Block
    net(images).sum().backward()
    assert net.first.conv1.weight.grad is not None
    assert not torch.equal(net.first.bn1.running_mean, before["first.bn1.running_mean"])


def test_tests_probes_and_copies_are_the_plain_model(images: Tensor) -> None:
    net, freezer = made(images)
    plain = copy.deepcopy(net).eval()
    freeze(freezer)
    with torch.no_grad():
        assert torch.equal(net.eval()(images), plain(images))
    net.train()
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert [type(module) for module in twin.modules()] == [type(module) for module in plain.modules()]
        assert not any(key.startswith("_neq") for module in twin.modules() for key in vars(module))
    freezer.detach()
    assert [type(module) for module in net.modules()] == [type(module) for module in plain.modules()]


def test_nothing_is_kept_of_a_resting_front(images: Tensor) -> None:
    net, freezer = made(images)
    freeze(freezer, tuple(freezer.anatomy.may_freeze))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor):
        output = net(images)
    output.sum().backward()
    assert {name for name, one in net.named_parameters() if one.grad is not None} == {"head.weight", "head.bias"}


def test_what_is_refused(images: Tensor) -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(FreezingError, match=r"front_mode inference is not for a model that torch\.compile runs"):
        Freezer(net, optimizer, [images], NEq(scope="front", front_mode="inference"), compiled=True)
    with pytest.raises(ValueError, match="front_mode is 'eval'; choose 'train' or 'inference'"):
        NEq(front_mode="eval")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "efficientnet_b0", "swin_t", "convnext_tiny"])
def test_fronts_of_torchvisions_models(name: str) -> None:
    """All but the output layer rests: the training model computes what it does in eval mode."""
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    net = models.get_model(name, num_classes=3)
    images = torch.randn(2, 3, 64, 64)
    net.train()(images)
    freezer = Freezer(net, torch.optim.SGD(net.parameters(), lr=0.1), [images], Rests({}))
    freeze(freezer, tuple(freezer.anatomy.may_freeze))
    with torch.no_grad():
        expected = copy.deepcopy(net).eval()(images)
    net.train()
    resting = net(images).detach()
    # Dropout between the last layer that rests and the output layer rests as well: nothing before it trains.
    torch.testing.assert_close(resting, expected, rtol=0, atol=1e-9 * max(float(expected.abs().max()), 1.0))
