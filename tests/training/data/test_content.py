from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from neq_cli.recipe import DataSection
from neq_cli.training.data.parts import MOST_NAMES, load_data


def test_an_image_folder_tells_its_class_names_and_statistics(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(2):
                Image.fromarray(np.zeros((6, 5, 3), np.uint8)).save(tmp_path / part / name / f"{number}.png")
    section = DataSection(name="image_folder", root=str(tmp_path), image_size=4, mean=[0.1, 0.2, 0.3], probe_size=1)
    content = load_data(section, 1).content()
    assert content["class_names"] == ["cat", "dog"]
    assert (content["mean"], content["std"]) == ([0.1, 0.2, 0.3], [0.229, 0.224, 0.225])
    assert (content["image_shape"], content["train"], content["test"]) == ([3, 4, 4], 4, 4)
    # The test part alone gives the same images, whether it lies in a folder of its own or not.
    for root in (tmp_path, tmp_path / "test"):
        alone = load_data(section.model_copy(update={"root": str(root)}), 1, tested_only=True)
        assert len(alone.test) == 4
        assert (alone.classes, alone.image_shape) == (("cat", "dog"), (3, 4, 4))


def test_names_are_left_out_where_there_are_too_many() -> None:
    data = load_data(DataSection(name="digits", probe_size=10), 1)
    assert data.content()["class_names"] == list("0123456789")
    few = replace(data, classes=tuple(map(str, range(MOST_NAMES))))
    assert len(few.content()["class_names"]) == MOST_NAMES
    for classes in ((*few.classes, "one more"), ("x" * 2**18,), ()):
        assert "class_names" not in replace(data, classes=classes).content()
