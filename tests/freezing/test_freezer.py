from __future__ import annotations

import copy
import io
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies
from rounding import apart_after_steps
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from neq_cli import Baseline, Freezer, NEq, Observation, Stochastic
from neq_cli.errors import FreezingError, NeqError
from neq_cli.freezing.backward.dispatch import Dispatch, Kernel, KernelChoice


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6)
        self.hidden, self.dropout, self.head = nn.Linear(24, 8), nn.Dropout(0.2), nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        hidden = nn.functional.relu(self.norm(self.conv(images)), inplace=True)
        return self.head(torch.tanh(self.dropout(self.hidden(hidden.flatten(1)))))


def data() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    images, probe = (torch.randn(n, 2, 4, 4, generator=generator) for n in (24, 6))
    return images, images.mean((1, 2)).argmax(1) % 3, probe


def train_one_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int = 0) -> None:
    model.train()
    images, labels, _ = data()
    torch.manual_seed(epoch)  # dropout
    for number in torch.randperm(24).split(8):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[number]), labels[number]).backward()
        optimizer.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed_rows(before: Mapping[str, Tensor], model: nn.Module) -> dict[str, list[bool]]:
    return {
        name: (parameter != before[name])
        .flatten(1 if parameter.dim() > 1 else 0)
        .reshape(len(parameter), -1)
        .any(1)
        .tolist()
        for name, parameter in model.named_parameters()
    }


class Sliced(Dispatch):
    """Computes the trainable rows and no others, as small layers as these would not by themselves."""

    def choose(self, kind: str, kernels: Sequence[Kernel], run: Callable[[Kernel], object], *_: Any) -> KernelChoice:
        return KernelChoice("sliced", {})


class FreezeAll:
    def choose(self, observations: Mapping[str, Observation], epoch: int) -> Mapping[str, Tensor]:
        return {name: torch.zeros_like(seen.trainable) for name, seen in observations.items()}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


def test_the_five_lines() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    probe_loader = torch.utils.data.DataLoader(data()[2], batch_size=4)

    freezer = Freezer(model, optimizer, probe_loader, policy=NEq(epsilon=2e-2, mu=0.5))
    in_force = {name: [True] * layer.neurons for name, layer in freezer.layers.items()}
    counts = []
    for epoch in range(6):
        before = weights(model)
        train_one_epoch(model, optimizer, epoch)
        changed = changed_rows(before, model)
        for name, trainable in in_force.items():
            assert changed[f"{name}.weight"] == trainable, (epoch, name)
            assert changed[f"{name}.bias"] == trainable or name == "conv", (epoch, name)
        observations = freezer.step()
        scheduler.step()
        assert list(observations) == ["conv", "norm", "hidden", "head"]
        for name, seen in observations.items():
            still = (seen.velocity.abs() < 2e-2) & (name != "head")
            assert torch.equal(seen.trainable, ~still), (epoch, name)
            in_force[name] = seen.trainable.tolist()
        counts.append(sum(int((~seen.trainable).sum()) for seen in observations.values()))
        assert freezer.epoch == epoch + 1
    assert len(set(counts)) > 1
    assert 0 < max(counts) < 20


def test_the_first_epoch_trains_everything_and_a_policy_that_freezes_all_never_freezes_the_output_layer() -> None:
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    freezer = Freezer(model, optimizer, [data()[2]], FreezeAll())
    assert all(trainable.all() for trainable in freezer.trainable.values())
    before = weights(model)
    train_one_epoch(model, optimizer)
    assert all(all(rows) for rows in changed_rows(before, model).values())
    for _ in range(2):
        freezer.step()
        before, mean = weights(model), model.norm.running_mean.clone()
        train_one_epoch(model, optimizer)
        changed = {name: set(rows) for name, rows in changed_rows(before, model).items()}
        assert changed == {name: {name.startswith("head")} for name in changed}
        assert not torch.equal(model.norm.running_mean, mean)


