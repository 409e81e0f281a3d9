"""Opening data: folders of images, torchvision's files, callables; and what can be wrong with each."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from neq_cli.errors import NeqError
from neq_cli.recipe import DataSection
from neq_cli.training.data.opened import Stored
from neq_cli.training.data.pixels import as_tensor
from neq_cli.training.data.sources import open_source

RANDOM = np.random.default_rng(0)


def pixels(*shape: int) -> Any:
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


def write_folder(root: Path, parts: dict[str, list[str]], images: int = 2) -> dict[Path, Any]:
    """Write PNG files part/class/n.png and return their pixels."""
    written = {}
    for part, classes in parts.items():
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for number in range(images):
                path = root / part / name / f"{number}.png"
                written[path] = pixels(6, 5, 3)
                Image.fromarray(written[path]).save(path)
    return written


def folder(root: Path, **values: Any) -> DataSection:
    return DataSection(name="image_folder", root=str(root), **values)


@pytest.mark.parametrize("test", ["test", "val"])
def test_an_image_folder(tmp_path: Path, test: str) -> None:
    written = write_folder(tmp_path, {"train": ["cat", "dog"], test: ["cat", "dog"]})
    source = open_source(folder(tmp_path))
    assert source.classes == ("cat", "dog")
    assert (len(source.train), len(source.test)) == (4, 4)
    for part, name in ((source.train, "train"), (source.test, test)):
        for index, path in enumerate(sorted(path for path in written if path.parts[-3] == name)):
            image, label = part[index]
            assert torch.equal(as_tensor(image), torch.from_numpy(written[path]).permute(2, 0, 1))
            assert label == ["cat", "dog"].index(path.parts[-2])


def test_the_root_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, {"train": ["a"], "test": ["a"]})
    monkeypatch.setenv("PICTURES", str(tmp_path))
    assert len(open_source(DataSection(name="image_folder", root="$PICTURES")).train) == 2


def test_image_folders_that_are_not_right(tmp_path: Path) -> None:
    def message(name: str, parts: dict[str, list[str]], images: int = 2) -> str:
        write_folder(tmp_path / name, parts, images)
        with pytest.raises(NeqError) as raised:
            open_source(folder(tmp_path / name))
        assert "\n" not in str(raised.value)
        return str(raised.value).replace(str(tmp_path), "")

    layout = "an image folder holds train/<class>/<image> and test/<class>/<image> (or val/...)"
    assert message("none", {}) == f"data.root: no folder '/none'; {layout}"
    assert message("no_train", {"test": ["a"]}) == f"data.root: '/no_train' has no folder 'train'; {layout}"
    assert message("no_test", {"train": ["a"]}) == (
        f"data.root: '/no_test' has no folder 'test'; {layout}; "
        "where there is no test part, data.validation=0.1 holds out a tenth of the images"
    )
    assert message("empty", {"train": ["a", "b"], "test": ["a"]}, 0) == (
        "data.root: '/empty/train' has no images for the classes 'a', 'b'"
    )
    assert message("differ", {"train": ["a", "b"], "test": ["a", "c"]}) == (
        "data.root: '/differ/train' and '/differ/test' differ in classes: 'b', 'c'; every class needs a folder in both"
    )
    (tmp_path / "flat" / "train").mkdir(parents=True)
    Image.fromarray(pixels(4, 4, 3)).save(tmp_path / "flat" / "train" / "a.png")
    assert message("flat", {"test": ["a"]}) == (
        "data.root: '/flat/train' has no class folders; put images in train/<class>/"
    )


def write_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Write CIFAR-10's pickled batches, three images each, and give torchvision their checksums."""
    base = root / "cifar-10-batches-py"
    base.mkdir(parents=True)
    files, written = {}, {}
    for name in ("data_batch_1", "data_batch_2", "test_batch", "batches.meta"):
        content: dict[str, Any] = {"label_names": [f"class{number}" for number in range(10)]}
        if name != "batches.meta":
            content = {"data": pixels(3, 3072), "labels": RANDOM.integers(0, 10, 3).tolist()}
            written[name] = content
        (base / name).write_bytes(pickle.dumps(content))
        files[name] = hashlib.md5((base / name).read_bytes()).hexdigest()
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [[n, files[n]] for n in ("data_batch_1", "data_batch_2")])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", files["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": files["batches.meta"]}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    return written


