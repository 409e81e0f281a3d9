"""Which items are images, and what becomes of those that are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset

from neq_cli.errors import NeqError
from neq_cli.recipe import DataSection
from neq_cli.training.batches.loaders import make_loaders
from neq_cli.training.data.items import taken_as_they_are
from neq_cli.training.data.parts import load_data

CPU = torch.device("cpu")
PICTURE = Image.new("L", (4, 4))
PIXELS = torch.zeros(3, 4, 4)


@pytest.mark.parametrize(
    ("item", "own", "neqs"),
    [
        ((PIXELS, 1), False, False),
        ((PICTURE, 1), False, False),
        ((PICTURE, np.int64(1)), False, False),
        ((PIXELS, torch.tensor(1)), False, False),
        ((PIXELS, torch.zeros(4, 4, dtype=torch.uint8)), False, False),
        ((PIXELS, PICTURE), False, False),
        ((PIXELS, 0.5), True, False),  # neq's own tasks have labels only: it is told so
        ((PICTURE, torch.tensor(0.5)), True, False),
        ((PIXELS, PIXELS), True, False),
        ((PIXELS, torch.tensor([1, 2])), True, False),
        ((torch.zeros(10), 1), True, True),
        ((np.zeros(10), 0.5), True, True),
        (torch.zeros(10), True, True),
        ({"tokens": torch.zeros(10), "labels": 1}, True, True),
        (({"tokens": torch.zeros(10)}, 1), True, True),
        ((PIXELS, 1, 2), True, False),
        (("a text", 1), True, False),
    ],
)
def test_the_first_item_tells(item: Any, own: bool, neqs: bool) -> None:
    assert taken_as_they_are([item], own_task=True) is own
    assert taken_as_they_are([item], own_task=False) is neqs


def test_a_dataset_with_a_collate_says_so_itself() -> None:
    class Own(list[Any]):
        def collate(self, items: list[Any]) -> Any:
            return items

    assert taken_as_they_are(Own([(PIXELS, 1)]), own_task=False)
    assert taken_as_they_are(Subset(Own([(PIXELS, 1)]), [0]), own_task=False)


CODE = """
import torch

class Noisy:
    num_classes = 3

    def __len__(self):
        return 20

    def __getitem__(self, index):
        if index == self.broken:
            raise KeyError('gone')
        return torch.tensor([float(index), torch.rand(()).item()]), index % 3

    broken = None

class Ragged(Noisy):
    def __getitem__(self, index):
        return torch.zeros(index + 1), 0.5

class Padded(Ragged):
    @staticmethod
    def collate(items):
        longest = max(len(values) for values, _ in items)
        return torch.stack([torch.cat([v, torch.rand(longest - len(v))]) for v, _ in items]), None

class Broken(Noisy):
    broken = 7

def noisy(): return Noisy(), Noisy()
def ragged(): return Ragged(), Ragged()
def padded(): return Padded(), Padded()
def broken(): return Broken(), Broken()
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "itemsmodule.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    return "itemsmodule"


def section(module: str, name: str, **changes: Any) -> DataSection:
    return DataSection(entrypoint=f"{module}:{name}", probe_size=4, workers=0, **changes)


def passes(module: str, name: str, workers: int, epochs: tuple[int, ...] = (1, 2)) -> list[list[Any]]:
    loaders = make_loaders(load_data(section(module, name), 1, own_task=True), 4, workers, 1, CPU)
    found = []
    for epoch in epochs:
        loaders.start_epoch(epoch)
        found.append(
            [[part.clone() if isinstance(part, Tensor) else part for part in batch] for batch in loaders.train]
        )
    return found


@pytest.mark.parametrize("name", ["noisy", "padded"])
def test_chance_follows_from_seed_epoch_and_place(module: str, name: str) -> None:
    state = torch.get_rng_state()
    first, second = passes(module, name, 0)
    assert torch.equal(torch.get_rng_state(), state)
    again = passes(module, name, 2, (2,))[0]
    assert [len(batches) for batches in (first, second, again)] == [4, 4, 4]
    assert all(torch.equal(one[0], other[0]) for one, other in zip(second, again, strict=True))
    if name == "noisy":
        drawn = [{float(row[0]): float(row[1]) for batch in batches for row in batch[0]} for batches in (first, second)]
        both = drawn[0].keys() & drawn[1].keys()
        assert both
        assert all(drawn[0][item] != drawn[1][item] for item in both), "drawn anew in every epoch"


def test_what_is_probed_and_tested_is_the_same_every_time(module: str) -> None:
    loaders = make_loaders(load_data(section(module, "noisy"), 1), 4, 0, 1, CPU)
    for part in (loaders.probe, loaders.test):
        one, other = ([batch[0] for batch in part] for _ in range(2))
        assert torch.equal(torch.cat(one), torch.cat(other))


def test_what_is_known_of_them(module: str) -> None:
    data = load_data(section(module, "noisy"), 1)
    assert (data.num_classes, data.image_shape, data.as_it_is, data.own) == (3, None, True, True)
    assert data.image_bytes == 2 * 4 + 8
    assert data.description == f"{module}:noisy: 16 training, 4 probe, 20 test items, 3 classes"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("noisy", {"augment": "crop"}, "data.augment: is for images with a label or a mask, and the items of"),
        ("noisy", {"image_size": 8}, "data.image_size: is for images with a label or a mask, and the items of"),
        ("noisy", {"mean": [0.5]}, "data.mean: is for images with a label or a mask, and the items of"),
        ("noisy", {"cache": "memory"}, "data.cache: memory is for images with a label or a mask, and the items of"),
    ],
)
def test_what_is_for_images_is_refused(module: str, name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(NeqError) as raised:
        load_data(section(module, name, **changes), 1)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ragged", r"{m}:ragged: 4 items do not make a batch \(RuntimeError: .*\); give it a method collate\(items\)$"),
        ("broken", r"item 7 of {m}:broken: cannot be used \(KeyError: 'gone'\); mend or remove it$"),
    ],
)
def test_what_fails_is_one_line(module: str, name: str, message: str) -> None:
    with pytest.raises(NeqError, match=message.format(m=module)):
        passes(module, name, 0, (1,))


def test_a_label_that_is_no_whole_number_is_not_cut_off() -> None:
    from neq_cli.training.data.images import as_label

    assert [as_label(label) for label in (3, np.int64(3), 3.0, torch.tensor(3.0), torch.tensor([3]))] == [3] * 5
    with pytest.raises(ValueError, match=r"label 0\.5 is no whole number; numbers are learnt by a task of your own"):
        as_label(0.5)
