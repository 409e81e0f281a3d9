"""Pixels of more than 8 bits: scaled by their range wherever images are read, or refused by the name of their file."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from neq_cli.errors import NeqError
from neq_cli.jobs.train import train
from neq_cli.recipe import DataSection
from neq_cli.recipe.load import load_recipe
from neq_cli.runs.store.run import read_run
from neq_cli.runs.views.live.progress import Silent
from neq_cli.training.checks import check_section
from neq_cli.training.data.parts import load_data
from neq_cli.training.data.pixels import as_tensor, read_image

LOW, HIGH = 3054, 18782
CLASSES = ("dark", "middle", "light")
Write = Callable[[np.ndarray[Any, Any], Path], None]


def grey_16(seed: int, middle: int, size: int = 8) -> np.ndarray[Any, Any]:
    """Values of 16 bits about ``middle``; the lowest and the highest of the classes are ``LOW`` and ``HIGH``."""
    noise = np.random.default_rng(seed).integers(-1500, 1501, (size, size))
    values = (middle + noise).clip(LOW, HIGH).astype(np.uint16)
    values[0, :2] = LOW, HIGH
    return values


def in_8_bits(values: np.ndarray[Any, Any], low: float, high: float) -> np.ndarray[Any, Any]:
    return np.rint((values.astype(float) - low) / (high - low) * 255).astype(np.uint8)


def save(values: np.ndarray[Any, Any], path: Path) -> None:
    Image.fromarray(values).save(path)


def save_16_bit_rgb(values: np.ndarray[Any, Any], path: Path) -> None:
    """Write [height, width, 3] as a PNG of three channels of 16 bits, which Pillow cannot write."""
    height, width, _ = values.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b""))


def write_folder(root: Path, convert: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]], images: int = 6) -> None:
    for part, offset in (("train", 0), ("test", 1000)):
        for number, (name, middle) in enumerate(zip(CLASSES, (5000, 11000, 17000), strict=True)):
            folder = root / part / name
            folder.mkdir(parents=True)
            for image in range(images):
                save(convert(grey_16(offset + 100 * number + image, middle)), folder / f"{image}.png")


def section(root: Path, name: str = "image_folder", **values: Any) -> DataSection:
    return DataSection(name=name, root=str(root), probe_size=2, mean=[0.0], std=[1.0], **values)


def tensors(recipe: DataSection) -> Tensor:
    recipe = recipe.model_copy(update={"mean": [0.0] * 3, "std": [1.0] * 3})
    data = load_data(recipe, 1)
    parts = [torch.stack([part[index][0] for index in range(len(part))]) for part in (data.train, data.probe)]
    return torch.cat([*parts, *(data.test[index][0].unsqueeze(0) for index in range(len(data.test)))])


@pytest.mark.parametrize(("value_range", "low", "high"), [(None, 0, 65535), ([LOW, HIGH], LOW, HIGH)])
@pytest.mark.parametrize("image_size", [None, 5])
def test_16_bit_images_are_like_their_8_bit_twins(
    tmp_path: Path, value_range: Any, low: int, high: int, image_size: int | None
) -> None:
    write_folder(tmp_path / "16", lambda values: values)
    write_folder(tmp_path / "8", lambda values: in_8_bits(values, low, high))
    wide = tensors(section(tmp_path / "16", value_range=value_range, image_size=image_size))
    narrow = tensors(section(tmp_path / "8", image_size=image_size))
    # 8 bits are off by half a step; scaling rounds after each of its two passes, and its weights too.
    torch.testing.assert_close(wide, narrow, rtol=0, atol=(0.5 if image_size is None else 2) / 255 + 1e-6)
    assert wide.max() < 1 or value_range is not None
    assert len(wide.unique()) > len(narrow.unique())  # nothing is lost to 8 bits


RECIPE = """
model: {{entrypoint: "tinymodule:make"}}
data: {{name: image_folder, root: {root}, probe_size: 2, workers: 0, value_range: {value_range}}}
epochs: 15
batch_size: 8
optimizer: {{name: sgd, lr: 0.05, momentum: 0.9}}
device: cpu
channels_last: false
"""


def test_16_bit_images_train_as_their_8_bit_twins_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tinymodule.py").write_text(
        "from torch import nn\n"
        "def make(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "16", lambda values: values, images=8)
    write_folder(tmp_path / "8", lambda values: in_8_bits(values, LOW, HIGH), images=8)
    scores = []
    for name, value_range in (("16", [LOW, HIGH]), ("8", "null")):
        (tmp_path / f"{name}.yaml").write_text(RECIPE.format(root=tmp_path / name, value_range=value_range))
        run = train(load_recipe(str(tmp_path / f"{name}.yaml"), []), tmp_path / f"run-{name}", Silent())
        scores.append(read_run(run).column("test_top1")[-1])
    assert scores == [100, 100]


def grey_picture(mode: str) -> Any:
    values = np.array([[0, 1000], [30000, 65535]])
    types = {"I;16": np.uint16, "I;16B": np.dtype(">u2"), "I": np.int32, "F": np.float32}
    return Image.frombuffer(mode, (2, 2), values.astype(types[mode]).tobytes(), "raw", mode, 0, 1)


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_the_range_is_that_of_the_type(mode: str) -> None:
    expected = torch.tensor([[[0, 1000], [30000, 65535]]]).double() / 65535
    torch.testing.assert_close(as_tensor(grey_picture(mode)).double(), expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_a_range_that_is_not_known_is_asked_for(mode: str) -> None:
    with pytest.raises(ValueError, match=r"from 0 to 65535, whose range is not known; set data.value_range to what"):
        as_tensor(grey_picture(mode))
    expected = torch.tensor([[[0, 0], [1, 1]]]).float()  # what lies outside is cut off
    torch.testing.assert_close(as_tensor(grey_picture(mode), (1000, 30000)), expected)


def test_16_bits_that_pillow_calls_32_bits(tmp_path: Path) -> None:
    (tmp_path / "a.pgm").write_bytes(b"P5\n2 1\n65535\n" + np.array([3054, 18782], ">u2").tobytes())
    with Image.open(tmp_path / "a.pgm") as picture:
        assert picture.mode in ("I", "I;16")
        image = as_tensor(picture)
    torch.testing.assert_close(image, torch.tensor([[[3054 / 65535, 18782 / 65535]]]))


def test_floats_from_0_to_1_are_in_their_range(tmp_path: Path) -> None:
    save(np.array([[0.25, 0.5]], np.float32), tmp_path / "a.tiff")
    assert read_image(tmp_path / "a.tiff").tolist() == [[[0.25, 0.5]]] * 3


def test_a_tiff_of_12_bits_has_their_range(tmp_path: Path) -> None:
    # Two pixels of 12 bits, 0xFFF and 0x800, in three bytes.
    tags = [(256, 2), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 3)]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    (tmp_path / "a.tif").write_bytes(b"II*\0" + struct.pack("<I", 12) + b"\xff\xf8\x00\0" + directory + bytes(4))
    image = read_image(tmp_path / "a.tif")
    torch.testing.assert_close(image, torch.tensor([[[1, 0x800 / 0xFFF]]] * 3))


def test_16_bits_in_colour_are_read_as_8_by_their_type_and_refused_with_another_range(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(LOW, HIGH, (4, 4, 3)).astype(np.uint16)
    save_16_bit_rgb(values, tmp_path / "a.png")
    image = as_tensor(read_image(tmp_path / "a.png")).permute(1, 2, 0).double() / 255
    # Pillow takes the upper 8 bits: less than a step too dark, and 65535 / 256 is 255.996.
    torch.testing.assert_close(image, torch.from_numpy(values / 65535), rtol=0, atol=1 / 255)
    with pytest.raises(NeqError) as raised:
        read_image(tmp_path / "a.png", (0, 200))
    assert str(raised.value) == (
        f"{tmp_path}/a.png: cannot be used (ValueError: 16 bits per channel in colour, read as 8: data.value_range "
        "cannot be had; store it as grey); mend or remove it"
    )


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "P, transparent", "RGB", "RGBA", "CMYK", "YCbCr"])
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_8_bits_are_read_as_torchvision_reads_them(tmp_path: Path, mode: str) -> None:
    from torchvision.datasets.folder import default_loader

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 6, 4), dtype=np.uint8))  # RGBA
    if mode != "RGBA":
        picture = picture.convert("RGB").convert(mode.partition(",")[0])
    if mode == "P, transparent":
        picture.info["transparency"] = bytes(range(200))
    path = tmp_path / ("a.tif" if mode in ("CMYK", "YCbCr") else "a.png")
    exif = Image.Exif()
    exif[0x112] = 6  # turned by a quarter
    picture.save(path, exif=exif)
    try:
        expected = as_tensor(default_loader(str(path)))
    except OSError:
        pytest.skip(f"this Pillow cannot read what it writes in {mode}")
    assert torch.equal(as_tensor(read_image(path)), expected)


def test_an_image_of_fewer_bits_than_the_range_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, lambda values: values)
    odd = tmp_path / "train" / "middle" / "3.png"
    save(in_8_bits(grey_16(0, 9000), LOW, HIGH), odd)
    for value_range, says in (
        (
            [LOW, HIGH],
            "cannot be used (ValueError: pixels of 8 bits end below data.value_range [3054, 18782]; store all",
        ),
        (None, "8 bits, but others have more than 8 bits (float32); store all images alike"),
    ):
        with pytest.raises(NeqError) as raised:
            tensors(section(tmp_path, value_range=value_range))
        assert str(raised.value).startswith(f"{odd}: {says}")


def test_pixels_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    save(np.array([[0.25, np.nan]], np.float32), tmp_path / "a.tiff")
    for value_range in (None, (0.0, 1.0)):
        with pytest.raises(NeqError, match=r"a\.tiff: cannot be used \(ValueError: "):
            read_image(tmp_path / "a.tiff", value_range)


@pytest.mark.parametrize("what", ["junk", "cut off", "unknown range"])
def test_a_broken_first_image_is_named(tmp_path: Path, what: str) -> None:
    write_folder(tmp_path, lambda values: in_8_bits(values, LOW, HIGH))
    first = tmp_path / "train" / "dark" / "0.png"
    if what == "junk":
        first.write_bytes(b"no image")
    elif what == "cut off":
        first.write_bytes(first.read_bytes()[:60])
    else:
        first.unlink()
        first = first.with_suffix(".tiff")
        save(np.full((8, 8), -5, np.int32), first)
    with pytest.raises(NeqError) as raised:
        load_data(section(tmp_path), 1)
    assert str(raised.value).startswith(f"data: {first}: cannot be used (")
    assert str(raised.value).endswith("mend or remove it")


def write_pairs(root: Path, convert: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> None:
    for part in ("train", "test"):
        for folder in ("images", "masks"):
            (root / part / folder).mkdir(parents=True)
        for number in range(4):
            save(convert(grey_16(number, 9000)), root / part / "images" / f"{number}.png")
            save((grey_16(number, 9000) > 9000).astype(np.uint8), root / part / "masks" / f"{number}.png")


@pytest.mark.parametrize("value_range", [None, [LOW, HIGH]])
def test_16_bit_images_with_masks(tmp_path: Path, value_range: Any) -> None:
    low, high = value_range or (0, 65535)
    write_pairs(tmp_path / "16", lambda values: values)
    write_pairs(tmp_path / "8", lambda values: in_8_bits(values, low, high))
    wide = tensors(section(tmp_path / "16", "segmentation_folder", value_range=value_range))
    narrow = tensors(section(tmp_path / "8", "segmentation_folder"))
    torch.testing.assert_close(wide, narrow, rtol=0, atol=0.5 / 255 + 1e-6)


def test_a_broken_mask_of_the_first_image_is_named(tmp_path: Path) -> None:
    write_pairs(tmp_path, lambda values: in_8_bits(values, LOW, HIGH))
    (tmp_path / "classes.txt").write_text("a\nb\n")
    mask = tmp_path / "train" / "masks" / "0.png"
    save(np.random.default_rng(0).integers(0, 2, (60, 60), np.uint8), mask)
    mask.write_bytes(mask.read_bytes()[:-60])
    with pytest.raises(NeqError, match=rf"^data: {mask}: cannot be used \("):
        load_data(section(tmp_path, "segmentation_folder"), 1)


MODULE = """
import numpy as np, torch
from PIL import Image
class Own(list): classes = ['a', 'b']
def make(kind):
    values = np.arange(16).reshape(4, 4) * 1000
    images = {
        'picture': Image.fromarray(values.astype(np.uint16)),
        'uint16': values.astype(np.uint16)[..., None],
        'int64': torch.from_numpy(values)[None],
        'float': torch.from_numpy(values / 65535).float()[None],
    }
    return [Own([(images[kind], 0)] * 6) for _ in '12']
