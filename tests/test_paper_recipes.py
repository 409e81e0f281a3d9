"""Every shipped recipe trains for an epoch on tiny data in the layout it asks for, scaled down by overrides alone."""

from __future__ import annotations

import csv
import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torchvision import datasets
from torchvision.models.swin_transformer import SwinTransformer

from neq_cli.jobs import train as running
from neq_cli.jobs.prepare import estimated_flops
from neq_cli.recipe.entrypoints import add_import_folder
from neq_cli.recipe.load import load_recipe, shipped_directory, shipped_names
from neq_cli.runs.views.live.progress import Silent
from neq_cli.text import format_flops
from neq_cli.training.checks import check_section
from neq_cli.training.loop.schedules import build_scheduler

RNG = np.random.default_rng(1)


def noise(height: int, width: int) -> NDArray[np.uint8]:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_cifar(root: Path) -> None:
    """CIFAR-10's pickled batches: five to train on and one to test, of six images each."""
    folder = root / datasets.CIFAR10.base_folder
    folder.mkdir(parents=True)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        pixels = RNG.integers(0, 256, (6, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [0, 1, 2, 3, 4, 9]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))


def write_images(root: Path, test: str = "val") -> None:
    """ImageNet's tree: a folder for each class, named by its number in WordNet, in train/ and val/."""
    for part, count in (("train", 3), (test, 2)):
        for name in ("n01440764", "n01443537", "n01484850"):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                size = (40 + 4 * number, 52 - 3 * number)
                Image.fromarray(noise(*size)).save(root / part / name / f"{name}_{number}.JPEG")


def write_coco(root: Path) -> None:
    """COCO's tree: a folder of images for each part, and its objects as outlines in a JSON file."""
    (root / "annotations").mkdir(parents=True)
    for part, count in (("train", 6), ("val", 3)):
        (root / f"{part}2017").mkdir()
        content: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1}, {"id": 18}]}
        for number in range(1, count + 1):
            height, width = 60 + number, 70
            Image.fromarray(noise(height, width)).save(root / f"{part}2017" / f"{number:012}.jpg")
            content["images"].append({"id": number, "file_name": f"{number:012}.jpg", "height": height, "width": width})
            for category, left in ((1, 2), (18, 36)):
                outline = [[left, 5, left + 30, 5, left + 30, 50, left, 50]]
                content["annotations"].append(
                    {
                        "id": len(content["annotations"]) + 1,
                        "image_id": number,
                        "category_id": category,
                        "segmentation": outline,
                        "area": 30 * 45,
                        "iscrowd": 0,
                    }
                )
        (root / "annotations" / f"instances_{part}2017.json").write_text(json.dumps(content))


def write_masks(root: Path) -> None:
    """Images and masks of the same names; 11 is void, as in CamVid."""
    for part, count in (("train", 6), ("test", 3)):
        for kind in ("images", "masks"):
            (root / part / kind).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(noise(60, 80)).save(root / part / "images" / f"{number}.jpg")
            mask = RNG.integers(0, 12, (60, 80), dtype=np.uint8)
            Image.fromarray(mask).save(root / part / "masks" / f"{number}.png")


SWIN = ["model.kwargs.embed_dim=16", "model.kwargs.depths=[1,1,2,1]", "model.kwargs.num_heads=[1,2,4,8]"]
"""swin_b itself takes minutes on one CPU core; its class, with fewer blocks and channels, is what the recipe names."""


def write_swin(root: Path) -> None:
    """A checkpoint as the authors save theirs: their names, nested under "model", with a head of other classes."""
    torch.manual_seed(7)
    model = SwinTransformer([4, 4], 16, [1, 1, 2, 1], [1, 2, 4, 8], [7, 7], num_classes=50)
    state = {theirs(name): tensor for name, tensor in model.state_dict().items()}
    state = {key: value.view(49, 49) if key.endswith("position_index") else value for key, value in state.items()}
    state["layers.0.blocks.0.attn_mask"] = torch.zeros(64, 49, 49)
    torch.save({"model": state}, root / "swin.pth")


def theirs(name: str) -> str:
    """Return what the authors call a tensor of torchvision's."""
    parts = name.split(".")
    if parts[0] != "features":
        return name
    if parts[1] == "0":
        return ".".join(["patch_embed", {"0": "proj", "2": "norm"}[parts[2]], *parts[3:]])
    stage, merges = divmod(int(parts[1]) - 1, 2)
    rest = ["fc1" if one == "0" else "fc2" if one == "3" else one for one in parts[3:]] if "mlp" in parts else parts[3:]
    if merges:
        return ".".join([f"layers.{stage}.downsample", *parts[2:]])
    return ".".join([f"layers.{stage}.blocks.{parts[2]}", *rest])


