"""Checkpoints come back as they went, hold nothing pickled, and say so where they are damaged."""

from __future__ import annotations

import math
import pickletools
import random
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from neq_cli.errors import RunDirectoryError, TrainingError
from neq_cli.freezing.rows.optimizers import MIXING_OPTIMIZERS
from neq_cli.recipe import OptimizerSection, SchedulerSection
from neq_cli.training.loop.checkpoint import (
    load_state,
    random_states,
    read_weights,
    restore_formats,
    restore_random_states,
    save_state,
    save_weights,
)
from neq_cli.training.loop.optimizers import OPTIMIZERS, build_optimizer
from neq_cli.training.loop.schedules import _SCHEDULERS as SCHEDULERS
from neq_cli.training.loop.schedules import REFUSED_SCHEDULERS, Schedule


def same(first: Any, second: Any) -> bool:
    """Equal in type, value and bits, however deep."""
    if isinstance(first, torch.Tensor):
        return (
            isinstance(second, torch.Tensor)
            and first.dtype == second.dtype
            and first.shape == second.shape
            and first.contiguous().view(-1).numpy(force=True).tobytes() == second.numpy(force=True).tobytes()
            if first.dtype != torch.bfloat16
            else second.dtype == torch.bfloat16 and torch.equal(first, second)
        )
    if type(first) is not type(second):
        return False
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, float) and math.isnan(first):
        return math.isnan(second)
    return bool(first == second)


