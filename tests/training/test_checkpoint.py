"""Checkpoints come back as they went, hold nothing pickled, and say so where they are damaged."""

from __future__ import annotations

import math
import pickletools
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn
from torch.optim.swa_utils import AveragedModel

from neq_cli.errors import RunDirectoryError, TrainingError
from neq_cli.training.checkpoint import load_state, random_states, read_weights, save_state, save_weights


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


def test_random_states_put_every_generator_back(tmp_path: Path) -> None:
    save_state(random_states(), tmp_path / "r.safetensors")
    drawn = torch.rand(3), random.random(), np.random.rand(3), np.random.randn(1)
    state = load_state(tmp_path / "r.safetensors")
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    again = torch.rand(3), random.random(), np.random.rand(3), np.random.randn(1)
    assert torch.equal(drawn[0], again[0])
    assert drawn[1] == again[1]
    assert (drawn[2] == again[2]).all()
    assert (drawn[3] == again[3]).all()


def stored(folder: Path) -> Path:
    path = folder / "last.safetensors"
    save_state({"model": {"weight": torch.ones(100)}, "averaged": None, "epoch": 1}, path)
    return path


@pytest.mark.parametrize("damage", ["cut", "header", "empty", "text", "missing", "other version", "folder", "weights"])
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
    else:
        path.write_bytes(content.replace(b'"version":"1"', b'"version":"9"'))
    with pytest.raises(RunDirectoryError) as raised:
        load_state(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


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
        assert file.metadata() == {"format": "pt", "epoch": "3"}


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
