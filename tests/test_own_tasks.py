"""The shipped recipes with a task of their own: they learn, freeze, resume to the bit, and every command copes.

On a few items each; metrics are computed anew from the weights that the run left.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from neq_cli.recipe.load import load_recipe, shipped_directory
from neq_cli.runs.views.report.names import capital, metric_in_words
from neq_cli.training.batches.sampling import shuffled
from neq_cli.training.data.splits import split
from neq_cli.training.loop.checkpoint import load_state
from neq_cli.training.session import prepare

SETTINGS = {
    "regression": ("data.kwargs.size=160", "batch_size=20"),
    "language-model": (
        *("data.kwargs={length: 16, size: 2400}", "model.kwargs={width: 16, layers: 2, heads: 2, length: 16}"),
        "batch_size=16",
    ),
    "detection": ("data.kwargs.size=24", "model.kwargs={width: 4, side: 48}", "batch_size=4", "data.probe_size=4"),
}
METRICS = {"regression": "test_mae", "language-model": "test_perplexity", "detection": "test_ap50"}
LOWER = ("regression", "language-model")
NAMES = [
    pytest.param(name, marks=pytest.mark.skipif(name == "language-model" and not find_spec("transformers"), reason=why))
    for name, why in dict.fromkeys(SETTINGS, "no transformers").items()
]
FREEZING = ("policy.epsilon=0.05",)
BASELINE = ("policy.kind=baseline",)
COMMON = ("epochs=3", "data.workers=0", "deterministic=true", "device=cpu")


@pytest.fixture(autouse=True)
def _beside_the_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(shipped_directory()), *sys.path])


@pytest.fixture(scope="module")
def runs(neq_in: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return what trains a recipe, once for each set of settings, and gives its run directory."""
    folder, found = tmp_path_factory.mktemp("runs"), {}

    def trained(name: str, *settings: str) -> Path:
        settings = settings or FREEZING
        if (name, settings) not in found:
            path = folder / f"{name}-{len(found)}"
            process = neq_in(folder, "train", name, *SETTINGS[name], *COMMON, *settings, "-o", path)
            assert process.wait(120) == 0, process.text
            found[name, settings] = path
        return found[name, settings]

    return trained


