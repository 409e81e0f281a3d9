"""Data that recipes name: how it is split and what it looks like; nothing is opened or downloaded here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torchvision import datasets

from neq_cli.errors import RecipeValueError, did_you_mean
from neq_cli.recipe import DataSection
from neq_cli.recipe.entrypoints import check_kwargs, load_entrypoint
from neq_cli.training.data.transforms import Preparation

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std per channel, of pixels in [0, 1]
Shape = tuple[int, int, int]  # channels, height, width

IMAGENET_STATISTICS: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GREY_STATISTICS: Statistics = ((0.5,), (0.5,))
_MNIST_STATISTICS: Statistics = ((0.1307,), (0.3081,))
HUB = "hf/NAME"
"""How the catalogue calls all data sets that Hugging Face's library reads."""
STREAM_ARGUMENTS = ("shuffle_buffer", "train_length", "test_length")
"""What is for hf/NAME with ``streaming`` alone: rows that are shuffled together, and how many the splits have."""
_OWN_ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "digits": (),
    "COCO": (),
    "segmentation_folder": ("num_classes",),
    HUB: ("config", "revision", "train_split", "test_split", "num_classes", "streaming", *STREAM_ARGUMENTS),
}
_TRANSFORMS = ("transform", "target_transform", "transforms", "loader", "is_valid_file")


@dataclass(frozen=True)
class Entry:
    """What is known of a data set before it is opened; ``statistics`` are those of its training part."""

    train: Mapping[str, Any]  # the arguments that select the training part
    test: Mapping[str, Any]
    classes: int | None = None  # None: the data tells
    shape: Shape | None = None  # None: images differ
    statistics: Statistics | None = None
    masks: bool | None = False  # whether images come with a mask each, not with a label; None: the data tells


def _flag(classes: int | None, shape: Shape | None, statistics: Statistics | None = None) -> Entry:
    return Entry({"train": True}, {"train": False}, classes, shape, statistics)


def _split(
    train: str, test: str, classes: int, shape: Shape | None = None, statistics: Statistics | None = None
) -> Entry:
    return Entry({"split": train}, {"split": test}, classes, shape, statistics)


_SMALL = (3, 32, 32)
_GREY = (1, 28, 28)
CATALOGUE: Mapping[str, Entry] = {
    "digits": Entry({}, {}, 10, (1, 8, 8), ((0.3058,), (0.3764,))),
    "image_folder": Entry({}, {}),
    "FakeData": Entry({}, {}),
    "CIFAR10": _flag(10, _SMALL, ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))),
    "CIFAR100": _flag(100, _SMALL, ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))),
    "MNIST": _flag(10, _GREY, _MNIST_STATISTICS),
    "QMNIST": _flag(10, _GREY, _MNIST_STATISTICS),
    "FashionMNIST": _flag(10, _GREY, ((0.2860,), (0.3530,))),
    "KMNIST": _flag(10, _GREY, ((0.1918,), (0.3483,))),
    "EMNIST": _flag(None, _GREY),
    "USPS": _flag(10, (1, 16, 16)),
    "SVHN": _split("train", "test", 10, _SMALL, ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970))),
    "STL10": _split("train", "test", 10, (3, 96, 96), ((0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713))),
    "ImageNet": _split("train", "val", 1000, None, IMAGENET_STATISTICS),
    "Imagenette": _split("train", "val", 10),
    "Places365": _split("train-standard", "val", 365),
    "CLEVRClassification": _split("train", "val", 11),
    "Country211": _split("train", "test", 211),
    "DTD": _split("train", "test", 47),
    "FER2013": _split("train", "test", 7, (1, 48, 48)),
    "FGVCAircraft": _split("trainval", "test", 100),
    "Flowers102": _split("train", "test", 102),
    "Food101": _split("train", "test", 101),
    "GTSRB": _split("train", "test", 43),
    "OxfordIIITPet": _split("trainval", "test", 37),
    "PCAM": _split("train", "test", 2, (3, 96, 96)),
    "RenderedSST2": _split("train", "test", 2, (3, 448, 448)),
    "StanfordCars": _split("train", "test", 196),
    "segmentation_folder": Entry({}, {}, masks=True),
    HUB: Entry({}, {}, masks=None),
    "COCO": Entry({}, {}, 21, statistics=IMAGENET_STATISTICS, masks=True),
    "VOCSegmentation": Entry(
        {"image_set": "train"}, {"image_set": "val"}, 21, statistics=IMAGENET_STATISTICS, masks=True
    ),
}
_CANONICAL = {name.lower(): name for name in CATALOGUE}


