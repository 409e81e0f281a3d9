"""The three parts of the data."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rounding import apart

from neq_cli.errors import NeqError, RecipeValueError
from neq_cli.recipe import DataSection
from neq_cli.training.data.parts import Data, load_data
from neq_cli.training.data.splits import split
from neq_cli.training.errors import DataError

# Scaled to one, less a mean below 0.5, divided by 0.2 or more: statistics are rounded too, and undone again in a test.
NORMALISED = {"rtol": 0.0, "atol": apart(10, torch.float32, magnitude=1.5 / 0.2)}


def digits(seed: int = 1, **values: Any) -> Data:
    return load_data(DataSection(name="digits", **values), seed)


@pytest.mark.parametrize(("size", "probe_size"), [(10, 1), (10, 9), (1438, 50)])
def test_a_split_is_disjoint_complete_and_sorted(size: int, probe_size: int) -> None:
    train, probe = split(size, probe_size, seed=3)
    assert len(probe) == probe_size
    assert sorted(train.tolist() + probe.tolist()) == list(range(size))
    assert train.tolist() == sorted(train.tolist())
    assert probe.tolist() == sorted(probe.tolist())


def test_the_seed_alone_decides_the_split() -> None:
    first = split(100, 10, seed=3)[1]
    torch.manual_seed(99)
    assert torch.equal(first, split(100, 10, seed=3)[1])
    assert not torch.equal(first, split(100, 10, seed=4)[1])
    state = torch.get_rng_state()
    split(100, 10, seed=3)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("probe_size", [10, 11])
def test_a_probe_that_leaves_nothing_is_refused(probe_size: int) -> None:
    with pytest.raises(NeqError) as raised:
        split(10, probe_size, seed=1)
    assert str(raised.value) == (
        f"data.probe_size: {probe_size} probe images of 10 training images leave none to train on; lower it"
    )


def test_digits_as_data() -> None:
    data = digits()
    assert (len(data.train), len(data.probe), len(data.test)) == (1388, 50, 359)
    assert data.num_classes == 10
    assert data.image_shape == (1, 8, 8)
    assert (data.image_bytes, data.own) == (1 * 8 * 8 * 4, False)
    assert data.description == "digits: 1388 training, 50 probe, 359 test images of 1x8x8, 10 classes"
    images = torch.stack([data.train[i][0] for i in range(len(data.train))])
    assert abs(images.mean().item()) < 0.02
    assert abs(images.std().item() - 1) < 0.02


def test_the_probe_is_the_same_whatever_the_augmentation_and_never_augmented() -> None:
    plain, augmented = digits(), digits(augment="cifar")
    for (first, label), (second, other) in zip(plain.probe, augmented.probe, strict=False):
        assert torch.equal(first, second)
        assert label == other
    assert torch.equal(plain.train.indices, augmented.train.indices)
    assert not torch.equal(digits(2).probe.indices, plain.probe.indices)
    assert not set(plain.train.indices.tolist()) & set(plain.probe.indices.tolist())


def test_the_test_part_is_not_touched_by_the_split() -> None:
    first, second = digits(1), digits(2)
    assert all(torch.equal(first.test[i][0], second.test[i][0]) for i in range(0, 359, 40))


def test_the_recipes_statistics_win() -> None:
    plain, own = digits(), digits(mean=[0.0], std=[2.0])
    image = plain.probe[0][0] * 0.3764 + 0.3058
    torch.testing.assert_close(own.probe[0][0], image / 2, **NORMALISED)
    with pytest.raises(NeqError, match=r"^data.mean: 3 given, and images have 1 channel\(s\); give one per channel"):
        digits(mean=[0.1, 0.2, 0.3])


def write(root: Path, sizes: Sequence[tuple[int, int]]) -> DataSection:
    for part in ("train", "test"):
        for name in ("a", "b"):
            (root / part / name).mkdir(parents=True)
            for number, size in enumerate(sizes):
                Image.fromarray(np.zeros((*size, 3), dtype=np.uint8)).save(root / part / name / f"{number}.png")
    return DataSection(name="image_folder", root=str(root), probe_size=1)


def test_images_of_several_sizes_are_told_before_one_is_trained_on(tmp_path: Path) -> None:
    section = write(tmp_path, [(6, 6), (6, 6), (7, 6)])
    with pytest.raises(RecipeValueError) as raised:
        load_data(section, 1)
    assert raised.value.key == "data.image_size"
    what = "7x6 pixels (height x width), but others have 6x6; give one size for all, such as data.image_size=6"
    assert raised.value.reason == f"{tmp_path}/train/a/2.png: {what}"
    scaled = load_data(section.model_copy(update={"image_size": 4}), 1)
    assert {scaled.train[index][0].shape for index in range(5)} == {(3, 4, 4)}
    # Black, by ImageNet's statistics.
    torch.testing.assert_close(
        scaled.test[0][0][:, 0, 0], torch.tensor([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225]), **NORMALISED
    )


def test_images_of_another_size_among_many_are_told_when_they_are_met(tmp_path: Path) -> None:
    sizes = [(6, 6)] * 40
    sizes[1] = (7, 6)  # of 80 in both classes every fifth is looked at, and neither of these
    section = write(tmp_path, sizes)
    data = load_data(section, 1)
    assert data.image_shape == (3, 6, 6)
    assert data.image_bytes == 3 * 6 * 6
    with pytest.raises(DataError, match=r"1.png: 3x7x6, but the first image is 3x6x6; set data.image_size") as raised:
        [data.train[index] for index in range(len(data.train))]
    assert raised.value.exit_code == 2  # as for all that is wrong with what was given


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "datamodule", raising=False)
    (tmp_path / "datamodule.py").write_text(
        "import torch\n"
        "from torch.utils.data import TensorDataset\n"
        "def floats(): return [TensorDataset(torch.full((9, 3, 4, 4), 0.5), torch.arange(9)) for _ in '12']\n"
        "def bytes(): return [TensorDataset(torch.full((9, 3, 4, 4), 51, dtype=torch.uint8), torch.arange(9))] * 2\n"
        "def empty(): return [TensorDataset(torch.ones(n, 3, 4, 4), torch.zeros(n)) for n in (9, 0)]\n"
        "class Odd(list): num_classes = 2\n"
        "def odd(): return Odd([('text', 0)] * 9), Odd([('text', 0)] * 9)\n"
    )
    return "datamodule"


def test_floats_of_the_users_own_are_normalised_only_when_asked(module: str) -> None:
    section = DataSection(entrypoint=f"{module}:floats", probe_size=2)
    data = load_data(section, 1)
    assert torch.equal(data.train[0][0], torch.full((3, 4, 4), 0.5))
    assert (data.image_bytes, data.own) == (3 * 4 * 4 * 4, True)
    asked = section.model_copy(update={"mean": [0.1] * 3, "std": [0.5] * 3})
    torch.testing.assert_close(load_data(asked, 1).train[0][0], torch.full((3, 4, 4), 0.8), **NORMALISED)
    eights = DataSection(entrypoint=f"{module}:bytes", probe_size=2)
    torch.testing.assert_close(
        load_data(eights, 1).train[0][0][0], torch.full((4, 4), (0.2 - 0.485) / 0.229), **NORMALISED
    )


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("empty", "data: {m}:empty has no test images"),
        ("odd", "data: the first image of {m}:odd cannot be used (TypeError: "),
    ],
)
def test_unusable_data_of_the_users_own(module: str, name: str, says: str) -> None:
    with pytest.raises(NeqError) as raised:
        load_data(DataSection(entrypoint=f"{module}:{name}", probe_size=2), 1)
    assert str(raised.value).startswith(says.format(m=module))
    assert "\n" not in str(raised.value)
