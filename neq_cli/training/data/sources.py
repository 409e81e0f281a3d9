"""Opening the data a recipe names: its training and test part as they are, before splitting and preparing."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import DatasetFolder

from neq_cli.errors import NeqError, RecipeValueError, one_line
from neq_cli.recipe import DataSection
from neq_cli.recipe.entrypoints import accepted_arguments, load_entrypoint
from neq_cli.training.data.catalogue import CATALOGUE, HUB, classes_above, find_name, kwargs_problems
from neq_cli.training.data.digits import load_digits
from neq_cli.training.data.hidden import Hidden, NoImagesError, folder_maker
from neq_cli.training.data.hub import open_hub
from neq_cli.training.data.images import place_of
from neq_cli.training.data.items import taken_as_they_are
from neq_cli.training.data.mask_sources import (
    OR_VALIDATION,
    VOC_CLASSES,
    CocoMasks,
    MaskFiles,
    folders_of,
    open_folder,
    tested_folder,
)
from neq_cli.training.data.pixels import Range, as_tensor, read_image
from neq_cli.training.errors import of_the_disk


@dataclass(frozen=True)
class Stored:
    """A part that is in memory: images [n, channels, height, width], labels [n]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Source:
    """Both parts: ``Stored``, or datasets that yield (PIL image, array or tensor, label or mask)."""

    name: str
    train: Any
    test: Any
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()
    untested: str = ""  # the part that is not opened, as data.validation takes its place: "test/"
    as_it_is: bool = False  # what the datasets yield is not images with a label or a mask; classes may be none


def open_source(section: DataSection, *, own_task: bool = False, tested_only: bool = False) -> Source:
    """Open what ``section`` names, downloading where it may. RecipeValueError, one line, for all that can go wrong.

    ``own_task``: what is learnt is a callable's to say, and need be neither labels nor masks. Of folders one part
    stands for both under ``data.validation``, the training one, and under ``tested_only``, the test part.
    """
    for argument, problem in kwargs_problems(section):
        raise RecipeValueError(f"data.kwargs.{argument}", problem)
    if section.entrypoint is not None:
        return _from_entrypoint(section, section.entrypoint, own_task=own_task)
    name = find_name(section.name or "")
    if name == "digits":
        train, test = load_digits()
        return Source(name, Stored(*train), Stored(*test), _numbered(10))
    tested_only = tested_only and section.validation is None  # else the test part is a part of the training part
    folders: dict[str, Callable[..., Source]] = {
        "image_folder": partial(_from_folder, tested_only=tested_only),
        "segmentation_folder": partial(_from_segmentation_folder, tested_only=tested_only),
        "COCO": _from_coco,
    }
    if name in folders:
        try:
            return folders[name](section)
        except OSError as error:  # folders that may not even be looked for
            root = data_root(section)
            raise RecipeValueError("data.root", f"'{root}' cannot be read ({one_line(error)})") from error
    if name == "FakeData":
        return _fake(section)
    if name == HUB:
        found = open_hub(section, range_of(section))
        return Source(str(section.name), found.train, found.test, found.classes, found.notes, found.untested)
    return _from_torchvision(section, name)


def range_of(section: DataSection) -> Range | None:
    """Return the pixel values that become 0 and 1, None where it is those of their type."""
    return None if section.value_range is None else (section.value_range[0], section.value_range[1])


def data_root(section: DataSection) -> Path:
    """Return ``section.root`` with ~ and $VARIABLES expanded."""
    return Path(os.path.expandvars(section.root)).expanduser()


def _from_folder(section: DataSection, *, tested_only: bool) -> Source:
    root = data_root(section)
    layout = "an image folder holds train/<class>/<image> and test/<class>/<image> (or val/...)"
    if not root.is_dir():
        raise RecipeValueError("data.root", f"no folder '{root}'; {layout}")
    validation = section.validation is not None
    train, test = folders_of(root, tested_only=tested_only, validation=validation)
    for part in (train, test):
        if not part.is_dir():
            mend = "" if tested_only or tested_folder(root) else OR_VALIDATION
            raise RecipeValueError("data.root", f"'{root}' has no folder '{part.name}'; {layout}{mend}")
    hidden = Hidden(root)
    make = partial(folder_maker(ImageFolder, hidden), loader=partial(read_image, value_range=range_of(section)))
    opened = {part: _image_folder(part, make, section.kwargs) for part in (train, test)}
    train_images, test_images = opened[train], opened[test]
    differing = sorted(set(train_images.classes) ^ set(test_images.classes))
    if differing:
        raise RecipeValueError(
            "data.root",
            f"'{train}' and '{test}' differ in classes: {_some(differing)}; every class needs a folder in both",
        )
    name, classes = f"image_folder {root.name}", tuple(train_images.classes)
    return Source(name, train_images, test_images, classes, hidden.notes, _untested(section, root))


