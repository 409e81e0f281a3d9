"""COCO's instances as segmentation masks of Pascal VOC's 21 classes; needs pycocotools, the extra `coco`."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neq_cli.errors import RecipeValueError, one_line
from neq_cli.training.data.joint import IGNORED
from neq_cli.training.data.pixels import Range, read_image

LAYOUT = "COCO holds train2017/, val2017/ and annotations/instances_{train,val}2017.json"
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
                raise RecipeValueError("data.root", f"no '{path}'; {LAYOUT}")
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
