"""Loss and metrics against brute force."""

from __future__ import annotations

import math
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from rounding import apart
from torch import Tensor
from torchvision.models import googlenet, inception_v3
from torchvision.models.googlenet import GoogLeNetOutputs
from torchvision.models.inception import InceptionOutputs

from neq_cli.errors import NeqError, TrainingError
from neq_cli.training.loop.tasks import (
    Classification,
    Task,
    auxiliary_outputs,
    build_task,
    checked_results,
    lower_is_better,
    main_output,
)

GENERATOR = torch.Generator().manual_seed(0)


def logits(batch: int = 4, classes: int = 5) -> Tensor:
    return torch.randn(batch, classes, generator=GENERATOR)


TARGETS = torch.tensor([0, 3, 4, 1])


def brute_force_loss(outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> float:
    total = 0.0
    for row, target in zip(outputs.tolist(), targets.tolist(), strict=True):
        log_sum = math.log(sum(math.exp(value) for value in row))
        for index, value in enumerate(row):
            wanted = (1 - smoothing) * (index == target) + smoothing / len(row)
            total -= wanted * (value - log_sum)
    return total / len(targets)


# In single precision: at most 23 rows of five logits below 5, each loss a difference of two numbers below 7, rounded
# once for each logit and a few times more.
LOSS = apart(23 + 5 + 8, torch.float32, magnitude=14)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_smoothed_cross_entropy(smoothing: float) -> None:
    outputs = logits()
    loss = Classification(smoothing).loss(outputs, TARGETS)
    assert loss.item() == pytest.approx(brute_force_loss(outputs, TARGETS, smoothing), abs=LOSS)


@pytest.mark.parametrize(
    ("wrap", "weights"),
    [
        (lambda main, *aux: GoogLeNetOutputs(main, aux[1], aux[0]), (0.3, 0.3)),
        (lambda main, *aux: InceptionOutputs(main, aux[0]), (0.4, 0)),
        (lambda main, *aux: InceptionOutputs(main, None), (0, 0)),
        (lambda main, *aux: {"out": main, "aux": aux[0]}, (0.5, 0)),
        (lambda main, *aux: {"logits": main}, (0, 0)),
        (lambda main, *aux: namedtuple("Outputs", "loss logits")(None, main), (0, 0)),
    ],
)
def test_auxiliary_classifiers_count_with_their_weights(wrap: Any, weights: tuple[float, float]) -> None:
    main, first, second = logits(), logits(), logits()
    outputs = wrap(main, first, second)
    expected = brute_force_loss(main, TARGETS)
    for weight, aux in zip(weights, (first, second), strict=True):
        expected += weight * brute_force_loss(aux, TARGETS)
    assert main_output(outputs) is main
    assert Classification().loss(outputs, TARGETS).item() == pytest.approx(expected, abs=2 * LOSS)


@pytest.mark.parametrize(("build", "size", "heads"), [(googlenet, 64, 2), (inception_v3, 299, 1)])
def test_torchvisions_own_outputs_are_understood(build: Any, size: int, heads: int) -> None:
    with torch.device("meta"):
        model = build(num_classes=5, init_weights=False)
        outputs = model.train()(torch.zeros(2, 3, size, size))
        assert main_output(outputs).shape == (2, 5)
        assert [aux.shape for _, aux in auxiliary_outputs(outputs)] == [(2, 5)] * heads
        assert auxiliary_outputs(model.eval()(torch.zeros(2, 3, size, size))) == []


def test_outputs_without_logits_are_told() -> None:
    with pytest.raises(TypeError, match="mapping without 'logits' or 'out': a, b"):
        main_output({"a": 1, "b": 2})
    with pytest.raises(TypeError, match="returned a list"):
        main_output([logits()])


def test_metrics_are_those_of_all_images_whatever_the_batches() -> None:
    task = Classification()
    outputs, targets = logits(23), torch.randint(0, 5, (23,), generator=GENERATOR)
    totals = task.new_totals(torch.device("cpu"))
    for start, end in ((0, 10), (10, 20), (20, 23)):
        batch, wanted = outputs[start:end], targets[start:end]
        task.update(totals, {"logits": batch}, wanted, task.loss(batch, wanted))
    right = sum(
        max(range(5), key=row.__getitem__) == target
        for row, target in zip(outputs.tolist(), targets.tolist(), strict=True)
    )
    results = task.results(totals)
    assert list(results) == ["loss", "top1"]
    assert results["top1"] == pytest.approx(100 * right / 23)
    assert results["loss"] == pytest.approx(brute_force_loss(outputs, targets), abs=LOSS)


def test_totals_add_up_over_processes() -> None:
    task = Classification()
    parts = [task.new_totals(torch.device("cpu")) for _ in range(2)]
    whole = task.new_totals(torch.device("cpu"))
    for totals in parts:
        outputs = logits()
        for target in (totals, whole):
            task.update(target, outputs, TARGETS, task.loss(outputs, TARGETS))
    assert task.results(parts[0] + parts[1]) == task.results(whole)


def test_totals_hold_no_graph_and_an_empty_pass_is_nan() -> None:
    task = Classification()
    totals = task.new_totals(torch.device("cpu"))
    assert all(math.isnan(value) for value in task.results(totals).values())
    outputs = logits().requires_grad_()
    task.update(totals, outputs, TARGETS, task.loss(outputs, TARGETS))
    assert not totals.requires_grad
    assert totals.dtype == torch.float64
    assert task.new_totals(torch.device("meta")).shape == totals.shape


def test_a_million_images_are_counted_exactly() -> None:
    task = Classification()
    totals = task.new_totals(torch.device("cpu"))
    totals += torch.tensor([0.0, 2**24 + 1, 2**24 + 2], dtype=torch.float64)
    outputs = torch.eye(3)
    task.update(totals, outputs, torch.arange(3), torch.tensor(0.0))
    assert totals.tolist() == [0, 2**24 + 4, 2**24 + 5]


def test_updates_read_nothing_back() -> None:
    # On the meta device there is nothing to read: whatever waits for a value fails.
    task = Classification()
    device = torch.device("meta")
    outputs, targets = torch.zeros(4, 5, device=device), torch.zeros(4, dtype=torch.long, device=device)
    task.update(task.new_totals(device), outputs, targets, task.loss(outputs, targets))


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "tasksmodule", raising=False)
    (tmp_path / "tasksmodule.py").write_text(
        "from neq_cli.training.loop.tasks import Classification\n"
        "def smooth(label_smoothing=0.0): return Classification(label_smoothing)\n"
        "def plain(): return Classification()\n"
        "def half():\n    class Half:\n        metric = 'test_x'\n        def loss(self): pass\n    return Half()\n"
        "def fails(): raise ValueError('no')\n"
        "def needs(size): pass\n"
        "def made(**changes): return lambda: type('Own', (Classification,), changes)()\n"
        "error = made(metric='test_error', better='lower')\n"
        "bare = made(metric='error')\n"
        "training_loss = made(metric='test_loss')\n"
        "least = made(better='least')\n"
        "called = made(call=3)\n"
    )
    return "tasksmodule"