def test_a_neuron_thaws_when_what_lies_below_it_moves() -> None:
    model = nn.Sequential(nn.Linear(32, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-7)
    images, labels, probe = data()

    def train(rate: float) -> None:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images.flatten(1)), labels).backward()
        optimizer.step()

    freezer = Freezer(model, optimizer, [probe.flatten(1)], NEq(1e-3), exclude=["0"])
    train(1e-7)
    assert not freezer.step()["2"].trainable.any()
    middle = model[2].weight.detach().clone()
    train(20.0)
    assert torch.equal(model[2].weight, middle)
    seen = freezer.step()["2"]
    assert seen.trainable.all()
    assert (seen.velocity < -1e-3).all()
    train(1.0)
    assert (model[2].weight != middle).any(1).all()


def test_baseline_trains_as_if_there_were_no_freezer() -> None:
    results = []
    for with_freezer in (True, False):
        torch.manual_seed(5)
        model = Net()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        freezer = Freezer(model, optimizer, [data()[2]], Baseline()) if with_freezer else None
        for epoch in range(3):
            train_one_epoch(model, optimizer, epoch)
            if freezer:
                freezer.step()
        results.append(model.state_dict())
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


@pytest.mark.parametrize("policy", [NEq(1.0), NEq(1.0, definition="reference"), Stochastic(0.5)])
def test_a_default_device_and_deterministic_algorithms_are_no_obstacle(policy: Any) -> None:
    # As torch.set_default_device("cuda") before a model that is on the CPU, or the other way round.
    class Mine(torch.optim.SGD):
        pass

    model = Net()
    optimizer = Mine(model.parameters(), lr=0.1, momentum=0.9)
    probe = data()[2]
    torch.use_deterministic_algorithms(True)
    try:
        with torch.device("meta"):
            freezer = Freezer(model, optimizer, [probe], policy)
            seen = freezer.step()
            freezer.load_state_dict(freezer.state_dict())
            model(probe).sum().backward()
            optimizer.step()
            seen = freezer.step()
            assert freezer.flops().paper < freezer.flops().paper_dense
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(tensor.device.type == "cpu" for one in seen.values() for tensor in vars(one).values())


# Backward modes.


class Tokens(nn.Module):
    """A small transformer over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 12)
        # Without biases: the keys' has a gradient of nothing but rounding, of which Adam makes whole steps.
        self.block = nn.TransformerEncoderLayer(12, 2, 20, dropout=0.1, batch_first=True, bias=False)
        self.head = nn.Linear(12, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.block(self.embed(images.permute(0, 2, 1, 3).flatten(2))).mean(1))


def trained(
    make: Callable[[], nn.Module], mode: Any, policy: Any, optimizer_name: str, epochs: int = 3
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Return the weights after some epochs, and the sets that were in force in each, but for the first's."""
    torch.manual_seed(5)
    model = make()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    freezer = Freezer(model, optimizer, [data()[2]], policy(), backward=mode, dispatch=Sliced())
    sets = []
    for epoch in range(epochs):
        before, trainable = weights(model), freezer.trainable
        train_one_epoch(model, optimizer, epoch)
        for name, layer in freezer.layers.items():
            for rows in layer.rows:
                frozen = ~trainable[name]
                own = slice(rows.start, rows.start + rows.count)
                old, new = before[rows.parameter][own], model.get_parameter(rows.parameter)[own]
                assert torch.equal(old[frozen], new[frozen]), (mode, epoch, rows.parameter)
        freezer.step()
        sets.append(freezer.trainable)
    return weights(model), sets


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("optimizer_name", ["sgd", "adam"])
@pytest.mark.parametrize("make", [Net, Tokens])
def test_exact_trains_as_dense_does(make: Callable[[], nn.Module], optimizer_name: str) -> None:
    found = {
        mode: trained(make, mode, lambda: Stochastic(0.5, seed=3), optimizer_name)
        for mode in ("exact", "dense", "truncated")
    }
    exact, dense, truncated = (found[mode][0] for mode in ("exact", "dense", "truncated"))
    # Nine steps. Forward no value is rounded more than 150 times, backward as often.
    tolerance = apart_after_steps(9, 300)
    apart = {}
    for name, expected in dense.items():
        largest = expected.abs().max()
        if name != "conv.bias":  # before a normalisation, its gradient is nothing but rounding
            assert (exact[name] - expected).abs().max() <= tolerance * largest, name
        apart[name] = bool((truncated[name] - expected).abs().max() > 1e-3 * largest)
    assert any(apart.values())  # an approximation
    for _, sets in found.values():
        assert any(not rows.all() for rows in sets[0].values())
        for one, other in zip(sets, found["dense"][1], strict=True):
            assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("make", [Net, Tokens])
