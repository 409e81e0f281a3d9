"""COCO's layout, written small: which images, which classes, and what overlaps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from neq_cli.errors import NeqError
from neq_cli.recipe import DataSection
from neq_cli.training.data.mask_sources import CATEGORIES, VOC_CLASSES, CocoMasks, painted
from neq_cli.training.data.parts import load_data

pytest.importorskip("pycocotools")

PERSON, DOG, FRISBEE = 1, 18, 34  # a frisbee is none of the 21 classes
HEIGHT, WIDTH = 50, 60


def box(left: int, top: int, right: int, below: int) -> list[list[int]]:
    return [[left, top, right, top, right, below, left, below]]


def annotation(image: int, category: int, outline: Any, area: int, **more: Any) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "segmentation": outline, "area": area, "iscrowd": 0, **more}


def write(root: Path) -> None:
    """Three images: a dog beside a person, overlapping; a frisbee; a person too small."""
    crowd = {"size": [HEIGHT, WIDTH], "counts": [0, 5 * HEIGHT, 55 * HEIGHT]}  # the first five columns
    found = [
        annotation(1, DOG, box(10, 10, 40, 50), 1200),
        annotation(1, PERSON, box(30, 0, 50, 30), 600),
        annotation(1, PERSON, crowd, 250, iscrowd=1),
        annotation(2, FRISBEE, box(0, 0, 50, 50), 2500),
        annotation(3, PERSON, box(0, 0, 10, 10), 100),
        annotation(4, DOG, box(0, 0, 60, 50), 3000),
    ]
    (root / "annotations").mkdir(parents=True)
    for part in ("train", "val"):
        folder = root / f"{part}2017"
        folder.mkdir()
        images = []
        for number in (1, 2, 3, 4):
            Image.fromarray(np.full((HEIGHT, WIDTH), 40 * number, np.uint8)).save(folder / f"{number}.jpg")
            images.append({"id": number, "file_name": f"{number}.jpg", "height": HEIGHT, "width": WIDTH})
        content = {
            "images": images,
            "annotations": [{"id": place, **one} for place, one in enumerate(found, 1)],
            "categories": [{"id": number, "name": str(number)} for number in (PERSON, DOG, FRISBEE)],
        }
        (root / "annotations" / f"instances_{part}2017.json").write_text(json.dumps(content))


def test_the_classes_are_those_of_pascal_voc() -> None:
    assert len(VOC_CLASSES) == len(CATEGORIES) == len(set(CATEGORIES)) == 21
    assert (VOC_CLASSES[CATEGORIES.index(PERSON)], VOC_CLASSES[CATEGORIES.index(DOG)]) == ("person", "dog")


def test_a_mask_has_every_objects_class_and_ignores_overlaps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path)
    part = CocoMasks(tmp_path, "val", only_with_objects=False)
    image, mask = part[0]
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[10:50, 10:40] = VOC_CLASSES.index("dog")
    expected[0:30, 30:50] = VOC_CLASSES.index("person")
    expected[10:30, 30:40] = 255
    expected[:, :5] = VOC_CLASSES.index("person")
    assert (mask == expected).mean() > 0.97  # polygons may end half a pixel off
    assert image.mode == "RGB"
    assert not part[1][1].any()
    assert capsys.readouterr().out == ""


def test_images_of_too_little_are_not_trained_on_but_tested(tmp_path: Path) -> None:
    write(tmp_path)
    data = load_data(DataSection(name="COCO", root=str(tmp_path), image_size=32, probe_size=1), 1)
    assert (len(data.train) + len(data.probe), len(data.test), data.num_classes) == (2, 4, 21)
    assert data.image_shape == (3, 32, 32)
    image, mask = data.test[3]
    assert image.shape[-2:] == mask.shape == (32, 38)
    assert torch.equal(mask.unique(), torch.tensor([VOC_CLASSES.index("dog")], dtype=torch.uint8))


def test_nothing_to_paint() -> None:
    assert not painted([], 3, 4).any()


@pytest.mark.parametrize("missing", ["val2017", "annotations/instances_train2017.json"])
def test_what_is_missing_is_named(tmp_path: Path, missing: str) -> None:
    write(tmp_path)
    (tmp_path / missing).rename(tmp_path / "away")
    with pytest.raises(NeqError, match=f"^data.root: no '{tmp_path / missing}'; COCO holds train2017/"):
        load_data(DataSection(name="coco", root=str(tmp_path)), 1)


def test_a_broken_annotation_file_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    file = tmp_path / "annotations" / "instances_val2017.json"
    file.write_text("{")
    with pytest.raises(NeqError, match=f"^data.root: {file}: cannot be read"):
        load_data(DataSection(name="coco", root=str(tmp_path), probe_size=1), 1)


def test_without_pycocotools_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)

    def fail(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named '{name}'")

    monkeypatch.setattr("neq_cli.training.data.mask_sources.import_module", fail)
    with pytest.raises(NeqError, match=r"^data.name: COCO needs pycocotools .*; pip install 'neq\[coco\]'$"):
        load_data(DataSection(name="coco", root=str(tmp_path)), 1)
