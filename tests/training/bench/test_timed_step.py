"""One training step on one batch: what it is made of, what it keeps for the backward pass, and how it is timed."""

from __future__ import annotations

import gc
import itertools
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from neq_cli.errors import NeqError
from neq_cli.recipe import Recipe
from neq_cli.training.bench.noise import find_data
from neq_cli.training.bench.timed_step import PARTS, Stopwatch, TimedStep

CPU = torch.device("cpu")
OWN_CODE = """
from torch import nn

def perceptron():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

def sigmoids():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Sigmoid(), nn.Linear(32, 10), nn.Sigmoid())
"""


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "benched_code.py").write_text(OWN_CODE)
    monkeypatch.syspath_prepend(tmp_path)
    return "benched_code"


def recipe(**changes: Any) -> Recipe:
    values = {
        "model": {"name": "resnet8", "kwargs": {"num_classes": 10, "in_channels": 1, "width": 4}},
        "data": {"name": "digits", "workers": 0},
        "epochs": 1,
        "batch_size": 4,
        "optimizer": {"name": "sgd", "lr": 0.1},
        "device": "cpu",
    }
    return Recipe.model_validate(values | changes)


def step(chosen: Recipe, *, channels_last: bool = False) -> TimedStep:
    return TimedStep(chosen, CPU, find_data(chosen)[0], channels_last=channels_last)


def test_a_model_that_does_not_fit_is_one_line() -> None:
    with pytest.raises(NeqError, match="model: does not take an image of digits, 1x8x8"):
        step(recipe(model={"name": "resnet8"}))


def test_bytes_kept_for_the_backward_pass(own_code: str) -> None:
    perceptron = step(recipe(model={"entrypoint": f"{own_code}:perceptron"}))
    images, hidden, log_probabilities = 4 * 4 * 64, 4 * 4 * 32, 4 * 4 * 10
    labels, weight_of_loss = 8 * 4, 4
    # The hidden layer's outputs, which the activation and the next layer need, count once; weights do not.
    assert perceptron.saved_for_backward() == images + hidden + log_probabilities + labels + weight_of_loss
    perceptron.model.get_parameter("1.weight").requires_grad_(False)
    perceptron.model.get_parameter("1.bias").requires_grad_(False)
    assert perceptron.saved_for_backward() == hidden + log_probabilities + labels + weight_of_loss
    assert all(parameter.grad is None for parameter in perceptron.model.parameters())


def tensors() -> int:
    """How many tensors Python knows of."""
    gc.collect()
    return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())


def test_looking_twenty_times_keeps_nothing(own_code: str) -> None:
    # The loss saves its own output, log-probabilities; so does a sigmoid.
    chosen = step(recipe(model={"entrypoint": f"{own_code}:sigmoids"}))
    found, before = chosen.saved_for_backward(), tensors()
    assert [chosen.saved_for_backward() for _ in range(20)] == [found] * 20
    assert tensors() == before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_looking_twenty_times_does_not_grow_the_process(own_code: str) -> None:
    model = {"name": "resnet18", "kwargs": {"num_classes": 10}}
    chosen = step(recipe(model=model, data={"name": "CIFAR10"}, batch_size=32))
    looked = [chosen.saved_for_backward() for _ in range(3)][-1]
    before = resident()
    for _ in range(20):
        chosen.saved_for_backward()
    assert resident() - before < 2 * looked  # where one look's activations stay, 20 times that


def resident() -> int:
    return os.sysconf("SC_PAGE_SIZE") * int(Path("/proc/self/statm").read_text().split()[1])


@pytest.mark.gpu
def test_looking_twenty_times_keeps_nothing_on_a_gpu(own_code: str) -> None:
    chosen = recipe(model={"entrypoint": f"{own_code}:sigmoids"}, batch_size=256)
    timed = TimedStep(chosen, torch.device("cuda"), find_data(chosen)[0])
    timed.run().read()
    timed.saved_for_backward()
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        timed.saved_for_backward()
    assert torch.cuda.memory_allocated() == before


def test_both_memory_formats_and_back() -> None:
    chosen = step(recipe(model={"name": "resnet18", "kwargs": {"num_classes": 10}}, data={"name": "CIFAR10"}))
    weights = [parameter for parameter in chosen.model.parameters() if parameter.dim() == 4]
    strides, images = [weight.stride() for weight in weights], chosen.inputs.clone()
    chosen.lay_out(channels_last=True)
    assert all(weight.stride()[1] == 1 for weight in weights)
    assert chosen.inputs.stride() == (3 * 32 * 32, 1, 3 * 32, 3)
    chosen.lay_out(channels_last=False)
    assert [weight.stride() for weight in weights] == strides  # of 1x1 kernels too, where `to` would change nothing
    assert torch.equal(chosen.inputs, images)
    assert chosen.inputs.is_contiguous()


@pytest.mark.parametrize("changes", [{}, {"precision": "bf16"}, {"clip_grad_norm": 1.0, "optimizer": {"name": "adam"}}])
def test_steps_train_without_changing_what_is_measured(changes: dict[str, Any]) -> None:
    chosen = step(recipe(**changes))
    before = [parameter.detach().clone() for parameter in chosen.model.parameters()]
    for _ in range(20):
        chosen.run()
    after = list(chosen.model.parameters())
    assert all(parameter.grad is None for parameter in after)
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(old, new.detach(), rtol=1e-3, atol=1e-4)


def test_the_stopwatch_adds_up_laps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.accumulate([100.0, 1, 2, 4, 8, 16])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    watch = Stopwatch(CPU)
    for part in ("forward", "backward", "optimizer", "row_keeping", "optimizer"):
        watch.lap(part)
    assert watch.read() == {"forward": 1, "backward": 2, "optimizer": 4 + 16, "row_keeping": 8}
    assert set(watch.read()) == set(PARTS)
