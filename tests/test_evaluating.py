"""`neq evaluate` and `neq predict` as their users meet them, beside what the run recorded and counts of one's own."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from neq_cli import Freezer, NEq, Recorder
from neq_cli.training.data.digits import load_digits
from neq_cli.training.data.transforms import Preparation
from neq_cli.training.models.cifar_resnet import cifar_resnet

Start = Callable[..., Any]
DIGITS = ("digits", "model.name=resnet8", "model.kwargs.width=4", "device=cpu", "data.probe_size=1000")
# More images at test than in a batch, and not in a whole number of batches.
CLASSES = ("ant", "bee", "cow")
FOLDER = """
model: {name: resnet8, kwargs: {width: 2}}
data: {name: image_folder, root: images, image_size: 8, workers: 0, probe_size: 4}
epochs: 2
batch_size: 4
optimizer: {name: sgd, lr: 0.05}
policy: {kind: baseline}
precision: bf16
channels_last: true
device: cpu
"""
MASKS = """
model: {entrypoint: "masking:make"}
data: {name: segmentation_folder, root: scenes, image_size: 12, base_size: 16, probe_size: 2, workers: 0}
task: segmentation
epochs: 1
batch_size: 2
optimizer: {name: sgd, lr: 0.05}
policy: {kind: baseline}
device: cpu
"""
MASKING = """
from torch import nn


