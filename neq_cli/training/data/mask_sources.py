"""Segmentation data in files: folders of images and masks, Pascal VOC's, and COCO's (extra `coco`)."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from neq_cli.errors import RecipeValueError, one_line
from neq_cli.training.data.hidden import Hidden
from neq_cli.training.data.masks import IGNORED, MOST_CLASSES, as_mask
from neq_cli.training.data.pixels import Range, cannot_be_used, read_image

FOLDER_LAYOUT = "a segmentation folder holds train/images/*, train/masks/<same names>.png, and val/ or test/ likewise"
OR_VALIDATION = "; where there is no test part, data.validation=0.1 holds out a tenth of the images"
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


class MaskFiles:
    """Pairs of files, read as (image in three channels, PIL mask as it is); ``sizes`` are read from images' headers."""

    def __init__(self, samples: Sequence[tuple[Path, Path]], value_range: Range | None = None) -> None:
        self.samples = list(samples)
        self.value_range = value_range
        self.classes: tuple[str, ...] = ()
        self._sizes: list[tuple[int, int]] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, mask = self.samples[index]
        read = read_image(image, self.value_range)
        try:
            with Image.open(mask) as opened:
                opened.load()
                return read, opened
        except Exception as error:
            raise cannot_be_used(mask, error) from error

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of every image. Raises RecipeValueError where one cannot be read."""
        if self._sizes is None:
            self._sizes = [_size(image) for image, _ in self.samples]
        return self._sizes

    def largest_class(self, ignore_index: int) -> int:
        """Return the largest number in all masks but ``ignore_index``; -1 where there is none. Reads every mask."""
        largest = -1
        for _, path in self.samples:
            try:
                with Image.open(path) as mask:
                    values = as_mask(mask)
            except Exception as error:
                raise RecipeValueError("data.root", f"{path}: cannot be used ({one_line(error)})") from error
            kept = values[values != ignore_index]
            largest = max(largest, int(kept.max()) if kept.numel() else -1)
            if largest >= MOST_CLASSES:
                said = f"{path}: {largest} is no class, a number from 0 to {MOST_CLASSES - 1}; correct the mask"
                raise RecipeValueError("data.root", said)
        return largest


def folders_of(root: Path, *, tested_only: bool = False, validation: bool = False) -> tuple[Path, Path]:
    """Return the folders of the training and the test part below ``root``, which need not be there.

    The test part is in test/, else in val/. ``tested_only``: its folder stands for both, and is ``root`` itself where
    that has no parts. ``validation``: the training part holds both, in train/, or in ``root`` itself where that has no
    parts.
    """
    train, test = root / "train", tested_folder(root)
    without_parts = test is None and not train.is_dir()
    if validation:
        only = root if without_parts else train
        return only, only
    if tested_only:
        only = root if without_parts else test or root / "test"
        return only, only
    return train, test or root / "test"


def tested_folder(root: Path) -> Path | None:
    """Return the folder of the test part below ``root``; None where there is none."""
    return next((root / name for name in ("test", "val") if (root / name).is_dir()), None)


def holds_masks(part: Path) -> bool:
    """Whether the folder of a part is laid out as one of images with masks."""
    return (part / "images").is_dir() and (part / "masks").is_dir()


def open_folder(
    root: Path,
    kwargs: Mapping[str, Any],
    ignore_index: int,
    value_range: Range | None = None,
    *,
    tested_only: bool = False,
    validation: bool = False,
) -> tuple[MaskFiles, MaskFiles, list[str]]:
    """Return the training and the test part under ``root``, and notes on how they were understood.

    ``tested_only``: the test part stands for both. ``validation``: the training part does.

    The number of classes is ``kwargs["num_classes"]``, else that of the lines of classes.txt, else one more than the
    largest number in the masks. Names that begin with a dot are left out.
    """
    if not root.is_dir():
        raise RecipeValueError("data.root", f"no folder '{root}'; {FOLDER_LAYOUT}")
    folders = folders_of(root, tested_only=tested_only, validation=validation)
    hidden = Hidden(root)
    if not folders[1].is_dir() and not tested_only and (folders[0].is_dir() or (root / "images").is_dir()):
        raise RecipeValueError("data.root", f"no folder '{folders[1]}'; {FOLDER_LAYOUT}{OR_VALIDATION}")
    opened = {part: MaskFiles(_pairs(part, hidden), value_range) for part in folders}
    classes, note = _classes(root, list(opened.values()), kwargs.get("num_classes"), ignore_index)
    for part in opened.values():
        part.classes = classes
    train, test = (opened[part] for part in folders)
    return train, test, [*([note] if note else ()), *hidden.notes]


def _classes(root: Path, parts: Sequence[MaskFiles], given: Any, ignore_index: int) -> tuple[tuple[str, ...], str]:
    names = root / "classes.txt"
    if given is not None:
        return given_classes(given), ""
    if names.is_file():
        lines = [line.strip() for line in names.read_text(encoding="utf-8", errors="replace").splitlines()]
        found = tuple(line for line in lines if line)
        if not 1 <= len(found) <= MOST_CLASSES:
            raise RecipeValueError("data.root", f"{names}: {len(found)} lines; write one class name in each, 1 to 255")
        return found, ""
    return classes_in(parts, ignore_index, f"under '{root}'", "data.root")


def given_classes(given: Any) -> tuple[str, ...]:
    """Return what as many classes as a recipe gives are called: their numbers."""
    if not isinstance(given, int) or isinstance(given, bool) or not 1 <= given <= MOST_CLASSES:
        raise RecipeValueError("data.kwargs.num_classes", f"{given!r} is not a number of classes, 1 to 255")
    return tuple(map(str, range(given)))


def classes_in(parts: Iterable[Any], ignore_index: int, where: str, key: str) -> tuple[tuple[str, ...], str]:
    """Return what the classes in all masks of ``parts`` are called, their numbers, and a note that says so."""
    count = 1 + max(part.largest_class(ignore_index) for part in parts)
    if not count:
        raise RecipeValueError(key, f"the masks {where} hold no class; give data.kwargs.num_classes")
    return tuple(map(str, range(count))), f"data: {count} classes, as {count - 1} is the largest number in the masks"


def _pairs(part: Path, hidden: Hidden) -> list[tuple[Path, Path]]:
    """Return every image of a part with the mask of its name."""
    images, masks = part / "images", part / "masks"
    for folder in (part, images, masks):
        if not folder.is_dir():
            raise RecipeValueError("data.root", f"no folder '{folder}'; {FOLDER_LAYOUT}")
    try:
        by_name = {path.stem: path for path in _files(masks, hidden)}
        pairs = []
        for image in _files(images, hidden):
            if image.stem not in by_name:
                raise RecipeValueError("data.root", f"{image}: has no mask '{masks / image.stem}.png'")
            pairs.append((image, by_name[image.stem]))
    except OSError as error:
        raise RecipeValueError("data.root", f"'{part}' cannot be read ({one_line(error)})") from error
    names = Counter(image.stem for image, _ in pairs)
    if len(names) < len(pairs):
        twice = names.most_common(1)[0][0]
        raise RecipeValueError("data.root", f"'{images}' holds two images called '{twice}'; rename one of them")
    if not pairs:
        raise RecipeValueError("data.root", f"'{images}' holds no images ({', '.join(SUFFIXES)})")
    return pairs


def _files(folder: Path, hidden: Hidden) -> list[Path]:
    paths = [str(path) for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file()]
    return sorted(map(Path, hidden.without(paths)))


def _size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except Exception as error:
        raise RecipeValueError("data.root", f"{path}: cannot be read ({one_line(error)})") from error


COCO_LAYOUT = "COCO holds train2017/, val2017/ and annotations/instances_{train,val}2017.json"
# Pascal VOC's classes in its order, and what COCO calls and numbers them (0: none, the background).
VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
CATEGORIES = (0, 5, 2, 16, 9, 44, 6, 3, 17, 62, 21, 67, 18, 19, 4, 1, 64, 20, 63, 7, 72)
_LEAST_AREA = 1000
"""Pixels that objects of an image must cover to be trained on, as in torchvision's segmentation training."""

