"""Tables of images on disk, written with Hugging Face's library, beside the same images in folders."""

from __future__ import annotations

import io
import logging
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from neq_cli.errors import NeqError, TrainingError
from neq_cli.recipe import DataSection
from neq_cli.training.batches.loaders import make_loaders
from neq_cli.training.checks import check_section
from neq_cli.training.data.digits import load_digits
from neq_cli.training.data.parts import load_data

datasets = pytest.importorskip("datasets")

CLASSES = ("eight", "one", "zero")
DIGITS = (8, 1, 0)
COUNTS = {"train": 12, "test": 5}
Table = dict[str, list[Any]]


pytestmark = pytest.mark.usefixtures("without_hub")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real digits, 16 x 16 pixels in colour, as part/class/nn.png (and one .jpg): an image folder."""
    root = tmp_path_factory.mktemp("digits")
    (images, labels), _ = load_digits()
    for name, digit in zip(CLASSES, DIGITS, strict=True):
        found = iter(images[labels == digit])
        for part, count in COUNTS.items():
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                grey = (next(found)[0] * 255).byte().numpy().repeat(2, 0).repeat(2, 1)
                picture = Image.fromarray(np.stack([grey, grey // 2, 255 - grey], -1))
                picture.save(root / part / name / f"{number:02d}.{'jpg' if number == 3 else 'png'}")
    return root


def files(folder: Path, part: str) -> list[Path]:
    return sorted((folder / part).rglob("*.*"))


def table(folder: Path, part: str) -> Table:
    """Return the columns of a part in an image folder's order, images as the bytes of their files."""
    found = files(folder, part)
    cells = [{"bytes": path.read_bytes(), "path": path.name} for path in found]
    return {
        "image": cells,
        "label": [CLASSES.index(path.parent.name) for path in found],
        "number": [*range(len(found))],
    }


def features(**others: Any) -> Any:
    label = datasets.ClassLabel(names=list(CLASSES))
    return datasets.Features({"image": datasets.Image(), "label": label, "number": datasets.Value("int64"), **others})


def saved(folder: Path, to: Path, **others: Any) -> Any:
    made = {part: datasets.Dataset.from_dict(table(folder, part), features=features(**others)) for part in COUNTS}
    return datasets.DatasetDict(made)


def as_parquet(folder: Path, to: Path) -> None:
    to.mkdir()
    for part, rows in saved(folder, to).items():
        rows.to_parquet(to / f"{part}-00000-of-00001.parquet")


def as_saved(folder: Path, to: Path) -> None:
    saved(folder, to).save_to_disk(to)


def as_folders(folder: Path, to: Path) -> None:
    to.symlink_to(folder)


def as_csv(folder: Path, to: Path) -> None:
    """Images beside metadata.csv, whose labels are words."""
    for part in COUNTS:
        (to / part).mkdir(parents=True)
        lines = ["file_name,label"]
        for number, path in enumerate(files(folder, part)):
            name = f"{number:03d}{path.suffix}"
            (to / part / name).write_bytes(path.read_bytes())
            lines.append(f"{name},{path.parent.name}")
        (to / part / "metadata.csv").write_text("\n".join(lines) + "\n")


def section(name: str, **values: Any) -> DataSection:
    return DataSection(name=name, probe_size=4, **values)


def batches(data_section: DataSection, workers: int = 0) -> tuple[list[list[tuple[Tensor, Tensor]]], tuple[str, ...]]:
    """Return every batch of an epoch's training, probe and test images, and the classes' names."""
    data = load_data(data_section, 3)
    loaders = make_loaders(data, 4, workers, 3, torch.device("cpu"), cache=data_section.cache)
    loaders.start_epoch(1)
    return [list(part) for part in (loaders.train, loaders.probe, loaders.test)], data.classes