def table(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def session(name: str, *settings: str) -> Any:
    torch.manual_seed(0)
    recipe = load_recipe(name, [*SETTINGS[name], *COMMON[:2], "device=cpu", *settings]).recipe
    return prepare(recipe, name)


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_and_freezes(name: str, runs: Callable[..., Path]) -> None:
    run, score = runs(name), METRICS[name].removeprefix("test_")
    rows = table(run)
    columns = ["epoch", "lr", "train_loss", f"train_{score}", "test_loss", f"test_{score}", "neurons", "frozen"]
    assert list(rows[0])[: len(columns)] == columns
    assert [math.isfinite(float(row["train_loss"])) for row in rows] == [True] * 3
    assert all(math.isfinite(float(row[METRICS[name]])) for row in rows)
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert int(rows[-1]["frozen"]) > 0
    environment = json.loads((run / "environment.json").read_text())
    assert environment["metric"] == METRICS[name]
    assert environment["metric_better"] == ("lower" if name in LOWER else "higher")


@pytest.mark.parametrize("name", NAMES)
def test_the_best_checkpoint_is_that_of_the_best_epoch(name: str, runs: Callable[..., Path]) -> None:
    scores = [float(row[METRICS[name]]) for row in table(runs(name))]
    best = min(scores) if name in LOWER else max(scores)
    assert load_state(runs(name) / "checkpoints" / "best.safetensors")["epoch"] == scores.index(best) + 1


@pytest.mark.parametrize("name", NAMES)
def test_killed_and_resumed_it_is_the_run_that_was_not(
    name: str,
    runs: Callable[..., Path],
    neq: Callable[..., Any],
    tmp_path: Path,
    at_step: Callable[[int, str], str],
    same_run: Callable[..., None],
) -> None:
    often = "checkpoint_minutes=0.00001"
    straight = runs(name, *FREEZING, often)
    command = ("train", name, *SETTINGS[name], *COMMON, *FREEZING, often, "-o", tmp_path / "run", "--resume")
    killed = neq(*command, before=at_step(7, "os.kill(os.getpid(), signal.SIGKILL)"))
    assert killed.wait(120) == -signal.SIGKILL, killed.text
    resumed = neq(*command)
    assert resumed.wait(120) == 0, resumed.text
    assert re.search("steps? into the next", resumed.text)
    same_run(straight, tmp_path / "run", name)


@pytest.mark.parametrize("name", ["regression", "detection"])
def test_two_processes_train_it_together(name: str, runs: Callable[..., Path], tmp_path: Path) -> None:
    """Also where their batches differ in shape. Without batch norm they are one process with the whole batch."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "neq_cli")
    half = f"batch_size={10 if name == 'regression' else 2}"
    settings = [*SETTINGS[name], *COMMON, *FREEZING, half, "deterministic=false", "-o", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, *torchrun, "train", name, *settings],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(shipped_directory().parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows, alone = table(tmp_path / "run"), table(runs(name))
    assert "kernels: by rule" in done.stderr
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    if name == "regression":
        for column in ("train_loss", "test_loss", "test_mae"):
            told = [[float(row[column]) for row in each] for each in (rows, alone)]
            assert told[0] == pytest.approx(told[1], rel=1e-3)


def test_the_regression_is_what_a_plain_loop_comes_to(runs: Callable[..., Path]) -> None:
    from regression_task import friedman, network

    run = runs("regression", *BASELINE, "scheduler.name=constant")
    train, test = friedman(160)
    kept, _ = split(160, 50, seed=1)
    torch.manual_seed(1)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for epoch in (1, 2, 3):
        order = kept[shuffled(len(kept), 1, epoch)[0]]
        for batch in order[: len(order) // 20 * 20].split(20):
            features, values = train.tensors[0][batch], train.tensors[1][batch]
            optimizer.zero_grad()
            functional.mse_loss(model(features).squeeze(1), values).backward()
            optimizer.step()
    weights = load_file(run / "weights.safetensors")
    for key, value in model.state_dict().items():
        torch.testing.assert_close(weights[key], value, rtol=1e-4, atol=1e-5)
    features, values = test.tensors
    with torch.no_grad():
        error = sum(abs(float(found) - float(value)) for found, value in zip(model(features), values, strict=True))
    assert float(table(run)[-1]["test_mae"]) == pytest.approx(error / len(values), rel=1e-4)


def test_several_numbers_at_once_are_learnt_too() -> None:
    from regression_task import Regression

    task, outputs = Regression(), torch.tensor([[1.0, 2.0], [3.0, 5.0], [0.0, 0.0]])
    targets = torch.tensor([[1.0, 4.0], [2.0, 5.0], [0.0, 0.0]])
    totals = task.new_totals(torch.device("cpu"))
    for part in (slice(0, 2), slice(2, 3)):
        loss = task.loss(outputs[part], targets[part])
        task.update(totals, outputs[part], targets[part], loss)
    # Squares 0, 4, 1, 0, 0, 0; sizes 0, 2, 1, 0, 0, 0.
    assert task.results(totals) == pytest.approx({"loss": 5 / 6, "mae": 3 / 6})


def test_perplexity_is_that_of_the_weights_it_left(runs: Callable[..., Path]) -> None:
    pytest.importorskip("transformers")
    from language_model import gpt2, text

    run = runs("language-model")
    model = gpt2(16, 2, 2, 16)
    model.load_state_dict(load_file(run / "weights.safetensors"), strict=False)
    model.tie_weights()
    model.eval()
    _, test = text(16, size=2400)
    told = []
    with torch.no_grad():
        for piece in test:
            shares = model(piece[None]).logits[0].log_softmax(-1)
            told += [-float(shares[place, token]) for place, token in enumerate(piece[1:].tolist())]
    assert float(table(run)[-1]["test_perplexity"]) == pytest.approx(math.exp(sum(told) / len(told)), rel=1e-4)


def test_a_text_of_ones_own(tmp_path: Path) -> None:
    from language_model import text

    (tmp_path / "mine.txt").write_bytes(b"abcd" * 10 + b"e")
    train, test = text(4, str(tmp_path / "mine.txt"))
    assert (len(train), len(test)) == (9, 1)
    assert train[0].tolist() == [97, 98, 99, 100]


def test_detections_are_matched_by_hand() -> None:
    from detection_task import matches

    there = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    boxes = torch.tensor([[0.0, 0, 10, 9], [0, 0, 10, 10], [20, 20, 30, 24], [21, 20, 30, 30]])
    # The second has the higher score and takes the object that the first overlaps too; the third overlaps by 0.4.
    assert matches(boxes, torch.tensor([0.5, 0.9, 0.8, 0.1]), there).tolist() == [False, True, False, True]
    assert matches(boxes, torch.rand(4), there[:0]).tolist() == [False] * 4
    assert matches(boxes[:0], torch.rand(0), there).tolist() == []


def test_average_precision_by_hand() -> None:
    from detection_task import Detection

    task = Detection(classes=2)
    objects = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [40, 40, 50, 50]])
    far = torch.tensor([[80.0, 80, 90, 90]])
    found = {
        "boxes": torch.cat([objects[:1], far, objects[1:2]]),
        "scores": torch.tensor([0.9, 0.8, 0.3]),
        "labels": torch.tensor([0, 0, 0]),
    }
    target = {"boxes": objects, "labels": torch.tensor([0, 0, 1])}
    totals = task.new_totals(torch.device("cpu"))
    task.update(totals, [found], [target], torch.tensor(0.25))
    # Class 0: right at recall 1/2 with precision 1, then wrong, then right at recall 1 with precision 2/3. Class 1: 0.
    wanted = 100 * ((0.5 * 1 + 0.5 * 2 / 3) + 0) / 2
    assert task.results(totals) == pytest.approx({"loss": 0.25, "ap50": wanted})


def brute_force_ap50(found: list[dict[str, Tensor]], targets: list[dict[str, Tensor]]) -> float:
    """AP50 by its definition: every detection a threshold, every precision the best at its recall or a higher one."""
    precisions = []
    for label in (0, 1):
        ranked, objects = [], 0
        for image, (detections, target) in enumerate(zip(found, targets, strict=True)):
            objects += int((target["labels"] == label).sum())
            columns = (detections[key].tolist() for key in ("scores", "boxes", "labels"))
            ranked += [(score, image, box) for score, box, said in zip(*columns, strict=True) if said == label]
        taken: set[tuple[int, int]] = set()
        points, right = [], 0
        for seen, (_, image, box) in enumerate(sorted(ranked, key=lambda one: -one[0]), 1):
            there = [
                (overlap(box, other), place)
                for place, other in enumerate(targets[image]["boxes"].tolist())
                if targets[image]["labels"][place] == label
            ]
            most, place = max(there, default=(0.0, -1))
            if most >= 0.5 and (image, place) not in taken:
                taken.add((image, place))
                right += 1
            points.append((right / objects, right / seen))
        area, before = 0.0, 0.0
        for number, (recall, _) in enumerate(points):
            area += (recall - before) * max(precision for _, precision in points[number:])
            before = recall
        precisions.append(area)
    return 100 * sum(precisions) / len(precisions)


def overlap(one: list[float], other: list[float]) -> float:
    width = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    height = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return width * height / (sum(areas) - width * height)


def test_ap50_is_that_of_its_definition() -> None:
    from detection_task import Detection, Shapes

    generator = torch.Generator().manual_seed(3)
    targets = [Shapes(6, 0)[index][1] for index in range(6)]
    found = []
    for target in targets:
        boxes = target["boxes"].repeat(3, 1)
        boxes = boxes + 8 * (torch.rand(boxes.shape, generator=generator) - 0.5)
        labels = torch.randint(2, (len(boxes),), generator=generator)
        found.append({"boxes": boxes, "labels": labels, "scores": torch.rand(len(boxes), generator=generator)})
    task = Detection()
    task.STEPS = 100_000  # so that no two detections are counted at one score  # type: ignore[misc]
    totals = task.new_totals(torch.device("cpu"))
    for one, target in zip(found, targets, strict=True):  # batch by batch
        task.update(totals, [one], [target], torch.tensor(0.0))
    wanted = brute_force_ap50(found, targets)
    assert 5 < wanted < 95
    assert task.results(totals)["ap50"] == pytest.approx(wanted)


def test_flops_of_detection_are_those_of_one_image(runs: Callable[..., Path]) -> None:
    trainer = session("detection").trainer
    image = trainer.loaders.probe.dataset[0][0][0]
    sizes: dict[str, int] = {}

    def count(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            assert len(output) == 1
            sizes[name] = sizes.get(name, 0) + module.weight[0].numel() * output.numel()

        return hook

    for name, module in trainer.model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count(name))
    trainer.model.eval()([image])
    layers = trainer.freezer.anatomy.costs
    assert {name: layers[name] for name in sizes} == sizes


@pytest.mark.parametrize("name", NAMES)
def test_every_command_copes(name: str, runs: Callable[..., Path], neq: Callable[..., Any], tmp_path: Path) -> None:
    run, plain, metric = runs(name), runs(name, *BASELINE), METRICS[name]
    scores = [float(row[metric]) for row in table(run)]
    best = min(scores) if name in LOWER else max(scores)

    def result(*arguments: object) -> str:
        process = neq(*arguments)
        assert process.wait(120) == 0, f"{arguments}: {process.text}"
        said: str = process.result
        return said

    inspected = json.loads(result("inspect", run, "--json"))
    assert (inspected["metric"], inspected["metric_best"]) == (metric, best)
    assert inspected["metric_best_epoch"] == scores.index(best) + 1
    assert f"{metric}, %" not in result("inspect", run, "--plot")
    compared = json.loads(result("compare", run, plain, "--json"))
    assert [row["lower_is_better"] for row in compared["rows"]] == [name in LOWER] * 2
    assert [row["best"]["mean"] for row in compared["rows"] if not row["is_baseline"]] == [best]
    words = " ".join(result("compare", run, plain).split())
    assert (f"lower {metric} is better" in words) == (name in LOWER)
    assert "in the metric's unit" in words
    result("export", run, "-o", tmp_path / "weights.safetensors")
    assert load_file(tmp_path / "weights.safetensors").keys() == load_file(run / "weights.safetensors").keys()
    assert f"task: {load_recipe(name).recipe.task}" in result("validate", name, *SETTINGS[name], "--resolved")
    counted = json.loads(result("flops", name, *SETTINGS[name], "--json"))
    assert counted["flops_paper_dense"] == float(table(run)[0]["flops_paper_dense"])
    options = ("--fractions", "0.5", "--modes", "exact", "--orders", "front", "--rounds", "1", "--json")
    benched = json.loads(result("bench", name, *SETTINGS[name], "channels_last=false", *options))
    assert benched["synthetic_data"] is False
    assert [one["frozen"] > 0 for one in benched["measurements"]] == [True]
    if find_spec("matplotlib"):
        result("report", run, plain, "-o", tmp_path / "report.html")
        page = (tmp_path / "report.html").read_text()
        words = metric_in_words(metric)
        assert f"{capital(words)} against FLOPs" in page
        assert f"{'Down' if name in LOWER else 'Up'} and to the left is better;" in page
        assert f"{words} (%)" not in page


@pytest.mark.parametrize("name", NAMES)
def test_a_screen_says_what_is_counted(name: str, runs: Callable[..., Path]) -> None:
    started = session(name).started
    assert (started.counted, started.lower_is_better) == ("items", name in LOWER)


def test_torchvisions_own_detector_takes_a_step() -> None:
    """The whole RetinaNet with a ResNet-50, without a line of Python for the model."""
    kwargs = "model.kwargs={weights: null, weights_backbone: null, num_classes: 2, min_size: 32, max_size: 64}"
    settings = ("data.kwargs.size=6", "batch_size=2", "data.probe_size=2", "epochs=1")
    recipe = load_recipe(
        "detection", ["model.entrypoint=torchvision.models.detection:retinanet_resnet50_fpn", kwargs, *settings]
    ).recipe
    trainer = prepare(recipe, "detection").trainer
    assert "head.classification_head.cls_logits" in trainer.freezer.anatomy.never_frozen
    before = trainer.model.head.regression_head.bbox_reg.bias.detach().clone()
    trainer.step.begin_epoch(trainer.task.new_totals(trainer.device))
    images, targets = next(iter(trainer.loaders.train))
    loss = trainer.step.train(images, targets, batches=1, update=True)
    assert math.isfinite(float(loss))
    assert not torch.equal(before, trainer.model.head.regression_head.bbox_reg.bias)