def test_cifar10s_files_are_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = write_cifar10(tmp_path, monkeypatch)
    source = open_source(DataSection(name="cifar10", root=str(tmp_path), download=False))
    assert isinstance(source.train, Stored)
    assert isinstance(source.test, Stored)
    assert source.classes == tuple(f"class{number}" for number in range(10))
    batches = [written["data_batch_1"], written["data_batch_2"]]
    # A row of the file is 1024 red, then green, then blue pixels, row by row.
    expected = np.concatenate([batch["data"] for batch in batches]).reshape(6, 3, 32, 32)
    assert torch.equal(source.train.images, torch.from_numpy(expected))
    assert source.train.labels.tolist() == [label for batch in batches for label in batch["labels"]]
    assert torch.equal(source.test.images, torch.from_numpy(written["test_batch"]["data"].reshape(3, 3, 32, 32)))


def test_mnists_files_are_read_into_memory(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    written = {}
    for part in ("train", "t10k"):
        images, labels = pixels(4, 28, 28), pixels(4) % 10
        written[part] = images, labels
        header = struct.pack(">IIII", 0x803, 4, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 4) + labels.tobytes())
    source = open_source(DataSection(name="MNIST", root=str(tmp_path)))
    for part, name in ((source.train, "train"), (source.test, "t10k")):
        assert torch.equal(part.images, torch.from_numpy(written[name][0]).unsqueeze(1))
        assert part.labels.tolist() == written[name][1].tolist()
    assert len(source.classes) == 10


def test_svhns_files_are_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scipy = pytest.importorskip("scipy.io")
    lists = dict(datasets.SVHN.split_list)
    written = {}
    for part in ("train", "test"):
        file = f"{part}_32x32.mat"
        images, labels = pixels(32, 32, 3, 4), np.array([[10], [1], [2], [9]], dtype=np.uint8)
        scipy.savemat(tmp_path / file, {"X": images, "y": labels})
        lists[part] = ["", file, hashlib.md5((tmp_path / file).read_bytes()).hexdigest()]
        written[part] = images
    monkeypatch.setattr(datasets.SVHN, "split_list", lists)
    source = open_source(DataSection(name="SVHN", root=str(tmp_path)))
    assert source.train.labels.tolist() == [0, 1, 2, 9]  # the file calls the digit zero 10
    assert torch.equal(source.test.images, torch.from_numpy(written["test"].transpose(3, 2, 0, 1).copy()))
    assert source.classes == tuple("0123456789")


def test_gtsrb_is_read_file_by_file(tmp_path: Path) -> None:
    for number in range(2):
        path = tmp_path / "gtsrb" / "GTSRB" / "Training" / f"{number:05d}"
        path.mkdir(parents=True)
        Image.fromarray(pixels(9, 8, 3)).save(path / "0.ppm")
    tests = tmp_path / "gtsrb" / "GTSRB" / "Final_Test" / "Images"
    tests.mkdir(parents=True)
    Image.fromarray(pixels(7, 8, 3)).save(tests / "0.ppm")
    (tmp_path / "gtsrb" / "GT-final_test.csv").write_text("Filename;ClassId\n0.ppm;1\n")
    source = open_source(DataSection(name="gtsrb", root=str(tmp_path)))
    assert (len(source.train), len(source.test), len(source.classes)) == (2, 1, 43)
    assert not isinstance(source.train, Stored)


def test_data_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any) -> None:
        raise RuntimeError("no network\nat all")

    def message(**values: Any) -> str:
        with pytest.raises(NeqError) as raised:
            open_source(DataSection(root=str(tmp_path / "data"), **values))
        assert "\n" not in str(raised.value)
        return str(raised.value).replace(str(tmp_path), "")

    monkeypatch.setattr(datasets.CIFAR10, "download", fail)
    assert message(name="CIFAR10") == (
        "data.root: CIFAR10 is not in '/data', or not whole, and could not be downloaded (RuntimeError: no network); "
        "set data.root to where it is, or check the network"
    )
    assert message(name="CIFAR10", download=False) == (
        "data.root: CIFAR10 is not in '/data' (RuntimeError: Dataset not found or corrupted. You can use download=True "
        "to download it); set data.download=true, or data.root to where it is"
    )
    assert message(name="ImageNet").endswith(
        "torchvision cannot download it; put its files there as torchvision's documentation says"
    )
    assert message(name="EMNIST", kwargs={"split": "lettres"}).startswith("data.kwargs: EMNIST cannot be opened (Value")


def test_a_disk_that_refuses_is_not_laid_to_the_network(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NeqError, match="NotADirectoryError") as raised:
        open_source(DataSection(name="CIFAR10", root=str(tmp_path / "file" / "data")))
    assert "network" not in str(raised.value)
    assert str(raised.value).endswith(
        "set data.root to where it is, or to a folder that can be written to and has room"
    )


