"""Rows are written back to the bit, whatever bits they are: against element by element arithmetic on integers."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from states import whole_state
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from neq_cli import Freezer, Observation
from neq_cli.freezing.model.layouts import RowLayout
from neq_cli.freezing.rows import frozen_rows as holding
from neq_cli.freezing.rows.frozen_rows import FrozenRows, Writer

WIDTHS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
    torch.complex64: torch.int64,
}


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Any bits at all: NaN, infinities, both zeros and subnormal numbers among them."""
    span = torch.iinfo(WIDTHS[dtype])
    drawn = torch.randint(span.min, span.max, shape, dtype=WIDTHS[dtype], generator=generator)
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0]).to(dtype).view(WIDTHS[dtype])
    chosen = torch.randint(2 * len(special), shape, generator=generator)
    return torch.where(chosen < len(special), special[chosen % len(special)], drawn).view(dtype)


def row_of(place: tuple[int, ...], shape: tuple[int, ...], layout: RowLayout) -> int:
    """The row that the element at ``place`` belongs to."""
    if layout.kind == "leading":
        return place[0]
    if layout.kind == "flat":
        return sum(index * math.prod(shape[dimension + 1 :]) for dimension, index in enumerate(place))
    return place[0] // (shape[0] // layout.groups) * shape[1] + place[1]


def strided(shape: tuple[int, ...], order: str, offset: int, dtype: torch.dtype) -> Tensor:
    """An empty tensor of ``shape``: contiguous, dimensions stored in another order, or every other column of one."""
    room = torch.empty(offset + 2 * math.prod(shape), dtype=dtype)[offset:]
    if order == "sparse":
        return room.view(*shape[:-1], 2 * shape[-1])[..., ::2]
    flat = room[: math.prod(shape)]
    dimensions = list(range(len(shape)))
    if order == "channels last":
        dimensions = [0, *dimensions[2:], 1] if len(shape) > 1 else dimensions
    elif order == "reversed":
        dimensions = dimensions[::-1]
    stored = flat.view([shape[dimension] for dimension in dimensions])
    return stored.permute([dimensions.index(dimension) for dimension in range(len(shape))])


ORDERS = ["contiguous", "channels last", "reversed", "sparse"]
CASES = {
    "by row": (RowLayout(), True),
    "by element": (RowLayout(), False),
    "flat": (RowLayout("flat"), True),
    "transposed": (RowLayout("transposed"), True),
    "transposed in groups": (RowLayout("transposed", 3), True),
}


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    dtype=st.sampled_from(list(WIDTHS)),
    orders=st.tuples(st.sampled_from(ORDERS), st.sampled_from(ORDERS)),
    offset=st.integers(0, 4),
    seed=st.integers(0, 2**31),
)
def test_frozen_rows_come_back_and_the_others_stay(
    case: str, shape: list[int], dtype: torch.dtype, orders: tuple[str, str], offset: int, seed: int
) -> None:
    (layout, by_row), (order, state_order) = CASES[case], orders
    generator = torch.Generator().manual_seed(seed)
    size = (shape[0] * layout.groups, *shape[1:])
    parameter = nn.Parameter(strided(size, order, offset, dtype).copy_(random_bits(size, dtype, generator)))
    state = strided(size, state_order, offset, dtype).copy_(random_bits(size, dtype, generator))
    frozen = torch.rand(layout.count(parameter), generator=generator) < 0.5
    frozen[0] = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(holding, "_SMALL", {"cpu": 0 if by_row else 10**9})
        patch.setattr(holding, "_SHORT_ROW", 0)
        rows = FrozenRows(parameter, layout, frozen)
    assert rows.by_row is (by_row and layout.kind == "leading")
    assert rows.whole is bool(frozen.all())

    # After the first time the state is replaced, in other memory and another order.
    first, second = (
        {"": parameter, "state": state},
        {"": parameter, "state": strided(size, order, 0, dtype).copy_(state)},
    )
    kept = {key: bits_of(tensor) for key, tensor in first.items()}
    for tensors in (first, second):
        writer = Writer()
        for key, tensor in tensors.items():
            if key not in rows.held:
                rows.held[key] = rows.read(tensor)
            writer.add(rows, key, tensor)
        updated = {}
        with torch.no_grad():
            for key, tensor in tensors.items():
                updated[key] = bits_of(tensor.copy_(random_bits(size, dtype, generator)))
            writer.write()
        for key, tensor in tensors.items():
            places = itertools.product(*map(range, size))
            held = [bool(frozen[row_of(place, size, layout)]) for place in places]
            expected = [a if h else b for h, a, b in zip(held, kept[key], updated[key], strict=True)]
            assert bits_of(tensor) == expected, key


