"""What a run tells of its data, in environment.json and beside weights in their files; parsed as untrusted."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neq_cli.runs.store.untrusted import damaged

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std per channel
_MOST_CLASSES = 2**24


@dataclass(frozen=True)
class Content:
    """The data of a run, as far as it is told: nothing is where an earlier version wrote the run."""

    classes: int | None = None
    class_names: tuple[str, ...] = ()
    image_shape: tuple[int, int, int] | None = None  # channels, height, width
    statistics: Statistics | None = None  # None: images were not normalised, where that is told
    tells_statistics: bool = False
    held_out: tuple[int, int] | None = None  # how many were tested of how many that might be trained on; else None

    def name(self, number: int) -> str:
        """Return what a class is called: its number where no name is known."""
        return self.class_names[number] if number < len(self.class_names) else str(number)


def parse_content(recorded: object, path: Path) -> Content:
    """Return what ``recorded`` in the file ``path`` says of data; RunDirectoryError where it is none of ours."""
    if recorded is None:
        return Content()
    if not isinstance(recorded, dict):
        raise damaged(path, "data: not a mapping")
    classes, names, shape = (recorded.get(key) for key in ("classes", "class_names", "image_shape"))
    if not (classes is None or (_is_count(classes) and classes <= _MOST_CLASSES)):
        raise damaged(path, "data.classes: not a number of classes")
    if not (names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names))):
        raise damaged(path, "data.class_names: not a list of names")
    if not (shape is None or (isinstance(shape, list) and len(shape) == 3 and all(map(_is_count, shape)))):
        raise damaged(path, "data.image_shape: not [channels, height, width]")
    return Content(
        classes,
        tuple(names or ()),
        None if shape is None else (shape[0], shape[1], shape[2]),
        _statistics(recorded, path),
        tells_statistics="mean" in recorded,
        held_out=_held_out(recorded, path),
    )


def weights_metadata(recipe_name: str, recipe_yaml: str | None, data: object) -> dict[str, str]:
    """Return what stands beside weights in their file, so that they are of use without their run."""
    told = {"recipe": recipe_name}
    if recipe_yaml is not None:
        told["recipe_yaml"] = recipe_yaml
    if isinstance(data, Mapping):
        told["data"] = json.dumps(data)
    return told


def content_in(metadata: Mapping[str, str], path: Path) -> Content:
    """Return the data that ``weights_metadata`` put beside the weights in ``path``; RunDirectoryError."""
    try:
        return parse_content(json.loads(metadata.get("data", "null")), path)
    except (ValueError, RecursionError) as error:
        raise damaged(path, "data: not JSON") from error


def _statistics(recorded: Mapping[str, Any], path: Path) -> Statistics | None:
    mean: Any = recorded.get("mean")
    std: Any = recorded.get("std")
    if mean is None and std is None:
        return None
    lists = isinstance(mean, list) and isinstance(std, list) and len(mean) == len(std) > 0
    if not lists or not all(_is_number(one) for one in mean) or not all(_is_number(one) and one > 0 for one in std):
        raise damaged(path, "data.mean and data.std: not a number each per channel")
    return tuple(map(float, mean)), tuple(map(float, std))


def _held_out(recorded: Mapping[str, Any], path: Path) -> tuple[int, int] | None:
    tested: Any = recorded.get("validation")
    rest: Any = recorded.get("train")
    if tested is None:
        return None
    if not (_is_count(tested) and _is_count(rest)):
        raise damaged(path, "data.validation and data.train: not a number of images each")
    return tested, tested + rest


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
