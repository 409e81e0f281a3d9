"""What is known of data by name, against torchvision's own signatures."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from torchvision import datasets

from neq_cli.errors import NeqError
from neq_cli.recipe import DataSection
from neq_cli.training.data.catalogue import CATALOGUE, class_count, find_name, kwargs_problems, sample_shape, statistics

OWN = ("digits", "image_folder", "segmentation_folder", "COCO", "FakeData", "hf/NAME")


def section(name: str, **values: Any) -> DataSection:
    return DataSection(name=name, **values)


@pytest.mark.parametrize("name", [name for name in CATALOGUE if name not in OWN])
def test_torchvision_has_every_entry_with_the_arguments_of_its_parts(name: str) -> None:
    kind = getattr(datasets, name)
    taken = {p for base in kind.__mro__ if "__init__" in vars(base) for p in inspect.signature(base).parameters}
    entry = CATALOGUE[name]
    assert entry.train != entry.test
    for part in (entry.train, entry.test):
        assert set(part) <= taken
        for value in part.values():
            if isinstance(value, str):  # the splits it takes stand in its source
                assert f'"{value}"' in inspect.getsource(inspect.getmodule(kind))  # type: ignore[arg-type]


def test_statistics_have_a_value_per_channel() -> None:
    for name, entry in CATALOGUE.items():
        if entry.statistics and entry.shape:
            assert [len(values) for values in entry.statistics] == [entry.shape[0]] * 2, name


def test_names_in_any_case() -> None:
    assert find_name("cifar10") == "CIFAR10"
    assert find_name("ImageNet") == "ImageNet"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cifar-10", "no data set 'cifar-10'; did you mean 'cifar10'?"),
        ("zzz", "no data set 'zzz'; known are digits, image_folder, FakeData, CIFAR10"),
        ("VOCDetection", "'VOCDetection' has no training and test part of labelled images"),
    ],
)
def test_unknown_names(name: str, says: str) -> None:
    with pytest.raises(NeqError) as raised:
        find_name(name)
    assert str(raised.value).startswith(f"data.name: {says}")


@pytest.mark.parametrize(
    ("name", "kwargs", "problems"),
    [
        ("EMNIST", {"split": "letters"}, []),
        ("EMNIST", {}, [("split", "EMNIST needs the argument 'split'")]),
        ("CIFAR10", {"train": True}, [("train", "'train' of CIFAR10 is set by neq; remove it")]),
        ("SVHN", {"spilt": 1}, [("spilt", "unknown argument 'spilt' of SVHN")]),
        ("FakeData", {"sise": 1}, [("sise", "unknown argument 'sise' of FakeData; did you mean 'size'?")]),
        ("digits", {"size": 1}, [("size", "digits takes no arguments; remove it")]),
        ("image_folder", {"allow_empty": True}, []),
        ("segmentation_folder", {"num_classes": 3}, []),
        ("COCO", {"year": 1}, [("year", "COCO takes no arguments; remove it")]),
        ("VOCSegmentation", {"year": "2007"}, []),
    ],
)
def test_arguments(name: str, kwargs: dict[str, Any], problems: list[tuple[str, str]]) -> None:
    assert kwargs_problems(section(name, kwargs=kwargs)) == problems


@pytest.mark.parametrize(
    ("data", "shape", "classes"),
    [
        (section("digits"), (1, 8, 8), 10),
        (section("cifar100", augment="cifar"), (3, 32, 32), 100),
        (section("mnist", image_size=32), (1, 32, 32), 10),
        (section("ImageNet", augment="imagenet"), (3, 224, 224), 1000),
        (section("ImageNet"), None, 1000),
        (section("image_folder"), None, None),
        (section("image_folder", image_size=64), (3, 64, 64), None),
        (section("FakeData"), (3, 224, 224), 10),
        (section("FakeData", kwargs={"image_size": [1, 4, 5], "num_classes": 3}), (1, 4, 5), 3),
        (section("coco", image_size=480), (3, 480, 480), 21),
        (section("segmentation_folder", kwargs={"num_classes": 11}), None, 11),
        (DataSection(entrypoint="a:b"), None, None),
    ],
)
def test_what_is_known_beforehand(data: DataSection, shape: Any, classes: int | None) -> None:
    assert sample_shape(data) == shape
    assert class_count(data) == classes


def test_statistics_are_the_recipes_else_the_datas_else_imagenets() -> None:
    assert statistics(section("mnist"), 1) == ((0.1307,), (0.3081,))
    assert statistics(section("image_folder"), 3) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert statistics(section("usps"), 1) == ((0.5,), (0.5,))
    assert statistics(section("mnist", mean=[0.25]), 1) == ((0.25,), (0.3081,))
    with pytest.raises(NeqError, match=r"^data.std: 2 given, and images have 3 channel\(s\)"):
        statistics(section("CIFAR10", std=[0.1, 0.1]), 3)