def test_with_nothing_frozen_all_modes_train_bit_for_bit_alike(make: Callable[[], nn.Module]) -> None:
    exact, dense, truncated = (trained(make, mode, Baseline, "sgd")[0] for mode in ("exact", "dense", "truncated"))
    for name, expected in dense.items():
        assert torch.equal(exact[name], expected), name
        assert torch.equal(truncated[name], expected), name


def test_exact_is_the_default() -> None:
    model = Net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    freezer = Freezer(model, optimizer, [data()[2]], Stochastic(0.5), dispatch=Sliced())
    assert freezer.backward == "exact"
    freezer.step()
    model(data()[0]).sum().backward()
    assert set(freezer.kernels()) == {"conv", "norm", "hidden"}
    assert freezer.kernels()["conv"].rows_computed == 3
    assert freezer.kernels()["norm"].kernel == "dense"
    flops = freezer.flops()
    conv, hidden = 6 * 4 * (2 * 9), 8 * 24  # 2x2 positions of 2 channels by 3x3, and 24 inputs: half is saved
    assert flops.executed == flops.executed_dense - (conv + hidden) / 2


def test_a_state_puts_its_sets_in_force() -> None:
    model, other = Net(), Net()
    freezers = [Freezer(net, OPTIMIZERS["sgd"](net.parameters()), [data()[2]], FreezeAll()) for net in (model, other)]
    freezers[0].step()
    freezers[1].load_state_dict(freezers[0].state_dict())
    other(data()[0]).sum().backward()
    assert {use.kernel for use in freezers[1].kernels().values()} == {"none"}
    assert [name for name, parameter in other.named_parameters() if parameter.grad is not None] == [
        "head.weight", "head.bias"
    ]  # fmt: skip


# Going on where a run was cut.


