"""What only a CUDA device can show: the same neurons as on the CPU, rows held, and no waiting in a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from rounding import apart, phi_apart, unit
from states import whole_state
from torch import Tensor, nn

from neq_cli import Freezer, NEq, Stochastic
from neq_cli.events import EpochRecord
from neq_cli.recipe.load import load_recipe
from neq_cli.recipe.values import Cache
from neq_cli.training.batches.cache import CachedBatches
from neq_cli.training.batches.loaders import make_loaders
from neq_cli.training.data.images import ImagesInMemory
from neq_cli.training.data.parts import Data
from neq_cli.training.data.transforms import Preparation
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
    inputs = torch.randn(10, 3, 8, 8).double()
    found = []
    for device in ("cpu", "cuda"):
        model = network().double().to(device)
        freezer = Freezer(model, torch.optim.SGD(model.parameters(), lr=0.1), [inputs], NEq())
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
                parameter.add_(0.1 * noise.to(device))
        found.append({name: observation.phi for name, observation in freezer.step().items()})
    for name, phi in found[0].items():
        # 27 products, 4 operations of the norm, 36 positions, 8 products; 360 outputs; handed out in single precision.
        close = phi_apart(80, 360) + 2 * unit(torch.float32)
        assert torch.allclose(phi, found[1][name], rtol=0, atol=close), name


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
        return [
            weight.detach().clone(),
            *(whole_state(optimizer)[weight][key].clone() for key in ("exp_avg", "exp_avg_sq")),
        ]

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


@pytest.mark.parametrize("augment", ["none", "crop", "cifar"])
@pytest.mark.parametrize("cache", ["memory", "device"])
def test_kept_images_are_those_of_the_cpu_and_a_batch_never_waits(cache: Cache, augment: str) -> None:
    bytes_ = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8)
    preparation = Preparation(augment=augment, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))  # type: ignore[arg-type]
    part = ImagesInMemory(bytes_, torch.arange(40), torch.arange(40), preparation, augmented=True)
    data = Data("noise", part, part, part, 40, (), (3, 8, 8), bytes_[0].nbytes, own=False)
    cuda, cpu = (make_loaders(data, 8, 0, 1, torch.device(device), cache=cache) for device in ("cuda", "cpu"))
    assert isinstance(cuda.train, CachedBatches)
    assert cuda.train.place.type == ("cuda" if cache == "device" else "cpu")
    for _ in range(2):
        found = iter(cuda.train)
        batches = [next(found)]  # what a pass needs is sent with its first batch
        with no_waiting():
            batches += found
        for (images, labels), (expected, expected_labels) in zip(batches, cpu.train, strict=True):
            assert images.device.type == labels.device.type == "cuda"
            # Scaled to one, less at most 0.6, divided by at least 0.2.
            close = apart(6, torch.float32, magnitude=8)
            torch.testing.assert_close(images.cpu(), expected, rtol=0, atol=close)
            assert torch.equal(labels.cpu(), expected_labels)


def test_images_in_memory_are_pinned_where_they_are_not_kept() -> None:
    loaded = load_recipe("digits", ["device=cuda", "data.cache=none"])
    loaders = prepare(loaded.recipe, loaded.name).trainer.loaders
    images, labels = next(iter(loaders.train))
    assert images.is_pinned()
    assert labels.is_pinned()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_recipe_trains(precision: str) -> None:
    ready = session(f"precision={precision}")
    assert ready.started.notes[0] == "data.cache: device, 0.46 MB"
    records = [record for record in ready.trainer.run() if isinstance(record, EpochRecord)]
    assert [record.epoch for record in records] == [1, 2]
    assert records[1].metrics["train_loss"] < records[0].metrics["train_loss"]


# Where a gradient is next to nothing, Adam without eps makes a whole step of its sign.
@pytest.mark.parametrize("optimizer", ["name: sgd", "name: adam, eps: 1.0"])
def test_a_captured_step_trains_as_an_eager_one_does(optimizer: str) -> None:
    """In few small steps: rounding, which kernels may do in their own ways, grows from step to step."""
    weights = []
    for captured in ("true", "false"):
        run = session(
            f"cuda_graph={captured}",
            f"optimizer={{{optimizer}, lr: 0.003}}",
            "policy={kind: stochastic, p: 0.5}",
            "channels_last=true",
            "batch_size=200",
        )
        run.trainer.freezer.dispatch.fixed = True  # else the two may time other kernels
        torch.backends.cudnn.benchmark = False
        for _ in run.trainer.run():
            pass
        weights.append({name: tensor.cpu() for name, tensor in run.trainer.model.state_dict().items()})
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-3, atol=3e-4)