def find_name(name: str) -> str:
    """Return the catalogue's spelling of ``name``, whatever its case; RecipeValueError where it is not there."""
    if name.startswith("hf/") and name != "hf/":
        return HUB
    found = _CANONICAL.get(name.lower())
    if found is not None:
        return found
    if name.lower() in {known.lower() for known in datasets.__all__}:
        raise RecipeValueError(
            "data.name", f"'{name}' has no training and test part of labelled images; wrap it in a data.entrypoint"
        )
    hint = did_you_mean(name, [*CATALOGUE, *_CANONICAL]) or f"; known are {', '.join(CATALOGUE)}"
    raise RecipeValueError("data.name", f"no data set '{name}'{hint}")


def called(name: str) -> str:
    """Return what data of this ``name`` is called where it is told: the catalogue's spelling, a hub's as it is."""
    found = find_name(name)
    return name if found == HUB else found


def kwargs_problems(section: DataSection) -> list[tuple[str, str]]:
    """Return (argument, problem) pairs of ``section.kwargs``; RecipeValueError where the data itself is not known."""
    if section.entrypoint is not None:
        make = load_entrypoint(section.entrypoint, "data.entrypoint")
        problems = check_kwargs(make, section.kwargs, name=section.entrypoint)
        return [(argument, problem) for argument, problem in problems if argument != "root"]  # passed where taken
    name = find_name(section.name or "")
    if name in _OWN_ARGUMENTS:
        taken = _OWN_ARGUMENTS[name]
        what = f"{name} takes {', '.join(taken) or 'no arguments'}; remove it"
        unknown = [(argument, what) for argument in section.kwargs if argument not in taken]
        return unknown + (_stream_problems(section.kwargs) if name == HUB else [])
    kind = getattr(datasets, "ImageFolder" if name == "image_folder" else name)
    supplied = {"root", "download", *_TRANSFORMS, *CATALOGUE[name].train}
    return check_kwargs(kind, section.kwargs, supplied=supplied, forwards_to=classes_above(kind), name=name)


def _stream_problems(kwargs: Mapping[str, Any]) -> list[tuple[str, str]]:
    streaming = kwargs.get("streaming", False)
    if not isinstance(streaming, bool):
        return [("streaming", f"{streaming!r} is neither true nor false")]
    given = [argument for argument in STREAM_ARGUMENTS if argument in kwargs]
    if not streaming:
        return [(argument, "is for streams; remove it, or set data.kwargs.streaming=true") for argument in given]
    return [
        (argument, f"{kwargs[argument]!r} is not a number of rows above 0")
        for argument in given
        if not _counts([kwargs[argument]]) or isinstance(kwargs[argument], bool)
    ]


def classes_above(kind: type) -> list[type]:
    """Return the base classes with a constructor: those such as EMNIST pass what they do not know on to them."""
    return [base for base in kind.__mro__[1:] if "__init__" in vars(base)]


def has_masks(section: DataSection) -> bool | None:
    """Return whether images come with masks; None where only the data tells."""
    return CATALOGUE[find_name(section.name)].masks if section.name is not None else None


