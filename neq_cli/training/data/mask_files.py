"""Segmentation data in files: folders of images and masks of the same names, and Pascal VOC's; images become RGB."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from neq_cli.errors import RecipeValueError, one_line
from neq_cli.training.data.hidden import Hidden
from neq_cli.training.data.masks import MOST_CLASSES, as_mask
from neq_cli.training.data.pixels import Range, cannot_be_used, read_image

LAYOUT = "a segmentation folder holds train/images/*, train/masks/<same names>.png, and val/ or test/ likewise"
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


def open_folder(
    root: Path, kwargs: Mapping[str, Any], ignore_index: int, value_range: Range | None = None
) -> tuple[MaskFiles, MaskFiles, list[str]]:
    """Return the training and the test part under ``root``, and notes on how they were understood.

    The number of classes is ``kwargs["num_classes"]``, else that of the lines of classes.txt, else one more than the
    largest number in the masks. Names that begin with a dot are left out.
    """
    if not root.is_dir():
        raise RecipeValueError("data.root", f"no folder '{root}'; {LAYOUT}")
    held_out = next((root / name for name in ("test", "val") if (root / name).is_dir()), root / "test")
    hidden = Hidden(root)
    parts = [MaskFiles(_pairs(part, hidden), value_range) for part in (root / "train", held_out)]
    classes, note = _classes(root, parts, kwargs.get("num_classes"), ignore_index)
    for part in parts:
        part.classes = classes
    return parts[0], parts[1], [*([note] if note else ()), *hidden.notes]


def _classes(root: Path, parts: Sequence[MaskFiles], given: Any, ignore_index: int) -> tuple[tuple[str, ...], str]:
    names = root / "classes.txt"
    if given is not None:
        if not isinstance(given, int) or isinstance(given, bool) or not 1 <= given <= MOST_CLASSES:
            raise RecipeValueError("data.kwargs.num_classes", f"{given!r} is not a number of classes, 1 to 255")
        return tuple(map(str, range(given))), ""
    if names.is_file():
        lines = [line.strip() for line in names.read_text(encoding="utf-8", errors="replace").splitlines()]
        found = tuple(line for line in lines if line)
        if not 1 <= len(found) <= MOST_CLASSES:
            raise RecipeValueError("data.root", f"{names}: {len(found)} lines; write one class name in each, 1 to 255")
        return found, ""
    count = 1 + max(part.largest_class(ignore_index) for part in parts)
    if not count:
        raise RecipeValueError("data.root", f"the masks under '{root}' hold no class; give data.kwargs.num_classes")
    return tuple(map(str, range(count))), f"data: {count} classes, as {count - 1} is the largest number in the masks"


def _pairs(part: Path, hidden: Hidden) -> list[tuple[Path, Path]]:
    """Return every image of a part with the mask of its name."""
    images, masks = part / "images", part / "masks"
    for folder in (part, images, masks):
        if not folder.is_dir():
            raise RecipeValueError("data.root", f"no folder '{folder}'; {LAYOUT}")
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