@pytest.mark.parametrize("write", [as_parquet, as_saved, as_folders, as_csv])
def test_every_batch_is_that_of_the_image_folder(
    folder: Path, tmp_path: Path, write: Callable[[Path, Path], None]
) -> None:
    write(folder, tmp_path / "set")
    keys = {"label_key": "label"} if write is as_csv else {}
    for changes in (
        {"augment": "cifar"},
        {"augment": "crop", "cache": "none"},
        {"augment": "imagenet", "image_size": 8},
        {"validation": 0.25},
        {"value_range": [20.0, 200.0]},
    ):
        expected, names = batches(DataSection(name="image_folder", root=str(folder), probe_size=4, **changes))
        found, classes = batches(section("hf/set", **keys, **changes))
        assert (classes, [len(part) for part in found]) == (names, [len(part) for part in expected])
        assert all(expected)
        for ours, theirs in zip(found, expected, strict=True):
            for (images, labels), (other_images, other_labels) in zip(ours, theirs, strict=True):
                assert torch.equal(images, other_images)
                assert torch.equal(labels, other_labels)


@pytest.mark.parametrize("cache", ["none", "memory"])
def test_workers_read_the_same(folder: Path, tmp_path: Path, cache: Any) -> None:
    as_parquet(folder, tmp_path / "set")
    alone, _ = batches(section("hf/set", augment="cifar", cache=cache))
    together, _ = batches(section("hf/set", augment="cifar", cache=cache), workers=2)
    for ours, theirs in zip(alone, together, strict=True):
        assert ours
        for pair, other in zip(ours, theirs, strict=True):
            assert all(torch.equal(one, two) for one, two in zip(pair, other, strict=True))


def test_a_place_is_absolute_below_home_or_below_the_current_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_saved(folder, tmp_path / "home" / "set")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("hf/home/set", "hf/./home/set", "hf/~/set", f"hf/{tmp_path}/home/set"):
        data = load_data(section(name), 1)
        assert (data.name, len(data.test)) == (name, 15)


def test_rows_can_be_sent_to_another_process(folder: Path, tmp_path: Path) -> None:
    """As where workers are not forked."""
    as_parquet(folder, tmp_path / "set")
    test = load_data(section("hf/set"), 1).test
    again = pickle.loads(pickle.dumps(test))
    assert torch.equal(again[0][0], test[0][0])


def test_labels_may_be_numbers_or_words(tmp_path: Path) -> None:
    def data(**columns: list[Any]) -> Any:
        pictures = [Image.new("RGB", (4, 4), (shade, 0, 0)) for shade in range(8)]
        made = datasets.Dataset.from_dict({"image": pictures, **columns}).cast_column("image", datasets.Image())
        made.save_to_disk(tmp_path / "set")
        return load_data(DataSection(name="hf/set", validation=0.25, probe_size=1, label_key=next(iter(columns))), 1)

    words = data(kind=["b", "a", "c", "a"] * 2)
    assert words.classes == ("a", "b", "c")
    order = [*words.train.indices.tolist(), *words.probe.indices.tolist()]
    found = [label for part in (words.train, words.probe) for _, label in part]
    assert found == [(1, 0, 2, 0)[index % 4] for index in order]
    numbers = data(number=[0, 3, 1, 1] * 2)
    assert numbers.classes == ("0", "1", "2", "3")
    assert {label for _, label in numbers.train} <= {0, 1, 3}
    assert data(yes=[True, False] * 4).classes == ("0", "1")


@pytest.mark.parametrize(
    ("splits", "changes", "sizes", "note"),
    [
        (("train", "test"), {}, (12, 12), ""),
        (("train", "validation"), {}, (12, 12), ""),
        (("train", "validation", "test"), {"kwargs": {"test_split": "validation"}}, (12, 12), ""),
        (("one", "two"), {"kwargs": {"train_split": "two", "test_split": "one"}}, (12, 12), ""),
        (("only",), {"validation": 0.25}, (9, 3), ""),
        (("train", "test"), {"validation": 0.25}, (9, 3), ", in place of the split 'test'"),
    ],
)
def test_splits(tmp_path: Path, splits: tuple[str, ...], changes: Any, sizes: tuple[int, int], note: str) -> None:
    def part(number: int) -> Any:
        pictures = [Image.new("RGB", (4, 4), (10 * number + shade, 0, 0)) for shade in range(12)]
        labels = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
        return datasets.Dataset.from_dict({"image": pictures, "label": [0, 1] * 6}, features=labels)

    datasets.DatasetDict({name: part(number) for number, name in enumerate(splits)}).save_to_disk(tmp_path / "set")
    data = load_data(section("hf/set", mean=[0.0] * 3, std=[1.0] * 3, **changes), 1)
    assert (len(data.train) + len(data.probe), len(data.test)) == sizes
    if "validation" in changes:
        assert data.notes[-1].endswith(f"are the test part{note}")
        return
    given = changes.get("kwargs", {})
    tested = splits.index(given.get("test_split", splits[-1]))
    assert [round(255 * float(image[0, 0, 0])) for image, _ in data.test] == [
        10 * tested + shade for shade in range(12)
    ]