def bits_of(tensor: Tensor) -> list[int]:
    copy = tensor.detach().clone(memory_format=torch.contiguous_format)
    return [int(number) for number in copy.view(WIDTHS[tensor.dtype]).flatten().tolist()]


def test_rows_woven_into_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holding, "_SMALL", {"cpu": 0})
    monkeypatch.setattr(holding, "_SHORT_ROW", 0)
    room = torch.zeros(14)
    parameter = nn.Parameter(room.as_strided((2, 4), (4, 3)))  # 0, 3, 6, 9 and 4, 7, 10, 13
    rows = FrozenRows(parameter, RowLayout(), torch.tensor([True, False]))
    rows.held[""] = torch.ones(1, 4)
    writer = Writer()
    writer.add(rows, "", parameter)
    writer.write()
    assert rows.by_row
    assert room.nonzero().flatten().tolist() == [0, 3, 6, 9]


def look(rows: FrozenRows, state: dict[str, object]) -> None:
    rows.look(state, {"": rows.parameter, **{key: one for key, one in state.items() if isinstance(one, Tensor)}})


def test_what_counts_as_a_change() -> None:
    rows = FrozenRows(nn.Parameter(torch.zeros(3)), RowLayout(), torch.tensor([True, False, False]))
    state: dict[str, object] = {"momentum": torch.zeros(3), "step": 1}
    look(rows, state)
    assert not rows.changed(state)
    state["step"] = 2
    state["momentum"] += 1  # type: ignore[operator]
    rows.parameter.data += 1
    assert not rows.changed(state)

    state["momentum"] = torch.zeros(3)  # replaced
    assert rows.changed(state)
    look(rows, state)
    state["step"] = torch.ones(3)  # now a row of its own
    assert rows.changed(state)
    look(rows, state)
    state["variance"] = torch.zeros(3)  # born
    assert rows.changed(state)
    look(rows, state)
    rows.parameter.data = torch.zeros(3)  # other memory
    assert rows.changed(state)
    look(rows, state)
    assert not rows.changed(state)


def test_small_tensors_are_written_together_and_large_ones_by_row() -> None:
    def rows(shape: tuple[int, ...], layout: RowLayout = RowLayout()) -> FrozenRows:  # noqa: B008 - frozen
        frozen = torch.zeros(layout.count(torch.empty(shape)), dtype=torch.bool)
        frozen[0] = True
        return FrozenRows(nn.Parameter(torch.zeros(shape)), layout, frozen)

    assert not rows((64,)).by_row
    assert not rows((16, 16, 3, 3)).by_row
    assert rows((64, 64, 3, 3)).by_row
    assert not rows((100_000, 4)).by_row  # rows of 16 bytes
    assert not rows((64, 64, 3, 3), RowLayout("transposed")).by_row
    assert not rows((64, 64, 3, 3), RowLayout("flat")).by_row


@pytest.mark.parametrize(("width", "kind"), [(64, torch.complex128), (66, torch.int64), (65, torch.float32)])
def test_rows_are_copied_in_elements_as_wide_as_they_can_be(width: int, kind: torch.dtype) -> None:
    rows = FrozenRows(nn.Parameter(torch.rand(100, width)), RowLayout(), torch.arange(100) < 50)
    rows.held[""] = rows.read(rows.parameter)
    writer = Writer()
    writer.add(rows, "", rows.parameter)
    ((target, _, source),) = writer.by_row
    assert (target.dtype, source.dtype) == (kind, kind)