@pytest.mark.parametrize("name", ["image_folder", "segmentation_folder", "COCO"])
def test_a_folder_that_may_not_be_looked_into_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def refuse(self: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "is_dir", refuse)
    monkeypatch.setattr(Path, "is_file", refuse)
    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(NeqError, match=r"^data.root: '.*' cannot be read \(PermissionError: .*Permission denied"):
        open_source(DataSection(name=name, root=str(tmp_path)))


def test_an_error_without_arguments_is_not_laid_to_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(self: Any, *arguments: Any, **named: Any) -> None:
        raise ValueError("buffer is smaller than requested size")

    monkeypatch.setattr(datasets.MNIST, "__init__", torn)
    with pytest.raises(NeqError, match=r"^data\.root: MNIST cannot be opened \(ValueError: buffer"):
        open_source(DataSection(name="MNIST", root=str(tmp_path)))


def test_what_is_missing_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def write(self: datasets.MNIST) -> None:
        asked.append(self.train)
        raw = Path(self.raw_folder)
        raw.mkdir(parents=True)
        for part in ("train", "t10k"):
            images = struct.pack(">IIII", 0x803, 1, 28, 28) + bytes(784)
            (raw / f"{part}-images-idx3-ubyte").write_bytes(gzip.decompress(gzip.compress(images)))
            (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 1) + bytes(1))

    monkeypatch.setattr(datasets.MNIST, "download", write)
    source = open_source(DataSection(name="MNIST", root=str(tmp_path / "new")))
    assert asked == [True]  # the training part fetched both
    assert (len(source.train), len(source.test)) == (1, 1)


def test_fake_data_has_different_images_in_both_parts() -> None:
    section = DataSection(name="FakeData", kwargs={"size": 6, "image_size": [3, 4, 4], "num_classes": 3})
    source = open_source(section)
    assert (len(source.train), len(source.test), source.classes) == (6, 6, ("0", "1", "2"))
    images = [as_tensor(part[index][0]) for part in (source.train, source.test) for index in range(6)]
    assert len({image.numpy().tobytes() for image in images}) == 12
    wrong = DataSection(name="FakeData", kwargs={"image_size": "large"})
    with pytest.raises(NeqError, match=r"^data.kwargs: FakeData cannot be made \("):
        open_source(wrong)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "sourcesmodule", raising=False)
    (tmp_path / "sourcesmodule.py").write_text(
        "import torch\n"
        "from torch.utils.data import Subset, TensorDataset\n"
        "def tensors(count=4): return [TensorDataset(torch.rand(count, 1, 2, 2), torch.arange(count)) for _ in '12']\n"
        "class Named(list): classes = ['x', 'y']\n"
        "def named(root): return Subset(Named([(root, 0)]), [0]), Named([(root, 1)])\n"
        "def silent(): return [(1, 0)], [(1, 0)]\n"
        "def three(): return [], [], []\n"
        "def no_datasets(): return 1, 2\n"
        "def fails(): raise KeyError('x')\n"
    )
    return "sourcesmodule"


def test_an_entrypoint_is_called(module: str, tmp_path: Path) -> None:
    source = open_source(DataSection(entrypoint=f"{module}:tensors", kwargs={"count": 5}))
    assert (len(source.train), source.classes) == (5, ("0", "1", "2", "3", "4"))
    source = open_source(DataSection(entrypoint=f"{module}:named", root=str(tmp_path)))
    assert source.classes == ("x", "y")
    assert source.test[0] == (str(tmp_path), 1)


@pytest.mark.parametrize(
    ("name", "kwargs", "says"),
    [
        ("silent", {}, "data.entrypoint: the training dataset of '{m}:silent' does not tell its classes"),
        ("three", {}, "data.entrypoint: '{m}:three' must return (train, test), two datasets"),
        ("no_datasets", {}, "data.entrypoint: '{m}:no_datasets' must return (train, test), two datasets"),
        ("fails", {}, "data.entrypoint: '{m}:fails' raised KeyError: 'x' ("),
        ("tensors", {"cuont": 1}, "data.kwargs.cuont: unknown argument 'cuont' of {m}:tensors; did you mean 'count'?"),
    ],
)
def test_entrypoints_that_fail(module: str, name: str, kwargs: dict[str, Any], says: str) -> None:
    with pytest.raises(NeqError) as raised:
        open_source(DataSection(entrypoint=f"{module}:{name}", kwargs=kwargs))
    assert str(raised.value).startswith(says.format(m=module))