def test_masks_in_a_column_of_images_are_those_of_a_folder(tmp_path: Path) -> None:
    """Every batch, those of whole test images in sizes of their own too."""
    generator = np.random.default_rng(0)
    made = {}
    for part, count in (("train", 6), ("test", 4)):
        cells: Table = {"scene": [], "annotation": []}
        for kind in ("images", "masks"):
            (tmp_path / "folder" / part / kind).mkdir(parents=True)
        for number in range(count):
            size = (12, 9) if number % 2 else (8, 10)
            pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
            mask = generator.integers(0, 3, size, dtype=np.uint8)
            mask[0] = 255
            for column, kind, values in (("scene", "images", pixels), ("annotation", "masks", mask)):
                path = tmp_path / "folder" / part / kind / f"{number}.png"
                Image.fromarray(values).save(path)
                cells[column].append({"bytes": path.read_bytes(), "path": path.name})
        images = datasets.Features({column: datasets.Image() for column in cells})
        made[part] = datasets.Dataset.from_dict(cells, features=images)
    datasets.DatasetDict(made).save_to_disk(tmp_path / "set")
    options: Any = {"image_size": 6, "augment": "segmentation", "cache": "memory"}
    expected, names = batches(
        DataSection(name="segmentation_folder", root=str(tmp_path / "folder"), probe_size=2, **options)
    )
    found, classes = batches(DataSection(name="hf/set", label_key="annotation", probe_size=2, **options))
    assert classes == names == ("0", "1", "2")
    for ours, theirs in zip(found, expected, strict=True):
        assert ours
        for pair, other in zip(ours, theirs, strict=True):
            assert all(torch.equal(one, two) for one, two in zip(pair, other, strict=True))


def test_a_mask_that_is_none_is_named(tmp_path: Path) -> None:
    def written(mask: Any) -> DataSection:
        cells = {"image": [Image.new("RGB", (4, 4))] * 4, "mask": [Image.fromarray(mask)] * 4}
        columns = datasets.Features({column: datasets.Image() for column in cells})
        datasets.Dataset.from_dict(cells, features=columns).save_to_disk(tmp_path / "set")
        return DataSection(name="hf/set", label_key="mask", validation=0.25, probe_size=1)

    place = "data.name: hf/set train, row 0, its mask"
    assert said(written(np.zeros((4, 4, 3), np.uint8))).startswith(
        f"{place}: cannot be used (ValueError: a colour image"
    )
    assert said(written(np.full((4, 4), 300, np.uint16))) == (
        f"{place}: 300 is no class, a number from 0 to 254; correct the mask"
    )
    assert said(written(np.full((4, 4), 255, np.uint8))) == (
        "data.name: the masks of hf/set hold no class; give data.kwargs.num_classes"
    )
    few = written(np.full((4, 4), 2, np.uint8)).model_copy(update={"kwargs": {"num_classes": 2}})
    with pytest.raises(NeqError, match=r"hf/set train, row \d, its mask: class 2 in row 0, column 0, but there are 2"):
        load_data(few, 1)