class Half:
    """A policy that freezes the given neurons of every layer."""

    def __init__(self, neurons: Iterable[int]) -> None:
        self.neurons = list(neurons)

    def choose(self, observations: Mapping[str, Observation], epoch: int) -> Mapping[str, Tensor]:
        trainable = {name: torch.ones_like(seen.trainable) for name, seen in observations.items()}
        for one in trainable.values():
            one[[neuron for neuron in self.neurons if neuron < len(one)]] = False
        return trainable

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class Record(TorchDispatchMode):
    """Notes what torch is called for."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[function.name()] += 1
        return function(*args, **(kwargs or {}))


def calls_around_a_step(net: nn.Sequential, frozen: Iterable[int]) -> Counter[str]:
    """Return what torch is called for around a step, beyond what it is where frozen parameters have no gradients."""
    inputs = torch.randn(4, net[0].in_features)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused=True)
    freezer = Freezer(net, optimizer, [inputs], Half(frozen))

    def recorded() -> Counter[str]:
        optimizer.zero_grad()
        net(inputs).square().sum().backward()
        with Record() as record:
            optimizer.step()
        return record.calls

    recorded()
    freezer.step()
    recorded()
    with_hooks = recorded()
    freezer.detach()
    for name, trainable in freezer.trainable.items():
        if len(list(frozen)) == len(trainable):
            net.get_submodule(name).requires_grad_(False)
    return with_hooks - recorded()


@pytest.mark.parametrize("blocks", [1, 12])
def test_keeping_small_parameters_takes_two_calls_however_many_they_are(blocks: int) -> None:
    parts = [part for _ in range(blocks) for part in (nn.Linear(6, 6), nn.LayerNorm(6))]
    calls = calls_around_a_step(nn.Sequential(*parts, nn.Linear(6, 2)), [1, 2, 4])
    assert calls == {"aten::_foreach_mul_.List": 1, "aten::_foreach_add_.List": 1}


def test_keeping_large_parameters_takes_a_call_for_each_weight() -> None:
    calls = calls_around_a_step(nn.Sequential(nn.Linear(20, 300), nn.Linear(300, 20), nn.Linear(20, 2)), [1, 2, 4])
    # Two weights; the biases go together, and the state is written back when somebody looks.
    assert calls == {"aten::index_copy_": 2, "aten::_foreach_mul_.List": 1, "aten::_foreach_add_.List": 1}


def test_whole_frozen_parameters_cost_nothing() -> None:
    parts = [part for _ in range(3) for part in (nn.Linear(6, 6), nn.LayerNorm(6))]
    assert not calls_around_a_step(nn.Sequential(*parts, nn.Linear(6, 2)), range(6))


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["by element", "by row", "alone"])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_captured_step_holds_rows_as_an_eager_one_does(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole step in a CUDA graph: what is kept around it must neither wait nor use memory that moves."""
    if way != "by element":
        monkeypatch.setattr(holding, "_SMALL_ELSEWHERE", 0)
        monkeypatch.setattr(holding, "_SHORT_ROW", 0)
    if way == "alone":
        monkeypatch.setattr(holding, "_FEW", ((0, 1.0),))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 32), nn.LayerNorm(32))
    net = net.append(nn.Linear(32, 4)).cuda()
    arguments = {"momentum": 0.9} if name == "SGD" else {"capturable": True}
    rate = torch.tensor(0.01, device="cuda")
    optimizer = getattr(torch.optim, name)(net.parameters(), lr=rate, weight_decay=0.1, fused=True, **arguments)
    inputs = torch.randn(16, 3, 6, 6, device="cuda")
    freezer = Freezer(net, optimizer, [inputs[:4]], Half([1, 2, 4]))

    def step() -> None:
        optimizer.zero_grad()
        net(inputs).square().mean().backward()
        optimizer.step()

    def watched() -> list[Tensor]:
        found = []
        for layer in (net[0], net[3], net[4]):
            for parameter in (layer.weight, layer.bias):
                state = [
                    one for one in whole_state(optimizer).get(parameter, {}).values() if one.shape == parameter.shape
                ]
                found += [parameter.detach().clone(), *(one.clone() for one in state)]
        return found

    step()
    freezer.step()
    frozen = torch.tensor([1, 2, 4], device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    before = watched()
    for _ in range(3):
        graph.replay()
    for old, new in zip(before, watched(), strict=True):
        assert torch.equal(old[frozen], new[frozen])
        assert not torch.equal(old[[0, 3]], new[[0, 3]])
    assert not net[0].weight.grad[frozen].any()
    assert net[0].weight.grad[[0, 3]].any()


@pytest.mark.gpu
def test_a_gpu_keeps_what_the_cpu_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    for small in (10**9, 0):
        monkeypatch.setattr(holding, "_SMALL_ELSEWHERE", small)
        monkeypatch.setattr(holding, "_SMALL", {})
        generator = torch.Generator().manual_seed(0)
        for dtype in WIDTHS:
            numbers, other = (random_bits((8, 4, 3, 3), dtype, generator) for _ in range(2))
            results = []
            for device in ("cpu", "cuda"):
                rows = FrozenRows(nn.Parameter(numbers.to(device)), RowLayout(), torch.arange(8) % 3 == 0)
                rows.held[""] = rows.read(rows.parameter)
                writer = Writer()
                writer.add(rows, "", rows.parameter)
                with torch.no_grad():
                    rows.parameter.copy_(other)
                torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
                try:
                    writer.write()
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                results.append(bits_of(rows.parameter.cpu()))
            assert results[0] == results[1], (small, dtype)
