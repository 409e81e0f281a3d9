"""Datasets of prepared images: what they give, and what they say of images that cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rounding import apart
from torch import Tensor
from torchvision.datasets import ImageFolder

from neq_cli.errors import TrainingError
from neq_cli.training.data.images import CachedItems, Images, ImagesInMemory, ReadImages
from neq_cli.training.data.pixels import as_tensor
from neq_cli.training.data.transforms import Preparation

PIXELS = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
# A byte divided by 255, or multiplied by what 1 / 255 is rounded to.
SCALED = {"rtol": apart(2, torch.float32), "atol": 0.0}
LABELS = torch.tensor([3, 1, 4, 1, 5, 9])
INDICES = torch.tensor([5, 0, 2])


def both(preparation: Preparation, *, augmented: bool) -> list[Images]:
    """The same images in memory and read one by one."""
    pairs = [(image, int(label)) for image, label in zip(PIXELS, LABELS, strict=True)]
    stored = ImagesInMemory(PIXELS, LABELS, INDICES, preparation, augmented=augmented)
    return [stored, ReadImages(pairs, INDICES, preparation, name="pairs", augmented=augmented)]


@pytest.mark.parametrize("which", [0, 1])
def test_the_chosen_images_in_order(which: int) -> None:
    images = both(Preparation(), augmented=True)[which]
    assert len(images) == 3
    for position, index in enumerate([5, 0, 2]):
        image, label = images[position]
        torch.testing.assert_close(image, PIXELS[index].float() / 255, **SCALED)
        assert label == LABELS[index]


@pytest.mark.parametrize("augment", ["crop", "cifar", "imagenet"])
def test_a_draw_decides_the_augmentation_one_by_one_or_in_batches(augment: Any) -> None:
    preparation = Preparation(8, augment)
    stored, read = both(preparation, augmented=True)
    keys = [(0, 2**40 + 7), (1, 5 * 2**33 + 70001), (2, 123456789012345)]
    expected = preparation.train(PIXELS[INDICES], torch.tensor([draw for _, draw in keys]))
    for images in (stored, read):
        batch = images.__getitems__(keys)  # type: ignore[attr-defined]
        assert torch.equal(torch.stack([image for image, _ in batch]), expected)
        assert [label for _, label in batch] == [9, 3, 4]
        assert torch.equal(images[keys[1]][0], expected[1])


@pytest.mark.parametrize("which", [0, 1])
def test_what_a_cache_keeps_is_not_augmented_yet(which: int) -> None:
    images = both(Preparation(augment="cifar", mean=(0.5,) * 3, std=(0.5,) * 3), augmented=True)[which]
    kept, labels = images.fixed([2, 0])
    assert torch.equal(torch.as_tensor(kept), PIXELS[[2, 5]])
    assert (labels.tolist(), labels.dtype) == ([4, 9], torch.int64)
    assert not images.differ


def test_images_that_are_cut_at_random_may_differ_in_size() -> None:
    preparation = Preparation(8, "imagenet")
    pairs = [(PIXELS[0], 0), (PIXELS[1, :, :5], 1)]
    train, test = (ReadImages(pairs, torch.arange(2), preparation, name="pairs", augmented=a) for a in (True, False))
    assert (train.differ, test.differ) == (True, False)
    kept, labels = train.fixed([0, 1])
    assert isinstance(kept, list)
    assert torch.equal(kept[0], PIXELS[0])
    assert torch.equal(kept[1], PIXELS[1, :, :5])
    assert labels.tolist() == [0, 1]
    assert torch.as_tensor(test.fixed([0, 1])[0]).shape == (2, 3, 8, 8)
    stored, _ = both(preparation, augmented=True)
    assert stored.scales_at_random
    assert not stored.differ


@pytest.mark.parametrize("which", [0, 1])
def test_without_a_draw_chance_decides_in_training_only(which: int) -> None:
    augmented = both(Preparation(augment="cifar"), augmented=True)[which]
    assert len({augmented[0][0].numpy().tobytes() for _ in range(12)}) > 1
    plain = both(Preparation(augment="cifar"), augmented=False)[which]
    torch.testing.assert_close(plain[0][0], PIXELS[5].float() / 255, **SCALED)
    torch.testing.assert_close(plain[0, 77][0], PIXELS[5].float() / 255, **SCALED)


def test_chance_in_a_dataset_of_the_users_own_is_seeded() -> None:
    class Noisy:
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return torch.rand(1, 2, 2), 0

    preparation = Preparation(augment="crop")
    train = ReadImages(Noisy(), torch.arange(4), preparation, name="noisy", augmented=True)
    test = ReadImages(Noisy(), torch.arange(4), preparation, name="noisy", augmented=False)
    assert torch.equal(train[0, 5][0], train[0, 5][0])
    assert not torch.equal(train[0, 5][0], train[0, 6][0])
    assert torch.equal(test[0][0], test[0][0])
    assert not torch.equal(test[0][0], test[1][0])


def test_images_of_all_kinds_become_tensors() -> None:
    array = PIXELS[0].permute(1, 2, 0).numpy()
    assert torch.equal(as_tensor(array), PIXELS[0])
    assert torch.equal(as_tensor(Image.fromarray(array)), PIXELS[0])
    assert type(as_tensor(array)) is Tensor
    grey = Image.fromarray(array[..., 0])
    assert torch.equal(as_tensor(grey), PIXELS[0, :1])
    palette = Image.fromarray(np.where(array > 127, 255, 0).astype(np.uint8)).convert("P")
    assert torch.equal(as_tensor(palette), as_tensor(palette.convert("RGB")))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "cat").mkdir()
    for number, size in enumerate([(8, 8), (8, 8), (6, 9), (12, 12)]):
        array = np.full((*size, 3), 60 * number, dtype=np.uint8)
        Image.fromarray(array).save(tmp_path / "cat" / f"{number}.png")
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cat" / "4.png")
    (tmp_path / "cat" / "4.png").write_bytes((tmp_path / "cat" / "4.png").read_bytes()[:60])
    (tmp_path / "cat" / "5.png").write_bytes(b"no image")
    return tmp_path


def read(folder: Path, preparation: Preparation) -> ReadImages:
    shape = torch.Size((3, preparation.size or 8, preparation.size or 8))
    return ReadImages(ImageFolder(str(folder)), torch.arange(6), preparation, name="cats", shape=shape, augmented=False)


@pytest.mark.parametrize("number", [4, 5])
def test_a_damaged_file_is_named(folder: Path, number: int) -> None:
    with pytest.raises(TrainingError) as raised:
        read(folder, Preparation())[number]
    assert str(raised.value).startswith(f"{folder}/cat/{number}.png: cannot be used (")
    assert str(raised.value).endswith("; mend or remove it")
    assert "\n" not in str(raised.value)


def test_an_image_of_another_size_is_named_unless_all_are_scaled(folder: Path) -> None:
    with pytest.raises(TrainingError) as raised:
        read(folder, Preparation())[2]
    assert str(raised.value) == (
        f"{folder}/cat/2.png: 3x6x9, but the first image is 3x8x8; "
        "set data.image_size, and store all images with the same channels"
    )
    batch = read(folder, Preparation(image_size=5)).__getitems__([0, 2, 3])
    assert [image.shape for image, _ in batch] == [(3, 5, 5)] * 3
    for (image, _), value in zip(batch, [0, 120, 180], strict=True):
        torch.testing.assert_close(image, torch.full((3, 5, 5), value / 255), **SCALED)


def test_an_image_without_a_file_is_named_by_its_number() -> None:
    pairs = [(PIXELS[0], 0), (PIXELS[1, :1], 0), (PIXELS[2], None)]
    shape = torch.Size((3, 8, 8))
    images = ReadImages(pairs, torch.tensor([1, 2]), Preparation(8), name="pairs", shape=shape, augmented=False)
    with pytest.raises(TrainingError, match=r"^image 1 of pairs: 1x8x8, but the first image is 3x8x8"):
        images[0]
    with pytest.raises(TrainingError, match=r"^image 2 of pairs: cannot be used \(TypeError"):
        images[1]


def test_a_label_that_is_no_class_is_told() -> None:
    images = ReadImages([(PIXELS[0], 3)], torch.tensor([0]), Preparation(), name="one", classes=3, augmented=False)
    with pytest.raises(TrainingError, match=r"^image 0 of one: label 3, but there are 3 classes, from 0 on$"):
        images[0]


def test_only_scaling_makes_images_in_memory_slow() -> None:
    def resizes(size: int | None, augment: Any = "none") -> bool:
        return ImagesInMemory(PIXELS, LABELS, INDICES, Preparation(size, augment), augmented=True).resizes

    assert [resizes(None), resizes(8), resizes(None, "cifar")] == [False] * 3
    assert [resizes(16), resizes(8, "imagenet"), resizes(None, "imagenet")] == [True] * 3


def test_only_scaling_for_good_changes_images_in_memory() -> None:
    def unchanged(size: int | None, augment: Any = "none", *, augmented: bool = True) -> bool:
        images = ImagesInMemory(PIXELS, LABELS, INDICES, Preparation(size, augment), augmented=augmented)
        assert images.unchanged == torch.equal(torch.as_tensor(images.fixed([0, 1, 2])[0]), PIXELS[INDICES])
        return images.unchanged

    assert [unchanged(None), unchanged(8), unchanged(None, "cifar"), unchanged(16, "imagenet")] == [True] * 4
    assert [unchanged(16), unchanged(8, "imagenet", augmented=False)] == [False] * 2


def test_kept_images_are_read_once() -> None:
    class Counted:
        reads = 0

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            self.reads += 1
            return PIXELS[index].float(), index

        def __len__(self) -> int:
            return 6

    counted = Counted()
    kept = CachedItems(counted)  # type: ignore[arg-type]
    assert len(kept) == 6
    for _ in range(3):
        assert torch.equal(kept[2][0], PIXELS[2].float())
        assert kept[4][1] == 4
    assert counted.reads == 2