def said(data_section: DataSection) -> str:
    with pytest.raises(NeqError) as raised:
        load_data(data_section, 1)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_columns_that_do_not_tell_what_they_are_are_listed(folder: Path, tmp_path: Path) -> None:
    listed = "image (Image), label (ClassLabel), number (int64)"
    as_parquet(folder, tmp_path / "set")
    assert said(section("hf/set", label_key="lable")) == (
        f"data.label_key: hf/set has no column 'lable'; it has {listed}"
    )
    assert said(section("hf/set", image_key="number")) == (
        f"data.image_key: 'number' of hf/set holds no images; it has {listed}"
    )
    columns = {"image": datasets.Image(), "fine": datasets.Value("int64"), "share": datasets.Value("float32")}
    rows = {"image": [Image.new("RGB", (4, 4))], "fine": [0], "share": [0.5]}
    datasets.Dataset.from_dict(rows, features=datasets.Features(columns)).save_to_disk(tmp_path / "plain")
    listed = "image (Image), fine (int64), share (float32)"
    assert said(section("hf/plain", validation=0.1)) == (
        f"data.label_key: which column of hf/plain holds the labels? Write one of {listed}"
    )
    assert said(section("hf/plain", validation=0.1, label_key="share")) == (
        f"data.label_key: 'share' of hf/plain holds no classes; it has {listed}"
    )
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "texts")
    assert said(section("hf/texts", validation=0.1)) == (
        "data.image_key: which column of hf/texts holds the images? Write one of text (string)"
    )


def test_splits_that_are_not_there_are_listed(folder: Path, tmp_path: Path) -> None:
    both = saved(folder, tmp_path)
    datasets.DatasetDict({"train": both["train"]}).save_to_disk(tmp_path / "one")
    assert said(section("hf/one")) == (
        "data.kwargs.test_split: hf/one has no split 'test' or 'validation', it has 'train'; give the one to test on; "
        "where there is no test part, data.validation=0.1 holds out a tenth of the images"
    )
    datasets.DatasetDict({"first": both["train"], "second": both["test"]}).save_to_disk(tmp_path / "two")
    assert said(section("hf/two")) == (
        "data.kwargs.train_split: hf/two has no split 'train', it has 'first', 'second'; give the one to train on"
    )
    assert said(section("hf/two", kwargs={"train_split": "third"})) == (
        "data.kwargs.train_split: hf/two has no split 'third'; it has 'first', 'second'"
    )


def test_splits_whose_classes_differ_are_refused(folder: Path, tmp_path: Path) -> None:
    other = features(label=datasets.ClassLabel(names=["one", "eight", "zero"]))
    for part, columns in (("train", features()), ("test", other)):
        made = datasets.Dataset.from_dict(table(folder, part), features=columns)
        made.save_to_disk(tmp_path / "set" / part)
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert said(section("hf/set")) == (
        "data.name: the splits 'train' and 'test' of hf/set differ in the column 'label'; make them alike"
    )


def test_a_test_split_without_labels_is_refused_before_training(folder: Path, tmp_path: Path) -> None:
    columns = {part: table(folder, part) for part in COUNTS}
    columns["test"]["label"] = [-1] * 15
    made = {part: datasets.Dataset.from_dict(rows, features=features()) for part, rows in columns.items()}
    datasets.DatasetDict(made).save_to_disk(tmp_path / "set")
    assert said(section("hf/set")) == (
        "data.label_key: 'label' names no class in 15 of 15 rows of the split 'test' of hf/set; take another one by "
        "data.kwargs.test_split, or a share of the training images by data.validation=0.1"
    )
    assert len(load_data(section("hf/set", validation=0.25), 1).test) == 9


def test_an_image_that_cannot_be_read_is_named(folder: Path, tmp_path: Path) -> None:
    columns = {part: table(folder, part) for part in COUNTS}
    columns["train"]["image"][7] = {"bytes": b"no image", "path": "cat.png"}
    columns["train"]["image"][9] = None
    made = {part: datasets.Dataset.from_dict(rows, features=features()) for part, rows in columns.items()}
    datasets.DatasetDict(made).save_to_disk(tmp_path / "set")
    data = load_data(section("hf/set", mean=[0.0] * 3, std=[1.0] * 3), 1)
    places = {int(index): position for position, index in enumerate(data.train.indices)}
    probed = {int(index): position for position, index in enumerate(data.probe.indices)}
    for row, what in ((7, " (cat.png): cannot be used (Unidentified"), (9, ": cannot be used (ValueError: no image")):
        part, position = (data.train, places[row]) if row in places else (data.probe, probed[row])
        with pytest.raises(TrainingError) as raised:
            part[position]
        assert str(raised.value).startswith(f"hf/set train, row {row}{what}")


