"""Data with masks: the same batches whatever keeps or reads them, and what is said of files that cannot be used."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from neq_cli.errors import NeqError
from neq_cli.recipe import DataSection
from neq_cli.training.batches.loaders import Loaders, make_loaders
from neq_cli.training.batches.sampling import Share
from neq_cli.training.data.masks import as_mask
from neq_cli.training.data.parts import Data, load_data

CPU = torch.device("cpu")
SIZES = [(16, 20), (20, 16), (18, 18)]


def write(root: Path, sizes: list[tuple[int, int]] = SIZES, train: int = 10, test: int = 7) -> None:
    """Noise, and masks of classes 0 to 2 that follow from its brightness, with a ring that is ignored."""
    generator = np.random.default_rng(0)
    for part, count in (("train", train), ("val", test)):
        for kind in ("images", "masks"):
            (root / part / kind).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 256, (*sizes[number % len(sizes)], 3), dtype=np.uint8)
            mask = pixels[..., 0] // 86
            mask[0] = 255
            Image.fromarray(pixels).save(root / part / "images" / f"{number}.png")
            Image.fromarray(mask).save(root / part / "masks" / f"{number}.png")


def section(root: Path, **values: Any) -> DataSection:
    values = {"kwargs": {"num_classes": 3}, **values}
    return DataSection(name="segmentation_folder", root=str(root), probe_size=3, **values)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path)
    return tmp_path


def loaders(data: Data, cache: Any = "none", workers: int = 0, share: Share | None = None, batch: int = 2) -> Loaders:
    return make_loaders(data, batch, workers, 1, CPU, cache=cache, share=share or Share())


def passes(made: Loaders) -> list[tuple[Tensor, Tensor]]:
    return [batch for part in (made.train, made.test, made.probe, made.train) for batch in part]


def assert_same(first: list[tuple[Tensor, Tensor]], second: list[tuple[Tensor, Tensor]]) -> None:
    assert len(first) == len(second) > 0
    for (images, masks), (others, other_masks) in zip(first, second, strict=True):
        assert (images.dtype, masks.dtype) == (torch.float32, torch.uint8)
        assert images.shape[-2:] == masks.shape[-2:]
        assert torch.equal(images, others)
        assert torch.equal(masks, other_masks)


def test_what_is_in_a_folder(folder: Path) -> None:
    data = load_data(section(folder, image_size=12, augment="segmentation"), 1)
    assert (len(data.train), len(data.probe), len(data.test)) == (7, 3, 7)
    assert (data.num_classes, data.image_shape, data.masked) == (3, (3, 12, 12), True)
    assert data.image_bytes == 4 * 12 * 12
    assert data.notes == ()


def test_test_images_are_whole_and_of_one_size_in_a_batch(folder: Path) -> None:
    data = load_data(section(folder, image_size=12, base_size=16), 1)
    found = [tuple(images.shape) for images, _ in loaders(data).test]
    # Three of 16x20, two of 20x16 and two of 18x18, in batches of two; shorter sides become 16.
    assert sorted(found) == [(1, 3, 16, 20), (2, 3, 16, 16), (2, 3, 16, 20), (2, 3, 20, 16)]
    assert {tuple(images.shape[1:]) for images, _ in loaders(data).train} == {(3, 12, 12)}


def test_a_test_mask_is_that_of_its_file(folder: Path) -> None:
    data = load_data(section(folder, image_size=12, base_size=None, mean=[0.0] * 3, std=[1.0] * 3), 1)
    whole = section(folder, kwargs={"num_classes": 3}, mean=[0.0] * 3, std=[1.0] * 3)
    image, mask = load_data(whole, 1, tested_only=True).test[2]  # whose images differ in size, as they may
    pixels = np.asarray(Image.open(folder / "val" / "images" / "2.png"))
    assert torch.equal((image * 255).round().to(torch.uint8), torch.from_numpy(pixels.copy()).permute(2, 0, 1))
    assert torch.equal(mask, torch.from_numpy(np.array(Image.open(folder / "val" / "masks" / "2.png"))))
    assert len(data.test) == 7


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache", ["none", "memory"])
@pytest.mark.parametrize("augment", ["none", "segmentation"])
@pytest.mark.parametrize("sizes", [SIZES, [(16, 20)]])
def test_the_same_batches_whatever_reads_and_keeps_them(
    tmp_path: Path, sizes: list[tuple[int, int]], augment: str, cache: str, workers: int
) -> None:
    write(tmp_path, sizes)
    data = load_data(section(tmp_path, image_size=12, augment=augment), 1)
    expected = passes(loaders(data))
    made = loaders(data, cache, workers)
    assert_same(expected, passes(made))
    assert ("are read every time" in made.note) == (cache == "memory" and len(sizes) > 1)
    first, again = (torch.stack([images for images, _ in epoch]) for epoch in (expected[:3], expected[-3:]))
    assert not torch.equal(first, again)  # another epoch, another order


def test_images_without_a_size_of_the_recipe_keep_theirs(tmp_path: Path) -> None:
    write(tmp_path, [(16, 20)])
    data = load_data(section(tmp_path, augment="segmentation"), 1)
    assert {tuple(images.shape) for images, _ in passes(loaders(data, "memory"))} == {
        (2, 3, 16, 20),
        (1, 3, 16, 20),
    }


def test_processes_take_the_images_of_one(folder: Path) -> None:
    data = load_data(section(folder, image_size=12, augment="segmentation"), 1)
    alone = loaders(data, batch=2)
    both = [loaders(data, batch=1, share=Share(rank, 2, 2)) for rank in (0, 1)]
    for (images, masks), *others in zip(alone.train, *(made.train for made in both), strict=True):
        assert torch.equal(images, torch.cat([own for own, _ in others]))
        assert torch.equal(masks, torch.cat([own for _, own in others]))
    assert sum(len(images) for made in both for images, _ in made.test) == 7


def test_the_number_of_classes_is_given_listed_or_the_largest_in_the_masks(folder: Path) -> None:
    found = load_data(section(folder, kwargs={}, image_size=12), 1)
    assert found.num_classes == 3
    assert found.notes == ("data: 3 classes, as 2 is the largest number in the masks",)
    (folder / "classes.txt").write_text("road\nsky\ncar\nbird\n")
    assert load_data(section(folder, kwargs={}, image_size=12), 1).classes == ("road", "sky", "car", "bird")


def test_another_number_can_be_ignored(folder: Path) -> None:
    plain = load_data(section(folder, image_size=12), 1).train[3][1]
    for mask in folder.glob("*/masks/*"):
        values = np.array(Image.open(mask))
        Image.fromarray(np.where(values == 255, 11, values).astype(np.uint8)).save(mask)
    changed = load_data(section(folder, image_size=12, ignore_index=11, kwargs={}), 1)
    assert torch.equal(plain, changed.train[3][1])


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (300, "data.root: {}/train/masks/2.png: 300 is no class, a number from 0 to 254; correct the mask"),
        (255, "data.root: the masks under '{}' hold no class; give data.kwargs.num_classes"),
    ],
)
def test_masks_that_do_not_tell_the_number_of_classes(folder: Path, value: int, says: str) -> None:
    for mask in folder.glob("*/masks/*" if value == 255 else "train/masks/2.png"):
        Image.fromarray(np.full((18, 18), value, dtype=np.uint16)).save(mask)
    with pytest.raises(NeqError) as raised:
        load_data(section(folder, kwargs={}, image_size=12), 1)
    assert str(raised.value) == says.format(folder)


def damage(folder: Path, what: str) -> Path:
    """Break the mask of the first training image."""
    mask = folder / "train" / "masks" / "0.png"
    values = np.array(Image.open(mask))
    if what == "missing":
        mask.unlink()
    elif what == "size":
        Image.fromarray(values[:-1]).save(mask)
    elif what == "class":
        values[4, 5] = 9
        Image.fromarray(values).save(mask)
    elif what == "colour":
        Image.fromarray(np.stack([values] * 3, -1)).save(mask)
    else:
        mask.write_bytes(b"no picture")
    return mask


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("missing", "data.root: {image}: has no mask '{mask}'"),
        ("size", "{mask}: 15x20 pixels (height x width), but its image is 16x20; make them alike"),
        (
            "class",
            "{mask}: class 9 in row 4, column 5, but there are 3 classes, from 0 on, and 255 is ignored; "
            "mend the mask, or set data.kwargs.num_classes or data.ignore_index",
        ),
        (
            "colour",
            "{mask}: cannot be used (ValueError: a colour image (RGB); a mask is grey or has a palette, and holds "
            "class numbers); mend or remove it",
        ),
        ("junk", "cannot be used (UnidentifiedImageError: cannot identify image file"),
    ],
)
def test_a_wrong_mask_is_one_line_that_names_it(folder: Path, what: str, says: str, workers: int) -> None:
    mask = damage(folder, what)
    with pytest.raises(NeqError) as raised:
        passes(loaders(load_data(section(folder, image_size=12, augment="segmentation"), 1), workers=workers))
    text = str(raised.value)
    assert says.format(mask=mask, image=mask.parent.parent / "images" / "0.png") in text
    assert str(mask) in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"augment": "cifar"}, "data.augment: cifar would move images without their masks; use segmentation"),
        ({"mixup": 0.2}, "data.mixup: changes images without their masks; remove it"),
        ({"kwargs": {"num_classes": 300}}, "data.kwargs.num_classes: 300 is not a number of classes, 1 to 255"),
        ({"kwargs": {"clases": 3}}, "data.kwargs.clases: segmentation_folder takes num_classes; remove it"),
        (
            {},
            "/train/images/1.png: 20x16 pixels (height x width), but others have 16x20; give one size for all, such as",
        ),
    ],
)
def test_what_the_recipe_may_not_ask(folder: Path, values: dict[str, Any], says: str) -> None:
    with pytest.raises(NeqError) as raised:
        passes(loaders(load_data(section(folder, **values), 1)))
    assert says in str(raised.value)


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("", "data.root: no folder '{}'; a segmentation folder holds train/images/*"),
        ("train/masks", "data.root: no folder '{}/train/masks'; a segmentation folder holds"),
        ("val", "data.root: no folder '{}/test'; a segmentation folder holds"),
    ],
)
def test_a_missing_folder_is_one_line(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, missing: str, says: str
) -> None:
    (folder / missing).rename(tmp_path_factory.mktemp("moved") / "away")
    with pytest.raises(NeqError) as raised:
        load_data(section(folder), 1)
    assert str(raised.value).startswith(says.format(folder))


def test_two_images_of_one_name_are_refused(folder: Path) -> None:
    image = folder / "train" / "images" / "3.png"
    image.with_suffix(".jpg").write_bytes(image.read_bytes())
    with pytest.raises(NeqError, match="holds two images called '3'; rename one of them"):
        load_data(section(folder), 1)


class Made:
    """A dataset of the user's own: float images, and masks as tensors."""

    classes = ("a", "b")

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        mask = torch.full((10, 12), index % 2)
        return mask.float().expand(3, 10, 12), mask


