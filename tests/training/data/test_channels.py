"""One channel or three: what images become, what is said of it, and what they are normalised by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rounding import apart

from neq_cli.errors import RecipeValueError
from neq_cli.recipe import DataSection
from neq_cli.training.data.catalogue import statistics
from neq_cli.training.data.channels import in_channels
from neq_cli.training.data.parts import Data, load_data
from neq_cli.training.data.pixels import read_image

GREYS = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOURS = np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def saved(folder: Path, pixels: Any, name: str = "0.png", mode: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(folder / name)
    return folder / name


def images(root: Path, *pixels: Any) -> DataSection:
    for part in ("train", "test"):
        for name in ("a", "b"):
            for number, one in enumerate(pixels):
                saved(root / part / name, one, f"{number}.png")
    return DataSection(name="image_folder", root=str(root), probe_size=1)


def loaded(section: DataSection, **changes: Any) -> Data:
    return load_data(section.model_copy(update=changes), 1)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P"])
def test_a_grey_file_of_any_kind_is_its_pixels_in_one_channel_or_three(tmp_path: Path, mode: str) -> None:
    read = read_image(saved(tmp_path, GREYS, mode=mode))
    expected = torch.from_numpy(GREYS.copy())[None]
    assert torch.equal(in_channels(read, 1), expected)
    assert torch.equal(in_channels(read, 3), expected.expand(3, -1, -1))
    assert torch.equal(in_channels(read, None), expected.expand(3, -1, -1))  # as files are read


def test_grey_of_sixteen_bits_keeps_them_in_one_channel(tmp_path: Path) -> None:
    read = read_image(saved(tmp_path, (GREYS.astype(np.uint16) * 257)))
    assert torch.equal(in_channels(read, 1), (torch.from_numpy(GREYS.copy()).double() / 255).float()[None])


def test_colours_become_brightness_as_pillow_has_it(tmp_path: Path) -> None:
    read = read_image(saved(tmp_path, COLOURS))
    expected = np.asarray(Image.fromarray(COLOURS).convert("L"))
    assert torch.equal(in_channels(read, 1)[0], torch.from_numpy(expected.copy()))
    assert torch.equal(in_channels(read, 3), torch.from_numpy(COLOURS.copy()).permute(2, 0, 1))


def test_colours_of_tensors_become_brightness() -> None:
    image = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(1))
    red, green, blue = image
    brightness = 0.2989 * red + 0.587 * green + 0.114 * blue
    torch.testing.assert_close(in_channels(image, 1)[0], brightness, rtol=0, atol=apart(10, torch.float32))
    assert torch.equal(in_channels(image[:1].repeat(3, 1, 1), 1), image[:1])
    assert torch.equal(in_channels(image[:1], 3), image[:1].repeat(3, 1, 1))
    assert torch.equal(in_channels(image[:2], None), image[:2])
    with pytest.raises(ValueError, match=r"^2 channels, and data.channels=3 is for images of 1 or 3; leave it out$"):
        in_channels(image[:2], 3)


def test_a_folder_of_grey_images_has_three_equal_channels_and_says_so(tmp_path: Path) -> None:
    section = images(tmp_path, GREYS, GREYS[::-1])
    data = loaded(section)
    assert data.image_shape == (3, 16, 16)
    (note,) = data.notes
    assert note == (
        f"data.channels: the images of image_folder {tmp_path.name} are grey, as far as looked at, and read in three "
        "equal channels; data.channels=1 keeps one, where the model takes one"
    )
    again = loaded(section, channels=3)
    assert again.notes == data.notes
    assert all(torch.equal(data.test[at][0], again.test[at][0]) for at in range(len(data.test)))


def test_one_channel_of_a_folder_is_normalised_by_halves(tmp_path: Path) -> None:
    data = loaded(images(tmp_path, GREYS), channels=1)
    assert data.image_shape == (1, 16, 16)
    assert data.image_bytes == 256
    assert data.notes == ()
    expected = (torch.from_numpy(GREYS.copy()).float() / 255 - 0.5) / 0.5
    torch.testing.assert_close(data.test[0][0][0], expected, rtol=0, atol=apart(10, torch.float32))
    assert torch.equal(data.train[0][0], data.probe[0][0])


def test_colour_is_told_of_only_where_it_goes(tmp_path: Path) -> None:
    section = images(tmp_path, GREYS, COLOURS)
    assert loaded(section).notes == ()
    (note,) = loaded(section, channels=1).notes
    assert note == f"data.channels: the images of image_folder {tmp_path.name} are in colour, and made grey"


def test_images_in_memory_are_repeated_with_their_statistics() -> None:
    section = DataSection(name="digits")
    plain, repeated = loaded(section), loaded(section, channels=3)
    assert repeated.image_shape == (3, 8, 8)
    assert repeated.notes == ("data.channels: the images of digits are grey, and repeated in three channels",)
    assert loaded(section, channels=1).notes == plain.notes == ()
    assert (repeated.content()["mean"], repeated.content()["std"]) == ([0.3058] * 3, [0.3764] * 3)
    assert torch.equal(repeated.train[5][0], plain.train[5][0].repeat(3, 1, 1))
    assert repeated.train[5][1] == plain.train[5][1]


@pytest.mark.parametrize(
    ("name", "channels", "expected"),
    [
        ("MNIST", 3, ([0.1307] * 3, [0.3081] * 3)),
        ("MNIST", 1, ([0.1307], [0.3081])),
        ("CIFAR10", 1, ([0.5], [0.5])),
        ("ImageNet", 1, ([0.5], [0.5])),
        ("image_folder", 3, IMAGENET),
    ],
)
def test_statistics_go_by_the_channels(name: str, channels: int, expected: Any) -> None:
    mean, std = statistics(DataSection(name=name), channels)
    assert (list(mean), list(std)) == expected


def test_images_with_masks_have_one_channel_too(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for number in range(4):
            saved(tmp_path / part / "images", GREYS, f"{number}.png")
            saved(tmp_path / part / "masks", GREYS % 3, f"{number}.png")
    section = DataSection(name="segmentation_folder", root=str(tmp_path), probe_size=1, channels=1)
    data = loaded(section, mean=[0.0], std=[1.0], augment="segmentation", image_size=8)
    image, mask = loaded(section, mean=[0.0], std=[1.0]).test[0]
    assert torch.equal((image * 255).round().to(torch.uint8), torch.from_numpy(GREYS.copy())[None])
    assert torch.equal(mask, torch.from_numpy(GREYS % 3))
    assert data.train[0][0].shape == (1, 8, 8)


def test_statistics_of_other_channels_are_refused_at_what_was_given(tmp_path: Path) -> None:
    section = images(tmp_path, GREYS)
    with pytest.raises(RecipeValueError, match=r"^data.mean: 3 given, and images have 1 channel") as raised:
        loaded(section, channels=1, mean=[0.1, 0.2, 0.3])
    assert raised.value.others == ("data.mean", "data.channels")


def test_data_of_ones_own_is_brought_there_only_where_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "grey_sets.py").write_text(
        "import torch\nfrom torch.utils.data import TensorDataset\n"
        "def make(): return [TensorDataset(torch.full((9, 1, 4, 4), 51, dtype=torch.uint8), torch.arange(9))] * 2\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    section = DataSection(entrypoint="grey_sets:make", probe_size=2)
    assert loaded(section).image_shape == (1, 4, 4)
    data = loaded(section, channels=3)
    assert data.image_shape == (3, 4, 4)
    black = torch.tensor([(0.2 - mean) / std for mean, std in zip(*IMAGENET, strict=True)])
    torch.testing.assert_close(data.test[0][0][:, 0, 0], black, rtol=0, atol=apart(10, torch.float32, magnitude=2))