def test_what_is_not_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(section("hf/./none")).startswith("data.name: no folder 'none'; a folder holds parquet, arrow, a folder")
    (tmp_path / "empty").mkdir()
    assert said(section("hf/empty")).startswith("data.name: 'empty' cannot be read (")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "train.parquet").write_bytes(b"PAR1 and no more")
    assert said(section("hf/torn")).startswith("data.name: 'torn' cannot be read (")
    missing = said(section("hf/nobody/nothing"))
    assert missing.startswith("data.name: no folder 'nobody/nothing', nor could it be had from the Hugging Face hub (")
    assert missing.endswith(
        "`hf download --repo-type dataset nobody/nothing --local-dir FOLDER` elsewhere and name hf/FOLDER"
    )
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    assert said(section("hf/nobody/nothing", download=False)) == (
        "data.download: false, and hf/nobody/nothing is the hub's; set HF_HUB_OFFLINE=1 to take it from Hugging Face's "
        "cache alone, or name a folder"
    )
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert said(section("hf/set")) == "data.name: 'hf/set' needs datasets; pip install 'neq[datasets]'"


def test_the_library_says_nothing_and_is_left_as_it_was(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    as_parquet(folder, tmp_path / "set")
    capfd.readouterr()
    before = datasets.utils.are_progress_bars_disabled(), logging.getLogger("datasets").level
    load_data(section("hf/set"), 1)
    assert capfd.readouterr() == ("", "")
    assert (datasets.utils.are_progress_bars_disabled(), logging.getLogger("datasets").level) == before


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (
            {"name": "hf/set", "kwargs": {"split": "train"}},
            "data.kwargs.split: hf/NAME takes config, revision, train_split,",
        ),
        ({"name": "digits", "label_key": "label"}, "data.label_key: is for data.name=hf/NAME, and digits has no"),
        (
            {"entrypoint": "io:StringIO", "image_key": "x"},
            "data.image_key: is for data.name=hf/NAME, and io:StringIO has no",
        ),
        ({"name": "hf/"}, "data.name: no data set 'hf/'"),
    ],
)
def test_what_can_be_wrong_before_anything_is_opened(values: dict[str, Any], says: str) -> None:
    (problem, *_) = check_section("data", DataSection(**values))
    assert f"{problem.key}: {problem.message}".startswith(says)


def test_keys_of_masks_are_left_to_the_data_to_judge(folder: Path, tmp_path: Path) -> None:
    as_parquet(folder, tmp_path / "set")
    asked = section("hf/set", augment="segmentation")
    assert check_section("data", asked) == []
    assert said(asked) == "data.augment: segmentation is for data with masks; use imagenet or cifar"
    assert said(section("hf/set", kwargs={"num_classes": 3})) == (
        "data.kwargs.num_classes: is for masks, and 'label' of hf/set holds labels; remove it"
    )


def test_bytes_are_decoded_by_the_reader_of_files(tmp_path: Path) -> None:
    """Not by the library, which turns images by their EXIF tags: grey of 16 bits is scaled, and nothing is turned."""
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 2, 3)).save(turned, "PNG", exif=exif)
    deep = io.BytesIO()
    Image.fromarray(np.full((4, 2), 65535, np.uint16)).save(deep, "PNG")
    for name, content in (("turned", turned), ("deep", deep)):
        cells = [{"bytes": content.getvalue(), "path": None}] * 4
        rows = datasets.Dataset.from_dict(
            {"image": cells, "label": [0] * 4},
            features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])}),
        )
        rows.save_to_disk(tmp_path / name)
        data = load_data(
            DataSection(name=f"hf/{name}", validation=0.25, probe_size=1, mean=[0.0] * 3, std=[1.0] * 3), 1
        )
        assert data.image_shape == (3, 4, 2)
        if name == "deep":
            assert torch.equal(data.test[0][0], torch.ones(3, 4, 2))
