"""Processes that train one model together with frozen sets: what they end with, what they send, what is left over."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import weakref
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from rounding import apart_after_steps, apart_behind_layers, phi_apart
from scripted import Scripted
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from neq_cli import Freezer
from neq_cli.errors import FreezingError
from neq_cli.freezing.backward.dispatch import Dispatch
from neq_cli.freezing.processes.replica import Replica

PASS, STEPS, BATCH = 6, 3, 4
"""Epochs, steps in each, and samples of each process in a step."""

WEIGHTS = apart_after_steps(PASS * STEPS, 1200)
"""Of a tensor's largest weight. Forward no value of ``Net`` is rounded more than 500 times (400 of them in its head),
backward as often, and its samples and positions, 192 at most, are added up."""


class Net(nn.Module):
    """No statistics of a batch: convolution, transposed convolution, norm by sample, attention, a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 8, 3), nn.GroupNorm(2, 8)
        self.up = nn.ConvTranspose2d(8, 6, 2, groups=2)
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        # Without biases: the keys' has a gradient of nothing but rounding, of which Adam makes whole steps.
        self.attention = nn.MultiheadAttention(6, 2, bias=False, batch_first=True)
        self.hidden, self.wide, self.head = nn.Linear(6, 12), nn.Linear(12, 400), nn.Linear(400, 3)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.conv(images)))
        tokens = self.up(hidden).flatten(2).transpose(1, 2) + self.token
        mixed = self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1)
        return self.head(torch.tanh(self.wide(torch.tanh(self.hidden(mixed)))))


class Rooted(nn.MultiheadAttention):
    """A model that owns neurons' parameters itself."""

    def __init__(self) -> None:
        super().__init__(6, 2, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(tokens, tokens, tokens)[0].mean(1)


SCRIPT: list[Mapping[str, float]] = [
    {"": 0.5},
    {"conv": 0, "norm": 0, "": 0.4},
    {"conv": 0.5, "wide": 0, "hidden": 0.7},
    {},
    {"": 0},
]

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
}


def together() -> bool:
    return torch.distributed.is_initialized()


def own_part(samples: Tensor) -> Tensor:
    """Return this process's samples out of everyone's."""
    if not together():
        return samples
    return samples.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]


class Training:
    """A model in training, in this process alone or as one of several; ``wrap``: Replica, or wrapped before."""

    def __init__(
        self, mode: Any, optimizer: str, wrap: str = "replica", dtype: torch.dtype = torch.float64,
        script: list[Mapping[str, float]] = SCRIPT, make: type[nn.Module] = Net, fixed: bool = True, **options: Any,
    ) -> None:  # fmt: skip
        torch.manual_seed(4)
        self.model = make().to(dtype)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        shape = (5, 6) if make is Rooted else (2, 4, 4)
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(PASS * STEPS, 12, *shape, generator=generator).to(dtype)  # alike in all precisions
        group = torch.distributed.group.WORLD if together() else None
        self.wrapped: nn.Module = self.model
        if together() and wrap == "before":
            self.wrapped = DistributedDataParallel(self.model, **options)
        self.freezer = Freezer(
            self.wrapped, self.optimizer, [own_part(self.images[0])], Scripted(script),
            backward=mode, dispatch=Dispatch(fixed=fixed), process_group=group,
        )  # fmt: skip
        self.replica = Replica(self.model, self.freezer, **options) if together() and wrap == "replica" else None

    def loss(self, images: Tensor) -> Tensor:
        labels = images.flatten(1).sum(1).sign()
        return (self.wrapped(images)[:, 0] - labels).square().mean()

    def step(self, number: int, accumulate: int = 1) -> None:
        self.optimizer.zero_grad()
        parts = own_part(self.images[number]).chunk(accumulate)
        for place, part in enumerate(parts):
            last = place == accumulate - 1
            quiet = isinstance(self.wrapped, DistributedDataParallel) and not last
            with self.wrapped.no_sync() if quiet else contextlib.nullcontext():  # type: ignore[operator]
                (self.loss(part) / accumulate).backward()
        self.check_gradients()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def rows(self) -> dict[str, Tensor]:
        """Return for every parameter that neurons own which of its elements are frozen."""
        frozen: dict[str, Tensor] = {}
        for name, (layout, mask) in self.freezer.hold.keeper._frozen_rows(self.freezer.trainable).items():
            parameter = self.model.get_parameter(name)
            where = frozen[name] = torch.zeros(parameter.shape, dtype=torch.bool)
            layout.view(where)[layout.index(where, mask.nonzero().squeeze(1))] = True
        return frozen

    def check_gradients(self) -> None:
        """What every mode promises of gradients when backward ends."""
        for name, frozen in self.rows().items():
            gradient = self.model.get_parameter(name).grad
            if frozen.all():
                assert gradient is None, name
            elif gradient is not None:
                assert not gradient[frozen].any(), name

    def epoch(self, number: int, accumulate: int = 1) -> None:
        if self.replica is not None:
            self.wrapped = self.replica.current()
        before = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        frozen = self.rows()
        for step in range(STEPS):
            self.step(number * STEPS + step, accumulate)
        for name, where in frozen.items():
            assert torch.equal(self.model.get_parameter(name).detach()[where], before[name][where]), (number, name)
        self.freezer.step()


