"""Whole layers and fronts: who freezes by NEq and its yardsticks, and that nothing before a front moves or costs."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from frozen import Sets
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from neq_cli import Budget, Freezer, Front, NEq, Observation, Stochastic
from neq_cli.errors import FreezingError
from neq_cli.freezing.anatomy import Anatomy, anatomy_of
from neq_cli.freezing.backward.sliced import BackwardMode

EPSILON = 0.1


def chain() -> nn.Sequential:
    """Four layers of 4, 5, 2 and 2 neurons; the last is the output layer."""
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2), nn.Linear(2, 2))


def anatomy() -> Anatomy:
    return anatomy_of(chain(), torch.ones(1, 3))


def moving(*layers: str, unknown: int | None = None) -> dict[str, Observation]:
    """Observations in which "." is a neuron at equilibrium and "x" one that moves, layer by layer."""
    found = {}
    for number, neurons in enumerate(layers):
        velocity = torch.tensor([0.0 if neuron == "." else 1.0 for neuron in neurons])
        delta = torch.full_like(velocity, math.nan) if number == unknown else torch.zeros_like(velocity)
        found[str(number)] = Observation(
            torch.ones_like(velocity), delta, velocity, torch.ones(len(neurons), dtype=torch.bool)
        )
    return found


def drawn(sets: Mapping[str, Tensor]) -> list[str]:
    return ["".join("x" if trains else "." for trains in rows) for rows in sets.values()]


@pytest.mark.parametrize(
    ("scope", "share", "layers", "expected"),
    [
        ("neuron", 1.0, (".x..", "xx.xx", "..", ".."), [".x..", "xx.xx", "..", ".."]),
        ("neuron", 0.75, (".x..", "xx.xx", "..", ".x"), ["....", "xx.xx", "..", ".x"]),
        ("neuron", 0.76, (".x..", "xx.xx", "..", ".x"), [".x..", "xx.xx", "..", ".x"]),
        ("layer", 0.75, (".x..", "xx.xx", "..", ".x"), ["....", "xxxxx", "..", "xx"]),
        ("layer", 1.0, (".x..", ".....", "..", ".x"), ["xxxx", ".....", "..", "xx"]),
        ("front", 0.75, (".x..", "xx.xx", "..", ".x"), ["....", "xxxxx", "xx", "xx"]),
        ("front", 0.6, (".x..", ".x.x.", "..", ".."), ["....", ".....", "..", "xx"]),
        ("front", 0.8, (".x..", ".....", "..", ".."), ["xxxx", "xxxxx", "xx", "xx"]),
    ],
)
def test_who_freezes(scope: Any, share: float, layers: tuple[str, ...], expected: list[str]) -> None:
    policy = NEq(EPSILON, scope=scope, share=share)
    policy.look(anatomy(), 0.1)
    assert drawn(policy.choose(moving(*layers), 1)) == expected


def test_a_layer_of_which_something_is_unknown_does_not_freeze_whole() -> None:
    policy = NEq(EPSILON, scope="layer", share=0.5)
    assert drawn(policy.choose(moving("....", ".....", "..", "..", unknown=1), 1)) == ["....", "xxxxx", "..", ".."]


def test_a_front_asks_for_a_model() -> None:
    for policy in (NEq(scope="front"), Stochastic(0.5, scope="layer"), Front(0, 1, 3), Budget(0.5)):
        with pytest.raises(FreezingError, match=r"has not been told of the model; call look\(\) before choose\(\)"):
            policy.choose(moving("....", ".....", "..", ".."), 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NEq(share=0.0), r"share is 0.0; it must lie in \(0, 1\]"),
        (lambda: NEq(share=1.5), r"share is 1.5; it must lie in \(0, 1\]"),
        (lambda: NEq(share=math.nan), r"share is nan; it must lie in \(0, 1\]"),
        (lambda: NEq(scope="block"), "scope is 'block'; choose 'neuron', 'layer', 'front'"),  # type: ignore[arg-type]
        (lambda: NEq(thaw_at_lr_drop=1), "thaw_at_lr_drop is 1; it must be a factor above 1, or None"),
        (lambda: Stochastic(0.5, scope="all"), "scope is 'all'; choose"),  # type: ignore[arg-type]
        (lambda: Front(1.0, 0.5, 3), r"start is 1.0; it must lie in \[0, 1\)"),
        (lambda: Front(0.0, 0.0, 3), r"level is 0.0; it must lie in \(0, 1\]"),
        (lambda: Front(0.0, 0.5, 0), "epochs is 0; it must be at least 1"),
        (lambda: Budget(0.0), r"flops is 0.0; it must lie in \(0, 1\]"),
        (lambda: Budget(0.5, mu=1.0), r"mu is 1.0; it must lie in \[0, 1\)"),
    ],
)
def test_what_no_policy_takes(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_everything_trains_for_an_epoch_when_the_learning_rate_has_fallen() -> None:
    policy, seen = NEq(EPSILON, scope="layer", thaw_at_lr_drop=10), moving("....", ".....", "..", "..")
    thawed = []
    for epoch, rate in enumerate([0.05, 0.1, 0.1, 0.1 * 0.1, 0.01, 0.02, 0.002, 0.001, 0.0002], 1):
        policy.look(anatomy(), rate)
        if not policy.choose(seen, epoch):
            thawed.append(epoch)
        policy, before = NEq(EPSILON, scope="layer", thaw_at_lr_drop=10), policy.state_dict()  # as after a resume
        policy.load_state_dict(before)
    # From 0.1 to 0.01, from 0.02 to 0.002, and from there to 0.0002.
    assert thawed == [4, 7, 9]


# Yardsticks.


@pytest.mark.parametrize("scope", ["layer", "front"])
@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_random_layers_come_to_p_of_the_flops_in_the_mean(scope: Any, p: float) -> None:
    looked, draws = anatomy(), 4000
    policy, seen = Stochastic(p, seed=2, scope=scope), moving("xxxx", "xxxxx", "xx", "xx")
    policy.look(looked, 0.1)
    costs = {"0": 12, "1": 20, "2": 10}
    total, counts = 0.0, set()
    for _ in range(draws):
        frozen = [name for name, rows in policy.choose(seen, 1).items() if not rows.any()]
        assert all(bool(rows.all()) or not bool(rows.any()) for rows in policy.choose(seen, 1).values())
        if scope == "front":
            assert frozen == ["0", "1", "2"][: len(frozen)]
        total += sum(costs[name] for name in frozen) / 42
        counts.add(tuple(frozen))
    # A share in [0, 1] varies by at most a half; five of its standard errors.
    assert abs(total / draws - p) < 5 * 0.5 / math.sqrt(draws)
    assert len(counts) == 1 if p in (0.0, 1.0) else len(counts) >= 2


def test_random_layers_follow_from_the_seed_and_go_on() -> None:
    def choices(policy: Stochastic, count: int) -> list[list[str]]:
        policy.look(anatomy(), 0.1)
        return [drawn(policy.choose(moving("xxxx", "xxxxx", "xx", "xx"), 1)) for _ in range(count)]

    whole = choices(Stochastic(0.5, 3, scope="layer"), 10)
    policy = Stochastic(0.5, 3, scope="layer")
    first, state = choices(policy, 4), policy.state_dict()
    later = Stochastic(0.5, 9, scope="layer")
    later.load_state_dict(state)
    assert first + choices(later, 6) == whole


def test_a_front_by_schedule() -> None:
    # Ten epochs: none in the first five, then a fifth more of what is to be frozen in each.
    policy = Front(start=0.5, level=1.0, epochs=10)
    assert [policy.layers(epoch, 10) for epoch in range(1, 11)] == [0, 0, 0, 0, 0, 2, 4, 6, 8, 10]
    assert [Front(0.0, 0.5, 4).layers(epoch, 8) for epoch in range(1, 5)] == [1, 2, 3, 4]
    policy = Front(start=0.0, level=1.0, epochs=3)
    policy.look(anatomy(), 0.1)
    seen = moving("xxxx", "xxxxx", "xx", "xx")
    assert drawn(policy.choose(seen, 1)) == ["....", ".....", "xx", "xx"]
    assert drawn(policy.choose(seen, 2)) == ["....", ".....", "..", "xx"]


@pytest.mark.parametrize("flops", [0.05, 0.3, 0.5, 0.9, 1.0])
def test_a_budget_is_met_by_the_slowest_neurons(flops: float) -> None:
    looked = anatomy()
    policy = Budget(flops)
    policy.look(looked, 0.1)
    generator = torch.Generator().manual_seed(1)
    seen = {
        name: Observation(torch.ones(n), torch.zeros(n), torch.randn(n, generator=generator), torch.ones(n) > 0)
        for name, n in (("0", 4), ("1", 5), ("2", 2), ("3", 2))
    }  # fmt: skip
    chosen = policy.choose(seen, 1)
    cost = {"0": 3, "1": 4, "2": 5}  # of a neuron
    trains = sum(cost[name] * int(rows.sum()) for name, rows in chosen.items()) + 4
    speeds = [(float(seen[name].velocity[i].abs()), bool(rows[i]), cost[name]) for name, rows in chosen.items()
              for i in range(len(rows))]  # fmt: skip
    frozen = [speed for speed, train, _ in speeds if not train]
    assert max(frozen, default=0) <= min((speed for speed, train, _ in speeds if train), default=math.inf)
    if flops * 46 >= 4:
        assert flops * 46 - 5 < trains <= flops * 46 + 1e-9  # to a neuron
    else:
        assert trains == 4  # the output layer trains whatever it costs


# What a front costs and holds.


class Residual(nn.Module):
    """A class token and a position table before residual blocks, as in a vision transformer; one block is repeated by
    activation checkpointing, and takes a parameter of the model itself there."""

    def __init__(self, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.embed = nn.Linear(6, 8)
        self.token, self.places = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.shift = nn.Parameter(torch.randn(8))
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 3)

    def block(self, x: Tensor, number: int) -> Tensor:
        return x + (self.shift + self.blocks[number](self.norms[number](x)).tanh())

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), 1, 8), self.embed(x)], 1) + self.places
        for number in range(3):
            x = checkpoint(self.block, x, number, use_reentrant=False) if self.checkpointed else self.block(x, number)
        return self.head(x[:, 0])  # type: ignore[no-any-return]


FRONT = ("embed", "norms.0", "blocks.0", "norms.1", "blocks.1")
OUTSIDE = {"token", "places", "shift"}


def in_front(freezer: Freezer, names: tuple[str, ...] = FRONT) -> dict[str, Tensor]:
    return {name: torch.full((layer.neurons,), name not in names) for name, layer in freezer.layers.items()}


class InFront(Sets):
    scope = "front"


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(2, 4, 6)


def saved_tensors(net: nn.Module, inputs: Tensor) -> tuple[int, Tensor]:
    """Return how many tensors that are not the network's own a forward pass keeps, and its output."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*net.parameters(), *net.buffers())}
    found: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            found.add(tensor.untyped_storage().data_ptr())
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = net(inputs)
    return len(found), output


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("mode", ["exact", "truncated", "dense"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_what_lies_before_the_front_stands_still_and_comes_back(
    kind: Any, mode: BackwardMode, checkpointed: bool, inputs: Tensor
) -> None:
    net = Residual(checkpointed=checkpointed)
    optimizer = kind(net.parameters(), lr=0.05, weight_decay=0.1)
    freezer = Freezer(net, optimizer, [inputs], InFront({}), backward=mode)

    def step() -> None:
        optimizer.zero_grad()
        net(inputs).square().sum().backward()
        optimizer.step()

    step()
    freezer.policy.sets = in_front(freezer)  # type: ignore[attr-defined]
    freezer.step()
    assert freezer.still == OUTSIDE
    parameters = dict(net.named_parameters())
    before = copy.deepcopy({name: (parameters[name].data, optimizer.state[parameters[name]]) for name in OUTSIDE})
    for _ in range(2):
        step()
    for name, (weights, state) in before.items():
        assert parameters[name].grad is None
        assert torch.equal(parameters[name], weights)
        for key, value in state.items():
            assert torch.equal(optimizer.state[parameters[name]][key], value) if isinstance(value, Tensor) else True
    assert net.token is parameters["token"], "who asks for it outside of a forward pass gets the parameter"
    # What trains has the gradients that it always has: of this loss, with the rest fixed.
    fixed = copy.deepcopy(net)
    for name, parameter in fixed.named_parameters():
        parameter.requires_grad_(name.rpartition(".")[0] not in FRONT and name not in OUTSIDE)
    fixed.zero_grad()
    fixed(inputs).square().sum().backward()
    optimizer.zero_grad()
    net(inputs).square().sum().backward()
    for name, parameter in fixed.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameters[name].grad, parameter.grad)
    freezer.policy.sets = {}  # type: ignore[attr-defined]
    freezer.step()
    assert freezer.still == frozenset()
    step()
    assert all(not torch.equal(parameters[name], weights) for name, (weights, _) in before.items())
    freezer.detach()
    assert type(net) is Residual


def test_nothing_is_kept_before_the_front(inputs: Tensor) -> None:
    net = Residual()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    freezer = Freezer(net, optimizer, [inputs], InFront({}))
    whole, _ = saved_tensors(net, inputs)
    freezer.policy.sets = in_front(freezer, tuple(freezer.anatomy.may_freeze))  # type: ignore[attr-defined]
    freezer.step()
    kept, output = saved_tensors(net, inputs)
    assert (kept, whole > 8) == (1, True)  # the input of the output layer
    output.sum().backward()
    assert {name for name, one in net.named_parameters() if one.grad is not None} == {"head.weight", "head.bias"}
    # By hand: the weight gradient of the head, of the class token alone.
    assert freezer.flops().executed == 8 * 3


def test_single_neurons_leave_parameters_outside_alone(inputs: Tensor) -> None:
    """By the paper's scope all of them train, whatever is frozen around them."""
    net = Residual()
    freezer = Freezer(net, torch.optim.SGD(net.parameters(), lr=0.05), [inputs], Sets({}))
    freezer.policy.sets = in_front(freezer)  # type: ignore[attr-defined]
    freezer.step()
    assert freezer.still == frozenset()
    net(inputs).sum().backward()
    assert net.token.grad is not None


class WithoutGraph(nn.Module):
    """A model that shows no order: its layers run without autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.second(self.first(x))  # type: ignore[no-any-return]


def test_a_front_needs_an_order(inputs: Tensor) -> None:
    net = WithoutGraph()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(
        FreezingError, match=r"^policy: scope front asks which layer comes before which, .* scope layer"
    ):
        Freezer(net, optimizer, [inputs], NEq(scope="front"))
    Freezer(net, optimizer, [inputs], NEq(scope="layer"))


def test_copies_and_pickles_are_of_the_own_class(inputs: Tensor) -> None:
    net = Residual()
    freezer = Freezer(net, torch.optim.SGD(net.parameters(), lr=0.05), [inputs], InFront({}))
    freezer.policy.sets = in_front(freezer)  # type: ignore[attr-defined]
    freezer.step()
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert type(twin) is Residual
        twin(inputs).sum().backward()
        assert twin.token.grad is not None
    with freezer.suspended():
        net(inputs).sum().backward()
        assert net.token.grad is not None
    net.zero_grad()
    net(inputs).sum().backward()
    assert net.token.grad is None


def test_a_front_is_saved_and_loaded(inputs: Tensor) -> None:
    def made() -> tuple[Residual, Freezer]:
        torch.manual_seed(2)
        net = Residual()
        policy = NEq(1e9, scope="front", thaw_at_lr_drop=10)  # everything is at equilibrium
        return net, Freezer(net, torch.optim.SGD(net.parameters(), lr=0.05), [inputs], policy)

    net, freezer = made()
    freezer.step()
    assert freezer.still == OUTSIDE
    twin, loaded = made()
    twin.load_state_dict(net.state_dict())
    loaded.load_state_dict(freezer.state_dict())
    assert loaded.still == OUTSIDE
    assert loaded.policy.state_dict() == {"highest_learning_rate": 0.05}


def test_a_compiled_model_holds_its_front_and_compiles_once(inputs: Tensor) -> None:
    torch._dynamo.reset()
    net = Residual()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    compiled = torch.compile(net, backend="aot_eager")
    freezer = Freezer(compiled, optimizer, [inputs], InFront({}))

    def step() -> int:
        optimizer.zero_grad()
        compiled(inputs).square().sum().backward()
        optimizer.step()
        return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    graphs = step()
    freezer.policy.sets = in_front(freezer)  # type: ignore[attr-defined]
    freezer.step()
    assert freezer.still == OUTSIDE
    before = {name: net.get_parameter(name).detach().clone() for name in OUTSIDE}
    assert step() == graphs
    for name, weights in before.items():
        assert torch.equal(net.get_parameter(name), weights)
        assert net.get_parameter(name).grad is None


# Thawing is seen to work.


def course(thaw: float | None) -> tuple[list[bool], list[Tensor], float]:
    """Learn one function of the inputs, then, from epoch 21 on, another, at a tenth of the learning rate.

    Returns for every epoch whether the first layer is frozen in the next one, its weights, and the last loss.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    images = torch.randn(64, 4)
    before, after = (images[:, 0] * images[:, 1]).sign(), (images[:, 2] * images[:, 3]).sign()
    policy = NEq(0.02, scope="front", share=0.8, thaw_at_lr_drop=thaw)
    freezer = Freezer(net, optimizer, [torch.randn(16, 4)], policy)
    frozen, weights = [], []
    loss = torch.zeros(())
    for epoch in range(1, 61):
        for _ in range(30):
            optimizer.zero_grad()
            loss = (net(images).squeeze(1) - (before if epoch <= 20 else after)).square().mean()
            loss.backward()
            optimizer.step()
        if epoch == 20:
            optimizer.param_groups[0]["lr"] = 0.005
        freezer.step()
        frozen.append(not bool(freezer.trainable["0"].any()))
        weights.append(freezer.model.get_parameter("0.weight").detach().clone())
    return frozen, weights, float(loss.detach())


def test_a_frozen_front_thaws_and_learns_again_when_the_labels_change() -> None:
    """Without ``thaw_at_lr_drop`` a front frozen whole stays so: its outputs are the same ever after."""
    frozen, weights, stuck = course(None)
    assert frozen[18], "the front is frozen before the labels change"
    assert all(frozen[18:])
    assert torch.equal(weights[19], weights[-1])
    frozen, weights, learnt = course(10)
    assert frozen[18]
    assert not frozen[19], "in the first epoch of the lower learning rate everything trains"
    assert not torch.equal(weights[19], weights[20])
    assert learnt < 0.75 * stuck
