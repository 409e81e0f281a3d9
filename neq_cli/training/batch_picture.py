"""Draws a batch as the model sees it, its labels below and its masks beside it; the first 64 images of it at most."""

from __future__ import annotations

import colorsys
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from neq_cli.errors import NeqError
from neq_cli.freezing.model.observing import first_input
from neq_cli.text import counted
from neq_cli.training.data.masks import IGNORED
from neq_cli.training.data.parts import Data
from neq_cli.training.loop.calling import parts_of

MOST = 64
"""Images that are drawn."""
_LEAST_SIDE, _LARGEST_SIDE = 96, 256  # pixels of a drawn image: small ones are drawn larger, dot by dot
_GAP, _LINE = 8, 14  # pixels between images, and of a line of text
_INK, _SOFT, _PAPER = (20, 20, 20), (110, 110, 110), (255, 255, 255)
_MOST_CLASSES = 40  # whose colours are explained
_TOLD_SHARES = 2  # classes of a mixed image


@dataclass(frozen=True)
class _Cell:
    pictures: tuple[Image.Image, ...]  # of one size, side by side
    lines: tuple[str, ...]


def draw_batch(batch: Any, data: Data) -> Image.Image:
    """Return the picture of ``batch``, which comes from the training part of ``data``.

    Normalisation is undone. Images whose values are known by no mean and std, nor from 0 to 1, are stretched from their
    least to their largest; a line above says which. NeqError where the batch holds no images.
    """
    images, targets = _images(batch, data), parts_of(batch)[1]
    count = len(images)
    shown, said = _in_colour(images[:MOST], data)
    masks = targets[:MOST] if data.masked else None
    lines = _lines(targets, count, data)[:MOST]
    cells = []
    for number, (image, written) in enumerate(zip(shown, lines, strict=True)):
        pictures = [image] if masks is None else [image, _coloured(masks[number])]
        cells.append(_Cell(tuple(map(_sized, pictures)), written))
    first = (f"the first {MOST} of " if count > MOST else "") + counted(count, "image")
    size = "x".join(map(str, images.shape[1:]))
    title = f"{data.name}: {first} of {size}, the first training batch as the model sees it; {said}"
    return _laid_out(title, cells, [] if masks is None else _classes_in(masks, data.classes))


def _images(batch: Any, data: Data) -> Tensor:
    inputs = first_input(batch)
    if isinstance(inputs, Tensor) and inputs.dim() == 4 and inputs.is_floating_point() and inputs.numel():
        return inputs.detach()
    what = f"the inputs of {data.name} are no batch of images [batch, channels, height, width] of floats"
    raise NeqError(f"--show-batch: {what}, so there is nothing to draw; leave it out")


def _in_colour(images: Tensor, data: Data) -> tuple[list[Image.Image], str]:
    """Return images as they may be looked at, and what was done for that."""
    mean, std = data.train.preparation.mean, data.train.preparation.std
    said = "normalisation undone"
    if mean is not None and std is not None:
        images = images * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    elif images.min() >= 0 and images.max() <= 1:
        said = "not normalised"
    else:
        low, high = images.min().item(), images.max().item()
        images, said = (images - low) / max(high - low, 1e-12), f"values from {low:.3g} to {high:.3g} as black to white"
    channels = images.shape[1]
    if channels not in (1, 3):
        kept = 3 if channels > 3 else 1
        images, said = images[:, :kept], f"{said}; of {channels} channels the first {kept} drawn"
    pixels = (images.nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(one.squeeze(-1) if one.shape[-1] == 1 else one).convert("RGB") for one in pixels], said


def _lines(targets: Any, count: int, data: Data) -> list[tuple[str, ...]]:
    """Return what is written below each image: its class, the largest shares of a mixed one, a number, or nothing."""
    if not isinstance(targets, Tensor) or targets.dim() == 0 or len(targets) != count:
        return [()] * count
    if data.masked:
        return [(", ".join(name for name, _ in _classes_in(mask.unsqueeze(0), data.classes)),) for mask in targets]
    if targets.dim() == 1:
        whole = not targets.is_floating_point()
        return [(_name(int(one), data.classes) if whole else f"{one:.4g}",) for one in targets.tolist()]
    if targets.dim() == 2 and targets.is_floating_point() and targets.shape[1] == data.num_classes:
        largest = targets.topk(min(_TOLD_SHARES, targets.shape[1]))
        pairs = zip(largest.values.tolist(), largest.indices.tolist(), strict=True)
        return [_shares(values, labels, data.classes) for values, labels in pairs]
    return [()] * count


def _shares(values: Sequence[float], labels: Sequence[int], classes: Sequence[str]) -> tuple[str, ...]:
    pairs = zip(values, labels, strict=True)
    return tuple(f"{100 * value:.0f}% {_name(label, classes)}" for value, label in pairs if value > 0)