def flattened(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in state.items():
        assert isinstance(key, str)
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def through_torch(state: Any, folder: Path) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def through_safetensors(state: Any, folder: Path) -> Any:
    """Write tensors into a safetensors file and the rest as plain values, as one who allows no pickled objects does."""
    flat = dict(flattened(state))
    tensors = {key: value.contiguous().clone() for key, value in flat.items() if isinstance(value, Tensor)}
    plain = {key: value for key, value in flat.items() if not isinstance(value, Tensor)}
    assert all(isinstance(value, (int, float, str, bool)) for value in plain.values())
    # A file of its own: tensors that were read may still be backed by theirs.
    path = folder / f"state{len(list(folder.iterdir()))}.safetensors"
    save_file(tensors, path, metadata={key: repr(value) for key, value in plain.items()})
    nested: dict[str, Any] = {}
    for key, value in {**load_file(path), **plain}.items():
        *parents, last = key.split("/")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return nested


POLICIES: dict[str, Callable[[], Any]] = {
    "neq": lambda: NEq(epsilon=2e-2),
    "reference": lambda: NEq(epsilon=2e-2, definition="reference"),
    "stochastic": lambda: Stochastic(0.5, seed=3),
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
}


@pytest.mark.parametrize("order", ["freezer last", "freezer first"])
@pytest.mark.parametrize("through", [through_torch, through_safetensors])
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_run_cut_after_any_epoch_goes_on_bit_for_bit(
    policy: str, optimizer_name: str, through: Callable[..., Any], order: str, tmp_path: Path
) -> None:
    epochs = 5

    def begin(seed: int) -> tuple[Net, torch.optim.Optimizer, Freezer]:
        torch.manual_seed(seed)
        model = Net()
        optimizer = OPTIMIZERS[optimizer_name](model.parameters())
        return model, optimizer, Freezer(model, optimizer, [data()[2]], POLICIES[policy](), dispatch=Sliced())

    model, optimizer, freezer = begin(1)
    straight: list[tuple[dict[str, Observation], dict[str, Tensor]]] = []
    states = []
    for epoch in range(epochs):
        train_one_epoch(model, optimizer, epoch)
        seen = freezer.step()
        straight.append((seen, copy.deepcopy(model.state_dict())))
        states.append(
            [
                *(through_torch(part.state_dict(), tmp_path) for part in (model, optimizer)),
                through(freezer.state_dict(), tmp_path),
            ]
        )
    assert any(not seen.trainable.all() for observations, _ in straight[:-1] for seen in observations.values())

    for cut in range(1, epochs):
        parts = begin(99)
        pairs = list(zip(parts, states[cut - 1], strict=True))
        for part, state in pairs if order == "freezer last" else reversed(pairs):
            part.load_state_dict(state)
        model, optimizer, freezer = parts
        assert freezer.epoch == cut
        for epoch in range(cut, epochs):
            train_one_epoch(model, optimizer, epoch)
            seen = freezer.step()
            expected, expected_weights = straight[epoch]
            for name, observation in expected.items():
                for field in ("phi", "delta_phi", "velocity", "trainable"):
                    assert torch.equal(getattr(seen[name], field), getattr(observation, field)), (
                        cut,
                        epoch,
                        name,
                        field,
                    )
            for name, tensor in model.state_dict().items():
                assert torch.equal(tensor, expected_weights[name]), (cut, epoch, name)


def test_loading_leaves_the_loaded_state_alone() -> None:
    model = Net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    freezer = Freezer(model, optimizer, [data()[2]], NEq(1.0))
    freezer.step()
    state = copy.deepcopy(freezer.state_dict())
    kept = copy.deepcopy(state)
    freezer.load_state_dict(state)
    freezer.detach()
    other = Freezer(model, optimizer, [data()[2]], NEq(1.0))
    other.load_state_dict(state)
    train_one_epoch(model, optimizer)
    other.step()
    for (name, value), (_, before) in zip(flattened(state), flattened(kept), strict=True):
        assert torch.equal(value, before) if isinstance(value, Tensor) else value == before, name


def test_a_state_of_another_model_is_refused_and_changes_nothing() -> None:
    def freezer_of(model: nn.Module) -> Freezer:
        return Freezer(model, torch.optim.SGD(model.parameters(), lr=0.1), [torch.randn(2, 4)], FreezeAll())

    freezer = freezer_of(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)))
    others = {
        "'1'": freezer_of(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))),
        "'2'": freezer_of(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(3, 3))),
        "'0.weight'": Freezer(
            other := nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)),
            torch.optim.SGD(other.parameters(), lr=0.1),
            [torch.randn(2, 5)],
        ),
    }
    for place, wrong in others.items():
        wrong.step()
        with pytest.raises(FreezingError, match=rf"^freezer state: belongs to another model; .*{place} differs"):
            freezer.load_state_dict(wrong.state_dict())
    for state in ({}, {**freezer.state_dict(), "version": 999}):
        with pytest.raises(FreezingError, match=r"^freezer state: version"):
            freezer.load_state_dict(state)
    assert freezer.epoch == 0
    assert all(trainable.all() for trainable in freezer.trainable.values())


def stepped(policy: Any = None) -> tuple[Net, Freezer]:
    """A model whose sets have some frozen rows in force, and its Freezer."""
    torch.manual_seed(2)
    model = Net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    freezer = Freezer(model, optimizer, [data()[2]], policy or Stochastic(0.5, seed=3), dispatch=Sliced())
    train_one_epoch(model, optimizer)
    freezer.step()
    return model, freezer