def test_nested_state_comes_back_as_it_went(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    state = {
        "integers": {0: {"step": torch.tensor(3.0)}, 1: None, 10: [], "1": "text beside the integer"},
        "tuple": (1, (2.5, "three"), [True, False, None]),
        "numbers": [math.nan, math.inf, -math.inf, -0.0, 2**63 - 1, 1e-308],
        "empty": [{}, [], ()],
        "keys": {"tensor": 1, "tuple": 2, "items": 3, "a/b": torch.ones(2)},
        "a": {"b": torch.zeros(2)},
        "bf16": torch.randn(3, 2).to(torch.bfloat16),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(7),
        "nothing": torch.zeros(0, 3),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "slice": torch.arange(10)[::2],
        "shared": [shared, shared, shared[2:4]],
        "parameter": nn.Parameter(torch.ones(2)),
        "nan": torch.tensor([math.nan, 1.0]),
    }
    path = tmp_path / "state.safetensors"
    save_state(state, path)
    back = load_state(path)
    assert not back["parameter"].requires_grad
    state["parameter"] = torch.ones(2)
    assert same(state, back)
    back["shared"][0][0] = 99
    assert back["shared"][1][0] == 0


_PLAIN = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats() | st.text(max_size=5)
_NESTED = st.recursive(
    _PLAIN | st.builds(lambda n: torch.arange(float(n)), st.integers(0, 3)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=10,
)


@settings(max_examples=60, deadline=None)
@given(state=st.dictionaries(st.text(max_size=3) | st.integers(0, 9), _NESTED, max_size=4))
def test_any_nested_state_comes_back(tmp_path_factory: pytest.TempPathFactory, state: dict[Any, Any]) -> None:
    path = tmp_path_factory.mktemp("states") / "state.safetensors"
    save_state(state, path)
    assert same(state, load_state(path))


def test_names_that_look_alike_are_kept_apart(tmp_path: Path) -> None:
    state = {"a": {"b": torch.zeros(1)}, "a/b": torch.ones(1), 0: torch.ones(2), "0": torch.zeros(2)}
    save_state(state, tmp_path / "state.safetensors")
    assert same(state, load_state(tmp_path / "state.safetensors"))


def test_what_cannot_be_stored_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"optimizer/rule: a set cannot be stored"):
        save_state({"optimizer": {"rule": {1, 2}}}, tmp_path / "state.safetensors")


def test_an_optimiser_goes_on_from_a_state_that_was_stored(tmp_path: Path) -> None:
    def make() -> tuple[nn.Linear, torch.optim.Adam]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        return model, torch.optim.Adam(model.parameters(), lr=0.1, betas=(0.8, 0.99))

    def step(model: nn.Linear, optimizer: torch.optim.Adam) -> None:
        optimizer.zero_grad()
        model(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()

    model, optimizer = make()
    step(model, optimizer)
    save_state({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "s.safetensors")
    step(model, optimizer)
    resumed, resumed_optimizer = make()
    state = load_state(tmp_path / "s.safetensors")
    resumed.load_state_dict(state["model"])
    resumed_optimizer.load_state_dict(state["optimizer"])
    step(resumed, resumed_optimizer)
    assert torch.equal(model.weight, resumed.weight)


def drawn() -> list[Any]:
    numbers = [torch.rand(3), torch.randn(3), random.random(), random.gauss(0, 1)]
    return [*map(str, numbers), *np.random.rand(700).tolist(), *np.random.randn(3).tolist()]


def test_random_states_put_every_generator_back(tmp_path: Path) -> None:
    random.gauss(0, 1), np.random.randn(1)  # both keep a second number for next time
    save_state(random_states(), tmp_path / "r.safetensors")
    first = drawn()
    assert drawn() != first
    restore_random_states(load_state(tmp_path / "r.safetensors"))
    assert drawn() == first


NONSENSE: list[Callable[[dict[str, Any]], object]] = [
    lambda s: s.pop("torch"),
    lambda s: s.update(torch=torch.zeros(7)),
    lambda s: s.update(torch=s["torch"][:-1]),
    lambda s: s.update(torch=torch.full_like(s["torch"], 255)),
    lambda s: s.update(torch=None),
    lambda s: s.update(cuda=None),
    lambda s: s.update(python=(3, (1, 2), None)),
    lambda s: s.update(python=(3, (*s["python"][1][:-1], 625), None)),
    lambda s: s.update(python=(3, s["python"][1], "text")),
    lambda s: s.update(python={}),
    lambda s: s.update(numpy=("PCG64", *s["numpy"][1:])),
    lambda s: s.update(numpy=(*s["numpy"][:2], 625, 0, 0.0)),
    lambda s: s.update(numpy=(*s["numpy"][:2], -1, 0, 0.0)),
    lambda s: s.update(numpy=(*s["numpy"][:2], 10**9, 0, 0.0)),
    lambda s: s.update(numpy=("MT19937", s["numpy"][1] - 2**40, 3, 0, 0.0)),
    lambda s: s.update(numpy=("MT19937", s["numpy"][1][:600], 3, 0, 0.0)),
    lambda s: s.update(numpy=("MT19937", s["numpy"][1].float(), 3, 0, 0.0)),
]


@pytest.mark.parametrize("change", NONSENSE)
def test_no_generator_is_touched_by_states_that_are_none(change: Callable[[dict[str, Any]], object]) -> None:
    before = random_states()
    states = {**before, "torch": before["torch"].clone()}
    change(states)
    drawn()
    middle = random_states()
    with pytest.raises(RunDirectoryError) as raised:
        restore_random_states(states)
    assert str(raised.value).isprintable()
    assert same(middle, random_states())


def test_states_of_devices_that_are_not_here_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    states = {**random_states(), "cuda": [torch.zeros(16, dtype=torch.uint8)] * 5}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    first = drawn()
    restore_random_states(states)
    assert drawn() == first


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("more", [0, 1])
def test_cuda_generators_go_on(tmp_path: Path, more: int) -> None:
    states = random_states()
    states["cuda"] += more * states["cuda"][:1]
    save_state(states, tmp_path / "r.safetensors")
    first = torch.rand(5, device="cuda")
    restore_random_states(load_state(tmp_path / "r.safetensors"))
    assert torch.equal(first, torch.rand(5, device="cuda"))
    with pytest.raises(RunDirectoryError):
        restore_random_states({**states, "cuda": [torch.zeros(3, dtype=torch.uint8)]})


def test_state_takes_its_parameters_memory_format() -> None:
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3, 5, 5)).sum().backward()
    optimizer.step()
    for state in optimizer.state.values():
        state["exp_avg"] = torch.randn(state["exp_avg"].shape)
    expected = {id(parameter): state["exp_avg"].clone() for parameter, state in optimizer.state.items()}
    restore_formats(optimizer)
    for parameter, state in optimizer.state.items():
        assert state["exp_avg"].stride() == parameter.stride()
        assert torch.equal(state["exp_avg"], expected[id(parameter)])
        assert state["step"].shape == ()


SCHEDULES: dict[str, dict[str, Any]] = {
    "multisteplr": {"milestones": [4, 6, 6], "gamma": 0.3},
    "steplr": {"step_size": 2, "gamma": 0.7},
    "exponentiallr": {"gamma": 0.9},
    "constantlr": {"factor": 0.3, "total_iters": 4},
    "linearlr": {},
    "polynomiallr": {"power": 2.0},
    "cosineannealinglr": {"eta_min": 0.01},
    "cosineannealingwarmrestarts": {"T_0": 3},
    "constant": {},
    "onecyclelr": {"interval": "step"},
    "cycliclr": {"interval": "step", "base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3, "mode": "exp_range"},
    "reducelronplateau": {"patience": 0},
}
EPOCHS = 8


def test_every_schedule_is_tested_below() -> None:
    accepted = {"constant", *SCHEDULERS} - {name.lower() for name in REFUSED_SCHEDULERS}
    assert set(SCHEDULES) == accepted


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_goes_on_from_every_epoch(tmp_path: Path, name: str, warmup: int) -> None:
    section = SchedulerSection(name=name, warmup_epochs=0 if name == "onecyclelr" else warmup, **SCHEDULES[name])

    def make() -> tuple[torch.optim.Optimizer, Schedule]:
        torch.manual_seed(0)
        optimizer = build_optimizer(OptimizerSection(name="sgd", lr=0.1, momentum=0.9), nn.Linear(3, 2))
        return optimizer, Schedule(section, optimizer, EPOCHS)

    def epochs(optimizer: torch.optim.Optimizer, schedule: Schedule, first: int) -> Iterator[float]:
        for number in range(first, EPOCHS):
            yield optimizer.param_groups[0]["lr"]
            optimizer.step()
            schedule.after_step()
            schedule.after_test(float(number % 3))  # better twice, and then worse
            schedule.after_pass()

    whole = list(epochs(*make(), 0))
    assert name == "constant" or len(set(whole)) > 1
    optimizer, schedule = make()
    running = epochs(optimizer, schedule, 0)
    for done in range(EPOCHS):
        assert next(running) == whole[done]  # the state below is that within epoch `done` + 1, and then after it
        path = tmp_path / f"{done}.safetensors"
        state = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        save_state(state, path)
        resumed, resumed_schedule = make()
        state = load_state(path)
        resumed.load_state_dict(state["optimizer"])
        resumed_schedule.load_state_dict(state["schedule"])
        assert list(epochs(resumed, resumed_schedule, done)) == whole[done:]


OPTIMISERS = sorted({kind.__name__.lower() for kind in OPTIMIZERS.values()} - {n.lower() for n in MIXING_OPTIMIZERS})


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_an_optimiser_goes_on_from_every_step(tmp_path: Path, name: str, memory: str) -> None:
    extra = {"sgd": {"momentum": 0.9, "weight_decay": 0.1}, "adam": {"amsgrad": True}, "rmsprop": {"momentum": 0.5}}
    section = OptimizerSection(name=name, lr=0.01, **extra.get(name, {}))

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model: nn.Module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(3 * 4, 2))
        if name == "sparseadam":
            model = nn.Embedding(7, 3, sparse=True)
        elif memory == "channels_last":
            model.to(memory_format=torch.channels_last)
        return model, build_optimizer(section, model)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        inputs = torch.randn(2, 2, 4, 4, generator=generator)
        if name == "sparseadam":
            inputs = torch.randint(7, (4,), generator=generator)
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()

    model, optimizer = make()
    paths = []
    for number in range(4):
        paths.append(tmp_path / f"{number}.safetensors")
        save_state({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, paths[-1])
        step(model, optimizer, number)
    for done, path in enumerate(paths):
        resumed, resumed_optimizer = make()
        state = load_state(path)
        resumed.load_state_dict(state["model"])
        resumed_optimizer.load_state_dict(state["optimizer"])
        restore_formats(resumed_optimizer)
        for number in range(done, 4):
            step(resumed, resumed_optimizer, number)
        assert same(dict(model.state_dict()), dict(resumed.state_dict()))
        assert same(optimizer.state_dict(), resumed_optimizer.state_dict())


def stored(folder: Path) -> Path:
    path = folder / "last.safetensors"
    save_state({"model": {"weight": torch.ones(100)}, "averaged": None, "epoch": 1}, path)
    return path


@pytest.mark.parametrize(
    "damage", ["cut", "header", "empty", "text", "missing", "other version", "folder", "weights", "no sum"]
)
def test_a_damaged_checkpoint_is_one_line(tmp_path: Path, damage: str) -> None:
    path = stored(tmp_path)
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "header":
        path.write_bytes(content[:20] + b"\xff\xff" + content[22:])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("not a checkpoint at all")
    elif damage == "missing":
        path.unlink()
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    elif damage == "weights":
        save_weights({"weight": torch.ones(2)}, path, {})
    elif damage == "other version":
        save_file({"/epoch": torch.ones(1)}, path, {"version": "1", "structure": "{}"})
    else:
        path.write_bytes(content.replace(b'"checksum"', b'"checkson"', 1))
    with pytest.raises(RunDirectoryError) as raised:
        load_state(path)
    assert str(path) in str(raised.value)
    assert str(raised.value).isprintable()
    if damage == "other version":
        assert "checkpoint version 1, and this neq reads 2" in str(raised.value)


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    state = {
        "weight": torch.arange(5.0),
        "on": torch.tensor([True, False]),
        "text": "ä\x1b",
        "counter": Counter({3: 1}),
    }
    path = tmp_path / "state.safetensors"
    save_state(state, path)
    content = path.read_bytes()
    damaged = tmp_path / "damaged.safetensors"
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.write_bytes(flipped)
        with pytest.raises(RunDirectoryError):
            load_state(damaged)
    assert same(state, load_state(path))
    damaged.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    with pytest.raises(RunDirectoryError, match=r"damaged \(.*\); use another, or train again"):
        load_state(damaged)


def test_the_checksum_is_that_of_the_file_with_zeros_in_its_place(tmp_path: Path) -> None:
    path = stored(tmp_path)
    with safe_open(path, framework="np") as file:
        written = file.metadata()["checksum"]
    content = path.read_bytes()
    assert content.count(written.encode()) == 1
    assert written == f"{zlib.crc32(content.replace(written.encode(), b'00000000')):08x}"
    path.write_bytes(content[:-1] + b"\x01")
    with pytest.raises(RunDirectoryError, match="its checksum does not fit"):
        load_state(path)


def test_tensors_are_stored_as_the_library_reads_them(tmp_path: Path) -> None:
    tensors = {
        str(dtype).removeprefix("torch."): torch.arange(6).reshape(2, 3).to(dtype)
        for dtype in (
            *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
            *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64),
            *(torch.uint16, torch.uint32, torch.uint64),
        )
    }
    tensors |= {"conj": torch.tensor([1 + 2j]).conj(), "every second": torch.arange(8)[::2], "none": torch.zeros(0, 3)}
    save_weights(tensors, tmp_path / "w.safetensors", {"recipe": "lone \ud800 surrogate"})
    by_library, by_us = load_file(tmp_path / "w.safetensors"), read_weights(tmp_path / "w.safetensors")
    assert by_library.keys() == by_us.keys() == tensors.keys()
    for name, tensor in tensors.items():
        for back in (by_library[name], by_us[name]):
            assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
            assert back.flatten().tolist() == tensor.flatten().tolist()
    save_file(
        {name: tensor.resolve_conj().contiguous() for name, tensor in tensors.items()}, tmp_path / "plain.safetensors"
    )
    assert read_weights(tmp_path / "plain.safetensors")["int16"].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("tensor", [torch.eye(2).to_sparse(), torch.zeros(2, device="meta"), torch.zeros(2).cdouble()])
def test_tensors_that_cannot_be_stored_are_named(tmp_path: Path, tensor: torch.Tensor) -> None:
    with pytest.raises(TrainingError, match=r"/model/weight: a .* tensor on (cpu|meta) cannot be stored"):
        save_state({"model": {"weight": tensor}}, tmp_path / "s.safetensors")


def test_keys_and_depths_that_cannot_be_stored_are_refused(tmp_path: Path) -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    for state in ({(1, 2): 3}, {"deep": deep}, {"long": 10**5000}):
        with pytest.raises(TrainingError) as raised:
            save_state(state, tmp_path / "s.safetensors")
        assert str(raised.value).isprintable()


def test_a_counter_comes_back_as_one(tmp_path: Path) -> None:
    save_state({"milestones": Counter({30: 1, 60: 2})}, tmp_path / "s.safetensors")
    milestones = load_state(tmp_path / "s.safetensors")["milestones"]
    assert type(milestones) is Counter
    assert sorted(milestones.elements()) == [30, 60, 60]


def test_nothing_in_a_checkpoint_is_pickled(tmp_path: Path) -> None:
    path = stored(tmp_path)
    content = path.read_bytes()
    assert not zipfile.is_zipfile(path)
    assert content[:2] != b"\x80\x02"
    with pytest.raises(ValueError):
        list(pickletools.genops(content))
    with safe_open(path, framework="np") as file:
        assert (file.get_tensor("/model/weight") == 1).all()


def test_weights_are_a_plain_state_dict_for_any_reader(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4))
    model.append(model[2])  # tied: two names for one tensor, which safetensors alone refuses
    model.to(memory_format=torch.channels_last)
    path = tmp_path / "weights.safetensors"
    save_weights(model.state_dict(), path, {"epoch": "3"})
    weights = read_weights(path)
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    with safe_open(path, framework="pt") as file:
        assert (file.metadata()["format"], file.metadata()["epoch"]) == ("pt", "3")


@pytest.mark.parametrize("averages", [False, True])
def test_weights_of_a_checkpoint_are_those_that_are_tested(tmp_path: Path, averages: bool) -> None:
    model = nn.Linear(2, 2)
    averaged = AveragedModel(nn.Linear(2, 2))
    state = {"model": model.state_dict(), "averaged": averaged.state_dict() if averages else None}
    save_state(state, tmp_path / "best.safetensors")
    weights = read_weights(tmp_path / "best.safetensors")
    expected = (averaged.module if averages else model).state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_unreadable_weights_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"junk")
    with pytest.raises(RunDirectoryError) as raised:
        read_weights(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)
    save_state({"neither": 1}, path)
    with pytest.raises(RunDirectoryError):
        read_weights(path)
