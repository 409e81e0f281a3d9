"""Data as a run uses it: training, probe and test images, the probe set split off the training data by seed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from neq_cli.errors import RecipeValueError, one_line
from neq_cli.freezing.model.observing import first_input, tensors_in
from neq_cli.recipe import DataSection
from neq_cli.training.data.catalogue import Shape, hub_problems, masks_problems, range_problems, statistics
from neq_cli.training.data.channels import brought_to_channels, in_channels
from neq_cli.training.data.images import Images, ImagesInMemory, ReadImages, as_label
from neq_cli.training.data.items import Items, image_keys_problems
from neq_cli.training.data.looked_at import check_sizes
from neq_cli.training.data.masks import MaskedImages, MaskPreparation, is_mask
from neq_cli.training.data.opened import Source, Stored, place_of
from neq_cli.training.data.pixels import Range, comes_as_floats
from neq_cli.training.data.sources import open_source
from neq_cli.training.data.splits import hold_out, known_labels, split
from neq_cli.training.data.streamed_images import StreamedImages
from neq_cli.training.data.streamed_parts import StreamPart, divided
from neq_cli.training.data.streams import RowStream
from neq_cli.training.data.transforms import Mixing, Preparation
from neq_cli.training.errors import DataError

MOST_NAMES = 10_000
"""Classes whose names a run directory keeps."""
_LONGEST_NAMES = 2**18  # characters; readers refuse an environment.json of more than 2**20 bytes


@dataclass(frozen=True)
class Data:
    """Three parts that share no image; each yields (float image [channels, height, width], label).

    ``train`` is augmented as the recipe says, ``probe`` and ``test`` never are. Items that are ``as_it_is`` may be
    anything, in batches that the parts' ``collate`` makes.
    """

    name: str  # "CIFAR10"
    train: Images
    probe: Images
    test: Images
    num_classes: int | None  # None where there are none, or the data does not tell
    classes: tuple[str, ...]
    image_shape: Shape | None  # channels, height, width of what the model sees; None where it sees no such thing
    image_bytes: int  # of such an image before normalisation, or of all tensors of an item
    own: bool  # a dataset of the user's own, which may hold chance or change
    masked: bool = False  # a mask [height, width] in place of every label
    as_it_is: bool = False
    validation: bool = False  # whether the test part is a share of the data's training part
    notes: tuple[str, ...] = ()  # what a user should know of how the data was understood

    @property
    def description(self) -> str:
        """The data in one line: "CIFAR10: 49950 training, 50 probe, 10000 test images of 3x32x32, 10 classes"."""
        what = "items" if self.as_it_is else "images"
        shape = "" if self.image_shape is None else f" of {'x'.join(map(str, self.image_shape))}"
        classes = "" if self.num_classes is None else f", {self.num_classes} classes"
        return (
            f"{self.name}: {len(self.train)} training, {len(self.probe)} probe, {len(self.test)} test {what}"
            f"{shape}{classes}"
        )

    def content(self) -> dict[str, Any]:
        """Return what the data holds, wherever it lies, in plain values: what a run directory says of it.

        ``mean`` and ``std`` are those that images were normalised by, None where they were not. ``validation`` stands
        there where the test part is a share of the training part: how many. Names of classes are left out where there
        are too many to be kept in a small file.
        """
        preparation = self.test.preparation
        content = {
            "name": self.name,
            "train": len(self.train) + len(self.probe),
            "test": len(self.test),
            "classes": self.num_classes,
            "image_shape": None if self.image_shape is None else list(self.image_shape),
            "mean": None if preparation.mean is None else list(preparation.mean),
            "std": None if preparation.std is None else list(preparation.std),
        }
        if self.validation:
            content["validation"] = len(self.test)
        if 0 < len(self.classes) <= MOST_NAMES and len(json.dumps(self.classes)) <= _LONGEST_NAMES:
            content["class_names"] = list(self.classes)
        return content

    def used(self, section: DataSection) -> DataSection:
        """Return the section with what was found for what it leaves open: how images are scaled and normalised.

        Their size stays open where they keep their own. A run that is trained by it is the same.
        """
        if self.as_it_is or self.image_shape is None:
            return section
        preparation = self.train.preparation
        found: dict[str, Any] = {"image_size": preparation.size} if preparation.cuts_from_larger else {}
        if preparation.mean is not None and preparation.std is not None:
            found |= {"mean": list(preparation.mean), "std": list(preparation.std)}
        if self.image_shape[0] in (1, 3):
            found["channels"] = self.image_shape[0]
        return section.model_copy(update=found)

    def sample(self) -> Any:
        """Return a batch of one item of the probe. RecipeValueError where it does not make one."""
        try:
            return (self.probe.collate or default_collate)([self.probe[0]])
        except DataError as error:
            raise RecipeValueError("data", str(error)) from error


def load_data(section: DataSection, seed: int, *, own_task: bool = False, tested_only: bool = False) -> Data:
    """Open what ``section`` names and split ``probe_size`` images, chosen by ``seed`` alone, off the training part.

    Where the recipe gives ``validation``, that share of the training part is the test part; the probe is of the rest.

    Raises RecipeValueError, one line, where the data is missing, empty, inconsistent or smaller than the probe set.
    A dataset of the user's own may yield PIL images, uint8 or float tensors or arrays; it should leave augmentation to
    ``augment``, so that the probe set is seen without. Whatever else it yields is taken as it is; under an ``own_task``
    so are images with anything but a label or a mask beside them.

    ``tested_only``: the test part is all that is wanted. Of folders no other is opened, unless it is a share of the
    training part; the others then share images, and nothing may be trained.
    """
    for key, problem in hub_problems(section):
        raise RecipeValueError(f"data.{key}", problem)
    source = open_source(section, own_task=own_task, tested_only=tested_only)
    for part, dataset in (("training", source.train), ("test", source.test)):
        if len(dataset) == 0 and (part == "training" or section.validation is None):
            raise RecipeValueError("data", f"{source.name} has no {part} images")
    kept: Any  # numbers of images: tensors, or ranges of a stream's, which may have more than memory does
    tested: Any
    if isinstance(source.train, RowStream):
        source, train_part, test_part = divided(section, source, seed, tested_only=tested_only)
        kept, tested, probed = train_part.numbers, test_part.numbers, torch.arange(len(source.train))
    else:
        source, kept, tested = _held_out(section, source, seed)
        probed = kept
        if not tested_only:
            kept, probed = (kept[chosen] for chosen in split(len(kept), section.probe_size, seed))
        train_part, test_part = source.train, source.test
    if source.as_it_is:
        return _as_it_is(section, source, kept, probed, tested)
    own = section.entrypoint is not None
    value_range = section.pixel_range if own else None  # all others scale images as they read them
    image, target = _first(source)
    masked = is_mask(target)
    with _named(source):
        source, brought = brought_to_channels(section, source)
    for key, problem in (*masks_problems(section, masks=masked), *range_problems(section)):
        raise RecipeValueError(f"data.{key}", problem)
    first_image = _first_tensor(source, image, value_range, section.asked_channels)
    finished = own and value_range is None and comes_as_floats(image)
    preparation = _preparation(section, source, first_image.shape[0], masked=masked, finished=finished)
    train: Images
    if isinstance(preparation, MaskPreparation):
        options: dict[str, Any] = {
            "name": source.name,
            "classes": len(source.classes),
            "ignore_index": section.ignore_index,
            "value_range": value_range,
            "channels": section.asked_channels,
        }
        train = MaskedImages(source.train, kept, preparation, augmented=True, **options)
        probe: Images = MaskedImages(source.train, probed, preparation, **options)
        test: Images = MaskedImages(source.test, tested, preparation, whole=True, **options)
    else:
        read = {"value_range": value_range, "channels": section.asked_channels}
        train = _images(source, train_part, kept, preparation, read, augmented=True)
        probe = _images(source, source.train, probed, preparation, read, augmented=False)
        test = _images(source, test_part, tested, preparation, read, augmented=False)
    if not own and preparation.size is None and section.base_size is None:
        # Images with masks are tested whole, and a stream is not read twice.
        parts = ([] if tested_only else [source.train]) if masked else [source.train, source.test]
        check_sizes(source.name, [part for part in parts if not isinstance(part, RowStream)])
    first = probe.fixed([0])[0][0]
    channels, height, width = first.shape
    for images in (train, probe, test):
        if isinstance(images, ReadImages):
            images.shape, images.dtype = first.shape, first.dtype
    return Data(
        name=source.name,
        train=train,
        probe=probe,
        test=test,
        num_classes=len(source.classes),
        classes=source.classes,
        image_shape=(channels, height, width),
        image_bytes=first.nbytes + (height * width if masked else 0),
        own=own,
        masked=masked,
        validation=section.validation is not None,
        notes=(*source.notes, *brought),
    )


def _held_out(section: DataSection, source: Source, seed: int) -> tuple[Source, Tensor, Tensor]:
    """Return the source with what is tested in place, and the indices that are trained on or probed, and tested."""
    size = len(source.train)
    if section.validation is None:
        return source, torch.arange(size), torch.arange(len(source.test))
    labels = None if source.as_it_is else known_labels(source.train)
    rest, tested = hold_out(size, section.validation, seed, labels)
    chosen = "by seed and class by class" if labels is not None else "by seed alone"
    untested = source.untested or (f"the test part of {source.name}" if source.test is not source.train else "")
    instead = f", in place of {untested}" if untested else ""
    what = "items" if source.as_it_is else "images"
    note = f"data.validation: {len(tested)} of {size} training {what}, chosen {chosen}, are the test part{instead}"
    return replace(source, test=source.train, notes=(*source.notes, note)), rest, tested


def _as_it_is(section: DataSection, source: Source, kept: Tensor, probed: Tensor, tested: Tensor) -> Data:
    """Return the parts of a dataset whose items are no images with a label or a mask."""
    for key, problem in image_keys_problems(section, source.name):
        raise RecipeValueError(f"data.{key}", problem)
    data = Data(
        name=source.name,
        train=Items(source.train, kept, name=source.name, varies=True),
        probe=Items(source.train, probed, name=source.name),
        test=Items(source.test, tested, name=source.name),
        num_classes=len(source.classes) or None,
        classes=source.classes,
        image_shape=None,
        image_bytes=0,
        own=True,
        as_it_is=True,
        validation=section.validation is not None,
        notes=source.notes,
    )
    batch = data.sample()
    return replace(data, image_shape=_image_shape(batch), image_bytes=sum(one.nbytes for one in tensors_in(batch)))


def _image_shape(batch: Any) -> Shape | None:
    """Return the shape of what the model sees of a batch where that is float images, None where it is anything else."""
    inputs = first_input(batch)
    if not isinstance(inputs, Tensor) or inputs.dim() != 4 or not inputs.is_floating_point():
        return None
    _, channels, height, width = inputs.shape
    return channels, height, width


def _preparation(section: DataSection, source: Source, channels: int, *, masked: bool, finished: bool) -> Preparation:
    """Return how images are prepared; those that come ``finished`` are normalised only if the recipe says so."""
    options: dict[str, Any] = {"interpolation": section.interpolation}
    if not finished or section.mean or section.std:
        options["mean"], options["std"] = statistics(section, channels)
    if masked:
        return MaskPreparation(section.image_size, section.augment, base_size=section.base_size, **options)
    mixing = None
    if section.mixup or section.cutmix:
        mixing = Mixing(section.mixup, section.cutmix, len(source.classes))
    return Preparation(section.image_size, section.augment, erasing=section.erasing, mixing=mixing, **options)


def _first(source: Source) -> tuple[Any, Any]:
    """Return the first training image and its target, as the source has them."""
    if isinstance(source.train, Stored):
        return source.train.images[0], source.train.labels[0]
    with _named(source):
        image, target = source.train[0]
        if not is_mask(target):
            as_label(target)
        return image, target


def _first_tensor(source: Source, image: Any, value_range: Range | None, channels: int | None) -> Tensor:
    with _named(source):
        return in_channels(image, channels, value_range)


@contextmanager
def _named(source: Source) -> Iterator[None]:
    """Turn whatever is raised within into an error that names the first image, by its path where it has one."""
    try:
        yield
    except DataError as error:
        raise RecipeValueError("data", str(error)) from error
    except Exception as error:
        place = place_of(source.train, 0, source.name)
        if place.startswith("image 0 of "):
            place = f"the first image of {source.name}"
        raise RecipeValueError(
            "data",
            f"{place} cannot be used ({one_line(error)}); items must be (image, integer label), or (image, mask)",
        ) from error


def _images(
    source: Source, part: Any, indices: Tensor, preparation: Preparation, read: Mapping[str, Any], *, augmented: bool
) -> Images:
    """Return images of a part; ``read`` is how those are read that are not in memory."""
    if isinstance(part, StreamPart):
        options: dict[str, Any] = {"name": source.name, "classes": len(source.classes), "augmented": augmented, **read}
        return StreamedImages(part.stream, part.order, part.numbers, preparation, **options)
    if isinstance(part, Stored):
        return ImagesInMemory(part.images, part.labels, indices, preparation, augmented=augmented)
    return ReadImages(
        part,
        indices,
        preparation,
        name=source.name,
        classes=len(source.classes),
        augmented=augmented,
        **read,
    )
