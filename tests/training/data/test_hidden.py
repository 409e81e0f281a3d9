"""Names that begin with a dot are no classes, images or masks; a note says so, once."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from neq_cli.errors import NeqError
from neq_cli.recipe import DataSection
from neq_cli.training.data.hidden import Hidden
from neq_cli.training.data.sources import open_source

SKIPPED = "data: names that begin with a dot are skipped"


def save(path: Path, value: int = 7) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4), value, np.uint8)).save(path)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """An image folder of two classes below a folder that is hidden itself, which is of no matter."""
    root = tmp_path / ".cache" / "pets"
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            for number in range(3):
                save(root / part / name / f"{number}.png", number)
            save(root / part / name / "more" / "3.png", 3)
    return root


def section(root: Path) -> DataSection:
    return DataSection(name="image_folder", root=str(root))


def test_hidden_folders_are_no_classes_and_hidden_files_no_images(images: Path) -> None:
    plain = open_source(section(images))
    assert plain.notes == ()
    save(images / "train" / ".ipynb_checkpoints" / "0.png")
    (images / "test" / ".empty").mkdir()
    (images / "train" / "cat" / "._0.png").write_bytes(b"what macOS keeps beside a file")
    (images / "train" / "cat" / ".DS_Store").write_bytes(b"no image, and no matter")
    save(images / "train" / "dog" / "more" / ".thumbnails" / "deep" / "0.png")
    found = open_source(section(images))
    assert found.classes == plain.classes == ("cat", "dog")
    assert found.train.samples == plain.train.samples
    assert found.test.samples == plain.test.samples
    assert found.notes == (
        f"{SKIPPED} (4): train/.ipynb_checkpoints, train/cat/._0.png, train/dog/more/.thumbnails and 1 more",
    )


def test_images_are_those_of_torchvision_in_its_order(images: Path) -> None:
    found, expected = open_source(section(images)).train, ImageFolder(str(images / "train"))
    assert (found.samples, found.targets, found.class_to_idx) == (
        expected.samples,
        expected.targets,
        expected.class_to_idx,
    )
    assert type(found) is ImageFolder
    assert pickle.loads(pickle.dumps(found)).samples == expected.samples  # to a worker that is started afresh


def test_a_class_of_hidden_images_alone_has_none(images: Path) -> None:
    for path in sorted((images / "train" / "cat").rglob("*.png")):
        path.rename(path.with_name(f".{path.name}"))
    with pytest.raises(NeqError, match=r"^data.root: '.*/train' has no images for the classes 'cat'$"):
        open_source(section(images))
    allowed = section(images).model_copy(update={"kwargs": {"allow_empty": True}})
    assert len(open_source(allowed).train) == 4


def test_a_folder_of_hidden_folders_has_no_classes(tmp_path: Path) -> None:
    save(tmp_path / "train" / ".cat" / "0.png")
    save(tmp_path / "test" / "cat" / "0.png")
    with pytest.raises(NeqError, match=r"^data.root: '.*/train' has no class folders; put images in train/<class>/$"):
        open_source(section(tmp_path))


def test_torchvisions_class_folders(tmp_path: Path) -> None:
    for part in ("train", "valid", "test"):
        for name in ("AD", "AE"):
            save(tmp_path / "country211" / part / name / "0.png")
        save(tmp_path / "country211" / part / ".AA" / "0.png")
        save(tmp_path / "country211" / part / "AD" / "._0.png")
    source = open_source(DataSection(name="Country211", root=str(tmp_path), download=False))
    assert source.classes == ("AD", "AE")
    assert [len(source.train), len(source.test), source.train[1][1]] == [2, 2, 1]
    (note,) = source.notes
    assert note.startswith(f"{SKIPPED} (4): country211/train/.AA, country211/train/AD/._0.png, ")


def test_images_and_masks(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for folder in ("images", "masks"):
            save(tmp_path / part / folder / "0.png", 0)
            (tmp_path / part / folder / "._0.png").write_bytes(b"what macOS keeps beside a file")
        save(tmp_path / part / "images" / ".hidden" / "1.png")
    source = open_source(DataSection(name="segmentation_folder", root=str(tmp_path)))
    assert [image.name for image, _ in source.train.samples] == ["0.png"]
    assert source.notes[-1] == (
        f"{SKIPPED} (4): train/masks/._0.png, train/images/._0.png, val/masks/._0.png and 1 more"
    )
    assert torch.equal(torch.from_numpy(np.array(source.train[0][1])), torch.zeros(4, 4, dtype=torch.uint8))


def test_what_counts_as_hidden(tmp_path: Path) -> None:
    root = tmp_path / ".root"
    hidden = Hidden(root)
    paths = {
        "a/b.png": True,
        ".a/b.png": False,
        "a/.b/c/.d.png": False,
        "a/.b.png": False,
        "a.b/..c": False,
        "d.": True,
    }
    assert hidden.without(str(root / path) for path in paths) == [str(root / p) for p, kept in paths.items() if kept]
    assert hidden.notes == (f"{SKIPPED} (4): .a, a/.b, a/.b.png and 1 more",)