def _name(label: int, classes: Sequence[str]) -> str:
    return classes[label] if 0 <= label < len(classes) else str(label)


def _classes_in(masks: Tensor, classes: Sequence[str]) -> list[tuple[str, tuple[int, int, int]]]:
    """Return the names and colours of the classes in masks, the largest first; what is ignored last."""
    counts = torch.bincount(masks.flatten().long(), minlength=IGNORED + 1)
    there = [label for label in counts.argsort(descending=True, stable=True).tolist() if counts[label]]
    named = [(_name(label, classes), _colour(label)) for label in there if label != IGNORED]
    return [*named, *([("ignored", _colour(IGNORED))] if counts[IGNORED] else [])]


def _colour(label: int) -> tuple[int, int, int]:
    """Return the colour of a class: 0 is black, what is ignored white, and neighbours are far apart."""
    if label in (0, IGNORED):
        return (0, 0, 0) if label == 0 else (255, 255, 255)
    # Steps of the golden ratio never meet, so that any number of classes is spread evenly over the hues.
    hue = label * (math.sqrt(5) - 1) / 2 % 1
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.55 + 0.4 * (label % 2), 0.95 - 0.3 * (label // 2 % 2))
    return round(255 * red), round(255 * green), round(255 * blue)


def _coloured(mask: Tensor) -> Image.Image:
    colours: NDArray[np.uint8] = np.array([_colour(label) for label in range(IGNORED + 1)], dtype=np.uint8)
    return Image.fromarray(colours[mask.cpu().numpy()])


def _sized(picture: Image.Image) -> Image.Image:
    longer = max(picture.size)
    if longer > _LARGEST_SIDE:
        shrunk = picture.copy()
        shrunk.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
        return shrunk
    factor = max(1, math.ceil(_LEAST_SIDE / longer))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _laid_out(title: str, cells: Sequence[_Cell], legend: Sequence[tuple[str, tuple[int, int, int]]]) -> Image.Image:
    width = max(sum(picture.width for picture in cell.pictures) for cell in cells)
    height = max(cell.pictures[0].height for cell in cells)
    texts = max(len(cell.lines) for cell in cells)
    across = min(len(cells), max(1, round(math.sqrt(len(cells) * 1.5 * height / width))))
    step_x, step_y = width + _GAP, height + texts * _LINE + _GAP
    page_width = max(_GAP + across * step_x, 3 * _LARGEST_SIDE)
    heading = _wrapped(title, page_width - 2 * _GAP)
    top = _GAP + len(heading) * _LINE + _GAP
    below = top + math.ceil(len(cells) / across) * step_y
    boxes = _legend_places(legend, page_width)
    page = Image.new("RGB", (page_width, below + (boxes[-1][1] + _LINE + _GAP if boxes else 0)), _PAPER)
    draw = ImageDraw.Draw(page)
    for number, line in enumerate(heading):
        draw.text((_GAP, _GAP + number * _LINE), line, fill=_SOFT, font=_font())
    for number, cell in enumerate(cells):
        left, upper = _GAP + number % across * step_x, top + number // across * step_y
        for place, text in enumerate(cell.lines):
            draw.text((left, upper + height + place * _LINE), _cut(text, width), fill=_INK, font=_font())
        for picture in cell.pictures:
            page.paste(picture, (left, upper))
            left += picture.width
    for (name, colour), (x, y) in zip(legend, boxes, strict=False):
        draw.rectangle((x, below + y, x + 10, below + y + 10), fill=colour, outline=_SOFT)
        draw.text((x + 14, below + y - 1), _plain(name), fill=_INK, font=_font())
    return page


def _legend_places(legend: Sequence[tuple[str, Any]], width: int) -> list[tuple[int, int]]:
    places, x, y = [], _GAP, 0
    for name, _ in legend[:_MOST_CLASSES]:
        needed = 14 + round(_font().getlength(_plain(name))) + 2 * _GAP
        if x > _GAP and x + needed > width:
            x, y = _GAP, y + _LINE
        places.append((x, y))
        x += needed
    return places


@lru_cache
def _font() -> Any:
    return ImageFont.load_default()


def _plain(text: str) -> str:
    """Return ``text`` in ASCII, which is all that the font that comes with Pillow is sure to have, in one line."""
    bare = "".join(sign for sign in unicodedata.normalize("NFKD", text) if not unicodedata.combining(sign))
    return "".join(sign if sign.isascii() and sign.isprintable() else "?" for sign in bare)


def _cut(text: str, width: int) -> str:
    text = _plain(text)
    if _font().getlength(text) <= width:
        return text
    while text and _font().getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."


def _wrapped(text: str, width: int) -> list[str]:
    lines = [""]
    for word in _plain(text).split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and _font().getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
