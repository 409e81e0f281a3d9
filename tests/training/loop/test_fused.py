"""Fused optimisers: chosen where they fit, and no different from the others in what they do to a model."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rounding import apart, apart_after_steps
from states import whole_state
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from neq_cli import Freezer, Observation
from neq_cli.recipe import OptimizerSection
from neq_cli.training.loop.checkpoint import load_state, save_state
from neq_cli.training.loop.optimizers import build_optimizer

FUSED = ["sgd", "adam", "adamw", "adagrad"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def network() -> nn.Sequential:
    # Before a batch norm a bias would have no gradient but rounding, of which Adam makes whole steps.
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )


def assert_alike(model: nn.Module, twin: nn.Module) -> None:
    """Compare weights in double precision, all below 10, after at most four steps of ``network``.

    At most 27 products, 64 numbers of a norm, 16 of a mean and 6 products forward, as many backward; 8 images of 16
    positions.
    """
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert ours.dtype == torch.float64
        assert (ours - theirs).abs().max() <= apart_after_steps(4, 400, magnitude=10)


def build(model: nn.Module, name: str, **arguments: Any) -> torch.optim.Optimizer:
    return build_optimizer(OptimizerSection(name=name, **arguments), model)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor) -> None:
    optimizer.zero_grad()
    model(inputs).square().sum().backward()
    optimizer.step()


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    return all(group.get("fused") is True for group in optimizer.param_groups)


@pytest.mark.parametrize("name", FUSED)
def test_the_fused_kernel_is_what_runs(name: str) -> None:
    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.add(function.name())
            return function(*args, **(kwargs or {}))

    calls: set[str] = set()
    model = network()
    optimizer = build(model, name, lr=0.1)
    with Record():
        step(model, optimizer, torch.randn(2, 3, 5, 5))
    assert any(call.startswith(f"aten::_fused_{name}_") for call in calls)


@pytest.mark.parametrize("name", ["rmsprop", "nadam", "radam", "adamax", "adadelta", "asgd", "rprop"])
def test_where_torch_has_none_nothing_is_said(name: str) -> None:
    assert "fused" not in build(network(), name).defaults


@pytest.mark.parametrize(
    ("name", "arguments", "fused"),
    [
        ("sgd", {"fused": False}, False),
        ("adamw", {"foreach": True}, None),
        ("adamw", {"foreach": False}, None),
        ("adam", {"fused": None}, True),  # null: not said
        ("adam", {"differentiable": True}, None),
        ("sgd", {"differentiable": True}, None),
        ("sgd", {"momentum": 0.9, "dampening": 0.1}, None),
        ("sgd", {"momentum": 0.9, "dampening": 0.1, "fused": True}, True),
        ("sgd", {"momentum": 0.9, "nesterov": True}, True),
        ("adam", {"amsgrad": True, "betas": [0.8, 0.9]}, True),
    ],
)
def test_the_recipes_own_words_win(name: str, arguments: dict[str, Any], fused: bool | None) -> None:
    optimizer = build(network(), name, lr=0.1, **arguments)
    assert [group["fused"] for group in optimizer.param_groups] == [fused]


class Odd(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind == "complex":
            self.weight = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
        elif kind == "sparse gradients":
            self.table = nn.Embedding(4, 3, sparse=True)
        elif kind == "strided":
            self.weight = nn.Parameter(torch.zeros(3, 8)[:, ::2])
        elif kind == "subclass":
            self.weight = type("Mine", (nn.Parameter,), {})(torch.zeros(3))
        self.plain = nn.Linear(2, 2)


@pytest.mark.parametrize("kind", ["complex", "sparse gradients", "strided", "subclass"])
@pytest.mark.parametrize("name", FUSED)
def test_parameters_that_the_kernels_do_not_take(kind: str, name: str) -> None:
    assert not is_fused(build(Odd(kind), name))
    assert is_fused(build(Odd("none"), name))


def test_a_device_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise NotImplementedError("no kernel for this backend")

    monkeypatch.setattr(torch, "_fused_sgd_", refuse)
    assert not is_fused(build(network(), "sgd"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", FUSED)
def test_other_precisions(name: str, dtype: torch.dtype) -> None:
    model = nn.Linear(3, 2).to(dtype)
    optimizer = build(model, name, lr=0.1)
    before = model.weight.detach().clone()
    step(model, optimizer, torch.randn(4, 3, dtype=dtype))
    assert is_fused(optimizer)
    assert not torch.equal(model.weight, before)


ARGUMENTS: list[tuple[str, dict[str, Any]]] = [
    ("sgd", {"momentum": 0.9, "weight_decay": 0.01}),
    ("sgd", {"momentum": 0.9, "nesterov": True, "maximize": True}),
    ("sgd", {}),
    ("adam", {"weight_decay": 0.01, "amsgrad": True}),
    ("adamw", {"weight_decay": 0.1}),
    ("adagrad", {"lr_decay": 0.1}),
]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("name", "arguments"), ARGUMENTS)
def test_it_trains_as_without(name: str, arguments: dict[str, Any], channels_last: bool) -> None:
    model = network().double()
    if channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    twin = copy.deepcopy(model)
    groups = [{"parameters": ["*.bias"], "weight_decay": 0.0}, {"parameters": ["5.*"], "lr": 0.01}]
    optimizer = build(model, name, lr=0.05, groups=groups, **arguments)
    plain = build(twin, name, lr=0.05, groups=groups, fused=False, **arguments)
    assert is_fused(optimizer)
    for _ in range(4):
        inputs = torch.randn(8, 3, 6, 6).double()
        for one, its in ((model, optimizer), (twin, plain)):
            step(one, its, inputs)
    assert_alike(model, twin)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert ours.stride() == theirs.stride()


def test_two_runs_have_the_same_bits() -> None:
    def run(name: str) -> list[Tensor]:
        torch.manual_seed(1)
        model = network()
        optimizer = build(model, name, lr=0.1)
        for _ in range(3):
            step(model, optimizer, torch.randn(8, 3, 6, 6))
        return list(model.parameters())

    torch.use_deterministic_algorithms(True)
    try:
        for name in FUSED:
            assert all(torch.equal(a, b) for a, b in zip(run(name), run(name), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


# What torch's kernels take for granted.


@pytest.mark.parametrize(("name", "arguments"), ARGUMENTS)
def test_a_first_step_that_is_skipped_leaves_nothing_behind(name: str, arguments: dict[str, Any]) -> None:
    model = network().double()
    twin = copy.deepcopy(model)
    optimizer, plain = build(model, name, lr=0.1, **arguments), build(twin, name, lr=0.1, **arguments)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    # Memory to be handed out again, with something in it.
    rubbish = [torch.full_like(parameter, math.nan) for parameter in model.parameters() for _ in range(20)]
    del rubbish
    for overflows in (True, False, False):
        inputs = torch.randn(8, 3, 6, 6).double()
        optimizer.zero_grad()
        scaler.scale(model(inputs).square().sum() * (math.inf if overflows else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        if not overflows:
            step(twin, plain, inputs)
    assert_alike(model, twin)


def test_a_gradient_may_come_later_than_others() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    model = nn.ModuleList([first, second])
    optimizer = build(model, "sgd", lr=0.1, momentum=0.9)
    inputs = torch.randn(3, 2)
    step(first, optimizer, inputs)
    before = second.bias.detach().clone()
    step(second, optimizer, inputs)
    assert second.bias.grad is not None
    expected = before - 0.1 * second.bias.grad  # which a processor may compute as one operation or as two
    magnitude = float((before.abs() + second.bias.grad.abs()).max())
    assert torch.allclose(second.bias, expected, rtol=0, atol=apart(3, torch.float32, magnitude))


@pytest.mark.parametrize(("name", "arguments"), ARGUMENTS)
def test_a_run_goes_on_from_a_checkpoint_whatever_the_layout(
    name: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    batches = torch.randn(4, 8, 3, 6, 6)
    model = network().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert not model[0].weight.is_contiguous()
    optimizer = build(model, name, lr=0.1, **arguments)
    for inputs in batches[:2]:
        step(model, optimizer, inputs)
    save_state({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state")
    for inputs in batches[2:]:
        step(model, optimizer, inputs)

    resumed = network().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    other = build(resumed, name, lr=0.5, **arguments)
    state = load_state(tmp_path / "state")  # all of it contiguous
    resumed.load_state_dict(state["model"])
    other.load_state_dict(state["optimizer"])
    for inputs in batches[2:]:
        step(resumed, other, inputs)
    for ours, theirs in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_dampened_momentum_starts_undampened_where_the_recipe_asks_for_fused() -> None:
    model = network().double()
    twin = copy.deepcopy(model)
    arguments = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    optimizer, plain = build(model, "sgd", fused=True, **arguments), build(twin, "sgd", **arguments)
    for _ in range(2):
        inputs = torch.randn(8, 3, 6, 6).double()
        for one, its in ((model, optimizer), (twin, plain)):
            step(one, its, inputs)
    assert_alike(model, twin)


def test_a_state_without_momentum_is_completed() -> None:
    model = network()
    plain = build(model, "sgd", lr=0.1, momentum=0.9, fused=False)
    assert not plain.state
    optimizer = build(model, "sgd", lr=0.1, momentum=0.9)
    optimizer.load_state_dict({**plain.state_dict(), "param_groups": optimizer.state_dict()["param_groups"]})
    buffers = [optimizer.state[parameter]["momentum_buffer"] for parameter in model.parameters()]
    assert not any(buffer.any() or buffer.requires_grad for buffer in buffers)


# With the rest of a step.


class Odds:
    """A policy that freezes every other neuron."""

    def choose(self, observations: Mapping[str, Observation], epoch: int) -> Mapping[str, Tensor]:
        return {name: torch.arange(len(seen.phi)) % 2 == 0 for name, seen in observations.items()}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


@pytest.mark.parametrize("name", FUSED)
def test_frozen_rows_through_autocast_scaling_clipping_and_a_skipped_step(name: str) -> None:
    model = network()
    optimizer = build(model, name, lr=0.1, groups=[{"parameters": ["*.bias"], "lr": 0.2}])
    freezer = Freezer(model, optimizer, [torch.randn(4, 3, 6, 6)], Odds())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def scaled(factor: float = 1.0) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(torch.randn(8, 3, 6, 6))
        scaler.scale(factor * outputs.float().square().sum()).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

    def watched() -> list[Tensor]:
        weight = model[0].weight
        state = [one for one in whole_state(optimizer).get(weight, {}).values() if one.shape == weight.shape]
        return [weight.detach().clone(), *(one.clone() for one in state)]

    scaled()
    freezer.step()
    assert freezer.trainable["0"].tolist() == [True, False] * 3
    before = watched()
    for factor in (1.0, math.inf, 1.0):
        scaled(factor)
    assert scaler.get_scale() == 2.0
    assert len(before) == {"sgd": 1, "adam": 3, "adamw": 3, "adagrad": 2}[name]
    for old, new in zip(before, watched(), strict=True):
        assert torch.equal(old[1::2], new[1::2])
        assert not torch.equal(old[::2], new[::2])


@pytest.mark.gpu
@pytest.mark.parametrize("name", FUSED)
def test_on_a_gpu_it_is_chosen_where_torch_has_it_and_trains_as_without(name: str) -> None:
    model = network().cuda().double().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    twin = copy.deepcopy(model)
    optimizer, plain = build(model, name, lr=0.05), build(twin, name, lr=0.05, fused=False)
    assert is_fused(optimizer) or name == "adagrad"  # on the CPU alone in some versions
    for _ in range(4):
        inputs = torch.randn(8, 3, 6, 6, device="cuda", dtype=torch.float64)
        for one, its in ((model, optimizer), (twin, plain)):
            step(one, its, inputs)
    assert_alike(model, twin)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_on_a_gpu_a_skipped_first_step_leaves_nothing_behind(name: str) -> None:
    model = network().cuda()
    optimizer = build(model, name, lr=0.1, **({"momentum": 0.9} if name == "sgd" else {}))
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for factor in (math.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale(factor * model(torch.randn(8, 3, 6, 6, device="cuda")).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        if factor == math.inf:
            assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert scaler.get_scale() == 2.0
