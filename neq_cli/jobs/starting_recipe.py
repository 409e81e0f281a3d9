"""Writes a recipe for a folder of one's own data: values that train, each with the reason beside it.

They are a place to start from, not the best there are: the sizes and the number of images decide, nothing is trained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from neq_cli.errors import NeqError, RecipeValueError
from neq_cli.jobs.prepare import load_text, summarised
from neq_cli.text import printable

if TYPE_CHECKING:
    from neq_cli.recipe import ModelSection
    from neq_cli.training.data.survey import Survey

SMALL = 64
"""Pixels of the shorter side up to which images are small: networks made for CIFAR see more of them than others."""
LEAST_IMAGES = 10
_USUAL_SIZE = 224
_STEPS = 4000  # that a training is to have, within the least and the most epochs
_EPOCHS = (10, 60)
_PLAIN = re.compile(r"[/~.\w][\w/.-]*[A-Za-z_][\w/.-]*")
"""Text that YAML reads as text: what may stand there without quotes."""


@dataclass(frozen=True)
class StartingRecipe:
    """A recipe's text, and what was found that it was written for, in lines."""

    text: str
    found: tuple[str, ...]


@dataclass(frozen=True)
class _Choice:
    """The model, and the sizes that follow from it and from the images."""

    model: ModelSection
    asked: bool  # for by name
    normed: bool  # by batches
    weights: bool  # whether there are published ones
    size: int
    size_because: str


def starting_recipe(folder: Path, model: str | None, file: Path) -> StartingRecipe:
    """Return a recipe for the data in ``folder``, to be written to ``file``; ``model`` None: one that fits the images.

    It has been checked as ``neq validate`` checks it, the model on the size of the data's images. NeqError where the
    folder holds no images, or too few, or where there is no such model.
    """
    from neq_cli.training.data.survey import survey

    found = survey(folder)
    if found.train < LEAST_IMAGES:
        what = f"{found.train} images to train on are too few; {LEAST_IMAGES} are needed at least"
        raise NeqError(f"--data: '{printable(folder)}': {what}")
    choice = _chosen(found, model)
    text = _text(found, folder, choice)
    try:
        summarised(load_text(text, file.absolute(), str(file)))
    except NeqError as error:
        refused = isinstance(error.__cause__, RecipeValueError) and error.__cause__.key == "model"
        if not refused or choice.size == _USUAL_SIZE:
            raise
        # Such as torchvision's vision transformers, whose size is told by nothing but their refusal of others.
        text = _text(found, folder, _resized(choice))
        summarised(load_text(text, file.absolute(), str(file)))
    return StartingRecipe(text, found.lines)


def _chosen(found: Survey, name: str | None) -> _Choice:
    from torch import nn

    from neq_cli.recipe import ModelSection
    from neq_cli.training.models.build import build_on_meta, find_builder

    task = "segmentation" if found.masked else "classification"
    usual = "lraspp_mobilenet_v3_large" if found.masked else "resnet20" if found.shorter <= SMALL else "resnet18"
    section = ModelSection(name=name or usual)
    try:
        builder = find_builder(section, task)
        built = build_on_meta(section, len(found.classes), task)
        own_size = builder.image_defaults(section).size
    except RecipeValueError as error:
        raise NeqError(f"--model: {error.reason}") from error
    try:
        builder.find_weights(section.model_copy(update={"weights": "DEFAULT"}))
    except RecipeValueError:
        weights = False
    else:
        weights = True
    size, because = (own_size, f"what {name} is configured for") if own_size is not None else _size(found)
    normed = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in built.modules())
    return _Choice(section, name is not None, normed, weights, size, because)


def _resized(choice: _Choice) -> _Choice:
    return replace(choice, size=_USUAL_SIZE, size_because=f"{choice.model.name} takes no other that is nearer")


