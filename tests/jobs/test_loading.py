"""`neq_cli.load`: models of runs and files beside networks, weights and images that were put together by hand."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import neq_cli
from neq_cli import Freezer, NEq, Recorder
from neq_cli.errors import NeqError
from neq_cli.jobs.trained import find_trained
from neq_cli.training.models.cifar_resnet import cifar_resnet

CLASSES = ("ant", "bee", "cow")
FOLDER = """
model: {name: resnet8, kwargs: {width: 2}}
data: {name: image_folder, root: images, image_size: 8, workers: 0, probe_size: 4}
epochs: 2
batch_size: 8
optimizer: {name: sgd, lr: 0.05}
policy: {kind: baseline}
precision: bf16
ema: 0.5
device: cpu
"""
OWN = """
model: {entrypoint: "loading_nets:Own"}
data: {entrypoint: "loading_nets:prepared", workers: 0, probe_size: 4}
epochs: 1
batch_size: 20
optimizer: {name: sgd, lr: 0.05}
policy: {kind: baseline}
device: cpu
"""
NETS = """
import torch
from torch import nn
from torch.utils.data import TensorDataset


class Own(nn.Sequential):
    def __init__(self, num_classes=2):
        super().__init__(nn.Flatten(), nn.Linear(16, num_classes))
        self.transform = "mine"


