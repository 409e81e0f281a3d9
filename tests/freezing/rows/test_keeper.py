from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from frozen import Sets
from rounding import apart, apart_behind_layers
from states import whole_state
from torch import Tensor, nn, optim

from neq_cli import Freezer
from neq_cli.freezing.backward.dispatch import Dispatch, KernelChoice
from neq_cli.freezing.rows import frozen_rows as holding

ALL_STEP_ALONE = ((0, 1.0),)


@pytest.fixture(autouse=True, params=["small", "large"])
def _size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every parameter here is small; once they are kept as such, once as if they were large, when rows step alone."""
    if request.param == "large":
        monkeypatch.setattr(holding, "_SMALL", {"cpu": 0})
        monkeypatch.setattr(holding, "_SHORT_ROW", 0)
        monkeypatch.setattr(holding, "_FEW", ALL_STEP_ALONE)


class Dense(Dispatch):
    """Never another kernel than PyTorch's own, so that gradients have the bits of a net without a Freezer."""

    def choose(self, *_: Any) -> KernelChoice:
        return KernelChoice("dense", {})


class Fixed(Sets):
    """A policy that freezes the given neurons of each layer, from epoch to epoch as told."""

    def __init__(self, *epochs: Mapping[str, Iterable[int]], definition: str = "paper") -> None:
        super().__init__({})
        self.epochs = epochs
        self.definition = definition

    def choose(self, observations: Mapping[str, Any], epoch: int) -> Mapping[str, Tensor]:
        chosen = {}
        for name, frozen in self.epochs[min(epoch, len(self.epochs)) - 1].items():
            chosen[name] = torch.ones(len(observations[name].trainable), dtype=torch.bool)
            chosen[name][list(frozen)] = False
        return chosen