def trained(mode: str, optimizer: str, wrap: str, accumulate: int, options: Mapping[str, Any]) -> dict[str, Tensor]:
    training = Training(mode, optimizer, wrap, **options)
    for number in range(PASS):
        training.epoch(number, accumulate)
    return {name: parameter.detach().clone() for name, parameter in training.model.named_parameters()}


def compare(expected: Mapping[str, Tensor], everyone: list[dict[str, Tensor]], tolerance: float) -> None:
    for found in everyone:
        for name, tensor in expected.items():
            assert torch.equal(found[name], everyone[0][name]), name
            assert (found[name] - tensor).abs().max() <= tolerance * tensor.abs().max(), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("mode", ["exact", "truncated", "dense"])
@pytest.mark.parametrize("count", [2, 3])
def test_many_processes_train_as_one_with_all_their_samples(
    workers: Any, count: int, mode: str, optimizer: str
) -> None:
    alone = trained(mode, optimizer, "", 1, {})
    compare(alone, workers(count, trained, mode, optimizer, "replica", 1, {}), WEIGHTS)


@pytest.mark.parametrize(
    ("options", "accumulate"),
    [
        ({"bucket_cap_mb": 0.001}, 1),
        ({"gradient_as_bucket_view": False}, 1),
        ({"gradient_as_bucket_view": False, "bucket_cap_mb": 0.001}, 2),
        ({"fixed": False}, 1),
        ({}, 2),
    ],
)
@pytest.mark.parametrize("mode", ["exact", "truncated"])
def test_however_gradients_are_sent_and_accumulated(
    workers: Any, mode: str, options: Mapping[str, Any], accumulate: int
) -> None:
    alone = trained(mode, "sgd", "", 1, {})
    compare(alone, workers(2, trained, mode, "sgd", "replica", accumulate, options), WEIGHTS)


def test_in_single_precision_too(workers: Any) -> None:
    options = {"dtype": torch.float32}
    exact, alone = (trained("exact", "sgd", "", 1, one) for one in ({}, options))

    def error(found: Mapping[str, Tensor]) -> float:
        return max(float((found[name] - tensor).abs().max() / tensor.abs().max()) for name, tensor in exact.items())

    # A bound for so many steps would allow anything. But several round no more often than one alone does, who lies as
    # far from double precision as rounding takes him; the larger of two such distances is not ten times the smaller.
    everyone = workers(4, trained, "exact", "sgd", "replica", 1, options)
    compare(everyone[0], everyone, 0.0)
    assert 0 < error(everyone[0]) <= 10 * error(alone)