def test_tasks_by_name(module: str) -> None:
    task = build_task("classification", 0.1)
    assert isinstance(task, Task)
    assert task.metric == "test_top1"
    assert task.label_smoothing == 0.1  # type: ignore[attr-defined]
    assert build_task(f"{module}:smooth", 0.2).label_smoothing == 0.2  # type: ignore[attr-defined]
    assert isinstance(build_task(f"{module}:plain"), Classification)


def test_a_task_says_which_way_its_metric_is_better(module: str) -> None:
    assert lower_is_better(build_task(f"{module}:error"))
    assert not lower_is_better(build_task(f"{module}:plain"))


@pytest.mark.parametrize("found", [{"mae": 1.0, "loss": 2.0}, {"loss": 1.0}, [1.0, 2.0], {}])
def test_results_that_make_no_columns_are_one_line(found: Any) -> None:
    task = Classification()
    task.metric = "test_mae"
    task.results = lambda totals: found  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=r'^task: results returned .*; a dictionary with "loss" first and "mae" is'):
        checked_results(task, torch.zeros(3))


@pytest.mark.parametrize(
    ("name", "smoothing", "message"),
    [
        ("clasification", 0, "task: 'clasification' is neither classification, segmentation nor pkg.mod:callable"),
        ("{m}:plain", 0.1, "label_smoothing: 0.1, but the task '{m}:plain' does not take it; remove it"),
        ("{m}:half", 0, "task: '{m}:half' returned a Half without new_totals, update, results"),
        ("{m}:fails", 0, "task: '{m}:fails' cannot be made: ValueError: no"),
        ("{m}:needs", 0, "task: '{m}:needs' cannot be made: TypeError: "),
        ("{m}:none", 0, "task: module '{m}' has no 'none'"),
        ("{m}:bare", 0, "task: '{m}:bare': metric is 'error'; it begins with \"test_\""),
        ("{m}:training_loss", 0, "task: '{m}:training_loss': metric is 'test_loss'; it begins with \"test_\""),
        ("{m}:least", 0, "task: '{m}:least': better is 'least'; use \"higher\" or \"lower\""),
        ("{m}:called", 0, "task: '{m}:called': call is no method; make it call(model, inputs, targets)"),
    ],
)
def test_tasks_that_cannot_be(module: str, name: str, smoothing: float, message: str) -> None:
    with pytest.raises(NeqError) as raised:
        build_task(name.format(m=module), smoothing)
    assert str(raised.value).startswith(message.format(m=module))
