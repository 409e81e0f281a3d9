from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neq_cli import Freezer
from neq_cli.errors import FreezingError
from neq_cli.freezing.backward.dispatch import Dispatch, Kernel, KernelChoice

CPU = torch.device("cpu")


class Clock:
    """Stands still but for what is said to have passed, in seconds."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Timed]:
    """Return what makes kernels that take the milliseconds they are told to, by the only clock that choices go by."""
    clock = Clock()
    monkeypatch.setattr("neq_cli.freezing.backward.dispatch.time", clock)
    return lambda **milliseconds: Timed(clock, milliseconds)


class Timed:
    """Kernels that take so many milliseconds, and note that they ran."""

    def __init__(self, clock: Clock, milliseconds: Mapping[str, float]) -> None:
        self.clock = clock
        self.milliseconds = milliseconds
        self.ran: list[str] = []

    def __call__(self, kernel: Kernel) -> None:
        self.ran.append(kernel)
        self.clock.now += self.milliseconds[kernel] / 1e3


def choose(dispatch: Dispatch, run: Callable[[Kernel], object], kind: str = "kind", by_rule: Kernel = "sliced") -> str:
    return dispatch.choose(kind, ["dense", "sliced", "rounded"], run, by_rule, CPU).kernel


@pytest.mark.parametrize(
    ("dense", "sliced", "rounded", "chosen"),
    [
        (6, 2, 4, "sliced"),
        (6, 4, 2, "rounded"),
        (2, 4, 6, "dense"),
        (4, 4, 4, "dense"),  # not clearly faster
        (0.1, 0.06, 0.07, "dense"),  # faster, but by less than leaving PyTorch's own path costs
    ],
)
def test_the_fastest_kernel_is_chosen_and_the_dense_one_in_doubt(
    timed: Callable[..., Timed], dense: float, sliced: float, rounded: float, chosen: str
) -> None:
    dispatch, run = Dispatch(), timed(dense=dense, sliced=sliced, rounded=rounded)
    assert choose(dispatch, run) == chosen
    assert dispatch.choices["kind"].milliseconds == pytest.approx(run.milliseconds)
    assert dispatch.seconds == pytest.approx(sum(run.milliseconds[name] for name in run.ran) / 1e3)


def test_every_kernel_is_warmed_up_before_it_is_timed(timed: Callable[..., Timed]) -> None:
    kernels = timed(dense=2, sliced=1, rounded=3)

    def run(kernel: Kernel) -> None:
        if kernel not in kernels.ran:
            kernels.clock.now += 0.05  # as a library that compiles something first
        kernels(kernel)

    dispatch = Dispatch()
    assert choose(dispatch, run) == "sliced"
    assert dispatch.choices["kind"].milliseconds == pytest.approx(kernels.milliseconds)


def test_times_that_disagree_are_taken_again_and_the_shortest_counts(timed: Callable[..., Timed]) -> None:
    kernels = timed(dense=30, sliced=25, rounded=26)

    def run(kernel: Kernel) -> None:
        if kernel == "sliced" and kernels.ran.count("sliced") < 4:
            kernels.clock.now += 0.04 / (1 + kernels.ran.count("sliced"))  # as beside another program that ends
        kernels(kernel)

    dispatch = Dispatch()
    assert choose(dispatch, run) == "sliced"
    assert kernels.ran.count("dense") > 4  # warmed up, and timed oftener than the three times that would do
    assert dispatch.choices["kind"].milliseconds == pytest.approx(kernels.milliseconds)


def test_a_hopeless_kernel_is_not_timed_again(timed: Callable[..., Timed]) -> None:
    run = timed(dense=1, sliced=0.5, rounded=20)
    choose(Dispatch(), run)
    assert run.ran.count("rounded") == 4  # warmed up and timed three times
    assert run.ran.count("sliced") > 4


def test_a_kind_is_timed_once(timed: Callable[..., Timed]) -> None:
    dispatch, run = Dispatch(), timed(dense=1, sliced=0.1, rounded=2)
    assert choose(dispatch, run) == "sliced"
    number = len(run.ran)
    run.milliseconds = {"dense": 0.1, "sliced": 1, "rounded": 2}
    assert choose(dispatch, run) == "sliced"
    assert len(run.ran) == number
    assert choose(dispatch, run, "another kind") == "dense"
    assert list(dispatch.choices) == ["kind", "another kind"]


@pytest.mark.parametrize("by_rule", ["dense", "sliced"])
def test_a_fixed_rule_never_times(by_rule: Kernel) -> None:
    def run(kernel: Kernel) -> None:
        raise AssertionError

    dispatch = Dispatch(fixed=True)
    for _ in range(2):
        assert choose(dispatch, run, by_rule=by_rule) == by_rule
    assert dispatch.choices == {"kind": KernelChoice(by_rule, {})}
    assert dispatch.choices["kind"].reason == "by rule"
    assert dispatch.seconds == 0


def test_a_choice_gives_its_reason_the_fastest_first() -> None:
    assert KernelChoice("sliced", {"dense": 7.914, "sliced": 5.1, "rounded": 6}).reason == (
        "sliced 5.1 ms, rounded 6 ms, dense 7.91 ms"
    )


# Written down, and read again.


def test_a_choice_is_announced_when_it_is_made() -> None:
    told: list[dict[str, Any]] = []
    dispatch = Dispatch(fixed=True, on_choice=lambda dispatch: told.append(dispatch.state_dict()))
    choose(dispatch, lambda kernel: None, "first")
    choose(dispatch, lambda kernel: None, "first")
    choose(dispatch, lambda kernel: None, "second")
    first = {"first": {"kernel": "sliced", "milliseconds": {}}}
    assert told == [first, {**first, "second": {"kernel": "sliced", "milliseconds": {}}}]


def test_choices_survive_json(timed: Callable[..., Timed]) -> None:
    dispatch = Dispatch()
    choose(dispatch, timed(dense=1, sliced=0.1, rounded=2))
    choose(dispatch, timed(dense=0.1, sliced=1, rounded=2), "another kind")
    again = Dispatch()
    again.load_state_dict(json.loads(json.dumps(dispatch.state_dict())))
    assert again.choices == dispatch.choices
    run = timed()
    assert choose(again, run) == "sliced"
    assert choose(again, run, "another kind") == "dense"
    assert run.ran == []


@pytest.mark.parametrize(
    "state",
    [
        None,
        [],
        "sliced",
        {"kind": None},
        {"kind": "sliced"},
        {"kind": {}},
        {"kind": {"kernel": "sliced"}},
        {"kind": {"milliseconds": {}}},
        {"kind": {"kernel": "fastest", "milliseconds": {}}},
        {"kind": {"kernel": ["sliced"], "milliseconds": {}}},
        {"kind": {"kernel": "sliced", "milliseconds": 5}},
        {"kind": {"kernel": "sliced", "milliseconds": {"sliced": "fast"}}},
        {"kind": {"kernel": "sliced", "milliseconds": {"sliced": None}}},
    ],
)
def test_a_damaged_table_is_refused_and_changes_nothing(state: Any) -> None:
    dispatch = Dispatch(fixed=True)
    choose(dispatch, lambda kernel: None)
    before = dict(dispatch.choices)
    with pytest.raises(FreezingError, match=r"^dispatch: not a table of kernel choices \(.*\)$"):
        dispatch.load_state_dict(state)
    assert dispatch.choices == before


# In training.


class Half:
    """Freezes every other neuron, or the first ``count`` of each layer."""

    def __init__(self, count: int | None = None) -> None:
        self.count = count

    def choose(self, observations: Any, epoch: int) -> dict[str, Tensor]:
        numbers = {name: torch.arange(len(seen.trainable)) for name, seen in observations.items()}
        return {
            name: number % 2 == 0 if self.count is None else number >= self.count for name, number in numbers.items()
        }

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        pass


def frozen(policy: Half, dispatch: Dispatch, **arguments: Any) -> tuple[Freezer, Tensor]:
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(16 * 16, 2))
    images = torch.randn(2, 3, 6, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freezer = Freezer(model, optimizer, [images], policy, dispatch=dispatch, **arguments)
    freezer.step()
    return freezer, images


class Counting(Dispatch):
    """Chooses the sliced kernel, and counts how often something was timed."""

    timed = 0

    def choose(
        self, kind: str, kernels: Any, run: Callable[[Kernel], object], by_rule: Kernel, device: torch.device
    ) -> KernelChoice:
        if self.find(kind) is None:
            self.timed += 1
            self.choices[kind] = KernelChoice("sliced", {})
        return self.choices[kind]


def test_a_table_that_was_loaded_is_used_without_timing() -> None:
    dispatch = Dispatch()
    freezer, images = frozen(Half(), dispatch)
    freezer.model(images).sum().backward()
    assert len(dispatch.choices) == 2
    assert dispatch.seconds > 0
    for kernel in ("dense", "sliced"):
        table = {kind: {"kernel": kernel, "milliseconds": {kernel: 1.0}} for kind in dispatch.choices}
        loaded = Dispatch(on_choice=lambda dispatch: pytest.fail("chose again"))
        loaded.load_state_dict(table)
        freezer, images = frozen(Half(), loaded)
        freezer.model(images).sum().backward()
        assert loaded.seconds == 0
        assert [use.kernel for use in freezer.kernels().values()] == [kernel] * 2
        assert [use.rows_computed for use in freezer.kernels().values()] == [16 if kernel == "dense" else 8] * 2


def test_one_choice_serves_a_block_of_rows_and_every_frozen_set_of_as_many() -> None:
    dispatch = Counting()
    policy = Half(count=1)  # 15 of 16 rows train
    freezer, images = frozen(policy, dispatch)

    def train() -> None:
        freezer.model(images).sum().backward()

    train()
    train()
    assert dispatch.timed == 2  # of two layers
    for count, timed in ((3, 2), (7, 2), (8, 4), (15, 4), (9, 4)):  # 9 to 15 rows are two blocks of 8, 1 to 8 are one
        policy.count = count
        freezer.step()
        train()
        assert dispatch.timed == timed, count
    images = torch.randn(3, 3, 6, 6)
    train()
    assert dispatch.timed == 6  # another batch size


def test_kinds_differ_where_the_work_does() -> None:
    dispatch = Counting()
    freezer, images = frozen(Half(), dispatch)
    freezer.model(images).sum().backward()
    plain = dict(dispatch.choices)
    freezer.model(images.to(memory_format=torch.channels_last)).sum().backward()
    freezer.model(images.requires_grad_()).sum().backward()  # now the first layer computes an input gradient
    with torch.autocast("cpu", torch.bfloat16):
        output = freezer.model(images)
    output.sum().backward()
    freezer.model.double()
    freezer.model(images.double()).sum().backward()
    added = [kind for kind in dispatch.choices if kind not in plain]
    for word in ("channels_last", "bfloat16", "float64"):
        assert any(word in kind for kind in added), word
    assert sum("no input gradient" in kind for kind in plain) == 1
    assert len({kind for kind in dispatch.choices if kind.startswith(next(iter(plain))[:40])}) > 2
    truncated, images = frozen(Half(), dispatch, backward="truncated")
    before = set(dispatch.choices)
    truncated.model(images).sum().backward()
    assert len(set(dispatch.choices) - before) == 2


def test_a_choice_is_announced_before_it_is_used() -> None:
    """What is written down must be there already when the first gradient by it is computed."""
    seen: list[tuple[int, bool]] = []
    dispatch = Dispatch()
    freezer, images = frozen(Half(), dispatch)
    weights = [layer.weight for layer in (freezer.model[0], freezer.model[1])]
    dispatch.on_choice = lambda dispatch: seen.append(
        (len(dispatch.choices), weights[len(weights) - len(dispatch.choices)].grad is None)
    )
    freezer.model(images).sum().backward()
    assert seen == [(1, True), (2, True)]


def test_fixed_runs_choose_alike() -> None:
    tables = []
    for _ in range(2):
        dispatch = Dispatch(fixed=True)
        freezer, images = frozen(Half(), dispatch)
        freezer.model(images).sum().backward()
        tables.append(dispatch.state_dict())
        assert all(use.reason == "by rule" for use in freezer.kernels().values())
    assert tables[0] == tables[1]
    assert len(tables[0]) == 2


def test_what_is_known_is_not_timed_but_becomes_a_choice(timed: Callable[..., Timed]) -> None:
    written: list[list[str]] = []
    known = {
        "kind": KernelChoice("rounded", {"rounded": 1.0, "dense": 2.0}),
        "other": KernelChoice("dense", {"dense": 1.0}),
    }
    dispatch = Dispatch(known=known, on_choice=lambda dispatch: written.append(list(dispatch.choices)))
    run = timed(dense=0, sliced=0, rounded=0)
    assert dispatch.find("kind") is None
    assert choose(dispatch, run) == "rounded"
    assert (run.ran, written, dispatch.seconds) == ([], [["kind"]], 0)
    assert dispatch.find("kind") == known["kind"]
    assert choose(Dispatch(known=known, fixed=True), run) == "sliced"
    own = Dispatch(known=known)
    own.load_state_dict({"kind": {"kernel": "sliced", "milliseconds": {}}})
    assert choose(own, run) == "sliced"


def test_timing_is_announced(timed: Callable[..., Timed]) -> None:
    said: list[int] = []
    run = timed(dense=0, sliced=0, rounded=0)
    dispatch = Dispatch(on_timing=lambda: said.append(len(run.ran)))
    for _ in range(2):
        choose(dispatch, run)
    assert said == [0]


@pytest.mark.parametrize("kernel", ["dense", "sliced", "rounded", "rounded64", "pointwise", "indexed"])
def test_every_kernel_is_read_back(kernel: Kernel) -> None:
    dispatch = Dispatch()
    dispatch.choices["a kind of call"] = KernelChoice(kernel, {kernel: 1.0, "dense": 2.0})
    again = Dispatch()
    again.load_state_dict(json.loads(json.dumps(dispatch.state_dict())))
    assert again.choices == dispatch.choices
