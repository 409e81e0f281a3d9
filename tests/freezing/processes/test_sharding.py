"""A Freezer under ``fully_shard``: the sets and weights of one process, rows that stand still, what is sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from rounding import apart_after_steps, phi_apart
from scripted import Scripted
from torch import Tensor, nn

from neq_cli import Freezer, NEq
from neq_cli.errors import FreezingError
from neq_cli.freezing.backward.dispatch import Dispatch
from neq_cli.freezing.processes.replica import Replica

PASSES, STEPS = 4, 3
"""Epochs, and steps in each; 12 samples in a step, over all processes."""

WEIGHTS = apart_after_steps(PASSES * STEPS, 1200)
"""Of a tensor's largest weight: no value of these nets is rounded more than 1200 times in a step, there and back."""


class Perceptron(nn.Module):
    """Layers whose rows two or three processes share unevenly; the last one's are fewer than three."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 11), nn.LayerNorm(11)
        self.wide, self.head = nn.Linear(11, 400), nn.Linear(400, 2)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.first(images[:, 0, 0])))
        return self.head(torch.tanh(self.wide(hidden)))


class Convolutions(nn.Module):
    """Rows along dimension 1, in groups and not, and norms without statistics of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 8, 3), nn.GroupNorm(2, 8)
        self.up, self.more = nn.ConvTranspose2d(8, 6, 2, groups=2), nn.ConvTranspose2d(6, 5, 2)
        self.head = nn.Linear(5, 2)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.conv(images)))
        return self.head(torch.tanh(self.more(torch.tanh(self.up(hidden)))).mean((2, 3)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        # Without biases: the keys' has a gradient of nothing but rounding, of which Adam makes whole steps.
        self.attention = nn.MultiheadAttention(12, 2, bias=False, batch_first=True)
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 40), nn.Linear(40, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return tokens + self.down(torch.tanh(self.up(self.norm(tokens))))


class Transformer(nn.Module):
    """Weights passed to functions, an embedding's columns, and a parameter outside neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.token = nn.Embedding(5, 12), nn.Parameter(torch.randn(1, 1, 12))
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(12, 2)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embedding((3 * images[:, 0].flatten(1)).long().clamp(-2, 2) + 2) + self.token
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(tokens.mean(1))


MODELS = {"perceptron": Perceptron, "convolutions": Convolutions, "transformer": Transformer}


class OfMine(torch.optim.SGD):
    """No optimiser of torch.optim, so that a copy of it is tried on copies of the parameters."""


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
    "of mine": lambda parameters: OfMine(parameters, lr=0.1, momentum=0.9),
}


SCRIPT: list[Mapping[str, float]] = [
    {"": 0.4},
    {"first": 0, "norm": 0, "wide": 0.1, "conv": 0, "up": 0, "embedding": 0, "blocks.0.attention.in_proj": 0, "": 0.5},
    {"": 0},
]


def together() -> bool:
    return torch.distributed.is_initialized()


def rank() -> int:
    return torch.distributed.get_rank() if together() else 0


def own_part(samples: Tensor) -> Tensor:
    """Return this process's samples out of everyone's."""
    return samples.chunk(torch.distributed.get_world_size())[rank()] if together() else samples


def part(tensor: Tensor) -> Tensor:
    """Return the part of a parameter, or of its gradient or state, that is here."""
    return getattr(tensor, "_local_tensor", tensor)


def sharded(model: nn.Module, **options: Any) -> nn.Module:
    """Divide ``model`` block by block, where several processes run."""
    if together():
        from torch.distributed.fsdp import fully_shard

        units: list[Any] = [*model.blocks] if isinstance(model, Transformer) else list(model.children())[:-1]
        if isinstance(model, Outer):
            units = [model.wide]
        if isinstance(model, ByHand):
            units = [model.recurrent]
        if isinstance(model, Tied):
            units = [[model.first, model.again]]
        for unit in units:
            fully_shard(unit, **options)
        fully_shard(model, **options)
    return model


def whole_model(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (one.full_tensor() if hasattr(one, "full_tensor") else one).detach().clone()
        for name, one in model.state_dict().items()
    }


class Training:
    """A model in training, in this process alone or as one of several."""

    def __init__(self, model: str, optimizer: str, mode: Any = "exact", script: Any = None, **options: Any) -> None:
        torch.manual_seed(4)
        self.model = sharded(MODELS[model]().double(), **options.pop("sharding", {}))
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(PASSES * STEPS, 12, 2, 6, 6, generator=generator, dtype=torch.float64)
        policy = options.pop("policy", None) or Scripted(script or SCRIPT)
        self.freezer = Freezer(
            self.model, self.optimizer, [own_part(self.images[0])], policy,
            backward=mode, dispatch=Dispatch(fixed=True), **options,
        )  # fmt: skip

    def loss_of(self, images: Tensor) -> Tensor:
        return (self.model(images)[:, 0] - images.flatten(1).sum(1).sign()).square().mean()

    def step(self, number: int) -> None:
        self.optimizer.zero_grad()
        self.loss_of(own_part(self.images[number])).backward()
        self.check_gradients()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def frozen(self) -> dict[str, Tensor]:
        """Return which elements of every parameter with frozen rows stand still, of the part that is here."""
        found = {}
        for name, (layout, mask) in self.freezer.hold.keeper._frozen_rows(self.freezer.trainable).items():
            every = torch.zeros(self.model.get_parameter(name).shape, dtype=torch.bool)
            layout.view(every)[layout.index(every, mask.nonzero().squeeze(1))] = True
            if mask.any():
                parts = torch.chunk(every, torch.distributed.get_world_size()) if together() else [every]
                found[name] = parts[rank()] if rank() < len(parts) else every[:0]
        return found

    def check_gradients(self) -> None:
        whole = self.freezer.hold.keeper._frozen_rows(self.freezer.trainable)
        for name, still in self.frozen().items():
            gradient = self.model.get_parameter(name).grad
            if whole[name][1].all():
                assert gradient is None, name
            elif gradient is not None:
                assert not part(gradient)[still].any(), name

    def held(self) -> dict[str, Tensor]:
        """Return copies of what is to stand still: frozen weights, and their state."""
        found = {}
        state = self.optimizer.state_dict()["state"]
        numbers = {name: number for number, (name, _) in enumerate(self.model.named_parameters())}
        for name, still in self.frozen().items():
            parameter = self.model.get_parameter(name)
            found[name] = part(parameter.detach())[still].clone()
            for key, value in state.get(numbers[name], {}).items():
                if value.shape == parameter.shape:
                    found[f"{name} {key}"] = part(value)[still].clone()
        return found

    def run(self) -> int:
        """Train all epochs; return how many numbers were found to stand still, in this process."""
        count = 0
        for epoch in range(PASSES):
            before = self.held()
            for number in range(STEPS):
                self.step(epoch * STEPS + number)
            after = self.held()
            for name, values in before.items():
                assert torch.equal(values, after[name]), (epoch, name)
                count += values.numel()
            self.freezer.step()
        return count


def trained(model: str, optimizer: str, mode: Any) -> tuple[dict[str, Tensor], list[dict[str, Tensor]], int]:
    training = Training(model, optimizer, mode)
    count = training.run()
    sets = [training.freezer.trainable]
    return whole_model(training.model), sets, count


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    ("model", "mode", "count"),
    [
        ("perceptron", "exact", 3), ("convolutions", "exact", 2), ("transformer", "exact", 2),
        ("perceptron", "dense", 2), ("perceptron", "exact", 1),
        ("transformer", "truncated", 2), ("by hand", "exact", 2),
    ],
)  # fmt: skip
def test_sharded_training_is_that_of_one_process(
    workers: Any, model: str, mode: str, count: int, optimizer: str
) -> None:
    weights, sets, alone = trained(model, optimizer, mode)
    everyone = workers(count, trained, model, optimizer, mode)
    for found, found_sets, _ in everyone:
        for name, expected in weights.items():
            difference = (found[name] - expected).abs().max()
            assert difference <= WEIGHTS * max(1.0, float(expected.abs().max())), (name, float(difference))
        for one, other in zip(sets, found_sets, strict=True):
            assert all(torch.equal(rows, other[name]) for name, rows in one.items())
    assert sum(numbers for _, _, numbers in everyone) == alone > 1000


def trained_otherwise(how: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train with all divided over two of four processes, whose likes are copies; along dimension 1; with gradients that
    two passes add up before they are sent; by an optimiser that is tried; or as the authors' code does."""
    options: dict[str, Any] = {}
    if together():
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard

        if how == "hybrid":
            options["mesh"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts"))
        elif how == "dimension 1":
            options["shard_placement_fn"] = lambda one: Shard(1) if one.dim() > 1 and one.shape[1] % 2 == 0 else None
    policy = Scripted(SCRIPT)
    if how == "reference":
        policy.definition = "reference"  # type: ignore[attr-defined]
    optimizer = "of mine" if how == "of mine" else "adamw"
    training = Training("convolutions", optimizer, sharding=options, policy=policy)
    for epoch in range(PASSES):
        for number in range(STEPS):
            training.optimizer.zero_grad()
            parts = own_part(training.images[epoch * STEPS + number]).chunk(2 if how == "accumulated" else 1)
            for place, images in enumerate(parts):
                if together():
                    training.model.set_requires_gradient_sync(place == len(parts) - 1)  # type: ignore[operator]
                (training.loss_of(images) / len(parts)).backward()
            training.optimizer.step()
        training.freezer.step()
    return whole_model(training.model), training.freezer.trainable


@pytest.mark.parametrize(
    ("how", "count"), [("hybrid", 4), ("dimension 1", 2), ("accumulated", 2), ("of mine", 2), ("reference", 3)]
)
def test_sharded_training_of_other_kinds(workers: Any, how: str, count: int) -> None:
    weights, sets = trained_otherwise(how)
    for found, found_sets in workers(count, trained_otherwise, how):
        for name, expected in weights.items():
            difference = (found[name] - expected).abs().max()
            assert difference <= WEIGHTS * max(1.0, float(expected.abs().max())), (name, float(difference))
        assert all(torch.equal(rows, found_sets[name]) for name, rows in sets.items())


def moved(freezer: Freezer, number: int) -> None:
    """Change weights, the same way however they are divided; not what is frozen whole, which nothing changes."""
    whole = freezer.hold.keeper.discarding.whole
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for parameter in freezer.model.parameters():
            noise = 0.05 * torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype)
            parts = torch.chunk(noise, torch.distributed.get_world_size()) if together() else [noise]
            if rank() < len(parts) and all(parameter is not one for one in whole):
                part(parameter).add_(parts[rank()])


def batches(shares: list[list[int]]) -> list[Tensor]:
    """Return this process's share of the probe in batches of two; one process alone takes all, one after another."""
    images = torch.randn(12, 2, 6, 6, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    own = [shares[rank()]] if together() else shares
    return [images[chunk] for share in own if share for chunk in torch.tensor(share).split(2)]


def observed(model: str, shares: list[list[int]], definition: Any) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """Return phi and set of every layer after each of three epochs."""
    torch.manual_seed(3)
    made = sharded(MODELS[model]().double())
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    sample = torch.zeros(1, 2, 6, 6, dtype=torch.float64)
    freezer = Freezer(made, optimizer, batches(shares), NEq(0.004, definition=definition), sample=sample)
    result = []
    for epoch in range(3):
        moved(freezer, epoch)
        freezer.step()
        result.append({name: (freezer.dynamics[name].phi, freezer.trainable[name]) for name in freezer.layers})
    return result


@pytest.mark.parametrize(
    ("model", "definition", "shares"),
    [
        ("perceptron", "paper", [[0, 1, 2, 3, 4, 5, 6], [7, 8], []]),
        ("convolutions", "reference", [[0, 1], [2, 3, 4, 5, 6]]),
        ("transformer", "paper", [[], [0, 1, 2, 3, 4]]),
    ],
)
def test_shards_show_what_the_whole_does(workers: Any, model: str, definition: str, shares: list[list[int]]) -> None:
    # The same batches on the same weights give the same outputs; only their sums, in double precision, come together in
    # another order: of 36 positions in 7 inputs at most.
    alone, everyone = observed(model, shares, definition), workers(len(shares), observed, model, shares, definition)
    frozen = 0
    for epoch, expected in enumerate(alone):
        for name, (phi, trainable) in expected.items():
            for found in everyone:
                assert (found[epoch][name][0] - phi).abs().max() <= phi_apart(0, 252), (epoch, name)
                assert torch.equal(found[epoch][name][1], trainable), (epoch, name)
            frozen += int((~trainable).sum())
    assert frozen > 2


class Own(Perceptron):
    """Does something of its own when its mode changes, so that its weights must be there."""

    def train(self, mode: bool = True) -> nn.Module:
        assert self.first.weight[0].sum().isfinite()
        return super().train(mode)


class ByHand(nn.Module):
    """A factor that no module stands for, experts stacked in one weight, and recurrent layers."""

    def __init__(self) -> None:
        super().__init__()
        self.factor, self.head = nn.Parameter(torch.randn(6, 8)), nn.Linear(5, 2)
        self.experts, self.recurrent = nn.Parameter(torch.randn(3, 8, 8)), nn.LSTM(8, 5, batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.tanh(images[:, 0] @ self.factor)
        mixed = torch.bmm(hidden.flatten(0, 1).expand(3, -1, -1), self.experts).mean(0).view_as(hidden)
        return self.head(self.recurrent(torch.tanh(mixed))[0].mean(1))


class Tied(nn.Module):
    """Two layers with one weight, which are gathered together."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.again.weight = self.first.weight

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.tanh(self.again(torch.tanh(self.first(images[:, 0, 0])))))


class Outer(Perceptron):
    """Only the wide layer is gathered by itself."""


MODELS |= {"outer": Outer, "own": Own, "by hand": ByHand, "tied": Tied}


@pytest.mark.parametrize("model", ["own", "by hand", "tied"])
def test_what_looks_at_weights_elsewhere_finds_them(workers: Any, model: str) -> None:
    shares = [[0, 1, 2], [3, 4]]
    alone = observed(model, shares, "paper")
    for found in workers(2, observed, model, shares, "paper"):
        for epoch, expected in enumerate(alone):
            for name, (phi, trainable) in expected.items():
                assert (found[epoch][name][0] - phi).abs().max() <= phi_apart(0, 252), (epoch, name)
                assert torch.equal(found[epoch][name][1], trainable), (epoch, name)


def watched() -> tuple[int, int, int, list[int], set[str]]:
    """Return elements kept of the weights before, of all, most gathered at a time, of units; parameters' classes."""
    from neq_cli.freezing.processes.gathering import StandIns

    training = Training("perceptron", "sgd")
    there: dict[int, int] = {}
    most = 0
    gather, free = StandIns._gather, StandIns._free

    def gathering(self: StandIns, unit: Any) -> None:
        nonlocal most
        gather(self, unit)
        there[id(unit)] = sum(self.parameters[name].untyped_storage().size() // 8 for name in unit.parameters)
        most = max(most, sum(there.values()))

    def freeing(self: StandIns, unit: Any) -> None:
        free(self, unit)
        there.pop(id(unit), None)
        assert all(self.parameters[name].untyped_storage().size() == 8 for name in unit.parameters)

    StandIns._gather, StandIns._free = gathering, freeing  # type: ignore[method-assign]
    try:
        training.freezer.step()
    finally:
        StandIns._gather, StandIns._free = gather, free  # type: ignore[method-assign]
    kept = sum(
        one.untyped_storage().size() // 8 for one in training.freezer._previous.tensors.values() if one is not None
    )
    units = [
        sum(parameter.numel() for parameter in unit.parameters())
        for unit in (training.model.first, training.model.norm, training.model.wide, training.model.head)
    ]
    kinds = {type(one).__name__ for one in training.model.parameters()}
    return kept, sum(units), most, units, kinds


def test_a_process_keeps_a_shard_of_the_weights_before_and_gathers_a_unit_at_a_time(workers: Any) -> None:
    (first, *_), (second, *_) = found = workers(2, watched)
    for kept, count, most, units, kinds in found:
        # Of rows that two processes cannot share evenly one has one more: of 8 parameters, 400 elements at the widest.
        assert kept < count / 2 + 8 * 11
        assert most == max(units[:3]) + units[3], units  # the head is the root's, which runs all along
        assert kinds == {"DTensor"}
    assert first + second == found[0][1]


def saved(folder: str, how: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Observe twice and save, in one process or several; return phi and sets of what comes next."""
    torch.manual_seed(3)
    model = sharded(Perceptron().double())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freezer = Freezer(model, optimizer, batches([[0, 1, 2, 3], [4, 5, 6], []]), NEq(0.004))
    for epoch in range(2):
        moved(freezer, epoch)
        freezer.step()
    moved(freezer, 2)  # weights and those of the step before differ
    if how == "whole":
        weights, state = whole_model(model), freezer.state_dict(whole=True)
        if rank():
            assert state == {}
        else:
            torch.save({"model": weights, "freezer": state}, f"{folder}/saved.pt")
    else:
        from torch.distributed import checkpoint

        checkpoint.save({"model": model.state_dict(), "freezer": freezer.state_dict()}, checkpoint_id=folder)
    freezer.step()
    return {name: one.phi for name, one in freezer.dynamics.items()}, freezer.trainable


def resumed(folder: str, how: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Load what ``saved`` saved, and return phi and sets of what comes next, and the whole state before."""
    torch.manual_seed(5)
    model = sharded(Perceptron().double())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freezer = Freezer(model, optimizer, batches([[0, 1, 2, 3], [4, 5, 6], []]), NEq(0.004))
    if how == "whole":
        state = torch.load(f"{folder}/saved.pt", weights_only=True)
        whole = Perceptron().double()
        whole.load_state_dict(state["model"])
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), whole.parameters(), strict=True):
                parts = torch.chunk(value, torch.distributed.get_world_size()) if together() else [value]
                if rank() < len(parts):
                    part(parameter).copy_(parts[rank()])
    else:
        from torch.distributed import checkpoint

        state = {"model": model.state_dict(), "freezer": freezer.state_dict()}
        checkpoint.load(state, checkpoint_id=folder)
        model.load_state_dict(state["model"])
    freezer.load_state_dict(state["freezer"])
    assert freezer.epoch == 2
    before = freezer.state_dict(whole=True)
    freezer.step()
    return {name: one.phi for name, one in freezer.dynamics.items()}, freezer.trainable, before


@pytest.mark.parametrize(("how", "other"), [("whole", 3), ("whole", 1), ("checkpoint", 2), ("checkpoint", 3)])
def test_another_number_of_processes_goes_on(workers: Any, tmp_path: Any, how: str, other: int) -> None:
    first, second = workers(2, saved, str(tmp_path), how)
    # Three processes look at all of it, two leave the last share, which is empty, out.
    everyone = workers(other, resumed, str(tmp_path), how) if other > 1 else [resumed(str(tmp_path), how)]
    for phi, trainable, _ in everyone:
        for name, one in first[0].items():
            assert (phi[name] - one).abs().max() <= phi_apart(0, 252), name
            assert torch.equal(trainable[name], first[1][name])
            assert torch.equal(trainable[name], second[1][name])
    whole = everyone[0][2]
    assert {tuple(one.shape) for one in whole["previous"].values()} == {
        tuple(one.shape) for one in Perceptron().parameters()
    }
    assert all(type(one) is Tensor for one in whole["previous"].values())


# As fully_shard calls them, in torch 2.14 and before.
REDUCE, GATHER = (
    ("reduce_scatter_single", "all_gather_single")
    if hasattr(torch.distributed, "reduce_scatter_single")
    else ("reduce_scatter_tensor", "all_gather_into_tensor")
)


@contextmanager
def counted(name: str, what: str) -> Iterator[list[int]]:
    """Yield how many elements the ``input`` or ``output`` of every call of a collective has."""
    stock, counts = getattr(torch.distributed, name), []

    def counting(*arguments: Any, **keywords: Any) -> Any:
        named = {key.split("_")[0]: value for key, value in keywords.items()}
        given = dict(zip(("output", "input"), arguments, strict=False)) | named
        counts.append(given[what].numel())
        return stock(*arguments, **keywords)

    setattr(torch.distributed, name, counting)
    try:
        yield counts
    finally:
        setattr(torch.distributed, name, stock)


def sent(model: str, shares: Mapping[str, float]) -> tuple[list[int], list[int], dict[str, str]]:
    """Return how many elements a step's reduce-scatters take and its gathers give, and the kernels of its layers."""
    training = Training(model, "sgd", script=[shares])
    training.step(0)
    training.freezer.step()
    training.step(1)
    with counted(REDUCE, "input") as reduced, counted(GATHER, "output") as gathered:
        training.step(2)
    return reduced, gathered, {name: use.kernel or "" for name, use in training.freezer.kernels().items()}


def test_a_frozen_front_sends_nothing_and_gathers_for_the_forward_pass_alone(workers: Any) -> None:
    # Rows are padded to an even number: 11 of first and norm to 12.
    first, norm, wide, head = 12 * 6 + 12, 12 + 12, 400 * 11 + 400, 2 * 400 + 2
    for reduced, gathered, kernels in workers(2, sent, "perceptron", {"wide": 0.1}):
        assert sorted(reduced) == sorted([first, norm, wide, head])
        assert sorted(gathered) == sorted([first, norm, wide] * 2 + [head])  # the root keeps its own till the end
        assert kernels == {"wide": "sliced"}
    for reduced, gathered, kernels in workers(2, sent, "perceptron", {"first": 0, "norm": 0, "wide": 0.1}):
        assert sorted(reduced) == sorted([wide, head])
        # fully_shard fetches beforehand what came before the wide layer.
        assert [gathered.count(one) for one in (first, norm, wide, head)] == [1, 2, 2, 1]
        assert kernels == {"first": "none", "norm": "none", "wide": "sliced"}


def test_a_frozen_layer_takes_no_part_in_what_its_block_sends(workers: Any) -> None:
    projections, norm, up, down = 36 * 12 + 12 * 12, 12 + 12, 40 * 12 + 40, 12 * 40 + 12
    root = 6 * 12 + 2 * 12 + 2 * 12 + 2  # rows of the embedding and of the token are padded to an even number
    for reduced, _, kernels in workers(2, sent, "transformer", {"blocks.1.up": 0, "blocks.1.norm": 0}):
        block = projections + norm + up + down
        assert sorted(reduced) == sorted([block, block - norm - up, root])
        assert kernels == {"blocks.1.up": "none", "blocks.1.norm": "none"}


class Fronted(Scripted):
    """Has what lies outside neurons in a frozen front stand still as well."""

    scope = "front"


FRONT = [f"blocks.0.{name}" for name in ("attention.in_proj", "attention.out_proj", "norm", "up", "down")]


def fronted() -> tuple[frozenset[str], bool, list[int]]:
    """Return what stands still in a step, whether it did, and how many elements its reduce-scatters take."""
    training = Training("transformer", "adamw", policy=Fronted([dict.fromkeys(["embedding", *FRONT], 0.0)]))
    training.step(0)
    training.freezer.step()
    training.step(1)
    token = training.model.token
    before = part(token.detach()).clone()
    with counted(REDUCE, "input") as reduced:
        training.step(2)
    return training.freezer.still, torch.equal(before, part(token.detach())) and token.grad is None, reduced


def test_parameters_outside_neurons_stand_still_in_a_front(workers: Any) -> None:
    block = 36 * 12 + 12 * 12 + 12 + 12 + 40 * 12 + 40 + 12 * 40 + 12
    for still, stood, reduced in workers(2, fronted):
        assert still == {"token"}
        assert stood
        assert sorted(reduced) == sorted([block, 2 * 12 + 2])  # the second block and the head


def mishap() -> list[str]:
    """Fail in the first look and in a probe; return what was said, and whether training goes on."""
    model = sharded(Perceptron())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    said = []
    good, bad = torch.ones(2, 2, 6, 6), torch.ones(2, 2, 6, 5)
    loader = [bad]
    try:
        Freezer(model, optimizer, loader, NEq())
    except RuntimeError as error:
        said.append(str(error))
    freezer = Freezer(model, optimizer, [good], NEq())
    freezer.probe_loader = loader
    try:
        freezer.step()
    except RuntimeError as error:
        said.append(str(error))
    for _ in range(2):
        model(good).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        model(good)  # leaves the outermost parameters gathered
    freezer.probe_loader = [good]
    freezer.step()
    return [*said, str(freezer.epoch), *{type(one).__name__ for one in model.parameters()}]


def test_a_model_that_fails_in_the_probe_trains_on(workers: Any) -> None:
    for look, probe, *after in workers(2, mishap):
        assert "shape" in look
        assert "shape" in probe
        assert after == ["1", "DTensor"]


def stepping() -> tuple[list[str], bool]:
    """Step as soon as a block's gradients are there, while the outermost parameters are gathered for the others."""
    training = Training("outer", "sgd", script=[{"wide": 0.1, "first": 0.5}])
    training.step(0)
    training.freezer.step()
    training.optimizer.zero_grad()
    head = training.model.head.weight
    training.model.wide.weight.register_post_accumulate_grad_hook(lambda _: training.optimizer.step())
    before = training.held()
    training.loss_of(own_part(training.images[1])).backward()
    after = training.held()
    assert head.grad is not None
    return training.freezer.notes, all(torch.equal(values, after[name]) for name, values in before.items())


def test_a_step_inside_of_a_backward_pass_leaves_what_is_gathered(workers: Any) -> None:
    assert workers(2, stepping) == [([], True)] * 2


def mixed(checkpointed: bool) -> tuple[bool, int, dict[str, str], Tensor]:
    """Train blocks in bfloat16 with frozen rows; return whether they stood still, how many, kernels, and phi."""
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(4)
    model = Transformer()
    if checkpointed:
        for block in model.blocks:
            run = block.forward
            block.forward = lambda tokens, run=run: checkpoint(run, tokens, use_reentrant=False)  # type: ignore[method-assign]
    sharded(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    images = torch.randn(12, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    script: list[Mapping[str, float]] = [{"blocks.0.up": 0.3, "blocks.1.attention.in_proj": 0.3}]
    freezer = Freezer(model, optimizer, [own_part(images)], Scripted(script), dispatch=Dispatch(fixed=True))
    stood = True
    count = 0
    kernels: dict[str, str] = {}
    for _ in range(3):
        layer, attention = model.blocks[0].up, model.blocks[1].attention
        before = [part(one.detach()).clone() for one in (layer.weight, attention.in_proj_weight)]
        for _ in range(2):
            optimizer.zero_grad()
            model(own_part(images)).float().square().mean().backward()
            optimizer.step()
        for one, name, weights in zip(
            (layer.weight, attention.in_proj_weight), ("blocks.0.up", "blocks.1.attention.in_proj"), before, strict=True
        ):
            parts = torch.chunk(~freezer.trainable[name], 2)[rank()]
            stood &= torch.equal(part(one.detach())[parts], weights[parts])
            stood &= bool((part(one.detach()) != weights)[~parts].any())
            count += int(parts.sum())
        kernels = {name: use.kernel or "" for name, use in freezer.kernels().items()}
        phi = freezer.step()["blocks.0.up"].phi
    return stood, count, kernels, phi


@pytest.mark.parametrize("checkpointed", [False, True])
def test_mixed_precision_and_activation_checkpoints(workers: Any, checkpointed: bool) -> None:
    (first, some, kernels, phi), (second, others, _, _) = workers(2, mixed, checkpointed)
    assert first
    assert second
    assert some + others == 2 * (40 - 12 + 36 - 11)
    assert kernels == {"blocks.0.up": "sliced", "blocks.1.attention.in_proj": "sliced"}
    assert (phi < 1).all()  # of the weights themselves: to bfloat16 many of such small changes would be none


def refused(what: str) -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
    from torch.distributed.tensor import Replicate, distribute_tensor

    model: nn.Module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    mesh = init_device_mesh("cpu", (2,))
    if what == "parallel":
        model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh, [Replicate()]))
    elif what == "offload":
        fully_shard(model, offload_policy=CPUOffloadPolicy(pin_memory=False))
    else:
        fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    alone = [torch.distributed.new_group([number]) for number in range(2)][rank()]
    options: dict[str, Any] = {"compiled": what == "compile", "process_group": alone if what == "group" else None}
    policy = NEq(scope="front", front_mode="inference") if what == "inference" else NEq()
    try:
        Freezer(model, optimizer, [torch.ones(2, 4)], policy, **options)
    except FreezingError as error:
        return str(error)
    return ""


def replicated() -> str:
    training = Training("perceptron", "sgd")
    try:
        Replica(training.model, training.freezer)
    except FreezingError as error:
        return str(error)
    return ""


def test_a_replica_of_shards_is_refused(workers: Any) -> None:
    message = "model: fully_shard divides it already; train with it as it is, without a Replica"
    assert workers(2, replicated) == [message] * 2


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nothing", ""),
        ("parallel", "model: parameter '0.weight' is a DTensor that fully_shard does not manage; "),
        ("offload", "model: parameter '0.weight' is kept on the CPU by fully_shard; "),
        ("compile", "model: fully_shard divides it, and torch.compile runs it; "),
        ("inference", "policy: front_mode inference is not for what fully_shard divides; use front_mode train"),
        ("group", "process_group: has 1 processes, but fully_shard divides the model over 2; "),
    ],
)
def test_what_cannot_be_done_is_said_before_training(workers: Any, what: str, message: str) -> None:
    for said in workers(2, refused, what):
        assert said.startswith(message)
        assert bool(said) == bool(message)
        assert "\n" not in said
