"""Batches: complete, shuffled by seed and epoch alone, the same for any number of workers."""

from __future__ import annotations

import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from neq_cli.errors import NeqError, TrainingError
from neq_cli.recipe import DataSection
from neq_cli.training.batches.cache import CachedBatches
from neq_cli.training.batches.loaders import Loaders, make_loaders
from neq_cli.training.batches.sampling import Share
from neq_cli.training.data.parts import Data, load_data

CPU = torch.device("cpu")


def write(root: Path, images: int = 12) -> DataSection:
    """Two classes of PNG files, every image of another grey with noise on it."""
    generator = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("a", "b"):
            (root / part / name).mkdir(parents=True)
            for number in range(images):
                Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(
                    root / part / name / f"{number:02d}.png"
                )
    return DataSection(name="image_folder", root=str(root), probe_size=3, augment="cifar")


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return load_data(write(tmp_path), 1)


def loaders(data: Data, batch_size: int = 5, workers: int = 0, seed: int = 1, device: torch.device = CPU) -> Loaders:
    """The loaders that read anew in each pass; tests/training/test_kept.py has the others."""
    return make_loaders(data, batch_size, workers, seed, device, cache="none")


def one_pass(batches: Any) -> tuple[Tensor, Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_training_batches_are_whole_and_the_others_complete(data: Data) -> None:
    made = loaders(data)
    assert [len(labels) for _, labels in made.train] == [5, 5, 5, 5]  # 21 images
    assert [len(labels) for _, labels in made.test] == [5, 5, 5, 5, 4]
    assert [len(labels) for _, labels in made.probe] == [3]
    assert (len(made.train), len(made.test), len(made.probe)) == (4, 5, 1)
    images, labels = next(iter(made.train))
    assert images.shape == (5, 3, 8, 8)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)


def test_a_batch_may_be_all_there_is_but_no_more(data: Data) -> None:
    assert len(loaders(data, batch_size=21).train) == 1
    with pytest.raises(NeqError) as raised:
        loaders(data, batch_size=22)
    assert str(raised.value) == (
        f"batch_size: 22 images per step, but {data.name} has 21 to train on (and 3 in the probe set); lower it"
    )


def test_the_same_batches_with_and_without_workers(data: Data) -> None:
    alone, helped = loaders(data), loaders(data, workers=2)
    passes = []
    for made in (alone, helped):
        passes.append([one_pass(made.train), one_pass(made.test), one_pass(made.train), one_pass(made.probe)])
    for first, second in zip(*passes, strict=True):
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])
    assert not torch.equal(passes[0][0][0], passes[0][2][0])


def test_an_epoch_can_be_begun_at_will(data: Data) -> None:
    straight, resumed = loaders(data), loaders(data)
    for _ in range(2):
        one_pass(straight.train)
    resumed.start_epoch(3)
    assert torch.equal(one_pass(straight.train)[0], one_pass(resumed.train)[0])
    assert not torch.equal(one_pass(loaders(data, seed=2).train)[0], one_pass(loaders(data).train)[0])


def test_no_pass_touches_the_global_generators(data: Data) -> None:
    made = loaders(data)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index,union-attr]
    for batches in (made.train, made.test, made.probe):
        one_pass(batches)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()  # type: ignore[index]


def test_too_few_images_for_all_processes_are_refused(data: Data) -> None:
    assert len(make_loaders(data, 7, 0, 1, CPU, share=Share(2, 3)).train) == 1
    with pytest.raises(NeqError) as raised:
        make_loaders(data, 8, 0, 1, CPU, share=Share(0, 3))
    assert str(raised.value) == (
        f"batch_size: 8 images per step in each of 3 processes, but {data.name} has 21 to train on "
        "(and 3 in the probe set); lower it"
    )
    with pytest.raises(NeqError) as raised:
        make_loaders(data, 2, 0, 1, CPU, share=Share(1, 4))
    assert str(raised.value) == "data.probe_size: 3 probe images for 4 processes; give it at least 4"


def test_images_in_memory_need_no_workers_unless_they_are_scaled() -> None:
    def workers(**values: Any) -> list[int]:
        section = DataSection(name="digits", **values)
        made = loaders(load_data(section, 1), 100, 2)
        return [made.train.num_workers, made.test.num_workers, made.probe.num_workers]

    assert workers() == workers(augment="crop") == [0, 0, 0]
    assert workers(image_size=16) == [2, 2, 0]


def test_what_fits_is_kept_and_said_so(data: Data) -> None:
    made = make_loaders(data, 5, 0, 1, CPU)
    assert all(isinstance(part, CachedBatches) for part in (made.train, made.probe, made.test))
    assert made.note == f"data.cache: memory, {48 * 8 * 8 * 3 / 1e6:.3g} MB"
    assert loaders(data).note == "data.cache: none"


def test_workers_stay_for_the_next_epoch(data: Data) -> None:
    made = loaders(data, workers=2)
    assert made.train.persistent_workers
    assert made.train.num_workers == 2
    assert loaders(data, batch_size=21, workers=2).train.num_workers == 1  # one batch: one worker
    assert not loaders(data).train.persistent_workers


def test_memory_is_pinned_for_a_gpu_only(data: Data) -> None:
    assert not loaders(data).train.pin_memory
    assert loaders(data, device=torch.device("cuda")).train.pin_memory


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_file_is_named_with_and_without_workers(tmp_path: Path, workers: int) -> None:
    data = load_data(write(tmp_path), 1)
    damaged = tmp_path / "test" / "b" / "07.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    begun = time.monotonic()
    with pytest.raises(TrainingError) as raised:
        one_pass(loaders(data, workers=workers).test)
    assert str(raised.value).startswith(f"{damaged}: cannot be used (")
    assert "\n" not in str(raised.value)
    del raised
    assert time.monotonic() - begun < 5  # torch would wait for its workers, five seconds for each


def test_the_probe_is_read_once(tmp_path: Path) -> None:
    data = load_data(write(tmp_path), 1)
    made = loaders(data)
    first = one_pass(made.probe)
    for path in (tmp_path / "train").rglob("*.png"):
        path.unlink()
    again = one_pass(made.probe)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def test_datasets_can_be_sent_to_workers_that_are_started_afresh(data: Data) -> None:
    digits = load_data(DataSection(name="digits", augment="crop"), 1)
    for images in (data.train, data.test, digits.train):
        sent = pickle.loads(pickle.dumps(images))
        assert torch.equal(sent[3, 2**40][0], images[3, 2**40][0])