def _untested(section: DataSection, root: Path) -> str:
    test = None if section.validation is None else tested_folder(root)
    return "" if test is None else f"{test.name}/"


def _image_folder(folder: Path, make: Callable[..., ImageFolder], kwargs: Mapping[str, Any]) -> ImageFolder:
    try:
        return make(str(folder), **kwargs)
    except NoImagesError as error:
        raise RecipeValueError(
            "data.root", f"'{folder}' has no images for the classes {_some(error.classes)}"
        ) from error
    except FileNotFoundError as error:
        raise RecipeValueError(
            "data.root", f"'{folder}' has no class folders; put images in {folder.name}/<class>/"
        ) from error
    except OSError as error:
        raise RecipeValueError("data.root", f"'{folder}' cannot be read ({one_line(error)})") from error


def _from_segmentation_folder(section: DataSection, *, tested_only: bool) -> Source:
    root = data_root(section)
    train, test, notes = open_folder(
        root,
        section.kwargs,
        section.ignore_index,
        range_of(section),
        tested_only=tested_only,
        validation=section.validation is not None,
    )
    name = f"segmentation_folder {root.name}"
    return Source(name, train, test, train.classes, tuple(notes), _untested(section, root))


def _from_coco(section: DataSection) -> Source:
    root = data_root(section)
    train, test = (
        CocoMasks(root, part, only_with_objects=part == "train", value_range=range_of(section))
        for part in ("train", "val")
    )
    return Source("COCO", train, test, CocoMasks.classes)


def _fake(section: DataSection) -> Source:
    kwargs = {"size": 1000, "num_classes": 10, "random_offset": 0, **section.kwargs}
    try:
        train = datasets.FakeData(**kwargs)
        # Image i is drawn from the seed i + random_offset: the test part starts where the training part ends.
        test = datasets.FakeData(**{**kwargs, "random_offset": kwargs["random_offset"] + kwargs["size"]})
        if len(train):
            train[0]
    except Exception as error:
        raise RecipeValueError("data.kwargs", f"FakeData cannot be made ({one_line(error)})") from error
    return Source("FakeData", train, test, _numbered(kwargs["num_classes"]))


def _from_torchvision(section: DataSection, name: str) -> Source:
    entry = CATALOGUE[name]
    kind = getattr(datasets, name)
    hidden = Hidden(data_root(section))
    train, test = (
        _torchvision_part(section, kind, hidden, {**section.kwargs, **part}) for part in (entry.train, entry.test)
    )
    if entry.masks:  # Pascal VOC
        return Source(name, _voc_files(train, section), _voc_files(test, section), VOC_CLASSES)
    names = getattr(train, "classes", None)
    classes = _class_names(names) if names else _numbered(entry.classes or 0)
    return Source(name, _in_memory(train) or train, _in_memory(test) or test, classes, hidden.notes)


def _torchvision_part(section: DataSection, kind: type[Any], hidden: Hidden, arguments: dict[str, Any]) -> Any:
    """Open what is there, and only then download: some datasets fetch again whenever they may."""
    root = data_root(section)
    name = kind.__name__
    make = folder_maker(kind, hidden) if issubclass(kind, DatasetFolder) else kind
    try:
        return make(str(root), **arguments)
    except ImportError as error:
        raise RecipeValueError("data.name", f"{name} needs a package that is missing ({one_line(error)})") from error
    except (ValueError, TypeError) as error:
        key = "data.kwargs" if section.kwargs else "data.root"
        raise RecipeValueError(key, f"{name} cannot be opened ({one_line(error)})") from error
    except Exception as error:
        missing = error
    if "download" not in accepted_arguments(kind, classes_above(kind))[0]:
        mend = "torchvision cannot download it; put its files there as torchvision's documentation says"
    elif not section.download:
        mend = "set data.download=true, or data.root to where it is"
    else:
        try:
            root.mkdir(parents=True, exist_ok=True)
            return make(str(root), download=True, **arguments)
        except Exception as error:
            mend = "or check the network"
            if of_the_disk(error):
                mend = "or to a folder that can be written to and has room"
            raise RecipeValueError(
                "data.root",
                f"{name} is not in '{root}', or not whole, and could not be downloaded ({one_line(error)}); "
                f"set data.root to where it is, {mend}",
            ) from error
    raise RecipeValueError("data.root", f"{name} is not in '{root}' ({one_line(missing)}); {mend}") from missing


