"""What a folder of data holds is told as it was laid down, in every layout that training opens."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from neq_cli.errors import NeqError
from neq_cli.training.data import survey as surveys
from neq_cli.training.data.parts import load_data
from neq_cli.training.data.survey import survey


def lay(path: Path, height: int, width: int, *, mode: str = "RGB", value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (width, height), value if mode != "RGB" else (value,) * 3).save(path)
    return path


def lay_classes(root: Path, counts: dict[str, int], *, height: int = 20, width: int = 30, mode: str = "RGB") -> None:
    for name, count in counts.items():
        for number in range(count):
            lay(root / name / f"{number}.{'png' if number % 2 else 'jpg'}", height, width + number, mode=mode)


def lay_masks(root: Path, count: int, largest: int) -> None:
    for number in range(count):
        lay(root / "images" / f"{number}.jpg", 40, 50)
        lay(root / "masks" / f"{number}.png", 40, 50, mode="L", value=number % (largest + 1))


def test_parts_of_class_folders(tmp_path: Path) -> None:
    lay_classes(tmp_path / "train", {"cat": 7, "dog": 5})
    lay_classes(tmp_path / "val", {"cat": 2, "dog": 1})
    found = survey(tmp_path)
    assert (found.section.name, found.section.root) == ("image_folder", str(tmp_path))
    assert found.section.validation is None
    assert (found.classes, found.by_class) == (("cat", "dog"), (7, 5))
    assert (found.train, found.test, found.looked_at) == (12, 3, 12)
    assert (found.shorter, found.smallest, found.largest) == (20, (20, 30), (20, 36))
    assert (found.grey, found.masked) == (False, False)
    assert found.lines == (
        "a folder for each class: 2 classes, 12 images to train on, 3 to test",
        "sizes (height x width, of all): 20x30 to 20x36, median of the shorter side 20; in colour",
        "classes: cat 7, dog 5",
    )


@pytest.mark.parametrize("below", ["", "train"])
def test_classes_alone_are_to_be_divided(tmp_path: Path, below: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_classes(tmp_path / below, dict.fromkeys("abcdefghij", 3), height=8, width=8, mode="L")
    found = survey(tmp_path)
    assert found.section.validation == 0.2
    assert (found.train, found.test, found.grey) == (30, 0, True)
    assert found.lines[0].endswith("30 images to train on, none set apart to test")
    assert found.lines[1].endswith("median of the shorter side 8; grey, read in three channels")
    assert found.lines[2] == "classes: a 3, b 3, c 3, d 3, e 3, f 3, g 3, h 3 and 2 more"
    monkeypatch.setattr(surveys, "FEW", 30)
    assert survey(tmp_path).section.validation == 0.1


def test_one_image_in_colour_makes_it_colour(tmp_path: Path) -> None:
    lay_classes(tmp_path, {"a": 3}, mode="L")
    lay(tmp_path / "b" / "0.png", 9, 7)
    found = survey(tmp_path)
    assert (found.grey, found.smallest, found.shorter) == (False, (9, 7), 20)


def test_masks(tmp_path: Path) -> None:
    lay_masks(tmp_path, 6, 3)
    found = survey(tmp_path)
    assert (found.section.name, found.section.validation, found.masked) == ("segmentation_folder", 0.2, True)
    assert (found.classes, found.by_class, found.train) == (("0", "1", "2", "3"), (), 6)
    lay_masks(tmp_path / "parts" / "train", 6, 3)
    lay_masks(tmp_path / "parts" / "test", 2, 1)
    (tmp_path / "parts" / "classes.txt").write_text("ground\nsky\ncar\nme\n")
    found = survey(tmp_path / "parts")
    assert (found.section.validation, found.test, found.classes) == (None, 2, ("ground", "sky", "car", "me"))


@pytest.mark.parametrize("parts", [("train",), ("train", "test")])
def test_tables(tmp_path: Path, parts: tuple[str, ...]) -> None:
    datasets = pytest.importorskip("datasets")
    for part in parts:
        files = [str(lay(tmp_path / f"{part}{number}.png", 12, 16, mode="L")) for number in range(9)]
        table = datasets.Dataset.from_dict({"image": files, "label": [number % 3 for number in range(9)]})
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y", "z"])})
        (tmp_path / "set" / "data").mkdir(parents=True, exist_ok=True)
        table.cast(features).to_parquet(tmp_path / "set" / "data" / f"{part}-00000-of-00001.parquet")
    found = survey(tmp_path / "set")
    assert found.section.name == f"hf/{tmp_path / 'set'}"
    assert (found.classes, found.by_class, found.train) == (("x", "y", "z"), (3, 3, 3), 9)
    assert (found.section.validation, found.test) == ((0.2, 0) if len(parts) == 1 else (None, 9))
    assert (found.smallest, found.largest, found.grey) == ((12, 16), (12, 16), True)


def test_of_many_some_are_looked_at_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_classes(tmp_path, {"a": 10, "b": 10})
    monkeypatch.setattr(surveys, "MOST_LOOKED_AT", 6)
    found = survey(tmp_path)
    assert found.looked_at == 5
    assert found.largest == (20, 38), "of numbers 0, 4 and 8 of one class, 2 and 6 of the other"
    assert "of 5 of them" in found.lines[1]


def test_what_is_found_is_what_training_opens(tmp_path: Path) -> None:
    lay_classes(tmp_path, {"a": 10, "b": 10})
    found = survey(tmp_path)
    data = load_data(found.section.model_copy(update={"image_size": 8, "probe_size": 2}), 1)
    assert data.classes == found.classes
    assert len(data.train) + len(data.probe) + len(data.test) == found.train
    assert len(data.test) == 4


def test_mistakes_name_the_folder_or_the_file(tmp_path: Path) -> None:
    with pytest.raises(NeqError, match=r"^--data: no folder '.*/missing'; give the one that your images are in$"):
        survey(tmp_path / "missing")
    with pytest.raises(NeqError, match=r"^--data: '.*' has no class folders; put images in"):
        survey(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(NeqError, match=r"^--data: '.*' has no images for the classes 'a'$"):
        survey(tmp_path)
    (tmp_path / "a" / "0.png").write_bytes(b"no image")
    with pytest.raises(NeqError, match=r"^--data: .*/a/0.png: cannot be used \(UnidentifiedImageError: .*; mend"):
        survey(tmp_path)
    (tmp_path / "a$HOME").mkdir()
    with pytest.raises(NeqError, match=r"has a \$ in its path, which a recipe expands; rename it$"):
        survey(tmp_path / "a$HOME")