def masks_problems(section: DataSection, *, masks: bool) -> list[tuple[str, str]]:
    """Return (key, problem) pairs of what a recipe asks of images that come with masks, or without."""
    if not masks:
        problems = [(key, "is for data with masks; remove it") for key in ("base_size",) if getattr(section, key)]
        if section.augment == "segmentation":
            problems.append(("augment", "segmentation is for data with masks; use imagenet or cifar"))
        return problems
    problems = [
        (key, "changes images without their masks; remove it")
        for key in ("erasing", "mixup", "cutmix")
        if getattr(section, key)
    ]
    if section.augment not in ("none", "segmentation"):
        problems.append(("augment", f"{section.augment} would move images without their masks; use segmentation"))
    return problems


def hub_problems(section: DataSection) -> list[tuple[str, str]]:
    """Return (key, problem) pairs of columns that are named of data that has none."""
    if section.name is not None and find_name(section.name) == HUB:
        return []
    what = section.entrypoint or section.name
    keys = [key for key in ("image_key", "label_key") if getattr(section, key) is not None]
    return [(key, f"is for data.name=hf/NAME, and {what} has no columns; remove it") for key in keys]


def range_problems(section: DataSection) -> list[tuple[str, str]]:
    """Return (key, problem) pairs of a ``value_range`` for data whose pixels are known to have 8 bits."""
    if section.value_range is None or section.name is None:
        return []
    name = find_name(section.name)
    if name in ("image_folder", "segmentation_folder", "COCO", HUB) or CATALOGUE[name].masks:
        return []
    return [("value_range", f"is for images in files, or data of your own; {name} has 8 bits, remove it")]


def class_count(section: DataSection) -> int | None:
    """Return the number of classes where it is known without opening the data."""
    if section.name is None:
        return None
    name = find_name(section.name)
    if name == "segmentation_folder":
        given = section.kwargs.get("num_classes")
        return given if isinstance(given, int) else None  # what is no number is refused when the data is opened
    if name == "FakeData":
        count = section.kwargs.get("num_classes", 10)
        if not _counts([count]):
            raise RecipeValueError("data.kwargs.num_classes", f"{count!r} is not a number of classes")
        return int(count)
    return CATALOGUE[name].classes


def sample_shape(section: DataSection) -> Shape | None:
    """Return [channels, height, width] of what the model sees, where that is known without opening the data."""
    if section.name is None:
        return None
    name = find_name(section.name)
    own = CATALOGUE[name].shape
    if name == "FakeData":
        given = section.kwargs.get("image_size", (3, 224, 224))
        if not isinstance(given, list | tuple) or len(given) != 3 or not _counts(given):
            raise RecipeValueError("data.kwargs.image_size", f"{given!r} is not [channels, height, width]")
        own = (given[0], given[1], given[2])
    size = Preparation(section.image_size, section.augment).size
    if size is not None:
        own = (3 if own is None else own[0], size, size)  # data of differing sizes is in colour
    return own if own is None or section.asked_channels is None else (section.asked_channels, *own[1:])


def _counts(values: Iterable[Any]) -> bool:
    return all(isinstance(value, int) and value > 0 for value in values)


def statistics(section: DataSection, channels: int) -> Statistics:
    """Return the mean and std to normalise by: the recipe's, else the data's own, else ImageNet's or halves."""
    entry = CATALOGUE[find_name(section.name)] if section.name is not None else None
    mean, std = _known(entry, channels)
    mean = tuple(section.mean) if section.mean is not None else mean
    std = tuple(section.std) if section.std is not None else std
    for key, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise RecipeValueError(
                f"data.{key}",
                f"{len(values)} given, and images have {channels} channel(s); give one per channel",
                (f"data.{key}", "data.channels"),
            )
    return mean, std


def _known(entry: Entry | None, channels: int) -> Statistics:
    known = entry.statistics if entry is not None else None
    if known is not None and len(known[0]) in (1, channels):  # one is of grey, which may be repeated
        mean, std = known
        return (mean, std) if len(mean) == channels else (mean * channels, std * channels)
    return IMAGENET_STATISTICS if channels == 3 else GREY_STATISTICS
