"""Whatever is wrong with a value, the line that says so begins with where that value was written."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from neq_cli.commands.shared import with_device
from neq_cli.errors import RecipeError
from neq_cli.jobs.prepare import load, prepared
from neq_cli.jobs.sweep.grid import parse_grid
from neq_cli.recipe.yaml import write_yaml

RECIPE = """\
model:
  name: resnet8
  kwargs:
    in_channels: 1
    width: 2
data:
  name: digits
  probe_size: 20
  workers: 0
epochs: 1
optimizer:
  lr: 0.1
  groups:
  - {parameters: ['*.bias'], lr: 0.2}
  - {parameters: ['fc.*'], lr: 0.3}
scheduler:
  name: linear
policy:
  kind: neq
device: cpu
"""

NETS = """
from torch import nn

def three(**_):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))

def narrow(width=1, depth=1):
    if width + depth > 5:
        raise ValueError("too many")
    return three()
"""

# A key, a value that it cannot have, and how what is said of it begins. The last ones only data and model show.
WRONG = [
    ("epochs", "ten", "'ten' is not a whole number above 0"),
    ("epoch", "10", "unknown key; did you mean 'epochs'?"),
    ("model.name", "resnet81", "no torchvision model 'resnet81'"),
    ("model.kwargs.width", "wide", "resnet8 cannot be built: ValueError: width is 'wide'"),
    ("model.kwargs.widht", "3", "unknown argument 'widht' of resnet8"),
    ("model.kwargs.num_classes", "3", "3 outputs for data of 10 classes"),
    ("model.weights", "DEFAULT", "resnet8 has no weights by name"),
    ("model.checkpoint", "missing.pt", "no file 'missing.pt'"),
    ("data.name", "digitz", "no data set 'digitz'"),
    ("data.mean", "[0.1, 0.2]", "2 given, and images have 1 channel(s)"),
    ("data.value_range", "[0, 16]", "is for images in files"),
    ("data.kwargs.split", "test", "digits takes no arguments"),
    ("data.channels", "3", "3, but resnet8 takes 1, by model.kwargs.in_channels"),
    ("optimizer.name", "sdg", "no torch optimiser 'sdg'"),
    ("optimizer.momentum", "-1", "sgd refuses its arguments (ValueError: Invalid momentum value"),
    ("optimizer.nesterov", "true", "sgd refuses its arguments (ValueError: Nesterov"),
    ("optimizer.groups.1.momentum", "0.5", "unknown key"),
    ("scheduler.start_factor", "2.0", "linear refuses its arguments (ValueError: Starting mult"),
    ("scheduler.interval", "day", "'day' is not one of epoch, step"),
    ("policy.kind", "new", "'new' is not one of baseline, neq"),
    ("policy.epsilon", "-1", "-1 is not a number of at least 0"),
    ("task", "segmentation", "segmentation, but digits has no masks"),
    ("device", "gpu", "'gpu' is no torch device"),
    ("optimizer.groups.1.parameters", "['zz.*']", "no trained parameter matches 'zz.*'"),
    ("data.probe_size", "5000", "5000 probe images of 1438 training images leave none"),
    ("exclude", "[nothing]", "'nothing' matches no layer"),
    ("cuda_graph", "true", "needs a CUDA device, and the run is on cpu"),
    ("batch_size", "5000", "5000"),
]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "blamed_nets", raising=False)
    Path("blamed_nets.py").write_text(NETS)


def lines(text: str, *overrides: str) -> Sequence[str]:
    """Return what is said to be wrong with the recipe ``text``, by its values alone or by data and model."""
    Path("mine.yaml").write_text(text)
    with pytest.raises(RecipeError) as raised:
        prepared(load("mine.yaml", overrides))
    return raised.value.problems


def written(key: str, value: str) -> tuple[str, int]:
    """Return RECIPE with ``key`` in it, in place of what it has, and the number of the line that it stands in."""
    values = yaml.safe_load(RECIPE)
    *sections, name = key.split(".")
    inside = values
    for section in sections:
        inside = inside[int(section)] if isinstance(inside, list) else inside.setdefault(section, {})
    inside[name] = yaml.safe_load(value)
    text = write_yaml(values)
    sections = sections[: sections.index("groups")] if "groups" in sections else sections  # a list stands in one line
    line = 0
    for depth, part in enumerate([*sections, "groups" if "groups" in key else name]):
        line += next(
            at for at, one in enumerate(text.splitlines()[line:], 1) if one.startswith(f"{'  ' * depth}{part}:")
        )
    return text, line


@pytest.mark.parametrize("place", ["file", "command line", "sweep"])
@pytest.mark.parametrize(("key", "value", "says"), WRONG, ids=[f"{key}={value}" for key, value, _ in WRONG])
def test_a_wrong_value_is_blamed_on_where_it_was_written(key: str, value: str, says: str, place: str) -> None:
    if place == "file":
        text, line = written(key, value)
        said = lines(text)
        assert said[0].startswith(f"mine.yaml:{line}: {key}: {says}")
    else:
        overrides: Sequence[str] = [f"{key}={value}"]
        if place == "sweep":  # as each of its runs is called
            overrides = parse_grid(["seed=1,2", *overrides]).points[0].overrides
        said = lines(RECIPE, *overrides)
        begin = f"command line: {key}={value}: "
        assert said[0].startswith(begin)
        assert said[0].removeprefix(begin).removeprefix(f"{key}: ").startswith(says)
    assert len(said) == 1


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"  name: digits": "  name: image_folder"},
            "mine.yaml:6: data.root: no folder '{home}/data'; an image folder holds train/<class>/<image> and "
            "test/<class>/<image> (or val/...) ('~/data' is the default: write data.root)",
        ),
        (
            {"  name: digits": "  name: segmentation_folder"},
            "mine.yaml:1: task: classification, but segmentation_folder has masks; use task=segmentation "
            "('classification' is the default: write task)",
        ),
        (
            {
                "  name: digits": "  name: FakeData\n  kwargs: {size: 30, image_size: [1, 8, 8]}",
                "  probe_size: 20\n": "",
            },
            "mine.yaml:6: data.probe_size: 50 probe images of 30 training images leave none to train on; lower it "
            "(50 is the default: write data.probe_size)",
        ),
    ],
)
def test_a_default_that_does_not_do_is_called_one(changes: dict[str, str], line: str, tmp_path: Path) -> None:
    text = RECIPE
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    assert lines(text) == (line.format(home=tmp_path),)


def test_what_came_with_the_model_is_called_so() -> None:
    pytest.importorskip("timm")
    model = "model: {name: timm/vit_tiny_patch16_224}\n"
    text = model + RECIPE[RECIPE.index("data:") :].replace("  name: digits", "  name: CIFAR10\n  root: .")
    loaded = load(str(_write(text)))
    shown = loaded.problem("data.image_size", "is too much")
    assert shown == "mine.yaml:2: data.image_size: is too much (224 came with the model: write data.image_size)"


def _write(text: str) -> Path:
    Path("mine.yaml").write_text(text)
    return Path("mine.yaml")


STD = "  std: [0.5]\n"
HALF = RECIPE.replace("  workers: 0\n", f"  mean: [0.5]\n{STD}  workers: 0\n")
NARROW = RECIPE.replace("  name: resnet8", "  entrypoint: blamed_nets:narrow").replace("in_channels: 1", "depth: 1")


@pytest.mark.parametrize(
    ("text", "overrides", "begins"),
    [
        # Without the argument that was given on the command line the network is built, and the others are innocent.
        (
            RECIPE,
            ["model.kwargs.in_channels=one", "seed=2"],
            "command line: model.kwargs.in_channels=one: resnet8 cannot",
        ),
        (
            RECIPE.replace("width: 2", "width: wide"),
            ["model.kwargs.num_classes=10"],
            "mine.yaml:5: model.kwargs.width: resnet8 cannot",
        ),
        # Code of the user's own is not tried: what was changed is to blame, all of it.
        (
            NARROW,
            ["model.kwargs.depth=4"],
            "command line: model.kwargs.depth=4: model.kwargs: blamed_nets:narrow cannot",
        ),
        (
            NARROW,
            ["model.kwargs.depth=4", "data.workers=0", "model.kwargs.width=3"],
            "command line: model.kwargs.depth=4 model.kwargs.width=3: model.kwargs: blamed_nets:narrow cannot",
        ),
        (NARROW.replace("width: 2", "width: 9"), [], "mine.yaml:3: model.kwargs: blamed_nets:narrow cannot"),
        # Two keys at odds: the one that was changed, and no other of their section.
        (
            HALF,
            ["data.std=[1, 1]", "data.workers=1"],
            "command line: data.std=[1, 1]: data: mean has 1 values and std 2",
        ),
        (HALF.replace(STD, "  std: [1, 1]\n"), ["data.workers=1"], "mine.yaml:9: data: mean has 1 values and std 2"),
        # A model that does not take the images.
        (
            RECIPE,
            ["data.workers=0", "model.entrypoint=blamed_nets:three"],
            "command line: model.entrypoint=blamed_nets:three: model: does not take an image of digits, 1x8x8",
        ),
        (
            RECIPE.replace("  name: resnet8", "  entrypoint: blamed_nets:three"),
            ["data.workers=0", "policy.kind=baseline"],
            "mine.yaml:2: model: does not take an image of digits, 1x8x8",
        ),
        # Whoever made the section is to blame for what it misses.
        (RECIPE, ["policy.kind=budget"], "command line: policy.kind=budget: policy.flops: missing"),
    ],
)
def test_of_what_is_partly_in_the_file_the_part_that_is_wrong_is_blamed(
    text: str, overrides: Sequence[str], begins: str
) -> None:
    (line,) = lines(text, *overrides)
    assert line.startswith(begins)


def test_an_option_is_called_as_it_was_written() -> None:
    (line,) = lines(RECIPE, *with_device(["seed=2"], "gpu"))
    assert line.startswith("command line: --device gpu: 'gpu' is no torch device")
    (line,) = lines(RECIPE, *parse_grid(with_device(["seed=1,2"], "gpu")).points[1].overrides)
    assert line.startswith("command line: --device gpu: 'gpu' is no torch device")
