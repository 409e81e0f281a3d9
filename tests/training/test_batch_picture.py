"""The picture of a batch holds the batch: pixels as they were before normalisation, names, masks in their colours."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from neq_cli.errors import NeqError
from neq_cli.recipe import DataSection
from neq_cli.training import batch_picture
from neq_cli.training.batch_picture import MOST, draw_batch
from neq_cli.training.data.digits import load_digits
from neq_cli.training.data.parts import Data, load_data
from neq_cli.training.data.transforms import Preparation

LEFT, TOP = 8, 30  # of the first image, below a title of one line
CLASSES = ("cat", "größe", "a name that is longer than any picture of it is wide")


def make(preparation: Preparation | None = None, **changes: Any) -> Data:
    """Return the digits as if they were prepared so, or any other data."""
    from dataclasses import replace

    data = load_data(DataSection(name="digits"), 1)
    if preparation is not None:
        data.train.preparation = preparation
    return replace(data, **changes)


def pixels(picture: Image.Image, x: int, y: int, width: int, height: int) -> np.ndarray:
    return np.asarray(picture.crop((x, y, x + width, y + height)))


def written(monkeypatch: pytest.MonkeyPatch, batch: Any, data: Data) -> list[str]:
    """Return all that is written into the picture of a batch."""
    found: list[str] = []
    original = batch_picture.ImageDraw.ImageDraw.text

    def text(self: Any, place: Any, said: str, **options: Any) -> None:
        found.append(said)
        original(self, place, said, **options)

    monkeypatch.setattr(batch_picture.ImageDraw.ImageDraw, "text", text)
    draw_batch(batch, data)
    return found


def test_pixels_are_those_that_were_read() -> None:
    data = make()
    (images, _), _ = load_digits()
    index = int(data.train.indices[3])
    (image, label) = data.train[3]
    picture = draw_batch((image.unsqueeze(0), torch.tensor([label])), data)
    drawn = pixels(picture, LEFT, TOP, 96, 96)[::12, ::12]
    read = (images[index] * 255).round().permute(1, 2, 0).numpy()
    assert (drawn == read).all(), "8x8 pixels, 12 dots each"
    assert (pixels(picture, LEFT, TOP, 12, 12) == drawn[0, 0]).all()


def test_colour_and_sizes_that_are_not_square() -> None:
    image = torch.rand(1, 3, 48, 100)
    picture = draw_batch((image, torch.tensor([0])), make(Preparation()))
    drawn = pixels(picture, LEFT, TOP, 100, 48)
    assert (drawn == (image[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()).all()


def test_large_images_are_made_smaller() -> None:
    picture = draw_batch((torch.ones(1, 3, 600, 300), torch.tensor([0])), make(Preparation()))
    below = np.asarray(picture)[TOP : TOP + 256, LEFT : LEFT + 128]
    assert below.shape[:2] == (256, 128)
    assert (below == 255).all()


@pytest.mark.parametrize(
    ("images", "preparation", "said"),
    [
        (torch.zeros(1, 1, 8, 8), Preparation(mean=(0.5,), std=(0.5,)), "; normalisation undone"),
        (torch.full((1, 1, 8, 8), 0.5), Preparation(), "; not normalised"),
        (torch.arange(64.0).view(1, 1, 8, 8) - 4, Preparation(), "; values from -4 to 59 as black to white"),
        (torch.rand(1, 5, 8, 8), Preparation(), "; not normalised; of 5 channels the first 3 drawn"),
        (torch.rand(1, 2, 8, 8), Preparation(), "; not normalised; of 2 channels the first 1 drawn"),
    ],
)
def test_what_was_done_to_be_seen_is_told(
    monkeypatch: pytest.MonkeyPatch, images: Tensor, preparation: Preparation, said: str
) -> None:
    texts = written(monkeypatch, (images, torch.tensor([0])), make(preparation))
    title = " ".join(text for text in texts if text != "0")
    shape = "x".join(map(str, images.shape[1:]))
    assert title == f"digits: 1 image of {shape}, the first training batch as the model sees it{said}"


def test_labels_are_named_in_what_the_font_has(monkeypatch: pytest.MonkeyPatch) -> None:
    data = make(Preparation(), classes=CLASSES, num_classes=3)
    _, *names = written(monkeypatch, (torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 7])), data)
    assert names[:2] == ["cat", "gro?e"]
    assert names[2].startswith("a name that")
    assert names[2].endswith("...")
    assert names[3] == "7"


def test_mixed_labels_are_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    data = make(Preparation(), classes=("a", "b", "c"), num_classes=3)
    shares = torch.tensor([[0.25, 0.0, 0.75], [0.0, 1.0, 0.0]])
    _, *names = written(monkeypatch, (torch.rand(2, 1, 8, 8), shares), data)
    assert names == ["75% c", "25% a", "100% b"]


@pytest.mark.parametrize("targets", [torch.rand(2, 4), torch.tensor(1), {"a": 1}, torch.zeros(3, dtype=torch.int64)])
def test_targets_of_another_kind_are_left_out(monkeypatch: pytest.MonkeyPatch, targets: Any) -> None:
    texts = written(monkeypatch, (torch.rand(2, 1, 8, 8), targets), make(Preparation()))
    assert [text for text in texts if not text.startswith("digits: 2 images")] == []


def test_numbers_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = written(monkeypatch, (torch.rand(2, 1, 8, 8), torch.tensor([0.5, 123456.0])), make(Preparation()))
    assert texts[1:] == ["0.5", "1.235e+05"]


def test_masks_stand_beside_their_images(monkeypatch: pytest.MonkeyPatch) -> None:
    data = make(Preparation(), masked=True, classes=("ground", "sky"), num_classes=2)
    mask = torch.tensor([[0, 1, 1, 255]] * 4, dtype=torch.uint8).repeat_interleave(24, 0).repeat_interleave(24, 1)
    picture = draw_batch((torch.ones(1, 3, 96, 96), mask.unsqueeze(0)), data)
    drawn = pixels(picture, LEFT + 96, TOP, 96, 96)
    assert (pixels(picture, LEFT, TOP, 96, 96) == 255).all()
    assert (drawn[:, :24] == 0).all()
    assert (drawn[:, 72:] == 255).all()
    (sky,) = {tuple(colour) for colour in drawn[:, 24:72].reshape(-1, 3)}
    assert sky not in ((0, 0, 0), (255, 255, 255))
    texts = written(monkeypatch, (torch.ones(1, 3, 96, 96), mask.unsqueeze(0)), data)
    assert texts[1:] == ["sky, ground, ignored", "sky", "ground", "ignored"], "below the image, and what colours mean"


def test_colours_of_classes_differ() -> None:
    colours = [batch_picture._colour(label) for label in range(256)]
    assert len(set(colours)) == 256


def test_of_a_large_batch_the_first_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.arange(MOST + 6) // MOST
    texts = written(monkeypatch, (torch.rand(MOST + 6, 1, 8, 8), labels), make(Preparation()))
    assert texts[0].startswith(f"digits: the first {MOST} of {MOST + 6} images of 1x8x8")
    assert texts[1:] == ["0"] * MOST


@pytest.mark.parametrize("batch", [torch.zeros(3, 4), [[torch.zeros(3, 8, 8)]], {"a": torch.zeros(1, 3, 8, 8)}])
def test_what_is_no_batch_of_images_is_one_line(batch: Any) -> None:
    with pytest.raises(NeqError, match=r"^--show-batch: the inputs of digits are no batch of images"):
        draw_batch(batch, make())