def prepared():
    images, labels = torch.rand(24, 1, 4, 4), torch.arange(24) % 2
    return TensorDataset(images, labels), TensorDataset(images, labels)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, neq_in: Callable[..., Any]) -> Path:
    """A folder with runs of an image folder in bf16 with averaged weights, of grey digits, and of code of one's own."""
    folder = tmp_path_factory.mktemp("loaded")
    generator = np.random.default_rng(0)
    for part in ("train", "test"):
        for number, name in enumerate(CLASSES):
            (folder / "images" / part / name).mkdir(parents=True)
            for image in range(8):
                pixels = generator.integers(60 * number, 60 * number + 90, (12, 10, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "images" / part / name / f"{image}.png")
    (folder / "folder.yaml").write_text(FOLDER)
    (folder / "own.yaml").write_text(OWN)
    (folder / "loading_nets.py").write_text(NETS)
    digits = ("digits", "model.name=resnet8", "model.kwargs.width=2", "data.probe_size=1000", "epochs=1", "device=cpu")
    for run, recipe in (("folder", ("folder.yaml",)), ("digits", digits), ("own", ("own.yaml",))):
        process = neq_in(folder, "train", *recipe, "-o", run)
        assert process.wait(120) == 0, process.text
    for file in ("alone.safetensors", "alone.pt"):
        process = neq_in(folder, "export", "folder", "-o", file, "--from", "best")
        assert process.wait(60) == 0, process.text
    return folder


def same(one: nn.Module, tensors: dict[str, torch.Tensor]) -> bool:
    state = one.state_dict()
    return state.keys() == tensors.keys() and all(torch.equal(state[name], tensors[name]) for name in tensors)


def mistake(*arguments: Any, **options: Any) -> str:
    with pytest.raises(NeqError) as raised:
        neq_cli.load(*arguments, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_weights_are_those_of_the_run_bit_for_bit(place: Path) -> None:
    final = load_file(place / "folder/weights.safetensors")
    assert same(neq_cli.load(place / "folder", weights="final"), final)
    assert same(neq_cli.load(place / "folder/weights.safetensors"), final)
    last = load_file(place / "folder/checkpoints/last.safetensors")
    averaged = {name.partition("module.")[2]: tensor for name, tensor in last.items() if name.startswith("/averaged/m")}
    assert averaged.keys() == final.keys()
    assert same(neq_cli.load(str(place / "folder"), weights="last"), averaged)
    exported = load_file(place / "alone.safetensors")
    for given in ("folder", "folder/checkpoints/best.safetensors", "alone.safetensors", "alone.pt"):
        assert same(neq_cli.load(place / given), exported), given


def test_it_is_the_network_itself_in_eval_mode(place: Path) -> None:
    before = torch.get_rng_state()
    model = neq_cli.load(place / "alone.pt")
    assert torch.equal(torch.get_rng_state(), before)
    plain = cifar_resnet(8, num_classes=3, width=2)
    assert type(model) is type(plain)
    assert not any(module.training for module in model.modules())
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_it_says_of_an_image_is_what_predict_says(place: Path, neq_in: Callable[..., Any]) -> None:
    image = place / "images/test/bee/3.png"
    process = neq_in(place, "predict", "alone.pt", image, "--device", "cpu", "--json")
    assert process.wait(60) == 0, process.text
    (predicted,) = json.loads(process.result)
    model: Any = neq_cli.load(place / "alone.pt")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # the run's precision, in which `predict` computes
        scores = model(model.transform(image).unsqueeze(0)).float().softmax(1)[0]
    assert {one["name"]: one["score"] for one in predicted["classes"]} == dict(
        zip(model.classes, scores.tolist(), strict=True)
    )


def test_images_are_prepared_as_they_were_to_be_tested(place: Path) -> None:
    model: Any = neq_cli.load(place / "folder")
    assert model.classes == CLASSES
    image = Image.open(place / "images/test/cow/0.png")
    prepared = model.transform(image)
    assert (prepared.shape, prepared.dtype) == ((3, 8, 8), torch.float32)
    small = image.crop((1, 2, 9, 10))  # of the run's size, so that nothing is scaled
    pixels = torch.tensor(np.array(small)).permute(2, 0, 1)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (pixels / 255 - mean[:, None, None]) / std[:, None, None]
    for form in (small, pixels, pixels / 255, np.array(small)):
        # Three roundings of numbers below 1, of which a mean is taken and which is divided by 0.224 at least.
        assert torch.allclose(model.transform(form), expected, rtol=0, atol=4 * 2**-24 / 0.224)


def test_grey_images_of_another_size_become_those_of_the_run(place: Path) -> None:
    model: Any = neq_cli.load(place / "digits")
    assert model.classes == tuple(map(str, range(10)))
    one = torch.arange(64, dtype=torch.uint8).view(8, 8)
    grey = model.transform(Image.fromarray(one.numpy()))
    assert torch.equal(grey, model.transform(one.unsqueeze(0)))
    assert torch.equal(grey, model.transform(one.expand(3, 8, 8)))
    assert grey.flatten()[[0, 63]].tolist() == pytest.approx([-0.3058 / 0.3764, (63 / 255 - 0.3058) / 0.3764])
    assert model.transform(Image.new("RGB", (30, 20), "white")).flatten().tolist() == pytest.approx(
        [(1 - 0.3058) / 0.3764] * 64
    )
    for wrong in ("nothing", torch.zeros(2, 8, 8), torch.zeros(8, dtype=torch.uint8), 3):
        with pytest.raises(NeqError, match=r"^(nothing: |the image )cannot be used"):
            model.transform(wrong)


def test_it_is_copied_and_pickled_with_what_it_knows(place: Path) -> None:
    model: Any = neq_cli.load(place / "folder")
    image = Image.new("RGB", (9, 9), "teal")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.classes == CLASSES
        assert torch.equal(other.transform(image), model.transform(image))
        assert same(other, model.state_dict())


def test_a_models_own_attributes_stay_its_own(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model: Any = neq_cli.load(place / "own")
    assert capsys.readouterr().err == "note: the model has its own 'transform'; what neq knows is its 'neq_transform'\n"
    assert model.transform == "mine"
    assert model.classes == ("0", "1")
    assert model(torch.zeros(1, 1, 4, 4)).shape == (1, 2)  # a Sequential, which runs whatever its children are
    with pytest.raises(NeqError, match=r"^model\.transform: loading_nets:prepared prepares images itself; call"):
        model.neq_transform(Image.new("L", (4, 4)))


def test_code_is_the_runs_own_and_never_a_files(place: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(place / "own", tmp_path / "moved")
    (moved / "loading_nets.py").unlink()
    code = (
        "import sys, neq_cli\ntry:\n neq_cli.load(sys.argv[1])\nexcept neq_cli.errors.NeqError as error:\n print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code, moved], capture_output=True, text=True, check=True, timeout=120)
    assert "loading_nets" in said.stdout
    assert said.stdout.splitlines()[0].startswith(f"{moved}/recipe.yaml:")
    file = shutil.copy(place / "own/weights.safetensors", tmp_path / "own.safetensors")
    assert mistake(file).startswith(f"{file}: its recipe calls Python, loading_nets:Own, which weights alone may not")
    assert same(neq_cli.load(file, recipe=str(place / "own/recipe.yaml")), load_file(file))


def test_weights_of_other_tools_are_given_their_recipe(place: Path, tmp_path: Path) -> None:
    plain = load_file(place / "digits/weights.safetensors")
    save_file(plain, tmp_path / "plain.safetensors")
    torch.save(plain, tmp_path / "plain.pt")
    for file in (tmp_path / "plain.safetensors", tmp_path / "plain.pt"):
        assert mistake(file) == f"{file}: does not tell the recipe it was trained by; give it: --recipe RECIPE"
        model: Any = neq_cli.load(file, recipe=str(place / "digits/recipe.yaml"))
        assert same(model, plain)
        assert model.transform(Image.new("L", (8, 8))).unique().item() == pytest.approx(-0.3058 / 0.3764)
        assert "does not fit the model that the recipe makes" in mistake(file, recipe=str(place / "folder.yaml"))
    torch.save({"weights": [1, 2]}, tmp_path / "list.pt")
    assert mistake(tmp_path / "list.pt").endswith("list.pt: holds no state_dict of tensors; save model.state_dict()")
    torch.save(nn.Linear(2, 2), tmp_path / "pickled.pt")
    assert mistake(tmp_path / "pickled.pt").endswith(
        "(or it holds more than plain tensors); use another, or train again"
    )


def test_damage_is_one_line(place: Path, tmp_path: Path) -> None:
    for name in ("alone.safetensors", "alone.pt"):
        content = (place / name).read_bytes()
        for cut in (0, 1, len(content) // 2, len(content) - 1):
            (tmp_path / name).write_bytes(content[:cut])
            assert mistake(tmp_path / name).startswith(f"{tmp_path / name}: damaged (")
        place_of_weights = content.index(load_file(place / "alone.safetensors")["fc.weight"].numpy().tobytes())
        flipped = bytes([content[place_of_weights + 5] ^ 1])  # one bit, as a disk may lose it
        (tmp_path / name).write_bytes(content[: place_of_weights + 5] + flipped + content[place_of_weights + 6 :])
        assert "checksum" in mistake(tmp_path / name)
    run = shutil.copytree(place / "folder", tmp_path / "run")
    (run / "checkpoints/best.safetensors").write_bytes(b"nothing")
    assert mistake(run).startswith(f"{run}/checkpoints/best.safetensors: damaged (")
    shutil.rmtree(run / "checkpoints")
    (run / "weights.safetensors").unlink()
    assert mistake(run) == f"{run}: not there, and no other weights; train it further or anew"


def test_a_runs_trackers_need_not_be_here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = shutil.copytree(place / "folder", tmp_path / "run")
    text = (run / "recipe.yaml").read_text()
    assert text.count("track: []") == 1
    (run / "recipe.yaml").write_text(text.replace("track: []", "track: [wandb]"))
    monkeypatch.setattr("neq_cli.jobs.tracking.libraries.missing", lambda tracker: f"'{tracker}' is not installed")
    with pytest.raises(NeqError, match="'wandb' is not installed"):
        find_trained(run)
    assert same(neq_cli.load(run), neq_cli.load(place / "folder").state_dict())


def test_an_earlier_run_tells_less_and_loads_as_well(place: Path, tmp_path: Path) -> None:
    run = shutil.copytree(place / "folder", tmp_path / "run")
    now: Any = neq_cli.load(run)
    environment = json.loads((run / "environment.json").read_text())
    del environment["data"]["mean"], environment["data"]["std"], environment["data"]["class_names"]
    (run / "environment.json").write_text(json.dumps(environment))
    before: Any = neq_cli.load(run)
    assert before.classes == ("0", "1", "2")
    image = Image.new("RGB", (20, 14), "purple")
    assert torch.equal(before.transform(image), now.transform(image))


def test_mistakes_are_one_line(place: Path, tmp_path: Path) -> None:
    assert mistake(tmp_path / "nowhere").startswith(f"{tmp_path}/nowhere: no such run directory")
    assert mistake(place / "folder", weights="bset") == (
        "weights: 'bset' is none of best, last, final; did you mean 'best'?"
    )
    assert "'gpu' is no torch device" in mistake(place / "folder", device="gpu")
    assert "is one file of weights" in mistake(place / "alone.pt", weights="last")
    (tmp_path / "graph.onnx").touch()
    assert mistake(tmp_path / "graph.onnx").startswith(f"{tmp_path}/graph.onnx: is a graph for ONNX runtimes; give the")
    model = nn.Linear(4, 2)
    freezer = Freezer(model, torch.optim.SGD(model.parameters(), lr=0.1), [torch.randn(3, 4)], NEq())
    with Recorder(freezer, tmp_path / "recorded", name="mine", metric="train_loss") as recorder:
        freezer.step()
        recorder.epoch(train_loss=1.0)
    assert "was recorded from a training loop that neq does not know" in mistake(tmp_path / "recorded")


def test_the_package_imports_no_torch_until_it_is_asked() -> None:
    code = "import sys, neq_cli; first = 'torch' in sys.modules; neq_cli.load; print(first, 'torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert said.stdout.split() == ["False", "True"]