@pytest.mark.parametrize("mode", ["exact", "truncated", "dense"])
@pytest.mark.parametrize("views", [False, True])
def test_a_model_that_is_wrapped_once_stays_in_one_graph(workers: Any, mode: str, views: bool) -> None:
    # In truncated mode frozen layers cut the token off, which weight decay would move wherever it has a gradient.
    alone = trained(mode, "adamw", "", 1, {})
    options = {"gradient_as_bucket_view": views}
    compare(alone, workers(2, trained, mode, "adamw", "before", 2, options), WEIGHTS)


def trained_as_if_large(*arguments: Any) -> dict[str, Tensor]:
    """Train with rows that step alone, and gradients that are handed over where no wrapper waits for them."""
    from neq_cli.freezing.rows import frozen_rows

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("_SMALL", {"cpu": 0}), ("_SHORT_ROW", 0), ("_FEW", ((0, 1.0),))):
            patch.setattr(frozen_rows, name, value)
        return trained(*arguments)


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("wrap", ["replica", "before"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_rows_that_step_alone_do_so_in_many_processes(workers: Any, optimizer: str, wrap: str, views: bool) -> None:
    alone = trained("exact", optimizer, "", 1, {})
    compare(alone, [trained_as_if_large("exact", optimizer, "", 1, {})], WEIGHTS)
    options = {"gradient_as_bucket_view": views}
    compare(alone, workers(2, trained_as_if_large, "exact", optimizer, wrap, 2, options), WEIGHTS)


class ByHand(nn.Module):
    """Hidden units, a scale of one axis, stacked experts, and a bias that stands beside a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.scale = nn.LSTM(4, 6, batch_first=True), nn.Parameter(torch.randn(6))
        self.experts = nn.Parameter(torch.randn(3, 5, 6) / 2)
        self.shift, self.head = nn.Parameter(torch.randn(5)), nn.Linear(5, 3)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.recurrent(images.flatten(2).reshape(len(images), 8, 4))[0].mean(1) * self.scale
        # By their inputs, so that who goes where does not hang on how samples are shared out.
        chosen = (images.flatten(1)[:, 0] > 0).long() + (images.flatten(1)[:, 1] > 0).long()
        mixed = hidden.new_zeros(len(hidden), 5)
        for expert in chosen.unique():
            own = torch.where(chosen == expert)[0]
            mixed = mixed.index_add(0, own, nn.functional.linear(hidden[own], self.experts[expert]))
        return self.head(torch.tanh(mixed + self.shift))


BY_HAND: list[Mapping[str, float]] = [
    {"": 0.5}, {"": 0.3}, {"recurrent.l0": 0, "": 0.5}, {"experts": 0, "scale": 0, "recurrent.l0": 0.5}, {}, {"": 0.5},
]  # fmt: skip


@pytest.mark.parametrize("wrap", ["replica", "before"])
@pytest.mark.parametrize("mode", ["exact", "truncated"])
def test_layers_that_no_module_calls_train_in_many_processes_as_in_one(workers: Any, mode: str, wrap: str) -> None:
    options = {"make": ByHand, "script": BY_HAND}
    alone = trained(mode, "sgd", "", 1, options)
    # In the processes' part of a batch an expert may get no sample, and still has a gradient, of zeros.
    compare(alone, workers(2, trained, mode, "sgd", wrap, 1, options), WEIGHTS)


class Beside(nn.Module):
    """Parameters outside neurons: before layers, inside one that computes its own way, beside layers, at the end."""

    class LowRank(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.down, self.up = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(2, 4))

        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs) + inputs @ (self.down.T @ self.up)

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.gate, self.last = (nn.Parameter(torch.randn(4)) for _ in range(3))
        self.first, self.own, self.second, self.third = (
            nn.Linear(4, 4),
            self.LowRank(),
            nn.Linear(4, 4),
            nn.Linear(4, 4),
        )
        self.head = nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.own(torch.tanh(self.first(inputs + self.shift)))
        left = torch.tanh(self.second(hidden))
        right = torch.tanh(self.third(hidden + self.gate))
        return self.head(left + right) + 2 * self.last


FROZEN_BESIDE: list[Mapping[str, float]] = [
    {"first": 0}, {"second": 0, "third": 0}, {"third": 0}, {"second": 0.5, "third": 0}, {"own": 0, "third": 0}, {"": 0},
    {"first": 0, "second": 0}, {},
]  # fmt: skip


def moved_beside(wrap: bool, set_to_none: bool, options: Mapping[str, Any]) -> list[tuple[list[str], list[Tensor]]]:
    """Return after each epoch which parameters have no gradient, and all parameters."""
    torch.manual_seed(4)
    model = Beside().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    wrapped = DistributedDataParallel(model, **options) if wrap else model
    freezer = Freezer(
        wrapped, optimizer, [torch.randn(3, 4, dtype=torch.float64)], Scripted(FROZEN_BESIDE), backward="truncated",
        dispatch=Dispatch(fixed=True), process_group=torch.distributed.group.WORLD if wrap else None,
    )  # fmt: skip
    found = []
    for _ in range(len(FROZEN_BESIDE) + 1):
        for _ in range(2):
            optimizer.zero_grad(set_to_none=set_to_none)
            wrapped(own_part(torch.randn(4, 4, dtype=torch.float64))).square().mean().backward()
            optimizer.step()
        none = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        found.append((none, [parameter.detach().clone() for parameter in model.parameters()]))
        freezer.step()
    freezer.detach()
    return found


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"gradient_as_bucket_view": True}, {"find_unused_parameters": True}, {"bucket_cap_mb": 1e-4}]
)
def test_what_no_error_reaches_has_no_gradient_in_a_wrapped_model_either(
    workers: Any, options: Mapping[str, Any], set_to_none: bool
) -> None:
    alone = moved_beside(False, set_to_none, {})
    if set_to_none:
        cut = [{"shift", "gate", "own.down", "own.up", "last"} & set(none) for none, _ in alone]
        both = {"shift", "gate", "own.down", "own.up"}
        # In the first epoch nothing is frozen yet; "first" whole cuts off what lies before it.
        assert cut == [set(), {"shift"}, both, {"gate"}, {"gate"}, {"gate"}, both, {"shift"}, set()]
    for everyones in workers(2, moved_beside, True, set_to_none, options):
        for epoch, ((none, parameters), (expected_none, expected)) in enumerate(zip(everyones, alone, strict=True)):
            assert none == expected_none, epoch
            for found, wanted in zip(parameters, expected, strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def suspended_beside(*, detached: bool = False) -> list[bool]:
    """Return whether what no error reaches has a gradient: before, in ``suspended()``, if ``detached``, and after."""
    torch.manual_seed(4)
    model = Beside()
    wrapped = DistributedDataParallel(model)
    freezer = Freezer(
        wrapped, torch.optim.SGD(model.parameters(), lr=0.1), [torch.randn(3, 4)], Scripted([{"first": 0}]),
        backward="truncated", process_group=torch.distributed.group.WORLD, dispatch=Dispatch(fixed=True),
    )  # fmt: skip
    freezer.step()

    def has_gradient() -> bool:
        model.zero_grad()
        wrapped(torch.randn(2, 4)).square().mean().backward()
        return model.shift.grad is not None and bool(model.shift.grad.any())

    found = [has_gradient()]
    with freezer.suspended():
        found.append(has_gradient())
        if detached:
            freezer.detach()
        else:
            freezer.step()
        found.append(has_gradient())
    return [*found, has_gradient()]


def test_a_wrapped_model_that_is_suspended_has_every_gradient(workers: Any) -> None:
    assert workers(2, suspended_beside) == [[False, True, True, False]] * 2


def detached_beside() -> list[bool]:
    return suspended_beside(detached=True)


def test_a_wrapped_model_that_was_detached_while_suspended_keeps_every_gradient(workers: Any) -> None:
    assert workers(2, detached_beside) == [[False, True, True, True]] * 2


def only_whole(mode: str) -> list[str]:
    training = Training(mode, "sgd", "before", script=[{"hidden": 0, "conv": 0}])
    training.epoch(0)
    training.epoch(1)
    return [name for name, parameter in training.model.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("mode", ["exact", "dense"])
def test_layers_frozen_whole_have_no_gradient_when_backward_ends_in_a_wrapped_model(workers: Any, mode: str) -> None:
    # By the last optimiser step's gradients: the third epoch's sets are in force already, and the same.
    expected = ["conv.weight", "conv.bias", "hidden.weight", "hidden.bias"]
    assert workers(2, only_whole, mode) == [expected] * 2


def root_parameters() -> list[tuple[list[str], int]]:
    training = Training("exact", "sgd", script=[{"": 0}], make=Rooted)
    seen = []
    for number in range(2):
        sent = training.replica.bytes_sent  # type: ignore[union-attr]
        training.epoch(number)
        without = [name for name, parameter in training.model.named_parameters() if parameter.grad is None]
        seen.append((without, (training.replica.bytes_sent - sent) // STEPS))  # type: ignore[union-attr]
    return seen


def test_parameters_of_the_root_itself_are_ignored_too(workers: Any) -> None:
    projections, output = 18 * 6 + 18, 6 * 6 + 6
    for first, second in workers(2, root_parameters):
        # The sets that the first step() put in force drop what the epoch before left in .grad.
        assert first == (["in_proj_weight", "in_proj_bias"], 8 * (projections + output))
        assert second == (["in_proj_weight", "in_proj_bias"], 8 * output)


# What is sent.


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(96, 96), nn.Tanh()) for _ in range(6)))
        self.head = nn.Linear(96, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.layers(inputs))


def volume(mode: str, share: float, frozen_layers: int, compiled: bool) -> tuple[int, dict[str, Tensor]]:
    """Return the bytes of one step, and the gradients that it leaves."""
    torch.manual_seed(0)
    model = Wide()
    rank = torch.distributed.get_rank()
    shares = {f"layers.{number}.0": 0.0 for number in range(frozen_layers)}
    freezer = Freezer(
        model, torch.optim.SGD(model.parameters(), lr=0.1), [torch.randn(2, 96)], Scripted([{"": share, **shares}]),
        backward=mode, dispatch=Dispatch(fixed=True), process_group=torch.distributed.group.WORLD, compiled=compiled,
    )  # fmt: skip
    torch._dynamo.reset()
    run = torch.compile(model, backend="aot_eager") if compiled else model
    replica = Replica(run, freezer, **({} if compiled else {"bucket_cap_mb": 0.05}))
    freezer.step()
    inputs = torch.randn(2, 3, 96)[rank]
    for _ in range(2):  # from the second on buckets are rebuilt
        sent = replica.bytes_sent
        model.zero_grad()
        replica.current()(inputs).square().sum().backward()
    return replica.bytes_sent - sent, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("mode", "compiled"),
    [("exact", False), ("truncated", False), ("dense", False), ("exact", True), ("truncated", True)],
)
def test_what_is_sent_shrinks_with_the_frozen_set(workers: Any, mode: str, compiled: bool) -> None:
    layer, head = 96 * 97, 2 * 97
    cases = [
        (0.5, 2, 2 * layer + head),
        (0.0, 0, head),
        (0.5, 0, 3 * layer + head),
        (1.0, 0, 6 * layer + head),
        (1 / 96, 0, 6 * 97 + head),
    ]
    for share, whole, expected in cases[: 2 if compiled else 5]:
        for sent, gradients in workers(2, volume, mode, share, whole, compiled):
            assert sent == 4 * expected, (share, whole)
            frozen = 6 if share == 0 else whole
            assert len(gradients) == 2 * (7 - frozen)


def averaged(options: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what the processes' own gradients come to on average, and what the wrapper left."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3), nn.Tanh(), nn.ConvTranspose2d(16, 12, 3, groups=2), nn.BatchNorm2d(12),
        nn.Conv2d(12, 90, 1), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(90, 51), nn.Tanh(), nn.Linear(51, 2),
    ).double().to(memory_format=torch.channels_last)  # fmt: skip
    twin = copy.deepcopy(model)
    freezer = Freezer(
        model, torch.optim.SGD(model.parameters(), lr=0.1), [torch.randn(2, 8, 6, 6).double()], Scripted([{"": 0.4}]),
        backward="dense", dispatch=Dispatch(fixed=True), process_group=torch.distributed.group.WORLD,
    )  # fmt: skip
    freezer.step()
    replica = Replica(model, freezer, **options)
    twin.load_state_dict(model.state_dict())
    for _ in range(2):
        inputs = torch.randn(2, 3, 8, 6, 6).double()[torch.distributed.get_rank()]
        for one in (model, twin):
            one.zero_grad()
        twin(inputs).square().sum().backward()
        replica.current()(inputs).square().sum().backward()
        expected = {}
        for name, parameter in twin.named_parameters():
            torch.distributed.all_reduce(parameter.grad)
            expected[name] = parameter.grad / 2
        for name, (layout, mask) in freezer.hold.keeper._frozen_rows(freezer.trainable).items():
            layout.view(expected[name])[layout.index(expected[name], mask.nonzero().squeeze(1))] = 0
    return expected, {name: parameter.grad for name, parameter in model.named_parameters()}  # type: ignore[misc]


@pytest.mark.parametrize("options", [{}, {"bucket_cap_mb": 0.01}, {"gradient_as_bucket_view": False}])
def test_every_row_arrives_at_its_place_in_every_layout(
    workers: Any, monkeypatch: pytest.MonkeyPatch, options: Mapping[str, Any]
) -> None:
    for small in (4096, 100):
        for expected, found in workers(2, averaged_with_small, small, options):
            assert list(found) == list(expected)
            for name, tensor in expected.items():
                assert (found[name] - tensor).abs().max() <= apart_behind_layers(500) * tensor.abs().max(), name


def averaged_with_small(small: int, options: Mapping[str, Any]) -> Any:
    from neq_cli.freezing.processes import sending

    before, sending._SMALL = sending._SMALL, small
    try:
        return averaged(options)
    finally:
        sending._SMALL = before


def timed() -> tuple[dict[str, Any], bool, list[str]]:
    told: list[str] = []
    training = Training("exact", "sgd", fixed=False, script=[{"": 0.5}])
    if torch.distributed.get_rank() == 0:
        training.freezer.dispatch.on_choice = lambda dispatch: told.extend(dispatch.choices)
    for number in range(2):
        training.epoch(number)
    table = {
        kind: choice for kind, choice in training.freezer.dispatch.choices.items() if kind.startswith("all-reduce")
    }
    # Only process 0 has the table of a run before: the others take it over.
    other = Training("exact", "sgd", fixed=False, script=[{"": 0.5}])
    if torch.distributed.get_rank() == 0:
        other.freezer.dispatch.load_state_dict(training.freezer.dispatch.state_dict())
    other.replica = Replica(other.model, other.freezer)
    other.replica._sending._timed = None  # type: ignore[assignment,method-assign]
    for number in range(2):
        other.epoch(number)
    sent = (training.replica.bytes_sent, other.replica.bytes_sent)  # type: ignore[union-attr]
    return (
        {kind: (choice.kernel, dict(choice.milliseconds)) for kind, choice in table.items()},
        sent[0] == sent[1],
        told,
    )


def test_choices_are_timed_together_and_kept(workers: Any) -> None:
    first, *others = workers(3, timed)
    assert first[0]
    assert all(other[0] == first[0] for other in others)
    for kernel, milliseconds in first[0].values():
        assert (kernel == "sliced") == (milliseconds["sliced"] < milliseconds["dense"])
    assert all(one[1] for one in (first, *others))
    assert set(first[0]) <= set(first[2])


# Parameters without gradients for other reasons.


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.idle, self.spare = nn.Linear(4, 4), nn.Parameter(torch.ones(3))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(inputs)))))


def with_unused(mode: str) -> tuple[bool, list[str], Tensor]:
    torch.manual_seed(0)
    model = Unused().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    group = torch.distributed.group.WORLD if together() else None
    freezer = Freezer(
        model, optimizer, [torch.randn(2, 4).double()], Scripted([{"second": 0}, {}, {"first": 0.5}]), backward=mode,
        process_group=group, dispatch=Dispatch(fixed=True),
    )  # fmt: skip
    replica = Replica(model, freezer) if together() else None
    wrapped: nn.Module = model
    for _ in range(4):
        wrapped = model if replica is None else replica.current()
        for _ in range(3):
            optimizer.zero_grad()
            wrapped(own_part(torch.randn(4, 4).double())).square().mean().backward()
            optimizer.step()
        freezer.step()
    none = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    unused = isinstance(wrapped, DistributedDataParallel) and wrapped.find_unused_parameters
    return unused, none, torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("mode", ["exact", "truncated", "dense"])
def test_parameters_that_the_model_does_not_use(workers: Any, mode: str) -> None:
    _, none, weights = with_unused(mode)
    assert {"idle.weight", "idle.bias", "spare"} <= set(none)
    for unused, found, everyones in workers(2, with_unused, mode):
        assert unused
        assert found == none
        # 12 steps; 4 + 6 + 6 terms forward, as many backward, 8 in the loss.
        assert (everyones - weights).abs().max() <= apart_after_steps(12, 40) * weights.abs().max()


# What is left over, and mistakes.


def remade(times: int) -> tuple[int, int, int, list[str]]:
    training = Training("exact", "sgd", script=[{"hidden": 0}, {"hidden": 0.5}])
    seen: list[weakref.ref[Any]] = []
    kept = None
    for number in range(times):
        assert training.replica is not None
        training.wrapped = training.replica.current()
        assert training.wrapped is training.replica.current()
        seen.append(weakref.ref(training.wrapped))
        kept = training.wrapped if number == 3 else kept  # somebody holds on to an old one
        training.step(number % 4)
        training.freezer.step()
    alive = {id(one()): one() for one in seen if one() is not None}
    del training.wrapped, training.replica
    others = sum(one is not kept for one in alive.values())
    del alive
    gc.collect()
    left = [one() for one in seen if one() is not None and one() is not kept]
    names = [key for p in training.model.parameters() for key in vars(p)] + [
        key for key in vars(training.model) if "ddp" in key
    ]
    reducers = sum(type(one).__name__ in ("Reducer", "Sending") for one in gc.get_objects())
    return len({id(one) for one in seen}), others, len(left), names + ["too many"] * (reducers > 4)


def test_wrappers_made_anew_leave_nothing_behind(workers: Any) -> None:
    for _, alive, left, names in workers(2, remade, 50):
        assert alive <= 3
        assert left == 0
        assert names == []


def misused() -> list[str]:
    training = Training("exact", "sgd", script=[{"hidden": 0}, {"": 0.5}, {"": 0.6}])
    messages = []
    assert training.replica is not None
    first = training.replica.current()
    images = own_part(training.images[0])
    first(images)
    training.freezer.step()
    for attempt in range(3):
        training.wrapped = training.replica.current() if attempt == 1 else first
        try:
            training.step(0)
            messages.append("")
        except FreezingError as error:
            messages.append(str(error))
    try:
        Replica(training.wrapped, training.freezer)
    except FreezingError as error:
        messages.append(str(error))
    training.replica.current()
    copied = pickle.loads(pickle.dumps(training.model))
    with torch.no_grad():
        messages.append(str(bool((copied(images) == training.model(images)).all())))
    training.freezer.step()
    training.freezer.step()  # other rows, but of the same parameters
    training.wrapped = training.replica.current()
    training.freezer.step()
    training.freezer.step()
    return messages


def test_a_wrapper_that_does_not_fit_the_sets_is_refused(workers: Any) -> None:
    changed = "replica: the frozen sets have changed; call current() after freezer.step()"
    old = "replica: this wrapper is out of date; train with the one that current() returns"
    wrapped = "model: DistributedDataParallel wraps it already; give the Replica the model inside"
    assert workers(2, misused) == [[changed, "", old, wrapped, "True"]] * 2


def test_without_a_group_there_is_a_line() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    freezer = Freezer(model, torch.optim.SGD(model.parameters(), lr=0.1), [torch.ones(1, 2)])
    with pytest.raises(
        FreezingError, match=r"^process_group: there is none; call torch.distributed.init_process_group"
    ):
        Replica(model, freezer)


def begun() -> tuple[list[float], list[float], list[float]]:
    torch.manual_seed(torch.distributed.get_rank())
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    model[1].running_mean.fill_(torch.distributed.get_rank())
    group = torch.distributed.group.WORLD
    freezer = Freezer(model, torch.optim.SGD(model.parameters(), lr=0.1), [torch.randn(3, 2)], process_group=group)
    Replica(model, freezer)
    freezer.step()
    return model[0].weight.tolist(), model[1].running_mean.tolist(), freezer.dynamics["0"].phi.tolist()


def test_all_begin_with_process_0_s_model(workers: Any) -> None:
    found = workers(3, begun)
    assert found[0] == found[1] == found[2]
    assert found[0][1] == [0, 0]
    assert found[0][2] == [pytest.approx(1, abs=phi_apart(0, 9))] * 2


class InFront(Scripted):
    scope = "front"


FRONT = ("conv", "norm", "up", "attention.in_proj", "attention.out_proj")


def with_a_front(way: str) -> tuple[list[str], list[str], float, bool]:
    """Return who stands still, who has a gradient, what was sent over what trains, and whether what is held moved."""
    torch.manual_seed(4)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped: nn.Module = DistributedDataParallel(model) if way == "wrapped" else model
    freezer = Freezer(
        wrapped, optimizer, [torch.randn(3, 2, 6, 6)], InFront([dict.fromkeys(FRONT, 0)]),
        process_group=torch.distributed.group.WORLD, dispatch=Dispatch(fixed=True),
    )  # fmt: skip
    replica = Replica(model, freezer, torch.distributed.group.WORLD) if way == "replica" else None
    freezer.step()
    before = {name: model.get_parameter(name).detach().clone() for name in freezer.still}
    images = torch.randn(BATCH, 2, 6, 6, generator=torch.Generator().manual_seed(torch.distributed.get_rank()))
    (replica.current() if replica is not None else wrapped)(images).square().mean().backward()
    there = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    trains = sum(4 * model.get_parameter(name).numel() for name in there)
    optimizer.step()
    moved = any(not torch.equal(model.get_parameter(name), tensor) for name, tensor in before.items())
    return sorted(freezer.still), there, 0.0 if replica is None else replica.bytes_sent / trains, moved


@pytest.mark.parametrize("way", ["replica", "wrapped"])
def test_a_front_sends_no_gradients(way: str, workers: Any) -> None:
    rest = [f"{layer}.{name}" for layer in ("hidden", "wide", "head") for name in ("weight", "bias")]
    for still, there, sent, moved in workers(2, with_a_front, way):
        assert (still, there, moved) == (["token"], rest, False)
        assert sent == (1.0 if way == "replica" else 0.0)
