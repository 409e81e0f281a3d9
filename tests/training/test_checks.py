"""What a check of a recipe finds, without opening data."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from neq_cli.recipe import (
    CustomPolicy,
    DataSection,
    ModelSection,
    NEqPolicy,
    OptimizerSection,
    Recipe,
    SchedulerSection,
    Section,
)
from neq_cli.training.checks import check_section, device_problem


def found(section: Section, name: str = "section") -> list[str]:
    return [f"{problem.key}: {problem.message}" for problem in check_section(name, section)]


def recipe(**values: Any) -> Recipe:
    return Recipe.model_validate(
        {"model": {"name": "resnet8"}, "data": {"name": "digits"}, "epochs": 3, "optimizer": {"name": "sgd"}, **values}
    )


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "checksmodule", raising=False)
    (tmp_path / "checksmodule.py").write_text(
        "def never(size=1): raise AssertionError('a check must not call this')\ndef plain(): never()\n"
    )
    return "checksmodule"


@pytest.mark.parametrize(
    "section",
    [
        ModelSection(name="resnet18", weights="DEFAULT", kwargs={"num_classes": 3}),
        ModelSection(name="regnet_y_400mf", kwargs={"num_classes": 3}),
        DataSection(name="CIFAR10", root="/nowhere"),
        DataSection(name="image_folder", root="/nowhere", mean=[0.1]),
        OptimizerSection(name="adamw", lr=0.1, betas=[0.8, 0.9]),
        SchedulerSection(name="multistep", milestones=[100, 150], warmup_epochs=5),
        DataSection(name="COCO", augment="segmentation", image_size=480, base_size=520),
        ModelSection(name="fcn_resnet50", weights_backbone="IMAGENET1K_V1", kwargs={"aux_loss": True}),
        ModelSection(name="resnet18", checkpoint="not-there-yet.pt", fresh=["fc.*"]),
        recipe(data={"name": "VOCSegmentation"}, task="segmentation", model={"name": "fcn_resnet50"}),
        SchedulerSection(),
        NEqPolicy(),
        recipe(),
    ],
)
def test_what_is_right_has_no_problems(section: Section) -> None:
    assert found(section) == []


def test_entrypoints_are_imported_and_never_called(module: str) -> None:
    for section in (
        ModelSection(entrypoint=f"{module}:never", kwargs={"size": 2}),
        DataSection(entrypoint=f"{module}:never"),
        CustomPolicy(entrypoint=f"{module}:never", kwargs={"size": 2}),
        recipe(task=f"{module}:never"),
    ):
        assert found(section) == []


def test_every_problem_of_a_section_is_found_at_once(tmp_path: Path) -> None:
    section = ModelSection(
        name="resnet18",
        weights="NONE",
        checkpoint=str(tmp_path / "w.pt"),
        kwargs={"num_clases": 3, "progress": True},
    )
    assert found(section) == [
        "model.kwargs.num_clases: unknown argument 'num_clases' of resnet18; did you mean 'num_classes'?",
        "model.kwargs.progress: 'progress' of resnet18 is set by neq; remove it",
        "model.weights: resnet18 has no weights 'NONE'; IMAGENET1K_V1, DEFAULT",
        "model.checkpoint: both weights and checkpoint are given; remove one of them",
    ]


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        (
            ModelSection(name="resnet18", weights_backbone="DEFAULT"),
            "model.weights_backbone: resnet18 has no backbone of its own; remove it",
        ),
        (
            ModelSection(name="fcn_resnet50", kwargs={"backbone": 3}),
            "model.kwargs.backbone: unknown argument 'backbone' of fcn_resnet50",
        ),
        (
            ModelSection(name="resnet18", fresh=["fc.*"]),
            "model.fresh: is for weights or a checkpoint, and none are given; remove it or give either",
        ),
        (
            DataSection(name="COCO", augment="imagenet"),
            "data.augment: imagenet would move images without their masks; use segmentation",
        ),
        (
            DataSection(name="CIFAR10", augment="segmentation"),
            "data.augment: segmentation is for data with masks; use imagenet or cifar",
        ),
        (DataSection(name="CIFAR10", base_size=40), "data.base_size: is for data with masks; remove it"),
        (
            recipe(data={"name": "COCO"}, model={"name": "fcn_resnet50"}),
            "task: classification, but COCO has masks; use task=segmentation",
        ),
        (
            recipe(task="segmentation"),
            "task: segmentation, but digits has no masks; use segmentation_folder, VOCSegmentation or COCO",
        ),
        (ModelSection(name="resnet81"), "model.name: no torchvision model 'resnet81'; did you mean 'resnet8'?"),
        (
            ModelSection(entrypoint="no_such_module:f"),
            "model.entrypoint: no module 'no_such_module'; it is looked for beside the recipe, here and on PYTHONPATH",
        ),
        (
            ModelSection(name="resnet18", kwargs={"layers": 1}),
            "model.kwargs.layers: resnet18 sets it itself; remove it",
        ),
        (DataSection(name="cifar11"), "data.name: no data set 'cifar11'; did you mean 'cifar10'?"),
        (DataSection(name="MNIST", kwargs={"a": 1}), "data.kwargs.a: unknown argument 'a' of MNIST"),
        (
            DataSection(name="MNIST", mean=[1.0, 2.0]),
            "data.mean: 2 given, and images have 1 channel(s); give one per channel",
        ),
        (
            DataSection(name="FakeData", kwargs={"image_size": 5}),
            "data.kwargs.image_size: 5 is not [channels, height, width]",
        ),
        (
            OptimizerSection(name="lion"),
            "optimizer.name: no torch optimiser 'lion'; use sgd, adam, adamw or another of torch.optim",
        ),
        (
            OptimizerSection(name="sgd", momentun=1),
            "optimizer.momentun: unknown argument 'momentun' of SGD; did you mean 'momentum'?",
        ),
        (SchedulerSection(name="step"), "scheduler.step_size: StepLR needs the argument 'step_size'"),
        (
            CustomPolicy(entrypoint="collections:OrderedDic"),
            "policy.entrypoint: module 'collections' has no 'OrderedDic'; did you mean 'OrderedDict'?",
        ),
        (CustomPolicy(entrypoint="textwrap:dedent"), "policy.kwargs.text: textwrap:dedent needs the argument 'text'"),
        (
            recipe(model={"name": "resnet8", "kwargs": {"num_classes": 3}}),
            "model.kwargs.num_classes: 3 outputs for data of 10 classes; leave it out or raise it",
        ),
        (
            recipe(task="textwrap:dedent", label_smoothing=0.1),
            "label_smoothing: the task 'textwrap:dedent' does not take it; remove it",
        ),
        (recipe(task="textwrap:dedant"), "task: module 'textwrap' has no 'dedant'; did you mean 'dedent'?"),
    ],
)
def test_a_problem_is_one_line_at_its_key(section: Section, problem: str) -> None:
    assert found(section) == [problem]


def test_the_device_is_checked_by_itself() -> None:
    (problem,) = check_section("device", "gpu")
    assert (problem.key, problem.message) == ("device", "'gpu' is no torch device; did you mean 'cuda'?")
    assert check_section("device", "cpu") == []


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_problem("auto") is None
    assert device_problem("cpu") is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    assert device_problem("cuda") == "'cuda', but no CUDA device is available; use device=auto"
    assert device_problem("cuda:1") == "'cuda:1', but no CUDA device is available; use device=auto"
    assert device_problem("mps") == "'mps', but no MPS device is available; use device=auto"
    assert device_problem("xpu") == "'xpu' is not available; use device=auto"
    assert device_problem("zzz") == "'zzz' is no torch device; use auto, cpu, cuda, cuda:N or mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert device_problem("cuda:1") is None
    assert device_problem("cuda:2") == "'cuda:2', but this machine has 2, counted from 0; use cuda:1 or lower"
