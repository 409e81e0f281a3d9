"""What trained weights say of images in files, prepared as a run's test images are; without its data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from neq_cli.errors import NeqError, one_line
from neq_cli.recipe import DataSection, Recipe
from neq_cli.training.data.catalogue import Shape, Statistics, sample_shape
from neq_cli.training.data.catalogue import statistics as statistics_of
from neq_cli.training.data.channels import in_channels
from neq_cli.training.data.mask_sources import SUFFIXES
from neq_cli.training.data.masks import MaskPreparation
from neq_cli.training.data.pixels import read_image
from neq_cli.training.data.transforms import Preparation
from neq_cli.training.errors import DataError
from neq_cli.training.evaluation import on_device, start_device, trained_model
from neq_cli.training.loop.calling import forward_of
from neq_cli.training.loop.step import autocast_of, moved_to
from neq_cli.training.loop.tasks import build_task
from neq_cli.training.machine.full_memory import full_memory_named
from neq_cli.training.models.build import first_convolution, misfit
from neq_cli.training.models.outputs import main_output, scaled_to


@dataclass(frozen=True)
class Known:
    """What is known of the images that weights were trained on; ``statistics`` None: not told."""

    classes: int | None = None
    image_shape: Shape | None = None
    statistics: Statistics | None = None
    normalised: bool | None = None  # None: not told


@dataclass(frozen=True)
class Scores:
    """The likeliest classes of an image with their softmax, the likeliest first."""

    path: Path
    classes: tuple[int, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Mask:
    """The class of every pixel of an image, uint8 [height, width] as the file has them."""

    path: Path
    classes: Tensor


def image_files(given: Sequence[Path]) -> list[Path]:
    """Return the files, and those with an image's suffix in folders, without names that begin with a dot.

    NeqError, a line for each that is not there and each folder that holds none.
    """
    found: list[Path] = []
    problems: list[str] = []
    for path in given:
        try:
            inside = _in_folder(path) if path.is_dir() else [path]
        except OSError as error:
            problems.append(f"{path}: cannot be read ({one_line(error)})")
            continue
        if not path.exists():
            problems.append(f"{path}: no such image, nor a folder of images")
        elif not inside:
            problems.append(f"{path}: holds no images ({', '.join(SUFFIXES)})")
        found += inside
    _refuse(problems)
    return found


def check_files(paths: Sequence[Path], section: DataSection) -> None:
    """Read every file. NeqError, a line for each that is no image."""
    problems = []
    for path in paths:
        try:
            read_image(path, section.pixel_range)
        except DataError as error:
            problems.append(str(error))
    _refuse(problems)


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise NeqError("\n".join(problems))


def _in_folder(folder: Path) -> list[Path]:
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


class Predictor:
    """A network with its weights on its device, and how images are prepared for it.

    Raises RecipeError, RunDirectoryError or NeqError, one line, where weights, recipe or images do not fit together.
    """

    def __init__(self, recipe: Recipe, weights: Mapping[str, Tensor], place: Path, known: Known) -> None:
        if recipe.task_is_own:
            mend = "call the model in Python"
            raise NeqError(f"neq predict: only the task {recipe.task} itself knows what outputs say; {mend}")
        self.recipe = recipe
        self.masked = recipe.task == "segmentation"
        self.device = start_device(recipe)
        model = trained_model(recipe, weights, known.classes, place)
        self.shape = known.image_shape or sample_shape(recipe.data)
        self.channels = self.shape[0] if self.shape is not None else _channels(model)
        if self.channels not in (1, 3):
            raise NeqError(f"neq predict: the run's images have {self.channels} channels, and files are read in 1 or 3")
        self.preparation = _preparation(recipe, known, self.channels, masked=self.masked)
        self.model = on_device(recipe, model, self.device)
        task = build_task(recipe.task, recipe.label_smoothing, known.classes or 1)
        self.call = forward_of(task, self.model)
        self.scaled: dict[str, None] = {}  # sizes that images were scaled from, of those that a run would refuse

    def prepared(self, path: Path) -> Tensor:
        """Return what the network sees of an image, [1, channels, height, width]."""
        images = self._read(path).unsqueeze(0)
        if isinstance(self.preparation, MaskPreparation):
            image, _ = self.preparation.whole(images[0], torch.zeros(images.shape[-2:], dtype=torch.uint8))
            return self.preparation.finished(image.unsqueeze(0))
        return self._sized(path, images).test(images)

    def _sized(self, path: Path, images: Tensor) -> Preparation:
        """Return the preparation; of data of one size, one that scales whatever has another."""
        if self.preparation.size is not None or self.shape is None or images.shape[-2:] == self.shape[1:]:
            return self.preparation
        height, width = images.shape[-2:]
        side = self.shape[1]
        if side != self.shape[2]:
            wanted = f"{self.shape[2]}x{side}"
            raise NeqError(f"{path}: {width}x{height} pixels, and the run's images are {wanted}; scale it before")
        self.scaled[f"{width}x{height}"] = None
        return replace(self.preparation, image_size=side)

    def _read(self, path: Path) -> Tensor:
        return in_channels(read_image(path, self.recipe.data.pixel_range), self.channels)

    @full_memory_named("prediction")
    def scores(self, paths: Sequence[Path], top: int) -> Iterator[Scores]:
        """Yield the ``top`` likeliest classes of each image."""
        size = self.recipe.batch_size
        for start in range(0, len(paths), size):
            part = paths[start : start + size]
            prepared = [self.prepared(path) for path in part]
            groups = [torch.cat(prepared)] if len({image.shape for image in prepared}) == 1 else prepared
            logits = torch.cat([self._outputs(group) for group in groups]).float()
            found = logits.softmax(1).topk(min(top, logits.shape[1]), dim=1)
            for path, classes, scores in zip(part, found.indices.tolist(), found.values.tolist(), strict=True):
                yield Scores(path, tuple(classes), tuple(scores))

    @full_memory_named("prediction")
    def masks(self, paths: Sequence[Path]) -> Iterator[Mask]:
        """Yield the class of every pixel of each image, in the image's own height and width."""
        for path in paths:
            own = self._read(path).shape[-2:]
            image = self.prepared(path)
            classes = scaled_to(self._outputs(image), image).argmax(1)
            if classes.shape[-2:] != own:  # a class is never between two others
                classes = functional.interpolate(classes[None].float(), size=own, mode="nearest-exact")[0].long()
            yield Mask(path, classes[0].clamp(max=255).to("cpu", torch.uint8))

    def _outputs(self, images: Tensor) -> Tensor:
        inputs: Any = moved_to(self.device, images, channels_last=self.recipe.channels_last is True)
        try:
            with torch.no_grad(), autocast_of(self.recipe, self.device):
                return main_output(self.call(self.model, inputs, inputs))
        except RuntimeError as error:
            raise misfit(self.model, "these files", images.shape[1:], error) from error


def _channels(model: nn.Module) -> int:
    first = first_convolution(model)
    return 3 if first is None else first.in_channels


def _preparation(recipe: Recipe, known: Known, channels: int, *, masked: bool) -> Preparation:
    """Return how the run's test images were prepared."""
    section = recipe.data
    if section.entrypoint is not None and not known.normalised:
        why = "prepares images itself" if known.normalised is False else "may prepare images itself, which is not told"
        raise NeqError(f"neq predict: {section.entrypoint} {why}; call the model in Python with what it makes of them")
    mean, std = known.statistics if known.statistics is not None else statistics_of(section, channels)
    if len(mean) != channels:
        raise NeqError(f"neq predict: data.mean has {len(mean)} numbers, and the run's images have {channels} channels")
    options: dict[str, Any] = {"interpolation": section.interpolation, "mean": mean, "std": std}
    if masked:
        return MaskPreparation(section.image_size, section.augment, base_size=section.base_size, **options)
    return Preparation(section.image_size, section.augment, **options)
