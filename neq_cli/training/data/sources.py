"""Opening the data a recipe names: its training and test part as they are, before splitting and preparing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import DatasetFolder

from neq_cli.errors import RecipeValueError, one_line
from neq_cli.recipe import DataSection
from neq_cli.recipe.entrypoints import accepted_arguments
from neq_cli.text import some_of
from neq_cli.training.data.catalogue import CATALOGUE, HUB, classes_above, find_name, kwargs_problems
from neq_cli.training.data.digits import load_digits
from neq_cli.training.data.hidden import Hidden, NoImagesError, folder_maker
from neq_cli.training.data.hub import open_hub
from neq_cli.training.data.mask_sources import (
    OR_VALIDATION,
    VOC_CLASSES,
    CocoMasks,
    MaskFiles,
    folders_of,
    open_folder,
    tested_folder,
)
from neq_cli.training.data.opened import Source, Stored, class_names, numbered
from neq_cli.training.data.own_datasets import open_entrypoint
from neq_cli.training.data.pixels import as_tensor, read_image
from neq_cli.training.errors import of_the_disk

MAY_FETCH = "set data.download=true, or data.root to where it is"
"""What mends the lack of data that could be downloaded, and may not be."""


def open_source(section: DataSection, *, own_task: bool = False, tested_only: bool = False) -> Source:
    """Open what ``section`` names, downloading where it may. RecipeValueError, one line, for all that can go wrong.

    ``own_task``: what is learnt is a callable's to say, and need be neither labels nor masks. Of folders one part
    stands for both under ``data.validation``, the training one, and under ``tested_only``, the test part.
    """
    for argument, problem in kwargs_problems(section):
        raise RecipeValueError(f"data.kwargs.{argument}", problem)
    if section.entrypoint is not None:
        return open_entrypoint(section, section.entrypoint, own_task=own_task)
    name = find_name(section.name or "")
    if name == "digits":
        train, test = load_digits()
        return Source(name, Stored(*train), Stored(*test), numbered(10))
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
            root = section.folder
            raise RecipeValueError("data.root", f"'{root}' cannot be read ({one_line(error)})") from error
    if name == "FakeData":
        return _fake(section)
    if name == HUB:
        return open_hub(section)
    return _from_torchvision(section, name)


def _from_folder(section: DataSection, *, tested_only: bool) -> Source:
    root = section.folder
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
    make = partial(folder_maker(ImageFolder, hidden), loader=partial(read_image, value_range=section.pixel_range))
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
    root = section.folder
    train, test, notes = open_folder(
        root,
        section.kwargs,
        section.ignore_index,
        section.pixel_range,
        tested_only=tested_only,
        validation=section.validation is not None,
    )
    name = f"segmentation_folder {root.name}"
    return Source(name, train, test, train.classes, tuple(notes), _untested(section, root))


def _from_coco(section: DataSection) -> Source:
    root = section.folder
    train, test = (
        CocoMasks(root, part, only_with_objects=part == "train", value_range=section.pixel_range)
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
    return Source("FakeData", train, test, numbered(kwargs["num_classes"]))


def _from_torchvision(section: DataSection, name: str) -> Source:
    entry = CATALOGUE[name]
    kind = getattr(datasets, name)
    hidden = Hidden(section.folder)
    train, test = (
        _torchvision_part(section, kind, hidden, {**section.kwargs, **part}) for part in (entry.train, entry.test)
    )
    if entry.masks:  # Pascal VOC
        return Source(name, _voc_files(train, section), _voc_files(test, section), VOC_CLASSES)
    names = getattr(train, "classes", None)
    classes = class_names(names) if names else numbered(entry.classes or 0)
    return Source(name, _in_memory(train) or train, _in_memory(test) or test, classes, hidden.notes)


def _torchvision_part(section: DataSection, kind: type[Any], hidden: Hidden, arguments: dict[str, Any]) -> Any:
    """Open what is there, and only then download: some datasets fetch again whenever they may."""
    root = section.folder
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
        mend = MAY_FETCH
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
    return MaskFiles(pairs, section.pixel_range)


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


def _some(names: Sequence[str]) -> str:
    return some_of(f"'{name}'" for name in names)