def make() -> tuple[Made, Made]:
    return Made(), Made()


def test_data_of_the_users_own_may_have_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "own_masks", sys.modules[__name__])
    data = load_data(DataSection(entrypoint="own_masks:make", probe_size=2, augment="segmentation"), 1)
    assert (data.masked, data.num_classes, data.image_shape) == (True, 2, (3, 10, 12))
    made = loaders(data)
    for images, masks in made.train:
        known = masks != 255
        assert torch.equal(images[:, 0][known], masks[known].float())
    assert len(made.test) == 8  # sizes are not known: one by one


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (Image.fromarray(np.array([[1, 200]], dtype=np.uint8)), [[1, 200]]),
        (Image.fromarray(np.array([[1, 300]], dtype=np.uint16)), [[1, 300]]),
        (np.array([[[1, 2]]]), [[1, 2]]),
        (torch.tensor([[-1, 2]]), [[-1, 2]]),
        (torch.tensor([[True, False]]), [[1, 0]]),
    ],
)
def test_what_a_mask_may_be(mask: Any, expected: list[list[int]]) -> None:
    assert as_mask(mask).tolist() == expected


def test_a_palette_is_of_no_matter() -> None:
    picture = Image.fromarray(np.array([[3, 1]], dtype=np.uint8)).convert("P")
    picture.putpalette([7] * 768)
    assert as_mask(picture).tolist() == [[3, 1]]