SMALL = ["data.probe_size=4", "epochs=1", "data.workers=0", "device=cpu", "channels_last=true"]
OVERRIDES: dict[str, list[str]] = {
    "cifar10-folder": ["batch_size=5"],
    "digits": ["batch_size=200"],
    "digits-baseline": ["batch_size=200"],
    "digits-stochastic": ["batch_size=200"],
    "entrypoint": ["batch_size=200"],
    "resnet32-cifar10": ["batch_size=8"],
    "resnet32-cifar10-adam": ["batch_size=8"],
    "resnet32-cifar10-front": ["batch_size=8"],
    "resnet18-imagenet": ["batch_size=4", "data.image_size=32"],
    "swin_b-imagenet": [*SWIN, "batch_size=4", "data.image_size=32", "precision=bf16"],  # a CPU has no fp16 training
    "deeplabv3_resnet50-coco": [
        *("batch_size=2", "data.image_size=32", "data.base_size=36", "model.weights_backbone=null"),
    ],
    "segmentation-folder": ["batch_size=2", "data.image_size=32", "data.base_size=40"],
}


def write_data(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Write what a recipe reads, and return the overrides that name it."""
    data = load_recipe(name).recipe.data
    if data.name == "digits":
        return []
    if data.name == "CIFAR10":
        write_cifar(root)
        # The sums are those of the real files.
        monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    elif data.name == "COCO":
        pytest.importorskip("pycocotools")
        write_coco(root)
    elif data.name == "segmentation_folder":
        write_masks(root)
    else:
        write_images(root, "test" if name == "cifar10-folder" else "val")
    found = [f"data.root={root}"]
    if name == "swin_b-imagenet":
        write_swin(root)
        found.append(f"model.checkpoint={root / 'swin.pth'}")
    return found


def train(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> Path:
    overrides = [*OVERRIDES[name], *write_data(name, folder, monkeypatch), *SMALL, *more]
    add_import_folder(shipped_directory())
    return running.train(load_recipe(name, overrides, [check_section]), folder / "run", Silent())


FINETUNED = ("finetune-folder",)  # tests/test_finetune.py trains it
OWN_TASKS = ("detection", "language-model", "regression")
"""tests/test_own_tasks.py trains them."""


def test_there_is_no_other_recipe() -> None:
    assert sorted([*OVERRIDES, *OWN_TASKS, *FINETUNED]) == shipped_names()


@pytest.mark.parametrize("name", sorted(OVERRIDES))
def test_an_epoch_of_a_recipe(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(name, tmp_path, monkeypatch)
    with (run / "metrics.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    metric = "miou" if load_recipe(name).recipe.task == "segmentation" else "top1"
    for part in ("train", "test"):
        assert math.isfinite(float(row[f"{part}_loss"]))
        assert 0 <= float(row[f"{part}_{metric}"]) <= 100
    assert int(row["frozen"]) == 0  # the first epoch trains everything
    assert float(row["flops_paper"]) == float(row["flops_paper_dense"]) > 0
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "finished"
    weights = load_file(run / "weights.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values() if tensor.is_floating_point())
    neurons = load_file(run / "neurons" / "epoch_0001.safetensors")
    observed = [value for key, value in neurons.items() if key.endswith("/phi")]
    assert sum(map(len, observed)) == int(row["neurons"])
    # Half of all neurons or more were seen to have moved, or not, and none of them was lost.
    assert sum(int(value.isfinite().sum()) for value in observed) > 0.5 * int(row["neurons"])


def test_the_authors_checkpoint_is_where_swin_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train("swin_b-imagenet", tmp_path, monkeypatch, "optimizer.lr=0", "scheduler.eta_min=0")
    started = torch.load(tmp_path / "swin.pth", weights_only=True)["model"]
    for name, tensor in load_file(run / "weights.safetensors").items():
        if not name.startswith("head."):
            assert torch.equal(tensor, started[theirs(name)].reshape(tensor.shape)), name


def test_the_schedule_of_deeplab_is_the_references_at_the_start_of_each_epoch() -> None:
    recipe = load_recipe("deeplabv3_resnet50-coco").recipe
    rates = [0.02, 0.2]  # the auxiliary head's is ten times the others'
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    optimizer = torch.optim.SGD(groups, lr=0.02)
    scheduler = build_scheduler(recipe.scheduler, optimizer, recipe.epochs)
    assert scheduler is not None
    steps = 7  # of an epoch, after each of which the reference's rate falls
    for epoch in range(recipe.epochs):
        share = (1 - epoch * steps / (recipe.epochs * steps)) ** 0.9
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate * share for rate in rates])
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("name", "overrides", "paper"),
    [
        ("resnet32-cifar10", [], "138.94M"),
        ("resnet18-imagenet", [], "3.64G"),
        ("swin_b-imagenet", [], "30.28G"),
        ("deeplabv3_resnet50-coco", [], "305.06G"),
        ("resnet32-cifar10", ["policy.kind=stochastic", "policy.p=0.2"], "112.99M"),
        ("resnet32-cifar10", ["policy.kind=stochastic", "policy.p=0.5"], "69.75M"),
        ("swin_b-imagenet", ["policy.kind=stochastic", "policy.p=0.2", "epochs=15"], "24.65G"),
        ("swin_b-imagenet", ["policy.kind=stochastic", "policy.p=0.5", "epochs=15"], "16.15G"),
    ],
)
def test_the_flops_of_table_2(name: str, overrides: list[str], paper: str) -> None:
    recipe = load_recipe(name, overrides)
    assert format_flops(estimated_flops(recipe)["flops_paper"]) == paper