Object = tuple[int, Any]  # class, its outline as COCO writes it


class CocoMasks:
    """A part of COCO, as (image, mask): each pixel the class of the object there, ignored where objects overlap."""

    classes = VOC_CLASSES

    def __init__(self, root: Path, part: str, *, only_with_objects: bool, value_range: Range | None = None) -> None:
        self.value_range = value_range
        folder, annotations = root / f"{part}2017", root / "annotations" / f"instances_{part}2017.json"
        for path in (folder, annotations):
            if not path.exists():
                raise RecipeValueError("data.root", f"no '{path}'; {COCO_LAYOUT}")
        self.samples: list[tuple[Path, str]] = []
        self.sizes: list[tuple[int, int]] = []
        self.objects: list[list[Object]] = []
        try:
            self._read(folder, annotations, only_with_objects=only_with_objects)
        except RecipeValueError:
            raise
        except Exception as error:
            raise RecipeValueError("data.root", f"{annotations}: cannot be read ({one_line(error)})") from error

    def _read(self, folder: Path, annotations: Path, *, only_with_objects: bool) -> None:
        with redirect_stdout(io.StringIO()):  # it tells how long it took
            index = _pycocotools("coco").COCO(str(annotations))
        for number in sorted(index.imgs):
            image = index.imgs[number]
            found = [one for one in index.imgToAnns.get(number, []) if one["category_id"] in CATEGORIES]
            if only_with_objects and sum(one["area"] for one in found) <= _LEAST_AREA:
                continue
            self.samples.append((folder / image["file_name"], f"{annotations}: image {number}"))
            self.sizes.append((int(image["height"]), int(image["width"])))
            self.objects.append([(CATEGORIES.index(one["category_id"]), one["segmentation"]) for one in found])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, NDArray[np.uint8]]:
        image = read_image(self.samples[index][0], self.value_range)
        return image, painted(self.objects[index], *self.sizes[index])


def painted(objects: Sequence[Object], height: int, width: int) -> NDArray[np.uint8]:
    """Return a mask [height, width] of the classes of ``objects``: 0 outside them all, ignored where two overlap."""
    outlines = _pycocotools("mask")
    mask = np.zeros((height, width), np.uint8)
    covered = np.zeros((height, width), np.uint16)
    for number, outline in objects:
        # A list of polygons, or run lengths, for crowds not yet compressed.
        encoded = outlines.frPyObjects(outline, height, width) if _is_raw(outline) else outline
        inside = outlines.decode(encoded).reshape(height, width, -1).any(axis=2)
        covered += inside
        mask[inside] = number
    mask[covered > 1] = IGNORED
    return mask


def _is_raw(outline: Any) -> bool:
    return isinstance(outline, list) or isinstance(outline["counts"], list)


def _pycocotools(module: str) -> Any:
    try:
        return import_module(f"pycocotools.{module}")
    except ImportError as error:
        raise RecipeValueError(
            "data.name", f"COCO needs pycocotools ({one_line(error)}); pip install 'neq[coco]'"
        ) from error
