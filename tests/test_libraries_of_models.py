"""Models of timm and transformers from the command line: trained, resumed, exported, counted."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

TIMM = "{name: timm/vit_tiny_patch16_224, kwargs: {img_size: 8, patch_size: 4, in_chans: 1, embed_dim: 24, depth: 2}}"
VIT = (
    "{name: transformers/vit, kwargs: {image_size: 8, patch_size: 4, num_channels: 1, hidden_size: 24, "
    "num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 48}}"
)
SEGFORMER = (
    "{name: transformers/segformer, kwargs: {hidden_sizes: [8, 8, 16, 16], depths: [1, 1, 1, 1], "
    "num_attention_heads: [1, 1, 2, 2], decoder_hidden_size: 16}}"
)
DIGITS = """
model: MODEL
data: {name: digits, workers: 0}
epochs: 3
batch_size: 400
optimizer: {name: adamw, lr: 0.002}
policy: {kind: neq, epsilon: 0.5}
deterministic: true
device: cpu
"""
MASKS = """
model: MODEL
data: {name: segmentation_folder, root: images, image_size: 32, workers: 0, probe_size: 2, kwargs: {num_classes: 3}}
task: segmentation
epochs: 2
batch_size: 2
optimizer: {name: adamw, lr: 0.002}
policy: {kind: neq, epsilon: 0.5}
device: cpu
"""


def library(model: str) -> str:
    return model.removeprefix("{name: ").partition("/")[0]


def needs(model: str) -> None:
    if find_spec(library(model)) is None:
        pytest.skip(f"{library(model)} is not installed")


def ran(process: Any) -> Any:
    assert process.wait(240) == 0, process.text
    return process


@pytest.mark.parametrize("model", [TIMM, VIT], ids=library)
def test_a_run_is_interrupted_resumed_to_the_bit_and_exported(
    neq: Callable[..., Any], tmp_path: Path, same_run: Callable[..., None], model: str
) -> None:
    needs(model)
    (tmp_path / "mine.yaml").write_text(DIGITS.replace("MODEL", model))
    ran(neq("train", "mine.yaml", "-o", "straight"))
    ran(neq("train", "mine.yaml", "epochs=2", "-o", "run"))
    ran(neq("train", "mine.yaml", "--resume", "-o", "run"))
    same_run(tmp_path / "run", tmp_path / "straight")
    ran(neq("export", "run", "-o", "weights.safetensors"))
    exported, trained = load_file(tmp_path / "weights.safetensors"), load_file(tmp_path / "run/weights.safetensors")
    assert {name: tensor.tolist() for name, tensor in exported.items()} == {
        name: tensor.tolist() for name, tensor in trained.items()
    }
    for graph in ("graph.ts", "graph.onnx"):  # which the command tries beside the model before it is kept
        if graph == "graph.ts" or (find_spec("onnxscript") and find_spec("onnxruntime")):
            assert ran(neq("export", "run", "-o", graph)).result == f"{graph}\n"
    # As any other file of weights, it is what a run may start from.
    shape = f"{model[:-1]}, checkpoint: weights.safetensors}}"
    again = neq("train", "mine.yaml", f"model={shape}", "--dry-run")
    assert "on digits" in ran(again).result


@pytest.mark.parametrize("model", [TIMM, VIT], ids=library)
def test_flops_are_those_of_arithmetic(neq: Callable[..., Any], tmp_path: Path, model: str) -> None:
    needs(model)
    (tmp_path / "mine.yaml").write_text(DIGITS.replace("MODEL", model))
    # Four patches of 4x4 and a class token, which alone is classified. The paper's unit: two for each multiply-add of
    # what has weights, four for each element that a normalisation puts out.
    tokens, width, depth = 5, 24, 2
    hidden = 4 * width if model is TIMM else 48
    linear = 4 * 16 * width + depth * tokens * (4 * width * width + 2 * width * hidden) + width * 10
    norms = (2 * depth + 1) * tokens * width
    found = ran(neq("flops", "mine.yaml", "--json")).result
    assert f'"flops_paper": {float(2 * linear + 4 * norms)}' in found


def test_segmentation_with_outputs_smaller_than_the_masks(neq: Callable[..., Any], tmp_path: Path) -> None:
    needs(SEGFORMER)
    rng = np.random.default_rng(1)
    for part, count in (("train", 6), ("test", 2)):
        for kind, shape, most in (("images", (32, 40, 3), 256), ("masks", (32, 40), 3)):
            (tmp_path / "images" / part / kind).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, most, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / part / kind / f"{number}.png")
    (tmp_path / "mine.yaml").write_text(MASKS.replace("MODEL", SEGFORMER))
    process = ran(neq("train", "mine.yaml", "-o", "run"))
    assert "scaled up to them, bilinearly: 8x8 for masks of 32x32" in process.text
    assert "miou" in process.text


def test_timms_sizes_are_told_by_validate_and_weights_come_from_the_users_cache(
    neq: Callable[..., Any], tmp_path: Path
) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model = "{name: timm/test_vit, weights: DEFAULT, kwargs: {in_chans: 1}}"
    (tmp_path / "mine.yaml").write_text(DIGITS.replace("MODEL", model))
    snapshot = tmp_path / "cache/models--timm--test_vit.r160_in1k/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("abc")
    source = {name: tensor.numpy() for name, tensor in timm.create_model("test_vit").state_dict().items()}
    save_file(source, snapshot / "model.safetensors")
    checked = ran(neq("validate", "mine.yaml", "--resolved"))
    assert checked.text == (
        "note: data: image_size 160, which timm/test_vit is configured for; the recipe may give others\n"
    )
    assert "\n  image_size: 160\n" in checked.result
    cache = {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    planned = ran(neq("train", "mine.yaml", "--dry-run", environment=cache)).result
    assert "data: image_size 160, which timm/test_vit is configured for" in planned
    assert f"model.weights: 2 of {len(source)} tensors start from scratch: head.weight, head.bias" in planned
    cache["HF_HUB_CACHE"] = str(tmp_path / "none")
    process = neq("train", "mine.yaml", "--dry-run", environment=cache)
    assert process.wait(120) == 2
    assert process.lines[-1].startswith(
        f"mine.yaml:2: model.weights: 'DEFAULT' of timm/test_vit is not in '{tmp_path / 'none'}', and could not be"
    )