def _size(found: Survey) -> tuple[int, str]:
    """Return the side of the square that the model is to see, and why."""
    side = found.shorter
    if found.masked:
        size = min(480, max(32, side // 32 * 32))
        return size, "squares cut at random from images scaled to this shorter side"
    if found.smallest == found.largest == (side, side) and side <= SMALL:
        return side, "what all images have, or all that were looked at"
    if side <= SMALL:
        return max(8, side // 4 * 4), "about the images' shorter side"
    if side >= 192:
        return _USUAL_SIZE, "what most networks are made for; larger ones see more and take longer"
    return side // 32 * 32, "about the images' shorter side"


def _text(found: Survey, folder: Path, choice: _Choice) -> str:
    name = str(choice.model.name)
    title = f"{name} on the images in {folder.absolute().name}"
    lines = [f"description: {_yaml(title)}", *(f"# {line}" for line in found.lines)]
    trained = _trained(found)
    lines += [*_model(found, choice), *_data(found, choice, trained)]
    if found.masked:
        lines.append("task: segmentation")
    batch = _batch_size(found, trained)
    steps = trained // batch
    epochs = min(_EPOCHS[1], max(_EPOCHS[0], round(_STEPS / steps)))
    lines.append(f"epochs: {epochs} # about {epochs * steps} steps; more where the test metric still rises at the end")
    lines.append(f"batch_size: {batch} # as memory allows; change optimizer.lr in proportion")
    lines += _optimizer(found, choice, batch)
    lines += [
        "# Neurons whose outputs have stopped changing are no longer updated; a larger epsilon freezes them earlier.",
        "policy: {kind: neq, epsilon: 0.001, mu: 0.5} # on a GPU whole layers save more: add scope: front, share: 0.8",
        "seed: 1",
    ]
    return "\n".join(lines) + "\n"


def _model(found: Survey, choice: _Choice) -> Iterator[str]:
    name = str(choice.model.name)
    why = "a network for small images" if name == "resnet20" else "a small network, to begin with"
    yield "model: # it has an output for each class of the data"
    yield f"  name: {name} # {'as asked for' if choice.asked else why}; any other by --model or model.name=..."
    if choice.weights:
        yield "  # weights: DEFAULT # starts from published weights, fetched once; a tenth of optimizer.lr suits these"


def _data(found: Survey, choice: _Choice, trained: int) -> Iterator[str]:
    section = found.section
    yield "data:"
    yield f"  name: {_yaml(str(section.name))}"
    if not str(section.name).startswith("hf/"):
        yield f"  root: {_yaml(section.root)}"
    if section.validation is not None:
        yield f"  validation: {section.validation:g} # there is no part to test on: this share is held out, by seed"
    yield f"  image_size: {choice.size} # {choice.size_because}"
    augment, why = _augment(found, choice)
    yield f"  augment: {augment} # {why}"
    if found.masked and not (section.folder / "classes.txt").is_file():
        yield f"  kwargs: {{num_classes: {len(found.classes)}}} # one more than the largest number in the masks"
    if found.masked:
        yield f"  ignore_index: {section.ignore_index} # the number in masks that is neither learnt nor measured"
    yield f"  probe_size: {_probe_size(found)} # images that neurons are observed on, and that are not trained on"


def _augment(found: Survey, choice: _Choice) -> tuple[str, str]:
    if found.masked:
        return "segmentation", "scaled by 0.5 to 2, mirrored and cut, masks too"
    if choice.size > SMALL:
        return "imagenet", "a random part, scaled, mirrored; where left and right matter, use none"
    if found.grey or choice.size <= 16:
        return "crop", "padded and cut; cifar mirrors too, which digits and letters would not bear"
    return "cifar", "padded, cut and mirrored; where left and right matter, use crop"


def _optimizer(found: Survey, choice: _Choice, batch: int) -> Iterator[str]:
    if not choice.normed:
        yield "optimizer: {name: adamw, lr: 5e-4, weight_decay: 0.05} # the model has no batch norm, as transformers"
        yield "scheduler: {name: cosine, warmup_epochs: 2}"
        return
    if found.masked:
        rate, decay = 0.02 * batch / 16, "1e-4"
    elif found.shorter <= SMALL:
        rate, decay = 0.1 * batch / 128, "5e-4"
    else:
        rate, decay = 0.1 * batch / 256, "1e-4"
    yield f"optimizer: {{name: sgd, lr: {rate:.2g}, momentum: 0.9, weight_decay: {decay}}} # lr goes by the batch size"
    falls = "polynomial, power: 0.9" if found.masked else "cosine"
    yield f"scheduler: {{name: {falls}, warmup_epochs: 1}} # neurons come to rest as the learning rate falls"


def _held_out(found: Survey) -> int:
    share = found.section.validation
    return 0 if share is None else max(1, round(found.train * share))


def _probe_size(found: Survey) -> int:
    return min(50, max(1, (found.train - _held_out(found)) // 10))


def _trained(found: Survey) -> int:
    return found.train - _held_out(found) - _probe_size(found)


def _batch_size(found: Survey, trained: int) -> int:
    """Return a power of two that makes eight steps of an epoch at least, where there are so many images."""
    most = 8 if found.masked else 128 if found.shorter <= SMALL else 32
    size = 2
    while size * 2 <= min(most, trained // 8):
        size *= 2
    return size


def _yaml(text: str) -> str:
    """Return text as YAML has it, quoted where it might be read as anything else."""
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)