"""


@pytest.mark.parametrize(
    ("kind", "value_range", "normalised"),
    [
        ("picture", None, True),
        ("uint16", None, True),
        ("float", None, False),  # taken as its author has prepared it
        ("picture", [0, 65535], True),
        ("uint16", [0, 65535], True),
        ("int64", [0, 65535], True),
    ],
)
@pytest.mark.parametrize("cache", ["none", "memory"])
def test_data_of_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, value_range: Any, normalised: bool, cache: Any
) -> None:
    from neq_cli.training.batches.loaders import make_loaders

    (tmp_path / "widemodule.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = DataSection(
        entrypoint="widemodule:make", kwargs={"kind": kind}, probe_size=1, value_range=value_range, workers=0
    )
    made = make_loaders(load_data(own, 1), 2, 0, 1, torch.device("cpu"), cache=cache)
    expected = torch.arange(16).view(1, 4, 4) * 1000 / 65535
    expected = (expected - 0.5) / 0.5 if normalised else expected
    for _ in range(2):  # the second time, what was kept
        for images, _ in made.test:
            torch.testing.assert_close(images, expected.expand_as(images))


def test_integers_of_no_known_range_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "widemodule.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = DataSection(entrypoint="widemodule:make", kwargs={"kind": "int64"}, probe_size=1)
    with pytest.raises(
        NeqError, match=r"pixels of torch.int64, whose range is not known; return uint8, or set data.val"
    ):
        load_data(own, 1)


def test_images_kept_in_sizes_of_their_own_are_scaled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from neq_cli.training.batches.loaders import make_loaders

    (tmp_path / "widemodule.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = DataSection(
        entrypoint="widemodule:make",
        kwargs={"kind": "uint16"},
        probe_size=1,
        value_range=[0, 20000],
        augment="imagenet",
        image_size=4,
    )
    data = load_data(own, 1)
    kept, read = (
        [images for images, _ in make_loaders(data, 2, 0, 1, torch.device("cpu"), cache=cache).train]
        for cache in ("memory", "none")
    )
    assert torch.equal(torch.cat(kept), torch.cat(read))


def test_what_is_no_range(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"value_range \[9.0, 3.0\] is not from a lower to a higher value"):
        DataSection(name="image_folder", value_range=[9.0, 3.0])
    digits = DataSection(name="digits", value_range=[0.0, 16.0])
    says = "is for images in files, or data of your own; digits has 8 bits, remove it"
    assert [(problem.key, problem.message) for problem in check_section("data", digits)] == [("data.value_range", says)]
    with pytest.raises(NeqError, match=r"^data.value_range: is for images in files"):
        load_data(digits, 1)