@pytest.mark.parametrize("through", [through_torch, through_safetensors])
def test_what_is_executed_is_known_as_soon_as_a_state_is_loaded(through: Callable[..., Any], tmp_path: Path) -> None:
    class Blocks(Dispatch):
        """Computes more rows than train, so that the sets alone do not tell how many."""

        def choose(
            self, kind: str, kernels: Sequence[Kernel], run: Callable[[Kernel], object], *_: Any
        ) -> KernelChoice:
            return KernelChoice("dense", {})

    model, other = Net(), Net()
    freezers = [
        Freezer(net, OPTIMIZERS["sgd"](net.parameters()), [data()[2]], Stochastic(0.5, seed=3), dispatch=Blocks())
        for net in (model, other)
    ]
    freezers[0].step()
    before = freezers[0].flops().executed
    model(data()[0]).sum().backward()
    executed = freezers[0].flops().executed
    assert executed == freezers[0].flops().executed_dense > before
    state = through(freezers[0].state_dict(), tmp_path)
    assert state["computed"] == {"conv": 6, "hidden": 8}
    freezers[1].load_state_dict(state)
    assert freezers[1].flops() == freezers[0].flops()
    assert freezers[1].state_dict()["computed"] == state["computed"]
    freezers[1].dispatch = Sliced()
    for plan in freezers[1].hold.slicing.plans.values():
        plan.dispatch = Sliced()
    other(data()[0]).sum().backward()  # a newer backward pass is what counts
    assert freezers[1].flops().executed == before
    freezers[1].load_state_dict({key: value for key, value in state.items() if key != "computed"})
    assert freezers[1].flops().executed == before
    freezers[1].load_state_dict(state)
    freezers[1].step()  # new sets
    assert freezers[1].state_dict()["computed"] == {}
    assert freezers[1].flops().executed == before  # as many rows, none computed yet
    freezers[1].detach()
    assert freezers[1].state_dict()["computed"] == {}


ODD_VALUES: list[Any] = [
    None, True, -1, 10**30, 10**5000, 1.5, math.nan, "", "x\ny\x1b[31m" * 99, [], {}, {"a": {}}, [1] * 9, b"", object(),
    torch.tensor(0.5), torch.zeros(0), torch.zeros(6), torch.zeros(6, dtype=torch.float64), torch.zeros(8, 2),
    torch.ones(6) > 0,
    torch.zeros(6, device="meta", dtype=torch.float64), torch.zeros(6, dtype=torch.float64).to_sparse(),
    torch.zeros(5056, dtype=torch.uint8), torch.ones(3, 4, dtype=torch.complex64),
    torch.zeros(10**4).expand(10**4, 10**4),
]  # fmt: skip


