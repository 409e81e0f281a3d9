"""What only a CUDA device can show: the same neurons as on the CPU, rows held, and no waiting in a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from neq_cli import Freezer, NEq, Stochastic
from neq_cli.recipe.file import load_recipe
from neq_cli.records import EpochRecord
from neq_cli.training.session import Session, prepare

pytestmark = pytest.mark.gpu


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def session(*overrides: str) -> Session:
    loaded = load_recipe("digits", ["epochs=2", "device=cuda", *overrides])
    return prepare(loaded.recipe, loaded.name)


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_phi_is_that_of_the_cpu() -> None:
    inputs = torch.randn(10, 3, 8, 8)
    found = []
    for device in ("cpu", "cuda"):
        model = network().to(device)
        freezer = Freezer(model, torch.optim.SGD(model.parameters(), lr=0.1), [inputs], NEq())
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
                parameter.add_(0.1 * noise.to(device))
        found.append({name: observation.phi for name, observation in freezer.step().items()})
    for name, phi in found[0].items():
        assert torch.allclose(phi, found[1][name], atol=1e-4), name  # convolutions may use TF32


@pytest.mark.parametrize("fused", [False, True])
def test_frozen_rows_and_state_are_bit_identical_and_a_step_never_waits(fused: bool) -> None:
    model = network().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    freezer = Freezer(model, optimizer, [torch.randn(4, 3, 8, 8)], Stochastic(0.5))
    inputs, targets = torch.randn(16, 3, 8, 8, device="cuda"), torch.randint(4, (16,), device="cuda")

    def step() -> None:
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    def watched() -> list[Tensor]:
        weight = model[0].weight
        return [weight.detach().clone(), *(optimizer.state[weight][key].clone() for key in ("exp_avg", "exp_avg_sq"))]

    step()
    freezer.step()
    frozen = ~freezer.trainable["0"]
    before = watched()
    step()  # allocates
    with no_waiting():
        for _ in range(3):
            step()
    for old, new in zip(before, watched(), strict=True):
        assert torch.equal(old[frozen], new[frozen])
        assert not torch.equal(old[~frozen], new[~frozen])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_recipe_trains(precision: str) -> None:
    ready = session(f"precision={precision}")
    assert ready.trainer.loaders.train.pin_memory
    records = [record for record in ready.trainer.run() if isinstance(record, EpochRecord)]
    assert [record.epoch for record in records] == [1, 2]
    assert records[1].metrics["train_loss"] < records[0].metrics["train_loss"]
