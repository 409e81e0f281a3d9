"""Which images are trained on, probed and tested, counted beside the shares that were asked for."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from neq_cli.errors import NeqError
from neq_cli.recipe import DataSection
from neq_cli.training.data.digits import load_digits
from neq_cli.training.data.parts import Data, load_data
from neq_cli.training.data.splits import hold_out, known_labels, split


@pytest.mark.parametrize(("size", "share", "count"), [(10, 0.1, 1), (1438, 0.1, 144), (7, 0.5, 4), (9, 0.9, 8)])
def test_what_is_held_out_is_disjoint_complete_and_sorted(size: int, share: float, count: int) -> None:
    rest, tested = hold_out(size, share, seed=3)
    assert len(tested) == count
    assert sorted([*rest.tolist(), *tested.tolist()]) == list(range(size))
    assert rest.tolist() == sorted(rest.tolist())
    assert tested.tolist() == sorted(tested.tolist())


def test_every_class_gives_its_share() -> None:
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate((100, 3, 57, 1, 8, 31))])
    labels = labels[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    for share in (0.1, 0.25, 0.5):
        rest, tested = hold_out(200, share, 1, labels)
        assert len(tested) == round(200 * share)
        for label in range(6):
            there, held = int((labels == label).sum()), int((labels[tested] == label).sum())
            assert abs(held - share * there) < 1, (share, label)
        assert not set(rest.tolist()) & set(tested.tolist())
    # Chance alone would not do: of 31 images of the last class 3.1 are to be tested.
    alone = [int((labels[hold_out(200, 0.1, seed)[1]] == 5).sum()) for seed in range(20)]
    assert max(alone) > 4


def test_the_seed_alone_decides_what_is_held_out() -> None:
    labels = torch.arange(100) % 3
    first = hold_out(100, 0.2, 3, labels)[1]
    state = torch.get_rng_state()
    assert torch.equal(first, hold_out(100, 0.2, 3, labels)[1])
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, hold_out(100, 0.2, 4, labels)[1])
    # Nor has it to do with what is probed of as many images by the same seed.
    assert not torch.equal(hold_out(100, 0.2, 3)[1], split(100, 20, 3)[1])


@pytest.mark.parametrize(
    ("size", "share", "says"),
    [
        (20, 0.01, "0.01 of 20 training images is none of them; raise it"),
        (3, 0.9, "0.9 of 3 training images is all of them; lower it"),
    ],
)
def test_a_share_that_leaves_a_part_empty_is_refused(size: int, share: float, says: str) -> None:
    with pytest.raises(NeqError) as raised:
        hold_out(size, share, 1)
    assert str(raised.value) == f"data.validation: {says}"


class _Dataset:
    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)

    def __len__(self) -> int:
        return 3


@pytest.mark.parametrize("name", ["targets", "labels", "_labels"])
def test_labels_are_known_where_a_dataset_has_them_all(name: str) -> None:
    for labels in ([2, 0, 1], torch.tensor([2, 0, 1]), np.array([2, 0, 1], np.uint8)):
        found = known_labels(_Dataset(**{name: labels}))
        assert found is not None
        assert found.tolist() == [2, 0, 1]

    class Odd(list[int]):
        def __getitem__(self, index: Any) -> Any:
            raise KeyError(index)

    for other in (
        Odd([1, 2, 3]),
        [2, 0],
        ["a", "b", "c"],
        [0.5, 1.0, 2.0],
        [{}, {}, {}],
        None,
        torch.zeros(3, 4, 4).long(),
        7,
    ):
        assert known_labels(_Dataset(**{name: other})) is None, other


def test_labels_beside_paths_are_known_and_masks_are_none() -> None:
    found = known_labels(_Dataset(_samples=[("a.png", 1), ("b.png", 0), ("c.png", 1)]))
    assert found is not None
    assert found.tolist() == [1, 0, 1]
    pairs = TensorDataset(torch.zeros(3, 2), torch.tensor([5, 6, 7]))
    for dataset, labels in ((pairs, [5, 6, 7]), (Subset(pairs, [2, 0]), [7, 5])):
        found = known_labels(dataset)
        assert found is not None
        assert found.tolist() == labels
    assert known_labels(_Dataset(samples=[(Path("a.png"), Path("mask.png"))] * 3)) is None


def indices(data: Data) -> tuple[set[int], set[int], set[int]]:
    train, probe, test = (set(part.indices.tolist()) for part in (data.train, data.probe, data.test))
    assert len(train) + len(probe) + len(test) == len(train | probe | test)
    return train, probe, test


def test_a_share_of_the_training_digits_is_tested_in_place_of_their_test_part() -> None:
    section = DataSection(name="digits", validation=0.1, augment="cifar")
    data = load_data(section, 1)
    train, probe, test = indices(data)
    assert (len(train), len(probe), len(test)) == (1244, 50, 144)
    assert train | probe | test == set(range(1438))
    note = "data.validation: 144 of 1438 training images, chosen by seed and class by class, are the test part"
    assert data.notes == (f"{note}, in place of the test part of digits",)
    content = data.content()
    assert (content["train"], content["test"], content["validation"]) == (1294, 144, 144)
    assert "validation" not in load_data(DataSection(name="digits"), 1).content()
    # What is tested is as it is in the data, without augmentation; what is trained on has it.
    (images, labels), _ = load_digits()
    plain = load_data(DataSection(name="digits"), 1).test.preparation.test
    for position, index in enumerate(sorted(test)[:20]):
        image, label = data.test[position]
        assert torch.equal(image, plain(images[index : index + 1])[0])
        assert label == int(labels[index])
    assert data.train.augmented
    assert not data.test.augmented
    counts = Counter(labels[sorted(test)].tolist())
    assert all(abs(counts[digit] - 0.1 * int((labels == digit).sum())) < 1 for digit in range(10))


def test_only_what_is_tested_is_the_same_as_in_training() -> None:
    section = DataSection(name="digits", validation=0.2)
    assert indices(load_data(section, 5))[2] == set(load_data(section, 5, tested_only=True).test.indices.tolist())
    assert indices(load_data(section, 5))[2] != indices(load_data(section, 6))[2]


def write(root: Path, parts: dict[str, int], classes: tuple[str, ...] = ("cat", "dog")) -> dict[str, Tensor]:
    """Write PNG files part/class/n.png, as many of each class in a part, and return their pixels by path."""
    generator, written = np.random.default_rng(0), {}
    for part, count in parts.items():
        for name in classes:
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (6, 5, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
                written[str(folder / f"{number}.png")] = torch.from_numpy(pixels).permute(2, 0, 1)
    return written


def folder(root: Path, **values: Any) -> DataSection:
    return DataSection(name="image_folder", root=str(root), probe_size=1, **values)


@pytest.mark.parametrize("parts", [{"": 10}, {"train": 10}, {"train": 10, "test": 3}, {"train": 10, "val": 3}])
def test_a_folder_needs_no_test_part(tmp_path: Path, parts: dict[str, int]) -> None:
    written = write(tmp_path, parts)
    data = load_data(folder(tmp_path, validation=0.2), 1)
    assert (data.classes, len(data.train), len(data.probe), len(data.test)) == (("cat", "dog"), 15, 1, 4)
    assert Counter(label for _, label in data.test) == {0: 2, 1: 2}
    samples = [path for path, _ in data.test.source.samples]  # type: ignore[attr-defined]
    below = "train" if "train" in parts else ""
    assert all(Path(path).parent.parent == tmp_path / below for path in samples)
    for position, index in enumerate(data.test.indices.tolist()):
        assert torch.equal(data.test[position][0], data.test.preparation.test(written[samples[index]][None])[0])
    alone = load_data(folder(tmp_path, validation=0.2), 1, tested_only=True)
    assert torch.equal(alone.test.indices, data.test.indices)
    (note,) = data.notes
    told = "data.validation: 4 of 20 training images, chosen by seed and class by class, are the test part"
    assert note == told + "".join(f", in place of {name}/" for name in parts if name in ("test", "val"))


def test_a_test_part_that_is_not_read_may_be_anything(tmp_path: Path) -> None:
    write(tmp_path, {"train": 5})
    write(tmp_path, {"test": 1}, ("cow",))
    assert len(load_data(folder(tmp_path, validation=0.2), 1).test) == 2


def test_a_folder_without_a_test_part_says_what_would_do(tmp_path: Path) -> None:
    def message(section: DataSection, **options: Any) -> str:
        with pytest.raises(NeqError) as raised:
            load_data(section, 1, **options)
        assert "\n" not in str(raised.value)
        return str(raised.value).replace(str(tmp_path), "")

    write(tmp_path / "flat", {"": 5})
    write(tmp_path / "train_only", {"train": 5})
    write(tmp_path / "test_only", {"test": 5})
    mend = "; where there is no test part, data.validation=0.1 holds out a tenth of the images"
    assert message(folder(tmp_path / "flat")).endswith(mend)
    assert message(folder(tmp_path / "train_only")).endswith(mend)
    # It would not mend these.
    assert mend not in message(folder(tmp_path / "test_only"))
    assert mend not in message(folder(tmp_path / "train_only"), tested_only=True)
    assert message(folder(tmp_path / "test_only", validation=0.1)).startswith(
        "data.root: '/test_only' has no folder 'train'"
    )


@pytest.mark.parametrize("below", ["", "train"])
def test_masks_in_folders_need_no_test_part(tmp_path: Path, below: str) -> None:
    generator = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (tmp_path / below / kind).mkdir(parents=True)
    for number in range(10):
        size = (8, 12) if number % 2 else (10, 8)
        Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(
            tmp_path / below / "images" / f"{number}.png"
        )
        Image.fromarray(generator.integers(0, 3, size, dtype=np.uint8)).save(
            tmp_path / below / "masks" / f"{number}.png"
        )
    section = DataSection(name="segmentation_folder", root=str(tmp_path), image_size=6, probe_size=2)
    with pytest.raises(NeqError, match=r"data.validation=0.1 holds out a tenth of the images$"):
        load_data(section, 1)
    data = load_data(section.model_copy(update={"validation": 0.3}), 1)
    train, probe, test = indices(data)
    assert (len(train), len(probe), len(test)) == (5, 2, 3)
    assert data.notes[-1] == "data.validation: 3 of 10 training images, chosen by seed alone, are the test part"
    # Those that are tested are whole, and of the right file.
    shorter = {tuple(data.test[position][0].shape[1:]) for position in range(3)}
    assert shorter <= {(6, 9), (7, 6)}
    batches = data.test.batches(2)
    assert batches is not None
    assert sorted(position for batch in batches for position in batch) == [0, 1, 2]


def test_data_of_ones_own_is_divided_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "dividing", raising=False)
    (tmp_path / "dividing.py").write_text(
        "import torch\n"
        "from torch.utils.data import TensorDataset\n"
        "class Texts(list):\n"
        "    def collate(self, items): return torch.tensor(items)\n"
        "def texts(): return Texts([[i] * 3 for i in range(40)]), Texts()\n"
        "def images(): return TensorDataset(torch.rand(40, 3, 4, 4), torch.arange(40) % 4), []\n"
    )
    texts = load_data(DataSection(entrypoint="dividing:texts", validation=0.25, probe_size=4), 1, own_task=True)
    train, probe, test = indices(texts)
    assert (len(train), len(probe), len(test)) == (26, 4, 10)
    assert {texts.test[position][0][0] for position in range(10)} == test
    images = load_data(DataSection(entrypoint="dividing:images", validation=0.1, probe_size=4), 1)
    assert Counter(label for _, label in images.test) == {0: 1, 1: 1, 2: 1, 3: 1}
