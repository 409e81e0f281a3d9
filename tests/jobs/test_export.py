"""`neq export`: what is in the files, run by the programs that they are for, beside the network called by hand."""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rounding import apart
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms.v2 import functional as images_functional

import neq_cli
from neq_cli.cli import main
from neq_cli.errors import NeqError
from neq_cli.jobs.export import export
from neq_cli.training.data.masks import MaskPreparation
from neq_cli.training.data.picture import Transform
from neq_cli.training.data.transforms import Preparation

FOLDER = """
model: {name: resnet8, kwargs: {width: 2}}
data: {name: image_folder, root: images, image_size: 8, augment: imagenet, interpolation: bicubic, workers: 0,
       probe_size: 4, mean: [0.4, 0.5, 0.6], std: [0.2, 0.3, 0.4]}
epochs: 1
batch_size: 8
optimizer: {name: sgd, lr: 0.05}
policy: {kind: baseline}
precision: bf16
ema: 0.5
device: cpu
"""
MASKS = """
model: {entrypoint: "export_nets:Masking"}
data: {name: segmentation_folder, root: scenes, image_size: 12, base_size: 16, probe_size: 2, workers: 0,
       kwargs: {num_classes: 3}}
task: segmentation
epochs: 1
batch_size: 2
optimizer: {name: sgd, lr: 0.05}
policy: {kind: baseline}
device: cpu
"""
GREY = """
model: {entrypoint: "export_nets:NAME"}
data: {name: digits, probe_size: 1000, workers: 0}
epochs: 1
batch_size: 400
optimizer: {name: sgd, lr: 0.0001}
policy: {kind: baseline}
device: cpu
"""
NETS = """
import torch
from torch import nn


class Masking(nn.Module):
    def __init__(self, num_classes=2):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Conv2d(4, num_classes, 1)

    def forward(self, images):
        logits = nn.functional.interpolate(self.head(self.body(images)), size=images.shape[-2:], mode="bilinear")
        return {"out": logits, "aux": logits}


class Baking(Masking):
    def forward(self, images):
        height, width = (int(side) for side in images.shape[-2:])
        return nn.functional.interpolate(self.head(self.body(images)), size=(height, width))


class Positive(nn.Sequential):
    def __init__(self, num_classes=10):
        super().__init__(
            nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(216, 8), nn.ReLU(),
            nn.Linear(8, num_classes),
        )
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.abs_()


class Counting(nn.Sequential):
    def __init__(self, num_classes=10):
        super().__init__(nn.Flatten(), nn.Linear(64, num_classes))

    def forward(self, images):
        return super().forward(images) * len(images)
"""
GRAPHS = {"torchscript": ".ts", "onnx": ".onnx"}
JIT: Any = torch.jit


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, neq_in: Callable[..., Any]) -> Path:
    """A folder with runs of an image folder in bf16 with averaged weights, of masks, and of grey digits."""
    folder = tmp_path_factory.mktemp("exported")
    generator = np.random.default_rng(0)
    for part in ("train", "test"):
        for number, name in enumerate(("ant", "bee, wasp", 'c"ow')):
            (folder / "images" / part / name).mkdir(parents=True)
            for image in range(8):
                pixels = generator.integers(60 * number, 60 * number + 90, (12, 10, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "images" / part / name / f"{image}.png")
        for kind, shape, most in (("images", (16, 24, 3), 256), ("masks", (16, 24), 3)):
            (folder / "scenes" / part / kind).mkdir(parents=True)
            for image in range(4):
                pixels = generator.integers(0, most, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "scenes" / part / kind / f"{image}.png")
    (folder / "export_nets.py").write_text(NETS)
    texts = {"folder": FOLDER, "masks": MASKS, "baking": MASKS.replace("Masking", "Baking")}
    texts |= {name.lower(): GREY.replace("NAME", name) for name in ("Positive", "Counting")}
    for run, text in texts.items():
        (folder / f"{run}.yaml").write_text(text)
        process = neq_in(folder, "train", f"{run}.yaml", "-o", run)
        assert process.wait(120) == 0, process.text
    return folder


def mistake(*arguments: Any) -> str:
    with pytest.raises(NeqError) as raised:
        export(*arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def texts_of(path: Path) -> Mapping[str, str]:
    """Return the text in a file, as other programs find it."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return dict(file.metadata())
    if path.suffix == ".onnx":
        runtime = pytest.importorskip("onnxruntime")
        return dict(runtime.InferenceSession(path).get_modelmeta().custom_metadata_map)
    with zipfile.ZipFile(path) as archive:
        found = {name.partition("/extra/")[2]: archive.read(name) for name in archive.namelist() if "/extra/" in name}
    if path.suffix == ".ts":
        texts: dict[str, Any] = dict.fromkeys(found, "")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            JIT.load(path, _extra_files=texts)
        assert texts == found
    return {name: text.decode() for name, text in found.items()}


def ran(path: Path, images: Tensor) -> Tensor:
    """Return what a graph says of images, run by what it is for."""
    if path.suffix == ".onnx":
        runtime = pytest.importorskip("onnxruntime")
        session = runtime.InferenceSession(path)
        ((name,), (output,)) = ([one.name for one in ends] for ends in (session.get_inputs(), session.get_outputs()))
        assert (name, output) == ("images", "logits")
        return torch.from_numpy(session.run(None, {name: images.numpy()})[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        with torch.no_grad():
            logits: Tensor = JIT.load(path)(images)
    return logits


def needs(form: str) -> None:
    if form == "onnx":
        for library in ("onnxscript", "onnxruntime"):
            pytest.importorskip(library)


def test_a_state_dict_of_torch_has_the_weights_of_the_run(place: Path, tmp_path: Path) -> None:
    final = load_file(place / "folder/weights.safetensors")
    for name in ("one.pt", "two.pth", "three.safetensors"):
        export(place / "folder", tmp_path / name)
        state = torch.load(tmp_path / name, weights_only=True) if ".p" in name else load_file(tmp_path / name)
        assert state.keys() == final.keys()
        assert all(torch.equal(state[key], final[key]) for key in final)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["one.pt", "three.safetensors", "two.pth"]


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt", "graph.ts", "graph.onnx"])
def test_a_file_tells_how_images_are_prepared_and_what_classes_are_called(
    place: Path, tmp_path: Path, name: str
) -> None:
    needs(name[6:])
    export(place / "folder", tmp_path / name, "best")
    texts = texts_of(tmp_path / name)
    assert json.loads(texts["class_names"]) == ["ant", "bee, wasp", 'c"ow']
    assert json.loads(texts["preprocessing"]) == {
        "channels": 3,
        "value_range": None,
        "resize": 9,  # 8 * 256 / 224, rounded
        "image_size": [8, 8],
        "interpolation": "bicubic",
        "antialias": True,
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.3, 0.4],
    }
    assert (texts["recipe"], texts["epoch"]) == ("folder", "1")
    assert json.loads(texts["data"])["classes"] == 3
    assert "resnet8" in texts["recipe_yaml"]
    assert "images" not in texts["recipe_yaml"]  # the folder, which is nobody else's


PREPARED = {
    "cut from larger": Transform(Preparation(20, "imagenet", (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)), 3, (3, 20, 20)),
    "of one size": Transform(Preparation(None, "cifar", (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)), 3, (3, 32, 32)),
    "scaled": Transform(Preparation(24, "none", None, None, "bicubic"), 3, (3, 24, 24)),
    "grey": Transform(Preparation(8, "none", (0.3,), (0.4,)), 1, (1, 8, 8)),
    "masks": Transform(MaskPreparation(16, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), base_size=20), 3, (3, 16, 16)),
    "a range": Transform(Preparation(8, "none", (0.3,), (0.4,)), 1, (1, 8, 8), (10, 200)),
    "sizes that differ": Transform(Preparation(None, "none", (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)), 3, None),
}


@pytest.mark.parametrize("name", PREPARED)
def test_what_is_told_of_images_is_all_that_it_takes(name: str) -> None:
    told = json.loads(json.dumps(PREPARED[name].told()))
    pixels = np.random.default_rng(1).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    if told["channels"] == 1:
        pixels = pixels[..., :1].repeat(3, 2)
    image = torch.from_numpy(pixels).permute(2, 0, 1)[: told["channels"]]
    if told["value_range"] is not None:
        low, high = told["value_range"]
        image = ((image.double() - low) / (high - low)).clamp(0, 1).float()
    if told["resize"] is not None:
        mode = images_functional.InterpolationMode(told["interpolation"])
        image = images_functional.resize(image, [told["resize"]], mode, antialias=told["antialias"])
    if told["image_size"] is not None:
        image = images_functional.center_crop(image, told["image_size"])
    if image.dtype is torch.uint8:
        image = image.float() / 255
    for key, change in (("mean", torch.sub), ("std", torch.div)):
        if told[key] is not None:
            image = change(image, torch.tensor(told[key])[:, None, None])
    found = PREPARED[name](Image.fromarray(pixels))
    assert found.shape == image.shape
    # Numbers up to 1, rounded when they are scaled, less the mean and over the std, which is 0.2 at least.
    assert torch.allclose(found, image, rtol=0, atol=apart(3, torch.float32, 1 / 0.2))


def by_hand(state: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Return what the network of positive numbers says, in double precision."""
    state = {name: tensor.double() for name, tensor in state.items()}
    hidden = functional.conv2d(images.double(), state["0.weight"], state["0.bias"]).relu().flatten(1)
    hidden = functional.linear(hidden, state["4.weight"], state["4.bias"]).relu()
    return functional.linear(hidden, state["6.weight"], state["6.bias"])


@pytest.mark.parametrize("form", GRAPHS)
def test_a_graph_computes_what_the_network_does_up_to_rounding(place: Path, tmp_path: Path, form: str) -> None:
    needs(form)
    state = load_file(place / "positive/weights.safetensors")
    assert all((tensor > 0).all() for tensor in state.values())  # so that nothing cancels, and relative errors add up
    path = tmp_path / f"graph{GRAPHS[form]}"
    export(place / "positive", path)
    for count in (1, 2, 5):
        images = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(count))
        expected = by_hand(state, images)
        # A term is rounded once as a product and in each sum that it is added into: 9 + 1, 216 + 1 and 8 + 1 times.
        bound = apart(10 + 217 + 9 + 3, torch.float32)
        assert ((ran(path, images) - expected).abs() / expected).max() < bound


@pytest.mark.parametrize("name", ["graph.ts", "graph.pt", "graph.onnx"])
def test_graphs_of_runs_in_bf16_with_averaged_weights(place: Path, tmp_path: Path, name: str) -> None:
    needs(name[6:])
    export(place / "folder", tmp_path / name, "best", None if name != "graph.pt" else "torchscript")
    model: Any = neq_cli.load(place / "folder")
    image = model.transform(place / "images/test/ant/0.png").unsqueeze(0)
    with torch.no_grad():
        exact = model.double()(image.double())
        rough = model.float()(image)
    # Rounding alone, and that of one evaluation says how much it is here; another network is off by far more.
    assert (ran(tmp_path / name, image) - exact).abs().max() < 2**-10 * exact.abs().max()
    assert (rough - exact).abs().max() < 2**-10 * exact.abs().max()


@pytest.mark.parametrize("form", GRAPHS)
def test_a_segmentations_graph_takes_images_of_any_size(place: Path, tmp_path: Path, form: str) -> None:
    needs(form)
    path = tmp_path / f"graph{GRAPHS[form]}"
    export(place / "masks", path)
    assert json.loads(texts_of(path)["preprocessing"])["image_size"] is None
    model = neq_cli.load(place / "masks", weights="final")
    state = load_file(place / "masks/weights.safetensors")
    for shape in ((1, 3, 12, 12), (3, 3, 16, 24), (2, 3, 40, 22)):
        images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected = model(images)["out"]
        found = ran(path, images)
        assert found.shape == expected.shape == (shape[0], 3, *shape[2:])
        # 27 products with their bias, the batch norm's five operations, 4 products with theirs, a pixel's four corners.
        bound = apart(28 + 5 + 5 + 8, torch.float32, largest_terms(state, images))
        assert (found - expected).abs().max() < bound < 1e-3


def largest_terms(state: Mapping[str, Tensor], images: Tensor) -> float:
    """Return what the sums of the network of masks would come to at most if none of their terms cancelled."""
    size = {name: tensor.double().abs() for name, tensor in state.items()}
    terms = functional.conv2d(images.double().abs(), size["body.0.weight"], size["body.0.bias"], 2, 1)
    per_channel = {name: size[f"body.1.{name}"][:, None, None] for name in ("running_mean", "weight", "bias")}
    spread = (size["body.1.running_var"] + 1e-5).sqrt()[:, None, None]
    terms = (terms + per_channel["running_mean"]) / spread * per_channel["weight"] + per_channel["bias"]
    return float(functional.conv2d(terms, size["head.weight"], size["head.bias"]).max())


@pytest.mark.parametrize("form", GRAPHS)
def test_a_graph_for_one_size_alone_says_so(
    place: Path, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    needs(form)
    path = tmp_path / f"graph{GRAPHS[form]}"
    export(place / "baking", path)
    said = "note: the graph takes images of 12x12 alone (width x height), which the network does not"
    assert said in capsys.readouterr().err.splitlines()
    assert ran(path, torch.zeros(3, 3, 12, 12)).shape == (3, 3, 12, 12)


def test_a_graph_that_is_not_the_network_is_not_kept(place: Path, tmp_path: Path) -> None:
    path = tmp_path / "graph.ts"
    said = mistake(place / "counting", path)
    assert said.startswith(
        f"{path}: its outputs differ from the network's by 1 of the largest, on 1 image; not written"
    )
    assert list(tmp_path.iterdir()) == []


def test_what_a_graph_needs_is_told(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needs("onnx")
    with monkeypatch.context() as patched:
        patched.setitem(__import__("sys").modules, "onnxscript", None)
        said = mistake(place / "positive", tmp_path / "graph.onnx")
        assert said.startswith("--format onnx needs onnxscript (")
        assert said.endswith("); pip install 'neq[onnx]'")
    with monkeypatch.context() as patched:
        patched.setitem(__import__("sys").modules, "onnxruntime", None)
        export(place / "positive", tmp_path / "untried.onnx")
    assert capsys.readouterr().err == (
        "note: the graph was not tried: onnxruntime is not installed; pip install 'neq[onnx]'\n"
    )
    assert ran(tmp_path / "untried.onnx", torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_a_suffix_and_a_format_agree(place: Path, tmp_path: Path) -> None:
    run = place / "folder"
    for name, form, said in (
        ("a.bin", None, "must end in .safetensors, .pt, .pth, .ts, .torchscript or .onnx"),
        ("a", None, "must end in .safetensors, .pt, .pth, .ts, .torchscript or .onnx"),
        ("a.onnx", "torch", "must end in .pt or .pth, as --format torch says; or take --format onnx"),
        ("a.pt", "onnx", "must end in .onnx, as --format onnx says; or take --format torch or torchscript"),
        ("a.bin", "torchscript", "must end in .ts, .torchscript or .pt, as --format torchscript says"),
    ):
        assert mistake(run, tmp_path / name, "final", form) == f"{tmp_path / name}: {said}"
    (tmp_path / "there.ts").write_text("mine")
    assert mistake(run, tmp_path / "there.ts") == f"{tmp_path}/there.ts: already exists; choose another with -o"
    assert "cannot be written" in mistake(run, tmp_path / "no folder/x.ts")
    assert [path.name for path in tmp_path.iterdir()] == ["there.ts"]


def test_a_task_of_ones_own_has_no_graph(tmp_path: Path, neq: Callable[..., Any]) -> None:
    process = neq("train", "regression", "epochs=1", "device=cpu", "-o", "run")
    assert process.wait(120) == 0, process.text
    process = neq("export", "run", "-o", "graph.ts")
    assert process.wait(60) == 2
    assert process.lines == [
        "--format torchscript: only the task regression_task:Regression itself knows how its model is called; "
        "take --format torch, or what neq_cli.load returns"
    ]
    process = neq("export", "run", "-o", "weights.pt")
    assert (process.wait(60), process.result) == (0, "weights.pt\n")
    assert torch.load(tmp_path / "weights.pt", weights_only=True).keys() == (
        load_file(tmp_path / "run/weights.safetensors").keys()
    )


def test_the_command_names_what_it_wrote(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEQ_TRACEBACK", "1")
    with pytest.raises(SystemExit) as ended:
        main(["export", str(place / "folder"), "-o", str(tmp_path / "model.pt"), "--format", "torchscript"])
    assert not ended.value.code
    printed = capsys.readouterr()
    assert printed.out == f"{tmp_path}/model.pt\n"
    said = ["TorchScript deprecated" in line and line.startswith("note: ") for line in printed.err.splitlines()]
    assert said in ([], [True])  # torch 2.9 does not call it so
    with pytest.raises(NeqError, match=r"model\.pt: is a TorchScript graph, for torch\.jit\.load; give the run"):
        neq_cli.load(tmp_path / "model.pt")
    assert isinstance(neq_cli.load(place / "folder"), nn.Module)