class Net(nn.Module):
    """A layer of every layout: rows along dimension 0, along dimension 1 by groups, and one per element."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 6, 2, groups=2)
        self.spread = nn.LayerNorm((6, 3, 3))
        self.hidden = nn.Linear(54, 5)
        self.whole = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.up(self.norm(torch.relu(self.conv(images))))
        hidden = torch.tanh(self.hidden(self.spread(hidden).flatten(1)))
        return self.head(torch.tanh(self.whole(hidden)))


FROZEN = {
    "conv": [1, 2],
    "norm": [0, 3],
    "up": [0, 2, 4],  # two of the first group, one of the second
    "spread": [0, 10, 35, 53],
    "hidden": [4],
    "whole": range(5),
    "head": range(3),  # the output layer: never heeded
}
LAYERS = [name for name in FROZEN if name != "head"]


def rows(layer: str, parameter: str, tensor: Tensor, frozen: bool) -> Tensor:
    """Return the frozen (or trained) neurons' elements of a parameter of ``Net``, or of its gradient or state."""
    neurons = {"conv": 4, "norm": 4, "up": 6, "spread": 54, "hidden": 5, "whole": 5}[layer]
    wanted = [i for i in range(neurons) if (i in FROZEN[layer]) == frozen]
    if layer == "up" and parameter == "weight":
        # [4 inputs, 3 outputs of a group, 2, 2]: neuron i is output i % 3 of group i // 3, which has two inputs.
        return torch.stack([tensor[2 * (i // 3) : 2 * (i // 3) + 2, i % 3].flatten() for i in wanted])
    if layer == "spread":
        return tensor.flatten()[wanted]
    return torch.stack([tensor[i].flatten() for i in wanted]) if wanted else tensor.new_zeros(0)


def parameters_of(net: Net) -> list[tuple[str, str, nn.Parameter]]:
    return [(layer, name, p) for layer in LAYERS for name, p in getattr(net, layer).named_parameters()]


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 2, 4, 4), torch.randint(3, (6,))


def backward(net: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    nn.functional.cross_entropy(net(data[0]), data[1]).backward()


def step(net: nn.Module, optimizer: optim.Optimizer, data: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad()
    backward(net, data)
    optimizer.step()


Make = Callable[[Iterable[Tensor]], optim.Optimizer]


def prepared(make: Make, *epochs: Mapping[str, Iterable[int]], definition: str = "paper") -> Any:
    """Return a net, its optimiser and its Freezer after an epoch of two steps: state is there, FROZEN is in force."""
    net = Net()
    optimizer = make(net.parameters())
    policy = Fixed(*(epochs or (FROZEN,)), definition=definition)
    freezer = Freezer(net, optimizer, [torch.randn(5, 2, 4, 4)], policy, dispatch=Dense())
    for _ in range(2):
        step(net, optimizer, batch())
    freezer.step()
    return net, optimizer, freezer


def twin_of(net: Net, optimizer: optim.Optimizer, make: Make) -> tuple[Net, optim.Optimizer]:
    """Return the same net and optimiser at this moment, without a Freezer."""
    twin = Net()
    twin.load_state_dict(net.state_dict())
    twin_optimizer = make(twin.parameters())
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return twin, twin_optimizer


def frozen_bits(net: Net, optimizer: optim.Optimizer) -> dict[str, Tensor]:
    found, state = {}, whole_state(optimizer)
    for layer, name, parameter in parameters_of(net):
        found[f"{layer}.{name}"] = rows(layer, name, parameter.detach(), frozen=True).clone()
        for key, value in state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                found[f"{layer}.{name} {key}"] = rows(layer, name, value, frozen=True).clone()
    return found


def variants() -> dict[str, Make]:
    plain: dict[str, tuple[type[optim.Optimizer], dict[str, Any]]] = {
        "SGD": (optim.SGD, {"lr": 0.1}),
        "SGD weight decay": (optim.SGD, {"lr": 0.1, "weight_decay": 0.1}),
        "SGD momentum": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
        "SGD nesterov": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
        "SGD dampening": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
        "SGD maximize": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "maximize": True}),
        "Adam": (optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
        "Adam amsgrad": (optim.Adam, {"lr": 0.01, "amsgrad": True}),
        "Adam tensor lr": (optim.Adam, {"lr": torch.tensor(0.01)}),
        "AdamW": (optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
        "AdamW amsgrad": (optim.AdamW, {"lr": 0.01, "amsgrad": True}),
        "NAdam": (optim.NAdam, {"lr": 0.01, "weight_decay": 0.1}),
        "NAdam decoupled": (optim.NAdam, {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
        "RAdam": (optim.RAdam, {"lr": 0.01, "weight_decay": 0.1}),
        "RMSprop": (optim.RMSprop, {"lr": 0.01, "weight_decay": 0.1}),
        "RMSprop centered": (optim.RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.9}),
        "Rprop": (optim.Rprop, {"lr": 0.01}),
        "Adagrad": (optim.Adagrad, {"lr": 0.1, "weight_decay": 0.1, "lr_decay": 0.1}),
        "Adadelta": (optim.Adadelta, {"lr": 1.0, "weight_decay": 0.1}),
        "Adamax": (optim.Adamax, {"lr": 0.01, "weight_decay": 0.1}),
        "ASGD": (optim.ASGD, {"lr": 0.1, "weight_decay": 0.1, "t0": 1}),
    }
    fused = (optim.SGD, optim.Adam, optim.AdamW, optim.Adagrad)

    def maker(kind: type[optim.Optimizer], arguments: dict[str, Any]) -> Make:
        return lambda parameters: kind(parameters, **arguments)

    made = {}
    for name, (kind, arguments) in plain.items():
        tensor_rate = isinstance(arguments["lr"], Tensor)
        for way in ({"foreach": False}, *([] if tensor_rate else [{"foreach": True}])):
            made[f"{name}, foreach={way['foreach']}"] = maker(kind, {**arguments, **way})
        if kind in fused:
            made[f"{name}, fused"] = maker(kind, {**arguments, "fused": True})
    return made


VARIANTS = variants()
SGD: Make = lambda parameters: optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)  # noqa: E731
ADAM: Make = lambda parameters: optim.Adam(parameters, lr=0.01)  # noqa: E731


@pytest.mark.parametrize("variant", VARIANTS)
def test_frozen_rows_and_their_state_keep_every_bit_and_the_others_train_as_ever(variant: str) -> None:
    make = VARIANTS[variant]

    def alike(ours: Tensor, theirs: Tensor) -> bool:
        """Kernels may round otherwise at the end of a tensor, and where rows step alone the end is elsewhere."""
        if holding._FEW != ALL_STEP_ALONE:
            return torch.equal(ours, theirs)
        most = apart(16, torch.float32, magnitude=float(theirs.abs().max()) if theirs.numel() else 0.0)
        return torch.allclose(ours, theirs, rtol=0, atol=most)

    net, optimizer, _ = prepared(make)
    start = frozen_bits(net, optimizer)
    initial = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    stateless = variant.startswith(("SGD,", "SGD weight decay"))
    assert any(" " in name for name in start) is not stateless
    for number in range(3):
        data = batch()
        twin, twin_optimizer = twin_of(net, optimizer, make)
        step(twin, twin_optimizer, data)
        step(net, optimizer, data)
        now = frozen_bits(net, optimizer)
        assert now.keys() == start.keys()
        for name, bits in start.items():
            assert torch.equal(bits, now[name]), (number, name)
        for (layer, name, parameter), (_, _, dense) in zip(parameters_of(net), parameters_of(twin), strict=True):
            where = f"{layer}.{name}"
            ours, theirs = (rows(layer, name, tensor.detach(), frozen=False) for tensor in (parameter, dense))
            assert alike(ours, theirs), where
            if layer == "whole":
                continue
            for key, value in whole_state(optimizer).get(parameter, {}).items():
                other = twin_optimizer.state[dense][key]
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    ours, theirs = (rows(layer, name, tensor, frozen=False) for tensor in (value, other))
                    assert alike(ours, theirs), f"{where} {key}"
                elif isinstance(value, Tensor):
                    assert torch.equal(value, other), f"{where} {key}"
        for ours, theirs in zip(net.head.parameters(), twin.head.parameters(), strict=True):
            assert torch.equal(ours, theirs)
    for layer, name, parameter in parameters_of(net):
        before = rows(layer, name, initial[f"{layer}.{name}"], frozen=False)
        after = rows(layer, name, parameter.detach(), frozen=False)
        assert layer == "whole" or not torch.equal(before, after), (layer, name)
    assert not torch.equal(net.head.weight, initial["head.weight"])


def test_every_torch_optimiser_is_either_tested_or_refused() -> None:
    known = {name.split(",")[0].split()[0] for name in VARIANTS} | {"LBFGS", "Adafactor", "SparseAdam", "Muon"}
    offered = {
        name
        for name, kind in vars(optim).items()
        if isinstance(kind, type) and issubclass(kind, optim.Optimizer) and kind is not optim.Optimizer
    }
    assert offered <= known


def test_half_and_double_precision_parameters_are_held_too() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        net = Net().to(dtype)
        optimizer = optim.AdamW(net.parameters(), lr=0.1)
        freezer = Freezer(net, optimizer, [torch.randn(5, 2, 4, 4, dtype=dtype)], Fixed(FROZEN))
        for number in range(3):
            images, labels = batch()
            step(net, optimizer, (images.to(dtype), labels))
            if number == 0:
                freezer.step()
                start = frozen_bits(net, optimizer)
        assert all(torch.equal(bits, start[name]) for name, bits in frozen_bits(net, optimizer).items())


def test_channels_last_weights_are_held_in_place() -> None:
    net = Net().to(memory_format=torch.channels_last)
    optimizer = SGD(net.parameters())
    freezer = Freezer(net, optimizer, [torch.randn(5, 2, 4, 4)], Fixed(FROZEN))
    step(net, optimizer, batch())
    freezer.step()
    start = frozen_bits(net, optimizer)
    for _ in range(2):
        step(net, optimizer, batch())
    assert all(torch.equal(bits, start[name]) for name, bits in frozen_bits(net, optimizer).items())
    assert net.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert not net.conv.weight.is_contiguous()


def test_a_layer_norm_whose_weight_is_not_contiguous() -> None:
    class Spread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.LayerNorm((2, 3, 2, 2)), nn.Linear(2, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.head(self.norm(inputs))

    net = Spread().to(memory_format=torch.channels_last)
    assert not net.norm.weight.is_contiguous()
    optimizer = SGD(net.parameters())
    inputs = torch.randn(4, 2, 3, 2, 2)
    freezer = Freezer(net, optimizer, [inputs], Fixed({"norm": [1, 7, 23]}))
    freezer.step()
    start = net.norm.weight.detach().clone()
    net(inputs).pow(2).sum().backward()
    optimizer.step()
    same = (net.norm.weight == start).contiguous().flatten()
    assert same.nonzero().flatten().tolist() == [1, 7, 23]


def test_running_statistics_of_frozen_neurons_keep_moving() -> None:
    net, optimizer, _ = prepared(SGD)
    before = net.norm.running_mean.clone()
    step(net, optimizer, batch())
    assert (net.norm.running_mean != before).all()
    assert net.norm.num_batches_tracked == 3


# What a loop sees between backward and step.


def test_gradients_when_backward_ends() -> None:
    net, optimizer, _ = prepared(SGD)
    twin, _ = twin_of(net, optimizer, SGD)
    optimizer.zero_grad()
    data = batch()
    for one in (net, twin):
        backward(one, data)
    assert net.whole.weight.grad is None
    assert net.whole.bias.grad is None
    for (layer, name, parameter), (_, _, dense) in zip(parameters_of(net), parameters_of(twin), strict=True):
        assert rows(layer, name, dense.grad, frozen=True).any(), (layer, name)  # else the test shows nothing
        if layer != "whole":
            assert not rows(layer, name, parameter.grad, frozen=True).any(), (layer, name)
            ours, theirs = (rows(layer, name, p.grad, frozen=False) for p in (parameter, dense))
            assert torch.equal(ours, theirs), (layer, name)


@pytest.mark.usefixtures("double")
def test_gradients_accumulate_over_several_backwards() -> None:
    net, optimizer, _ = prepared(SGD)
    twin, _ = twin_of(net, optimizer, SGD)
    optimizer.zero_grad()
    for _ in range(3):
        data = batch()
        for one in (net, twin):
            backward(one, data)
    assert net.whole.weight.grad is None
    for (layer, name, parameter), (_, _, dense) in zip(parameters_of(net), parameters_of(twin), strict=True):
        if layer != "whole":
            assert not rows(layer, name, parameter.grad, frozen=True).any()
            ours, theirs = (rows(layer, name, p.grad, frozen=False) for p in (parameter, dense))
            # Three times a sum over 6 samples of 9 positions, behind 300 roundings forward and backward.
            assert (ours - theirs).abs().max() <= apart_behind_layers(500) * dense.grad.abs().max(), (layer, name)
    start = frozen_bits(net, optimizer)
    optimizer.step()
    assert all(torch.equal(bits, start[name]) for name, bits in frozen_bits(net, optimizer).items())


def test_gradients_that_are_there_when_a_set_comes_into_force_are_discarded() -> None:
    # A loop that zeroes gradients after the optimiser's step, not before backward.
    net = Net()
    optimizer = SGD(net.parameters())
    freezer = Freezer(net, optimizer, [torch.randn(5, 2, 4, 4)], Fixed(FROZEN))
    backward(net, batch())
    before = net.conv.weight.grad.clone()
    freezer.step()
    assert not net.conv.weight.grad[[1, 2]].any()
    assert torch.equal(net.conv.weight.grad[[0, 3]], before[[0, 3]])
    assert net.whole.weight.grad is None


def test_zeroing_in_place_brings_no_gradient_back() -> None:
    net, optimizer, _ = prepared(SGD)
    start = frozen_bits(net, optimizer)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=False)
        backward(net, batch())
        optimizer.step()
    assert net.whole.weight.grad is None
    assert all(torch.equal(bits, start[name]) for name, bits in frozen_bits(net, optimizer).items())


def test_a_gradient_put_in_after_backward_does_not_move_frozen_rows() -> None:
    # As DistributedDataParallel does when it has averaged its buckets.
    net, optimizer, _ = prepared(SGD)
    start = frozen_bits(net, optimizer)
    for _ in range(3):
        backward(net, batch())
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert all(torch.equal(bits, start[name]) for name, bits in frozen_bits(net, optimizer).items())


def test_a_closure_is_held_too() -> None:
    net, optimizer, _ = prepared(SGD)
    start = frozen_bits(net, optimizer)
    before = net.conv.weight.detach().clone()

    def closure() -> float:
        optimizer.zero_grad()
        backward(net, data)
        return 1.0

    data = batch()
    assert optimizer.step(closure) == 1.0
    assert all(torch.equal(bits, start[name]) for name, bits in frozen_bits(net, optimizer).items())
    assert not torch.equal(net.conv.weight, before)


def test_a_hook_of_the_user_after_the_step_sees_the_rows_as_they_are_held() -> None:
    net = Net()
    optimizer = SGD(net.parameters())
    seen: list[Tensor] = []
    optimizer.register_step_post_hook(lambda *_: seen.append(net.conv.weight.detach()[[1, 2]].clone()))
    freezer = Freezer(net, optimizer, [torch.randn(5, 2, 4, 4)], Fixed(FROZEN))
    step(net, optimizer, batch())
    freezer.step()
    for _ in range(2):
        step(net, optimizer, batch())
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


@pytest.mark.usefixtures("double")
def test_clipping_sees_only_what_trains() -> None:
    net, optimizer, _ = prepared(SGD)
    twin, _ = twin_of(net, optimizer, SGD)
    optimizer.zero_grad()
    data = batch()
    for one in (net, twin):
        backward(one, data)
    squares = sum(
        float(rows(layer, name, p.grad, frozen=False).double().pow(2).sum()) for layer, name, p in parameters_of(twin)
    )
    squares += sum(float(p.grad.double().pow(2).sum()) for p in twin.head.parameters())
    norm = nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
    assert float(norm) == pytest.approx(math.sqrt(squares), rel=apart_behind_layers(1000))
    assert float(norm) < 0.99 * float(nn.utils.clip_grad_norm_(twin.parameters(), 1e-3))


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler(fused: bool) -> None:
    def make(parameters: Iterable[Tensor]) -> optim.Optimizer:
        return optim.Adam(parameters, lr=0.01, fused=fused)

    net, optimizer, _ = prepared(make)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    start = frozen_bits(net, optimizer)

    def scaled_step(data: tuple[Tensor, Tensor], factor: float = 1.0) -> bool:
        """Step, and say whether a trained neuron moved."""
        before = net.conv.weight.detach().clone()
        optimizer.zero_grad()
        loss = factor * nn.functional.cross_entropy(net(data[0]), data[1])
        scaler.scale(loss).backward()
        if not fused:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        return not torch.equal(net.conv.weight, before)

    assert scaled_step(batch())
    assert not scaled_step(batch(), factor=math.inf)
    assert scaler.get_scale() == 4.0
    assert scaled_step(batch())
    # A frozen neuron whose gradient overflows is no reason to skip a step.
    handle = net.conv.weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([1, 2]), math.inf))
    assert scaled_step(batch())
    handle.remove()
    assert scaler.get_scale() == 4.0
    assert all(torch.equal(bits, start[name]) for name, bits in frozen_bits(net, optimizer).items())


def test_gradients_under_autocast() -> None:
    net, optimizer, _ = prepared(SGD)
    start = frozen_bits(net, optimizer)
    with torch.autocast("cpu", torch.bfloat16):
        loss = nn.functional.cross_entropy(net(batch()[0]), torch.zeros(6, dtype=torch.int64))
    loss.backward()
    assert not net.conv.weight.grad[[1, 2]].any()
    optimizer.step()
    assert all(torch.equal(bits, start[name]) for name, bits in frozen_bits(net, optimizer).items())


def test_state_born_after_gradients_were_written_anew_knows_none_of_a_frozen_row() -> None:
    net = Net()
    optimizer = SGD(net.parameters())
    freezer = Freezer(net, optimizer, [torch.randn(5, 2, 4, 4)], Fixed(FROZEN))
    freezer.step()
    weight = net.conv.weight.detach().clone()
    backward(net, batch())
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    momentum = whole_state(optimizer)[net.conv.weight]["momentum_buffer"]
    close = partial(torch.allclose, rtol=0, atol=apart(2, torch.float32, magnitude=2))
    assert close(momentum[[1, 2]], 0.1 * weight[[1, 2]])  # the decay's part alone
    assert close(momentum[[0, 3]], 1 + 0.1 * weight[[0, 3]])


# What is kept may be put elsewhere in the middle of an epoch.


class Replacing(optim.Optimizer):
    """Momentum that is another tensor after every step, stored in another order every other time."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        self.steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.steps += 1
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is None:
                continue
            momentum = 0.9 * self.state[parameter].get("momentum", 0) + parameter.grad + parameter
            if self.steps % 2 and parameter.dim() == 4:
                momentum = momentum.contiguous(memory_format=torch.channels_last)
            self.state[parameter]["momentum"] = momentum
            parameter.sub_(0.1 * momentum)


def test_state_that_is_replaced_in_every_step_is_held() -> None:
    net, optimizer, _ = prepared(Replacing)
    start = frozen_bits(net, optimizer)
    assert "conv.weight momentum" in start
    for _ in range(3):
        step(net, optimizer, batch())
        assert all(torch.equal(bits, start[name]) for name, bits in frozen_bits(net, optimizer).items())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_weights_put_in_other_memory_are_held_there(memory_format: torch.memory_format) -> None:
    net, optimizer, _ = prepared(SGD)
    start = frozen_bits(net, optimizer)
    for _ in range(2):
        for parameter in net.parameters():
            fits = parameter.dim() == 4 or memory_format == torch.contiguous_format
            parameter.data = parameter.data.clone(memory_format=memory_format if fits else torch.contiguous_format)
        before = net.conv.weight.detach().clone()
        step(net, optimizer, batch())
        assert all(torch.equal(bits, start[name]) for name, bits in frozen_bits(net, optimizer).items())
        assert not torch.equal(net.conv.weight[[0, 3]], before[[0, 3]])


def test_state_that_appears_later_is_held_from_then_on() -> None:
    net, optimizer, _ = prepared(lambda parameters: optim.SGD(parameters, lr=0.1))
    weights = frozen_bits(net, optimizer)
    step(net, optimizer, batch())
    assert frozen_bits(net, optimizer).keys() == weights.keys()
    optimizer.param_groups[0]["momentum"] = 0.9
    step(net, optimizer, batch())
    start = frozen_bits(net, optimizer)
    assert len(start) > len(weights)
    step(net, optimizer, batch())
    now = frozen_bits(net, optimizer)
    assert all(torch.equal(bits, now[name]) for name, bits in {**start, **weights}.items())


# From one epoch to the next.


@pytest.mark.usefixtures("double")
def test_a_thawed_neuron_goes_on_with_the_momentum_it_was_frozen_with() -> None:
    net, optimizer, freezer = prepared(SGD, FROZEN, {})
    held = whole_state(optimizer)[net.conv.weight]["momentum_buffer"][1].clone()
    held_whole = whole_state(optimizer)[net.whole.weight]["momentum_buffer"].clone()
    assert held.any()
    for _ in range(3):
        step(net, optimizer, batch())
    freezer.step()
    weight, whole = net.conv.weight.detach()[1].clone(), net.whole.weight.detach().clone()
    step(net, optimizer, batch())
    for parameter, before, momentum, gradient in (
        (net.conv.weight[1], weight, held, net.conv.weight.grad[1]),
        (net.whole.weight, whole, held_whole, net.whole.weight.grad),
    ):
        expected = before - 0.1 * (0.9 * momentum + gradient + 0.1 * before)
        assert torch.allclose(parameter, expected, rtol=0, atol=apart(6, magnitude=10))  # all below 10


@pytest.mark.usefixtures("double")
def test_a_thawed_neuron_goes_on_with_adams_moments_and_the_parameters_step() -> None:
    net, optimizer, freezer = prepared(ADAM, FROZEN, {})
    state = whole_state(optimizer)[net.conv.weight]
    first, second = state["exp_avg"][2].clone(), state["exp_avg_sq"][2].clone()
    for _ in range(3):
        step(net, optimizer, batch())
    assert state["step"] == 5  # the parameter's, which has trained rows too
    assert optimizer.state[net.whole.weight]["step"] == 2  # skipped whole
    freezer.step()
    weight = net.conv.weight.detach()[2].clone()
    step(net, optimizer, batch())
    gradient = net.conv.weight.grad[2]
    first = 0.9 * first + 0.1 * gradient
    second = 0.999 * second + 0.001 * gradient**2
    expected = weight - 0.01 * (first / (1 - 0.9**6)) / ((second / (1 - 0.999**6)).sqrt() + 1e-8)
    assert torch.allclose(net.conv.weight[2], expected, rtol=0, atol=apart_behind_layers(20))
    assert optimizer.state[net.whole.weight]["step"] == 3


def test_each_epoch_freezes_its_own_rows() -> None:
    net, optimizer, freezer = prepared(ADAM, {"conv": [0, 1]}, {"conv": [1, 2]}, {})
    for frozen in ([0, 1], [1, 2], []):
        start = net.conv.weight.detach().clone()
        moments = whole_state(optimizer)[net.conv.weight]["exp_avg"].clone()
        for _ in range(2):
            step(net, optimizer, batch())
        for now, before in ((net.conv.weight, start), (whole_state(optimizer)[net.conv.weight]["exp_avg"], moments)):
            same = [i for i in range(4) if torch.equal(now[i], before[i])]
            assert same == frozen
        freezer.step()


def test_state_born_while_a_row_is_frozen_is_held_from_then_on() -> None:
    net = Net()
    optimizer = SGD(net.parameters())
    freezer = Freezer(net, optimizer, [torch.randn(5, 2, 4, 4)], Fixed(FROZEN))
    freezer.step()  # before any step: no momentum buffer yet
    weights = frozen_bits(net, optimizer)
    step(net, optimizer, batch())
    start = frozen_bits(net, optimizer)
    assert len(start) > len(weights)
    step(net, optimizer, batch())
    now = frozen_bits(net, optimizer)
    assert all(torch.equal(bits, now[name]) for name, bits in {**start, **weights}.items())


# Loading in the middle of an epoch.


def loaded_values(net: Net) -> dict[str, Tensor]:
    return {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in net.state_dict().items()}


@pytest.mark.parametrize("how", ["whole", "part", "data parallel"])
def test_loading_into_the_model_moves_what_is_held(how: str) -> None:
    net, optimizer, _ = prepared(SGD)
    step(net, optimizer, batch())
    state = loaded_values(net)
    if how == "whole":
        net.load_state_dict(state)
    elif how == "part":
        for layer in LAYERS:
            prefix = f"{layer}."
            part = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            getattr(net, layer).load_state_dict(part)
    else:
        nn.DataParallel(net).load_state_dict({f"module.{name}": value for name, value in state.items()})
    start = frozen_bits(net, optimizer)
    assert torch.equal(start["conv.weight"], rows("conv", "weight", state["conv.weight"], frozen=True))
    for _ in range(2):
        step(net, optimizer, batch())
    assert all(torch.equal(bits, start[name]) for name, bits in frozen_bits(net, optimizer).items())


def test_loading_into_the_optimiser_moves_the_state_that_is_held() -> None:
    net, optimizer, _ = prepared(ADAM)
    step(net, optimizer, batch())
    state = copy.deepcopy(optimizer.state_dict())
    for values in state["state"].values():
        values["exp_avg"] += 1
    weights = frozen_bits(net, optimizer)["conv.weight"]
    optimizer.load_state_dict(state)
    start = frozen_bits(net, optimizer)
    assert start["conv.weight exp_avg"].mean() > 0.5
    for _ in range(2):
        step(net, optimizer, batch())
    now = frozen_bits(net, optimizer)
    assert all(torch.equal(bits, now[name]) for name, bits in start.items())
    assert torch.equal(now["conv.weight"], weights)


# Copies, and putting things back.


def test_a_copy_of_the_model_is_free_of_the_freezer() -> None:
    net, optimizer, freezer = prepared(SGD)
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(net),
        pickle.loads(pickle.dumps(net)),
        torch.load(buffer, weights_only=False),
        optim.swa_utils.AveragedModel(net).module,
    ]
    start = frozen_bits(net, optimizer)
    for other in copies:
        other_optimizer = SGD(other.parameters())
        before = [parameter.detach().clone() for parameter in other.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
        step(other, other_optimizer, batch())
        assert not any(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))
        other.load_state_dict(loaded_values(net))
    # Loading into a copy is nothing to the original.
    assert all(torch.equal(bits, start[name]) for name, bits in frozen_bits(net, optimizer).items())
    step(net, optimizer, batch())
    assert all(torch.equal(bits, start[name]) for name, bits in frozen_bits(net, optimizer).items())
    assert set(net.state_dict()) == set(Net().state_dict())
    assert freezer.trainable["conv"].tolist() == [True, False, False, True]


def test_the_optimiser_can_be_pickled_and_its_state_saved() -> None:
    _, optimizer, _ = prepared(ADAM)
    pickle.loads(pickle.dumps(optimizer))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True).keys() == optimizer.state_dict().keys()


def all_hooks(net: nn.Module, optimizer: optim.Optimizer) -> dict[str, int]:
    found = {
        f"{name}.{key}": len(value)
        for name, module in net.named_modules()
        for key, value in vars(module).items()
        if "hooks" in key
    }
    for name, parameter in net.named_parameters():
        found[f"{name} hooks"] = len(parameter._post_accumulate_grad_hooks or ()) + len(parameter._backward_hooks or ())
    return found | {key: len(value) for key, value in vars(optimizer).items() if "hooks" in key}


def test_detach_puts_everything_back() -> None:
    net = Net()
    optimizer = SGD(net.parameters())
    before = all_hooks(net, optimizer)
    classes = {name: type(module) for name, module in net.named_modules()}
    freezer = Freezer(net, optimizer, [torch.randn(5, 2, 4, 4)], Fixed(FROZEN))
    for _ in range(3):
        step(net, optimizer, batch())
        freezer.step()
    assert all_hooks(net, optimizer) != before
    freezer.detach()
    assert all_hooks(net, optimizer) == before
    assert {name: type(module) for name, module in net.named_modules()} == classes
    assert all(trainable.all() for trainable in freezer.trainable.values())
    data = batch()
    twin, twin_optimizer = twin_of(net, optimizer, SGD)
    step(twin, twin_optimizer, data)
    step(net, optimizer, data)
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("detach", [False, True])
def test_what_is_no_longer_used_leaves_memory(detach: bool) -> None:
    def use() -> list[weakref.ref[Any]]:
        net, optimizer, freezer = prepared(SGD)
        freezer.dispatch.on_choice = lambda dispatch: print(freezer.epoch)  # leads back to it
        step(net, optimizer, batch())
        if detach:
            freezer.detach()
        return [weakref.ref(thing) for thing in (net, optimizer, freezer, *net.parameters())]

    references = use()
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)


def test_nothing_leaves_the_optimiser_and_every_parameter_needs_gradients() -> None:
    net, optimizer, _ = prepared(SGD)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in net.parameters()}
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_a_parameter_whose_gradient_the_user_switches_off_is_left_alone() -> None:
    net, optimizer, freezer = prepared(SGD)
    net.conv.weight.requires_grad_(False)
    before = net.conv.weight.detach().clone()
    freezer.step()
    step(net, optimizer, batch())
    assert torch.equal(net.conv.weight, before)


# The authors' code.


@pytest.mark.usefixtures("double")
def test_reference_definition_zeroes_momentum() -> None:
    net, optimizer, freezer = prepared(SGD, FROZEN, {}, definition="reference")
    buffer = optimizer.state[net.conv.weight]["momentum_buffer"]
    weights = rows("conv", "weight", net.conv.weight.detach(), frozen=True).clone()
    assert not buffer[[1, 2]].any()
    for _ in range(2):
        step(net, optimizer, batch())
        assert torch.equal(rows("conv", "weight", net.conv.weight.detach(), frozen=True), weights)
        assert not buffer[[1, 2]].any()
        assert buffer[[0, 3]].all()
    # Linear layers and LayerNorm do not freeze; transposed convolutions are convolutions.
    assert freezer.trainable["hidden"].all()
    assert freezer.trainable["spread"].all()
    assert freezer.trainable["up"].tolist() == [False, True, False, True, False, True]
    freezer.step()
    before = net.conv.weight.detach()[1].clone()
    step(net, optimizer, batch())
    expected = before - 0.1 * (net.conv.weight.grad[1] + 0.1 * before)
    assert torch.allclose(net.conv.weight[1], expected, rtol=0, atol=apart(6, magnitude=10))


@pytest.mark.parametrize("frozen", [[1, 2], range(4)])
def test_reference_definition_lets_the_second_moment_decay(frozen: Iterable[int]) -> None:
    net, optimizer, _ = prepared(
        lambda parameters: optim.Adam(parameters, lr=0.01, weight_decay=0.1, betas=(0.8, 0.9)),
        {"conv": frozen},
        definition="reference",
    )
    state = optimizer.state[net.conv.weight]
    held = list(frozen)
    second = state["exp_avg_sq"][held].clone()
    weights = net.conv.weight.detach()[held].clone()
    decay = apart(8, torch.float32)  # three factors of 0.9, themselves rounded, and three products
    for number in range(1, 4):
        step(net, optimizer, batch())
        assert not state["exp_avg"][held].any()
        assert torch.allclose(state["exp_avg_sq"][held], second * 0.9**number, rtol=decay, atol=0)
        assert torch.equal(net.conv.weight[held], weights)


def test_second_moments_do_not_decay_in_a_fused_step_that_is_skipped() -> None:
    net, optimizer, _ = prepared(
        lambda parameters: optim.Adam(parameters, lr=0.01, betas=(0.8, 0.9), fused=True), definition="reference"
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    state = optimizer.state[net.conv.weight]
    second = state["exp_avg_sq"][[1, 2]].clone()
    for factor in (math.inf, 1.0, math.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale(factor * nn.functional.cross_entropy(net(batch()[0]), batch()[1])).backward()
        scaler.step(optimizer)
        scaler.update()
    assert state["step"] == 4
    assert torch.allclose(state["exp_avg_sq"][[1, 2]], second * 0.9**2, rtol=apart(6, torch.float32), atol=0)


# Wrappers.


@pytest.mark.parametrize("wrap", ["data parallel", "compiled", "compiled in place", "both"])
def test_wrapped_models(wrap: str) -> None:
    net = Net()
    wrapped: Any = nn.DataParallel(net) if wrap in ("data parallel", "both") else net
    if wrap in ("compiled", "both"):
        wrapped = torch.compile(wrapped, backend="eager")
    if wrap == "compiled in place":
        net.compile(backend="eager")
    optimizer = SGD(wrapped.parameters())
    freezer = Freezer(wrapped, optimizer, [torch.randn(5, 2, 4, 4)], Fixed(FROZEN))
    step(wrapped, optimizer, batch())
    observations = freezer.step()
    assert list(observations) == [*LAYERS, "head"]
    assert all(seen.phi.isfinite().all() for seen in observations.values())
    start = frozen_bits(net, optimizer)
    for _ in range(2):
        step(wrapped, optimizer, batch())
    assert all(torch.equal(bits, start[name]) for name, bits in frozen_bits(net, optimizer).items())
    assert net.whole.weight.grad is None
