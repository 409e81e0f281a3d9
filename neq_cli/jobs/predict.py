"""Predicts classes of images in files by trained weights; writes masks to a folder that is given, nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neq_cli.complaints import complain
from neq_cli.errors import NeqError
from neq_cli.jobs.prepare import located
from neq_cli.jobs.trained import Trained, WhichWeights, find_trained, known_images
from neq_cli.recipe.document import Given
from neq_cli.runs.store.disk import atomic_write, writing
from neq_cli.text import escaped

if TYPE_CHECKING:
    from neq_cli.training.prediction import Mask, Predictor

Prediction = dict[str, Any]
"""What `neq predict --json` prints of an image."""


def predict(
    given: Path,
    images: Sequence[Path],
    which: WhichWeights | None = None,
    recipe: str | None = None,
    device: str | None = None,
    *,
    top: int = 5,
    masks: Path | None = None,
) -> list[Prediction]:
    """Return what the weights in ``given`` say of every image, in order; ``find_trained`` has the arguments.

    ``images`` are files, or folders of such. All are read before the first is predicted: NeqError, a line for each that
    is no image. ``masks`` is the folder that masks are written to, where the task is segmentation.
    """
    from neq_cli.training.prediction import Predictor, check_files, image_files

    paths = image_files(images)
    overrides = [Given(f"device={device}", f"--device {device}")] if device else []
    trained = find_trained(given, which, recipe, overrides)
    section = trained.loaded.recipe
    check_files(paths, section.data)
    if masks is not None:
        if section.task != "segmentation":
            raise NeqError(f"-o: {section.task} makes no masks; leave it out")
        _check_masks(paths, masks)
    with located(trained.loaded):
        predictor = Predictor(section, trained.weights.tensors, trained.place, known_images(trained.content))
        if predictor.masked:
            found = [_shares(trained, mask, masks) for mask in predictor.masks(paths)]
        else:
            found = list(_scores(trained, predictor, paths, top))
    if predictor.scaled and predictor.shape is not None:
        size = f"{predictor.shape[2]}x{predictor.shape[1]}"
        sizes = list(predictor.scaled)
        more = f" and {len(sizes) - 3} other sizes" if len(sizes) > 3 else ""
        complain(f"note: scaled to {size}, the size of the run's images: from {', '.join(sizes[:3])}{more}")
    return found


def _scores(trained: Trained, predictor: Predictor, paths: Sequence[Path], top: int) -> Iterator[Prediction]:
    for found in predictor.scores(paths, top):
        classes = [
            {"class": number, "name": trained.content.name(number), "score": score}
            for number, score in zip(found.classes, found.scores, strict=True)
        ]
        yield {"image": str(found.path), "classes": classes}


def _shares(trained: Trained, mask: Mask, folder: Path | None) -> Prediction:
    counts = mask.classes.flatten().bincount()
    pixels = mask.classes.numel()
    classes = [
        {"class": number, "name": trained.content.name(number), "percent": 100 * int(counts[number]) / pixels}
        for number in counts.argsort(descending=True, stable=True).tolist()
        if counts[number]
    ]
    found: Prediction = {"image": str(mask.path), "classes": classes}
    if folder is not None:
        path = _mask_path(mask.path, folder)
        _write_mask(mask, path)
        found["mask"] = str(path)
    return found


def _check_masks(paths: Sequence[Path], folder: Path) -> None:
    """Make the folder. NeqError where two masks would have one name, or a file is there already."""
    wanted = Counter(_mask_path(path, folder) for path in paths)
    twice = next((path for path, count in wanted.items() if count > 1), None)
    if twice is not None:
        raise NeqError(f"{_shown(twice)}: would be the mask of {wanted[twice]} images; predict them apart")
    there = next((path for path in wanted if path.exists() or path.is_symlink()), None)
    if there is not None:
        raise NeqError(f"{_shown(there)}: already exists; choose another folder with -o")
    with writing(folder, "choose another folder with -o"):
        folder.mkdir(parents=True, exist_ok=True)


def _mask_path(image: Path, folder: Path) -> Path:
    return folder / f"{image.stem}.png"


def _write_mask(mask: Mask, path: Path) -> None:
    """Write class numbers as pixels, each in a colour of its own."""
    from PIL import Image

    picture = Image.fromarray(mask.classes.numpy()).convert("P")
    picture.putpalette(_palette())
    with writing(path, "choose another folder with -o"):
        atomic_write(path, lambda partial: picture.save(partial, format="PNG"))


def _palette() -> list[int]:
    """Return 256 colours, red, green and blue in turn: hues a golden angle apart are told apart, few or many."""
    from colorsys import hsv_to_rgb

    colours = [
        hsv_to_rgb(0.61803398875 * number % 1, 0.55 + 0.4 * (number % 2), 0.95 - 0.3 * (number // 2 % 2))
        for number in range(256)
    ]
    return [round(255 * part) for colour in colours for part in colour]


def _shown(path: Path) -> str:
    return escaped(str(path))