def paths(state: Mapping[str, Any], before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in state.items():
        yield (*before, key)
        if isinstance(value, Mapping):
            yield from paths(value, (*before, key))


def everything_of(freezer: Freezer) -> list[Any]:
    state = copy.deepcopy(freezer.state_dict())
    rows = {name: plan.trainable.tolist() for name, plan in freezer.hold.slicing.plans.items()}
    return [*((key, value.tolist() if isinstance(value, Tensor) else value) for key, value in flattened(state)), rows]


@pytest.mark.parametrize("policy", [Stochastic, NEq])
def test_damaged_states_are_refused_in_one_line_and_change_nothing(policy: Any) -> None:
    _model, freezer = stepped(Stochastic(0.5, seed=3) if policy is Stochastic else NEq(1.0))
    good = freezer.state_dict()
    everywhere = [path for path in paths(good) if path[0] != "policy" or policy is Stochastic]

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(strategies.sampled_from(everywhere), strategies.sampled_from(["remove", "add", *range(len(ODD_VALUES))]))
    def check(path: tuple[str, ...], damage: Any) -> None:
        state = copy.deepcopy(good)
        place = state
        for key in path[:-1]:
            place = place[key]
        if damage == "remove":
            del place[path[-1]]
        elif damage == "add":
            place[path[-1] + "\n"] = place[path[-1]]
        else:
            place[path[-1]] = ODD_VALUES[damage]
        before = everything_of(freezer)
        message = refusal(freezer, state)
        if message is None:
            # What was damaged is not needed, or is as good as what was there.
            harmless = path[0] in ("computed", "policy", "epoch", "at_rest") or damage == "add"
            value = None if isinstance(damage, str) else ODD_VALUES[damage]
            alike = isinstance(value, Tensor) and value.dtype == getattr(good_at(good, path), "dtype", None)
            assert harmless or alike, (path, damage)
            freezer.load_state_dict(good)
        else:
            assert message.startswith("freezer state: ")
            assert message.isprintable()
            assert len(message) < 500
            assert str(everything_of(freezer)) == str(before)

    check()
    with pytest.raises(FreezingError, match=r"^freezer state: it is list; it must be a mapping$"):
        freezer.load_state_dict([])  # type: ignore[arg-type]


def refusal(freezer: Freezer, state: Any) -> str | None:
    try:
        freezer.load_state_dict(state)
    except FreezingError as error:
        return str(error)
    return None


def good_at(state: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        state = state[key]
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": -1}, "epoch is -1; it must be a whole number from 0 to 1000000000"),
        ({"epoch": 10**30}, "epoch is a huge number; it must be a whole number from 0 to 1000000000"),
        ({"version": "1"}, "version '1' is not version 1"),
        ({"layers": 3}, "layers is 3; it must be a mapping"),
        ({"computed": {"conv": 7}}, "computed: conv is 7; it must be a whole number from 0 to 6"),
        ({"computed": {"nowhere": 1}}, "computed: 'nowhere' is no layer of this model"),
    ],
)
def test_what_is_wrong_with_a_state_is_said(change: Mapping[str, Any], message: str) -> None:
    _model, freezer = stepped()
    with pytest.raises(FreezingError) as error:
        freezer.load_state_dict({**freezer.state_dict(), **change})
    assert str(error.value) == f"freezer state: {message}"


def test_a_policy_that_does_not_take_its_state_over_keeps_the_one_it_had() -> None:
    class Half(FreezeAll):
        """Fails when half of its state is taken over."""

        def __init__(self) -> None:
            self.first, self.second = 1, 2

        def state_dict(self) -> dict[str, Any]:
            return {"first": self.first, "second": self.second}

        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            self.first = state["first"]
            self.second = state["second"]

    _model, freezer = stepped(policy := Half())
    with pytest.raises(
        FreezingError, match=r"^freezer state: policy Half does not take it over \(KeyError: 'second'\)$"
    ):
        freezer.load_state_dict({**freezer.state_dict(), "policy": {"first": 9}, "epoch": 5})
    assert (policy.first, policy.second, freezer.epoch) == (1, 2, 1)


# The surface.


def test_its_errors_belong_to_the_one_family() -> None:
    assert issubclass(FreezingError, NeqError)
    assert issubclass(FreezingError, ValueError)


def test_only_known_backward_modes_are_taken() -> None:
    model = Net()
    with pytest.raises(FreezingError, match=r"^backward: 'sparse' is not a backward mode; use "):
        Freezer(model, OPTIMIZERS["sgd"](model.parameters()), [data()[2]], backward="sparse")  # type: ignore[arg-type]


def test_the_sets_it_returns_are_copies() -> None:
    model = Net()
    freezer = Freezer(model, OPTIMIZERS["sgd"](model.parameters()), [data()[2]], FreezeAll())
    freezer.step()["conv"].trainable.fill_(True)
    assert not freezer.trainable["conv"].any()


def test_the_library_needs_torch_only_and_neq_cli_not_even_that() -> None:
    script = """
        import sys, neq_cli
        assert "torch" not in sys.modules
        neq_cli.Freezer
        extra = {"pydantic", "typer", "rich", "yaml", "torchvision", "safetensors"} & set(sys.modules)
        assert not extra, extra
        ours = {name.split(".")[1] for name in sys.modules if name.startswith("neq_cli.")}
        assert ours == {"errors", "freezing"}, ours
        try:
            neq_cli.Frezer
        except AttributeError as error:
            assert "Frezer" in str(error)
        else:
            raise AssertionError
    """
    lines = "\n".join(line.removeprefix(" " * 8) for line in script.splitlines())
    subprocess.run([sys.executable, "-c", lines], check=True, timeout=120)
