"""Every shipped recipe takes one real optimiser step, as `neq train` would take it."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from neq_cli.recipe.entrypoints import add_import_folder
from neq_cli.recipe.load import load_recipe, shipped_directory, shipped_names
from neq_cli.training.checks import check_section
from neq_cli.training.session import prepare

LARGE = ("resnet18-imagenet", "swin_b-imagenet", "deeplabv3_resnet50-coco", "segmentation-folder")
"""Those that take data or networks of their own: tests/test_paper_recipes.py runs them."""
FINETUNED = ("finetune-folder",)
"""tests/test_finetune.py trains it."""
OWN_TASKS = ("detection", "language-model", "regression")
"""tests/test_own_tasks.py trains them."""
FILES = sorted(path.stem for path in shipped_directory().glob("*.yaml"))


def write_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFAR-10's own files with four images each, in place of ten thousand."""
    folder = root / datasets.CIFAR10.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        content = {"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [0, 1, 2, 9]}
        (folder / name).write_bytes(pickle.dumps(content))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)  # the sums are the real files'


def write_folder(root: Path) -> None:
    rng = np.random.default_rng(1)
    for part, count in (("train", 2), ("test", 1)):
        for name in "abcdefghij":
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{number}.png")


def test_the_files_are_the_names() -> None:
    assert shipped_names() == FILES


@pytest.mark.parametrize("name", [name for name in FILES if name not in (*LARGE, *FINETUNED, *OWN_TASKS)])
def test_a_shipped_recipe_takes_a_step(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = ["device=cpu", "epochs=1", "data.workers=0"]
    recipe = load_recipe(name).recipe
    if recipe.data.name != "digits":
        if recipe.data.name == "CIFAR10":
            write_cifar10(tmp_path, monkeypatch)
        else:
            write_folder(tmp_path)
        changes += [f"data.root={tmp_path}", "data.download=false", "data.probe_size=4", "batch_size=16"]
    else:
        changes += ["batch_size=1388"]  # an epoch of one step
    add_import_folder(shipped_directory())
    trainer = prepare(load_recipe(name, changes, [check_section]).recipe, name).trainer
    assert len(trainer.loaders.train) == 1
    before = {key: value.detach().clone() for key, value in trainer.model.named_parameters()}
    steps: list[float] = []
    trainer.optimizer.register_step_post_hook(lambda *_: steps.append(trainer.optimizer.param_groups[0]["lr"]))
    for _ in trainer.run():
        if steps:
            break
    assert len(steps) == 1
    unmoved = [key for key, value in trainer.model.named_parameters() if torch.equal(value, before[key])]
    assert unmoved == []