def make(num_classes=2):
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, num_classes, 1))
"""


def result(neq: Start, *arguments: object) -> str:
    process = neq(*arguments)
    assert process.wait(120) == 0, process.text
    text: str = process.result
    return text


def found(neq: Start, *arguments: object) -> Any:
    return json.loads(result(neq, *arguments, "--json"))


def mistake(neq: Start, *arguments: object) -> str:
    process = neq(*arguments)
    assert process.wait(60) == 2, process.text + process.result
    assert process.result == ""
    assert len(process.lines) == 1, process.text
    line: str = process.lines[0]
    return line


def row(run: Path, epoch: int) -> dict[str, float]:
    with (run / "metrics.csv").open(newline="") as file:
        line = next(line for line in csv.DictReader(file) if int(line["epoch"]) == epoch)
    return {name.removeprefix("test_"): float(cell) for name, cell in line.items() if name.startswith("test_")}


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, neq_in: Start) -> Path:
    """A folder with runs of digits (and averaged weights), of an image folder and of masks, and their data."""
    folder = tmp_path_factory.mktemp("trained")
    generator = np.random.default_rng(0)
    for part, images in (("train", 8), ("test", 5)):
        for number, name in enumerate(CLASSES):
            (folder / "images" / part / name).mkdir(parents=True)
            for image in range(images):
                pixels = generator.integers(60 * number, 60 * number + 90, (12, 10, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "images" / part / name / f"{image}.png")
        for kind in ("images", "masks"):
            (folder / "scenes" / part / kind).mkdir(parents=True)
        for image in range(6):
            size = (40, 32) if image % 2 else (16, 24)
            pixels, mask = generator.integers(0, 256, (*size, 3)), generator.integers(0, 3, size)
            mask[0] = 255
            pixels[mask == 2] //= 4
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "scenes" / part / "images" / f"{image}.png")
            Image.fromarray(mask.astype(np.uint8)).save(folder / "scenes" / part / "masks" / f"{image}.png")
    (folder / "folder.yaml").write_text(FOLDER)
    (folder / "masks.yaml").write_text(MASKS)
    (folder / "masking.py").write_text(MASKING)
    for run, recipe in (
        ("digits", (*DIGITS, "epochs=2", "ema=0.9")),
        ("folder", ("folder.yaml",)),
        ("masks", ("masks.yaml",)),
        ("own", ("regression", "epochs=2", "device=cpu")),
    ):
        process = neq_in(folder, "train", *recipe, "-o", f"runs/{run}")
        assert process.wait(120) == 0, process.text
    return folder


@pytest.fixture
def neq(neq_in: Start, place: Path) -> Start:
    """Start `neq` in the folder of the runs."""
    return lambda *arguments: neq_in(place, *arguments)


@pytest.mark.parametrize("run", ["digits", "folder", "masks", "own"])
@pytest.mark.parametrize("which", ["best", "last", "final"])
def test_metrics_are_those_that_the_run_recorded_to_the_bit(neq: Start, place: Path, run: str, which: str) -> None:
    before = contents(place / "runs" / run)
    evaluation = found(neq, "evaluate", f"runs/{run}", "--weights", which)
    recorded = row(place / "runs" / run, evaluation["epoch"])
    assert {name: evaluation["metrics"][name] for name in recorded} == recorded
    assert evaluation["same_as_recorded"] is True
    assert contents(place / "runs" / run) == before
    if which != "best":
        assert evaluation["epoch"] == (1 if run == "masks" else 2)


def test_the_best_are_the_default_and_the_final_ones_where_there_are_none(
    neq: Start, place: Path, tmp_path: Path
) -> None:
    scores = [row(place / "runs/digits", epoch)["top1"] for epoch in (1, 2)]
    evaluation = found(neq, "evaluate", "runs/digits")
    assert (evaluation["weights"], evaluation["metrics"]["top1"]) == ("best", max(scores))
    run = shutil.copytree(place / "runs/digits", tmp_path / "run")
    (run / "checkpoints/best.safetensors").unlink()
    assert found(neq, "evaluate", run)["weights"] == "final"
    (run / "weights.safetensors").unlink()
    assert found(neq, "evaluate", run)["weights"] == "last"
    assert mistake(neq, "evaluate", run, "--weights", "final") == (
        f"{run}/weights.safetensors: not there; take --weights last"
    )


def test_the_confusion_is_that_of_the_model_called_by_hand(neq: Start, place: Path) -> None:
    evaluation = found(neq, "evaluate", "runs/digits", "--weights", "final")
    _, (images, labels) = load_digits()
    model = cifar_resnet(8, num_classes=10, in_channels=1, width=4)
    model.load_state_dict(load_file(place / "runs/digits/weights.safetensors"))
    with torch.no_grad():
        logits = model.eval()((images - 0.3058) / 0.3764)
    taken, true = logits.argmax(1).numpy(), labels.numpy()
    expected = [[int(((true == row) & (taken == column)).sum()) for column in range(10)] for row in range(10)]
    assert [line[:10] for line in evaluation["confusion"]] == expected
    of_five = (logits.argsort(1, descending=True)[:, :5] == labels[:, None]).any(1)
    assert evaluation["metrics"]["top5"] == pytest.approx(100 * of_five.double().mean().item())


def test_iou_by_class_is_that_of_the_masks_counted_by_hand(neq: Start, place: Path, tmp_path: Path) -> None:
    evaluation = found(neq, "evaluate", "runs/masks")
    result(neq, "predict", "runs/masks", "scenes/test/images", "-o", tmp_path / "masks")
    inside, either = np.zeros(3), np.zeros(3)
    for path in (place / "scenes/test/masks").iterdir():
        if Image.open(path).size[0] == 32:  # those of the other size are tested scaled
            continue
        true, taken = np.asarray(Image.open(path)), np.asarray(Image.open(tmp_path / "masks" / path.name))
        assert true.shape == taken.shape
        for number in range(3):
            mine, said = true == number, (taken == number) & (true != 255)
            inside[number] += (mine & said).sum()
            either[number] += (mine | said).sum()
    small = tmp_path / "small"
    for kind in ("images", "masks"):
        (small / kind).mkdir(parents=True)
        for path in (place / "scenes/test" / kind).iterdir():
            if Image.open(path).size[0] != 32:
                shutil.copy(path, small / kind)
    evaluation = found(neq, "evaluate", "runs/masks", "--data", small)
    assert [one["iou"] for one in evaluation["classes"]] == pytest.approx((100 * inside / either).tolist())
    assert sum(one["pixels"] for one in evaluation["classes"]) == 3 * 15 * 24


def test_another_folder_need_hold_the_test_part_alone(neq: Start, place: Path) -> None:
    own = found(neq, "evaluate", "runs/folder")
    for folder in ("images/test", "images"):
        other = found(neq, "evaluate", "runs/folder", "--data", folder)
        assert other["metrics"] == own["metrics"]
        assert other["recorded"] == {}
    assert [one["name"] for one in own["classes"]] == list(CLASSES)
    assert found(neq, "evaluate", "runs/folder", "precision=fp32")["metrics"]["loss"] != own["metrics"]["loss"]
    assert found(neq, "evaluate", "runs/folder", "data.workers=1") == own


def test_a_file_tells_its_recipe_wherever_it_lies(neq: Start, place: Path, tmp_path: Path) -> None:
    own = found(neq, "evaluate", "runs/folder", "--weights", "best")
    result(neq, "export", "runs/folder", "-o", tmp_path / "alone.safetensors", "--from", "best")
    alone = (tmp_path / "alone.safetensors", "--data", "images", "--device", "cpu")
    for file in (alone, ("runs/folder/checkpoints/best.safetensors",)):
        evaluation = found(neq, "evaluate", *file)
        assert evaluation["metrics"] == own["metrics"]
        assert evaluation["epoch"] == own["epoch"]
    image = "images/test/cow/0.png"
    predicted = found(neq, "predict", tmp_path / "alone.safetensors", image, "--device", "cpu")
    assert predicted == found(neq, "predict", "runs/folder", image)
    assert b"root:" not in (tmp_path / "alone.safetensors").read_bytes()


def test_a_file_that_tells_no_recipe_is_given_one(neq: Start, place: Path, tmp_path: Path) -> None:
    file = tmp_path / "plain.safetensors"
    save_file(load_file(place / "runs/folder/weights.safetensors"), file)
    mend = "does not tell the recipe it was trained by; give it: --recipe RECIPE"
    assert mistake(neq, "evaluate", file) == f"{file}: {mend}"
    assert mistake(neq, "predict", file, "images") == f"{file}: {mend}"
    own = found(neq, "evaluate", "runs/folder", "--weights", "final")
    assert found(neq, "evaluate", file, "--recipe", "runs/folder/recipe.yaml")["metrics"] == own["metrics"]
    assert "does not fit the model that the recipe makes" in mistake(neq, "evaluate", file, "--recipe", "digits")


def test_a_file_has_no_python_called(neq: Start, place: Path, tmp_path: Path) -> None:
    file = tmp_path / "masks.safetensors"
    result(neq, "export", "runs/masks", "-o", file, "--from", "best")
    said = f"{file}: its recipe calls Python, masking:make, which weights alone may not; where you trust it, give"
    for verb in (("evaluate", file), ("predict", file, "images")):
        assert mistake(neq, *verb).startswith(said)
    own = found(neq, "evaluate", "runs/masks")
    assert found(neq, "evaluate", file, "--recipe", "runs/masks/recipe.yaml")["metrics"] == own["metrics"]
    hostile = load_file(file)
    touched = tmp_path / "touched"
    recipe = f"model: {{entrypoint: 'os:mkdir', kwargs: {{path: {touched}}}}}\n{MASKS.partition('task:')[1]}"
    recipe += MASKS.partition("task:")[2] + "data: {name: digits}\n"
    save_file(hostile, file, {"recipe_yaml": recipe})
    assert "its recipe calls Python, os:mkdir" in mistake(neq, "evaluate", file)
    assert not touched.exists()


def test_scores_are_those_of_the_runs_own_preparation(neq: Start, place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "runs/folder", tmp_path / "run")  # whose data is not beside it
    image = tmp_path / "one.png"
    shutil.copy(place / "images/test/bee/1.png", image)
    text = (tmp_path / "run/recipe.yaml").read_text()
    (tmp_path / "run/recipe.yaml").write_text(text.replace("precision: bf16", "precision: fp32"))
    (prediction,) = found(neq, "predict", tmp_path / "run", image, "--weights", "final", "--top", "2")
    pixels = torch.from_numpy(np.array(Image.open(image))).permute(2, 0, 1).unsqueeze(0)
    prepared = Preparation(8, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)).test(pixels)
    model = cifar_resnet(8, num_classes=3, width=2)
    model.load_state_dict(load_file(tmp_path / "run/weights.safetensors"))
    with torch.no_grad():
        scores = model.eval()(prepared).softmax(1)[0]
    order = scores.argsort(descending=True)[:2].tolist()
    assert [one["class"] for one in prediction["classes"]] == order
    assert [one["name"] for one in prediction["classes"]] == [CLASSES[number] for number in order]
    assert [one["score"] for one in prediction["classes"]] == pytest.approx([scores[one].item() for one in order], 1e-4)


def test_grey_images_of_another_size_are_scaled_and_a_line_says_so(neq: Start, place: Path, tmp_path: Path) -> None:
    _, (images, _) = load_digits()
    small = (images[0, 0] * 255).round().to(torch.uint8)
    large = small.repeat_interleave(4, 0).repeat_interleave(4, 1)
    for name, pixels in (("small", small), ("large", large)):
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{name}.png")
    process = neq("predict", "runs/digits", tmp_path / "large.png", tmp_path / "small.png", "--top", "1", "--json")
    assert process.wait(60) == 0, process.text
    assert process.lines == ["note: scaled to 8x8, the size of the run's images: from 32x32"]
    one, other = json.loads(process.result)
    assert one["classes"][0]["class"] == other["classes"][0]["class"]


def test_files_that_are_no_images_are_told_before_anything_is_predicted(neq: Start, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    process = neq("predict", "runs/folder", "images/test", tmp_path / "text.png")
    assert process.wait(60) == 2
    assert process.result == ""
    assert [line.partition(":")[0] for line in process.lines] == [str(tmp_path / "text.png")]
    process = neq("predict", "runs/folder", "nowhere.png", tmp_path / "nothing", "images/test")
    assert process.wait(60) == 2
    assert len(process.lines) == 2


def test_masks_are_written_once(neq: Start, place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "masks"
    (prediction,) = found(neq, "predict", "runs/masks", "scenes/test/images/1.png", "-o", folder)
    mask = np.asarray(Image.open(prediction["mask"]))
    assert mask.shape == (40, 32)
    shares = {one["class"]: one["percent"] for one in prediction["classes"]}
    assert shares == {int(one): pytest.approx(100 * (mask == one).mean()) for one in np.unique(mask)}
    assert "already exists" in mistake(neq, "predict", "runs/masks", "scenes/test/images/1.png", "-o", folder)
    assert "makes no masks" in mistake(neq, "predict", "runs/folder", "images/test/cow/0.png", "-o", folder)


def test_what_a_run_held_out_is_what_is_tested(place: Path, tmp_path: Path, neq_in: Start) -> None:
    shutil.copytree(place / "images" / "train", tmp_path / "images")  # the classes lie in the folder itself
    shutil.copy(place / "folder.yaml", tmp_path)

    def neq(*arguments: object) -> Any:
        return neq_in(tmp_path, *arguments)

    changes = ("data.validation=0.25", "data.augment=crop", "epochs=1")
    process = neq("train", "folder.yaml", *changes, "-o", "run")
    assert process.wait(120) == 0, process.text
    process = neq("train", "folder.yaml", *changes[:2], "-o", "run", "--resume")
    assert process.wait(120) == 0, process.text
    told = json.loads((tmp_path / "run" / "environment.json").read_text())["data"]
    assert (told["train"], told["test"], told["validation"]) == (18, 6, 6)
    last = found(neq, "evaluate", "run", "--weights", "last")
    assert (last["images"], last["metrics"]) == (6, row(tmp_path / "run", 2))
    assert [sum(counts) for counts in last["confusion"]] == [2, 2, 2]
    other = found(neq, "evaluate", "run", "data.validation=null", "--data", place / "images" / "test")
    assert other["images"] == 15
    # With one more file others would be held out, of which the run has trained on most.
    shutil.copy(tmp_path / "images" / "ant" / "0.png", tmp_path / "images" / "ant" / "more.png")
    said = mistake(neq, "evaluate", "run")
    assert said.startswith("run/recipe.yaml"), said
    assert "data.validation: 6 of 25 images would be tested, and the run held 6 of 24 out" in said
    before = {path: held for path, held in contents(tmp_path / "run").items() if path.name != ".lock"}
    said = mistake(neq, "train", "folder.yaml", *changes[:2], "epochs=3", "-o", "run", "--resume")
    assert said.startswith("data.validation: 6 of 25 images would be held out, and so far 6 of 24 were, so that some")
    assert before.items() <= contents(tmp_path / "run").items()


@pytest.mark.parametrize("form", ["png", "svg"])
def test_the_picture_is_written_and_only_its_own_is_replaced(neq: Start, tmp_path: Path, form: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"confusion.{form}"
    result(neq, "evaluate", "runs/folder", "-o", path)
    first = path.read_bytes()
    assert first.startswith(b"\x89PNG" if form == "png" else b"<?xml")
    result(neq, "evaluate", "runs/folder", "-o", path)
    assert path.read_bytes() == first
    path.write_text("mine")
    assert "already exists" in mistake(neq, "evaluate", "runs/folder", "-o", path)
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("evaluate nowhere", "nowhere: no such run directory"),
        ("evaluate images", "images: not a run directory"),
        ("evaluate runs/digits policy.mu=0.1", "command line: policy.mu=0.1: evaluating goes by data.KEY, batch_size"),
        ("evaluate runs/digits --data images", "--data: digits does not lie in a folder"),
        ("evaluate runs/digits --recipe digits", "runs/digits: has its own recipe; leave out --recipe"),
        (
            "evaluate runs/digits --device gpu",
            "command line: --device gpu: 'gpu' is no torch device; did you mean",
        ),
        ("evaluate runs/digits -o x.pdf", "x.pdf: must end in .png or .svg"),
        ("evaluate runs/own -o x.png", "-o: regression_task:Regression tells no classes"),
        ("evaluate runs/folder --data nowhere", "command line: --data nowhere: no folder 'nowhere'"),
        ("evaluate runs/folder --data scenes/test", "command line: --data scenes/test: image_folder test has 2"),
        ("evaluate runs/own/weights.safetensors --weights best", "give runs/own for --weights best"),
        ("predict runs/own images", "only the task regression_task:Regression itself knows what outputs say"),
        ("predict runs/folder scenes/train/none", "scenes/train/none: no such image, nor a folder of images"),
        ("predict runs/folder runs", "runs: holds no images (.jpg,"),
    ],
)
def test_a_mistake_is_one_line(neq: Start, arguments: str, said: str) -> None:
    assert said in mistake(neq, *arguments.split())


def test_a_loop_that_was_recorded_has_no_model_to_be_made(neq: Start, tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    freezer = Freezer(model, torch.optim.SGD(model.parameters(), lr=0.1), [torch.ones(5, 4)], NEq())
    with Recorder(freezer, tmp_path / "run", name="mine", seed=1, metric="test_top1", progress="off") as recorder:
        freezer.step()
        recorder.epoch(lr=0.1, train_loss=1.0, test_top1=50.0)
    for verb in ("evaluate", "predict"):
        line = mistake(neq, verb, tmp_path / "run", *(["images"] if verb == "predict" else []))
        assert "was recorded from a training loop that neq does not know" in line


def test_a_run_that_trains_is_evaluated_beside_its_own_record(neq_in: Start, place: Path, tmp_path: Path) -> None:
    training = neq_in(tmp_path, "train", *DIGITS, "epochs=1000", "-o", "run")
    assert training.until((tmp_path / "run/checkpoints/best.safetensors").exists)
    evaluation = found(lambda *arguments: neq_in(tmp_path, *arguments), "evaluate", "run", "--weights", "last")
    assert not training.ended()
    training.kill(signal.SIGKILL)
    training.wait()
    assert evaluation["same_as_recorded"] is True


def test_classes_of_other_names_are_refused(neq: Start, place: Path, tmp_path: Path) -> None:
    other = shutil.copytree(place / "images/test", tmp_path / "other")
    (other / "ant").rename(other / "emu")
    line = mistake(neq, "evaluate", "runs/folder", "--data", other)
    assert line.endswith("image_folder other and the run's data differ in classes: 'ant', 'emu'")