@pytest.mark.parametrize("mask", [torch.zeros(2, 3), torch.zeros(3, 2, 2, dtype=torch.int64), torch.zeros(4).int()])
def test_what_a_mask_may_not_be(mask: Tensor) -> None:
    with pytest.raises(ValueError, match="mask of"):
        as_mask(mask)


def test_pascal_voc_in_its_own_layout(tmp_path: Path) -> None:
    base = tmp_path / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (base / folder).mkdir(parents=True)
    for part, names in (("train", ["a", "b", "c"]), ("val", ["d"])):
        (base / "ImageSets" / "Segmentation" / f"{part}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(base / "JPEGImages" / f"{name}.jpg")
            values = np.full((30, 40), 15, np.uint8)
            values[:2] = 255
            mask = Image.fromarray(values).convert("P")
            mask.putpalette([3] * 768)
            mask.save(base / "SegmentationClass" / f"{name}.png")
    recipe = DataSection(name="vocsegmentation", root=str(tmp_path), probe_size=1, image_size=24, download=False)
    data = load_data(recipe, 1)
    assert (len(data.train), len(data.test), data.classes[15]) == (2, 1, "person")
    image, mask = data.test[0]
    assert (image.shape, sorted(mask.unique().tolist())) == ((3, 24, 32), [15, 255])


def test_what_is_cut_is_no_larger_than_what_it_is_cut_from() -> None:
    with pytest.raises(ValueError, match="base_size 20 is less than image_size 30, which is cut from it; raise it"):
        DataSection(name="segmentation_folder", image_size=30, base_size=20)