def _voc_files(part: Any, section: DataSection) -> MaskFiles:
    pairs = [(Path(image), Path(mask)) for image, mask in zip(part.images, part.masks, strict=True)]
    return MaskFiles(pairs, range_of(section))


def _in_memory(dataset: Any) -> Stored | None:
    """Return the images that datasets such as CIFAR10 and MNIST hold as one array, or None where this one does not.

    Their layouts differ, so what is found is compared with what the dataset itself returns.
    """
    data, labels = getattr(dataset, "data", None), getattr(dataset, "targets", getattr(dataset, "labels", None))
    if not isinstance(data, np.ndarray | Tensor) or labels is None or data.ndim not in (3, 4):
        return None
    images, targets = torch.as_tensor(data), torch.as_tensor(labels)
    images = images.unsqueeze(1) if images.ndim == 3 else images
    if images.shape[1] not in (1, 3):
        images = images.permute(0, 3, 1, 2).contiguous()
    if images.dtype != torch.uint8 or targets.shape != images.shape[:1]:
        return None
    for index in (0, len(images) - 1):
        image, label = dataset[index]
        if not torch.equal(as_tensor(image), images[index]) or int(label) != int(targets[index]):
            return None
    return Stored(images, targets.long())


def _from_entrypoint(section: DataSection, entrypoint: str, *, own_task: bool) -> Source:
    make = load_entrypoint(entrypoint, "data.entrypoint")
    kwargs = dict(section.kwargs)
    if "root" in accepted_arguments(make)[0]:
        kwargs.setdefault("root", str(data_root(section)))
    try:
        made = make(**kwargs)
    except NeqError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise RecipeValueError(
            "data.entrypoint", f"'{entrypoint}' raised {one_line(error)} ({frame.filename}:{frame.lineno})"
        ) from error
    if not (isinstance(made, Sequence) and len(made) == 2 and all(map(_is_dataset, made))):
        raise RecipeValueError(
            "data.entrypoint", f"'{entrypoint}' must return (train, test), two datasets with a length and an index"
        )
    train, test = made
    if len(train) and _are_items(train, entrypoint, own_task=own_task):
        return Source(entrypoint, train, test, _told_classes(train), as_it_is=True)
    return Source(entrypoint, train, test, _classes_of(train, entrypoint, section.ignore_index))


def _are_items(dataset: Any, entrypoint: str, *, own_task: bool) -> bool:
    try:
        return taken_as_they_are(dataset, own_task=own_task)
    except NeqError as error:
        raise RecipeValueError("data", str(error)) from error
    except Exception as error:
        place = place_of(dataset, 0, entrypoint)
        what = f"the first item of {entrypoint}" if place.startswith("image 0 of ") else place
        raise RecipeValueError("data", f"{what} cannot be used ({one_line(error)})") from error


def _is_dataset(candidate: Any) -> bool:
    return hasattr(candidate, "__getitem__") and hasattr(candidate, "__len__")


def _told_classes(dataset: Any) -> tuple[str, ...]:
    """Return the class names that a dataset of the user's own tells, numbers for ``num_classes``, or none."""
    while hasattr(dataset, "dataset") and not hasattr(dataset, "classes"):  # torch.utils.data.Subset
        dataset = dataset.dataset
    if getattr(dataset, "classes", None):
        return _class_names(dataset.classes)
    return _numbered(dataset.num_classes) if isinstance(getattr(dataset, "num_classes", None), int) else ()


def _classes_of(dataset: Any, entrypoint: str, ignore_index: int) -> tuple[str, ...]:
    """Return the class names that a dataset of the user's own tells, or numbers for them."""
    if told := _told_classes(dataset):
        return told
    while hasattr(dataset, "dataset") and not hasattr(dataset, "classes"):
        dataset = dataset.dataset
    labels = getattr(dataset, "targets", getattr(dataset, "labels", None))
    if labels is None and hasattr(dataset, "tensors"):  # torch.utils.data.TensorDataset
        labels = dataset.tensors[-1]
    if labels is None or len(labels) == 0:
        raise RecipeValueError(
            "data.entrypoint",
            f"the training dataset of '{entrypoint}' does not tell its classes; give it classes or targets",
        )
    numbers = torch.as_tensor(labels)
    if numbers.ndim > 1:  # masks
        numbers = numbers[numbers != ignore_index]
    return _numbered(int(numbers.max()) + 1)


def _class_names(classes: Sequence[Any]) -> tuple[str, ...]:
    """Return one name per class; ImageNet gives several for each."""
    return tuple(str(name[0]) if isinstance(name, tuple | list) else str(name) for name in classes)


def _numbered(classes: int) -> tuple[str, ...]:
    return tuple(map(str, range(classes)))


def _some(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(f"'{name}'" for name in names[:limit]) + more
