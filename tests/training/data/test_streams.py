"""Streamed tables on disk, written with Hugging Face's library, beside the same tables read whole."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from neq_cli.errors import NeqError
from neq_cli.events import EpochRecord, Pause
from neq_cli.recipe import DataSection, Recipe
from neq_cli.training.batches.loaders import Loaders, make_loaders
from neq_cli.training.batches.sampling import ALONE, Share
from neq_cli.training.batches.streaming import StreamedSampler
from neq_cli.training.checks import check_section
from neq_cli.training.data.parts import Data, load_data
from neq_cli.training.data.streams import RowStream
from neq_cli.training.errors import DataError
from neq_cli.training.loop.trainer import GO_ON, STOP, Trainer
from neq_cli.training.session import prepare

datasets = pytest.importorskip("datasets")

CLASSES = ("cat", "dog", "eel")
TRAIN, TEST = 90, 11
FILES = {"train": 4, "test": 2}
BUFFER = 12
STREAM = {"streaming": True, "shuffle_buffer": BUFFER}
BITS = [0.0] * 3, [1.0] * 3  # mean and deviation that change nothing


pytestmark = pytest.mark.usefixtures("without_hub")


def picture(number: int) -> Image.Image:
    """Return an image all of whose pixels are its number in the data, but for a mark on its left side."""
    pixels = np.full((4, 4, 3), number, np.uint8)
    pixels[0, 0] = 255
    return Image.fromarray(pixels)


def stored(number: int) -> dict[str, Any]:
    file = io.BytesIO()
    picture(number).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": f"{number:03d}.png"}


def rows_of(start: int, stop: int, labels: list[Any] | None = None, kind: Any = None) -> Any:
    numbers = range(start, stop)
    label = datasets.ClassLabel(names=list(CLASSES)) if kind is None else kind
    columns = {"image": [*map(stored, numbers)], "label": labels or [number % 3 for number in numbers]}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(image=datasets.Image(), label=label))


def as_parquet(to: Path) -> None:
    """Rows 0 to 89 in four files to train on, 90 to 100 in two to test; row groups of seven rows."""
    to.mkdir()
    for part, rows in (("train", rows_of(0, TRAIN)), ("test", rows_of(TRAIN, TRAIN + TEST))):
        for file in range(FILES[part]):
            name = f"{part}-{file:05d}-of-{FILES[part]:05d}.parquet"
            rows.shard(FILES[part], file, contiguous=True).to_parquet(to / name, batch_size=7)


def as_arrow(to: Path) -> None:
    """The same in arrow files as streams, but the last one, which is a file."""
    import pyarrow

    as_parquet(to)
    for path in sorted(to.glob("*.parquet")):
        table = datasets.Dataset.from_parquet(str(path), cache_dir=str(to.parent / "made")).data.table
        kind = pyarrow.ipc.new_file if path.name.startswith("train-00003") else pyarrow.ipc.new_stream
        with kind(str(path.with_suffix(".arrow")), table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
        path.unlink()


def as_folders(to: Path) -> None:
    for number in range(TRAIN + TEST):
        folder = to / ("train" if number < TRAIN else "test") / CLASSES[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        picture(number).save(folder / f"{number:03d}.png")


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    as_parquet(tmp_path / "set")
    return tmp_path / "set"


def section(kwargs: dict[str, Any] | None = None, name: str = "hf/set", **values: Any) -> DataSection:
    given = {"probe_size": 5, "mean": BITS[0], "std": BITS[1], **values}
    return DataSection(name=name, kwargs=STREAM if kwargs is None else kwargs, **given)


def loaders_of(data: Data, batch_size: int = 8, *, seed: int = 3, share: Share = ALONE, **options: Any) -> Loaders:
    workers, cache = options.pop("workers", 0), options.pop("cache", "none")
    return make_loaders(data, batch_size, workers, seed, torch.device("cpu"), cache=cache, share=share, **options)


def passed(loaders: Loaders, epoch: int, consumed: int = 0) -> list[tuple[Tensor, Tensor]]:
    loaders.start_epoch(epoch, consumed)
    return list(loaders.train)


def numbers(batches: Any) -> list[int]:
    """Return which images batches are of, by their last pixel, which crops of a flat picture leave as it is."""
    return [round(255 * float(image[0, -1, -1])) for images, _ in batches for image in images]


def same(ours: Any, theirs: Any) -> bool:
    pairs = list(zip(ours, theirs, strict=True))
    return bool(pairs) and all(torch.equal(one, other) for pair in pairs for one, other in zip(*pair, strict=True))


@pytest.mark.parametrize("write", [as_parquet, as_arrow, as_folders])
@pytest.mark.parametrize("cache", ["none", "memory"])
def test_the_test_part_is_that_of_the_same_set_read_whole(
    tmp_path: Path, write: Callable[[Path], None], cache: Any
) -> None:
    write(tmp_path / "set")
    whole, streamed = load_data(section({}), 3), load_data(section(), 3)
    assert streamed.classes == whole.classes == CLASSES
    assert streamed.content() == whole.content()
    expected, found = (list(loaders_of(data, 4, cache=cache).test) for data in (whole, streamed))
    assert len(found) == 3
    assert same(found, expected)
    loaders = loaders_of(streamed, 4, cache=cache, workers=2)
    assert same(loaders.test, expected)
    assert same(loaders.test, expected)  # a second time


@pytest.mark.parametrize("changes", [{}, {"validation": 0.2}])
def test_every_image_is_tested_probed_or_comes_once_in_every_epoch(tables: Path, changes: dict[str, Any]) -> None:
    data = load_data(section(**changes), 3)
    loaders = loaders_of(data, 1)
    tested, probed = numbers(loaders.test), numbers(loaders.probe)
    held = tested if changes else []
    assert (len(tested), len(probed)) == (18 if changes else TEST, 5)
    epochs = [numbers(passed(loaders, epoch)) for epoch in (1, 2, 3)]
    for trained in epochs:
        assert sorted(trained + probed + held) == list(range(TRAIN))
    assert epochs[0] != epochs[1] != epochs[2]
    assert all(int(label) == number % 3 for (_, label), number in zip(passed(loaders, 3), epochs[2], strict=True))


def test_what_is_held_out_is_the_beginning_of_an_order_of_the_files_by_seed(tables: Path) -> None:
    files = [*map(list, np.array_split(np.arange(TRAIN), FILES["train"]))]
    found = {}
    for seed in range(6):
        data = load_data(section(validation=0.4), seed)
        order = data.train.order  # type: ignore[attr-defined]
        rows = [int(row) for file in order for row in files[file]]
        assert numbers(loaders_of(data).test) == rows[:36]
        assert numbers(loaders_of(data).probe) == rows[36:41]
        found[seed] = tuple(order)
        again = load_data(section(validation=0.4), seed, tested_only=True)
        assert numbers(loaders_of(again).test) == rows[:36]
        assert len(again.train) + len(again.test) == TRAIN
    assert len(set(found.values())) > 1


def test_rows_are_shuffled_in_blocks_of_files_in_another_order_each_epoch(tables: Path) -> None:
    data = load_data(section(), 3)
    probed = set(numbers(loaders_of(data).probe))
    files = np.array_split(np.arange(TRAIN), FILES["train"])
    orders = set()
    for epoch in range(1, 6):
        order = data.train.stream.order(3, epoch)  # type: ignore[attr-defined]
        orders.add(tuple(order))
        left = [int(row) for file in order for row in files[file] if row not in probed]
        trained = numbers(passed(loaders_of(data, 1), epoch))
        blocks = [(left[start : start + BUFFER], trained[start : start + BUFFER]) for start in range(0, 85, BUFFER)]
        assert all(sorted(rows) == sorted(block) for rows, block in blocks)
        assert sum(rows != block for rows, block in blocks) >= len(blocks) - 1
    assert len(orders) > 1
    moves = [np.argsort(np.argsort(block)).tolist() for _, block in blocks[:-1]]
    assert all(one != other for one, other in pairwise(moves))  # no two blocks in one way


@pytest.mark.parametrize("augment", ["crop", "imagenet"])
def test_order_and_augmentation_follow_from_seed_and_epoch_alone(tables: Path, augment: Any) -> None:
    values = {"augment": augment, "image_size": 4}
    expected = passed(loaders_of(load_data(section(**values), 3)), 2)
    for options in ({"workers": 1}, {"workers": 3}, {"cache": "memory", "workers": 2}):
        assert same(passed(loaders_of(load_data(section(**values), 3), **options), 2), expected)
    loaders = loaders_of(load_data(section(**values), 3))
    passed(loaders, 1)
    assert same(list(loaders.train), expected)  # the next pass
    assert not same(passed(loaders, 3), expected)
    assert not same(passed(loaders_of(load_data(section(**values), 3), seed=4), 2), expected)


def test_several_processes_have_together_the_steps_of_one(tables: Path) -> None:
    alone = loaders_of(load_data(section(), 3), 9)
    expected, tested = numbers(passed(alone, 2)), numbers(alone.test)
    shared = [loaders_of(load_data(section(), 3), 3, share=Share(rank, 3)) for rank in range(3)]
    parts = [numbers(passed(loaders, 2)) for loaders in shared]
    assert len({len(part) for part in parts}) == 1
    steps = [part[step : step + 3] for step in range(0, len(parts[0]), 3) for part in parts]
    assert [number for step in steps for number in step] == expected
    for loaders in shared:  # which go on where one process was
        loaders.go_on_at(alone.position(18))
    parts = [numbers(passed(loaders, 2, 18)) for loaders in shared]
    steps = [part[step : step + 3] for step in range(0, len(parts[0]), 3) for part in parts]
    assert [number for step in steps for number in step] == expected[18:]
    assert [number for loaders in shared for number in numbers(loaders.test)] == tested
    probed = [number for loaders in shared for number in numbers(loaders.probe)]
    assert probed == numbers(alone.probe)


def test_a_pass_goes_on_anywhere_and_reads_no_file_before_its_block(
    tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = loaders_of(load_data(section(augment="crop"), 3))
    expected = passed(straight, 4)
    positions = [straight.position(8 * step) for step in range(len(expected) + 1)]
    order = load_data(section(), 3).train.stream.order(3, 4)  # type: ignore[attr-defined]
    opened: list[tuple[int, int]] = []
    read = RowStream._rows_of

    def noted(self: RowStream, file: int, start: int) -> Iterator[Any]:
        opened.append((file, start))
        return read(self, file, start)

    monkeypatch.setattr(RowStream, "_rows_of", noted)
    for step in range(len(expected)):
        for position in (positions[step], None):
            resumed = loaders_of(load_data(section(augment="crop"), 3))
            resumed.go_on_at(position)
            opened.clear()
            rest = passed(resumed, 4, 8 * step)
            assert same(rest, expected[step:])
            first = opened[0]
            if position is None:
                assert first[0] == order[0]
            else:
                assert first[0] == order[position["file"]]
                assert first[1] >= position["row"]
                assert resumed.position(8 * step) == position  # for whoever is interrupted again
    assert positions[-1] is not None
    assert positions[-1]["file"] > 0  # so that there was something not to be read
    resumed.go_on_at(positions[3])  # one of another epoch says nothing of this one
    assert same(passed(resumed, 5, 16), passed(straight, 5)[2:])


def test_the_next_block_is_read_while_this_one_is_made_use_of(tables: Path) -> None:
    sampler = loaders_of(load_data(section(), 3), 1).train.sampler
    assert isinstance(sampler, StreamedSampler)
    keys = iter(sampler)
    next(keys)
    until = time.monotonic() + 20
    while sampler._begun[-1]["block"] < 2 and time.monotonic() < until:
        time.sleep(0.01)
    assert sampler._begun[-1]["block"] == 2  # the second has been read, the third has not
    keys.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("stream")]


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def make_trainer(**changes: Any) -> Trainer:
    values = {
        "model": {"entrypoint": f"{__name__}:network"},
        "data": {"name": "hf/set", "probe_size": 5, "workers": 0, "kwargs": STREAM, "augment": "crop"},
        "epochs": 2,
        "batch_size": 8,
        "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
        "policy": {"kind": "neq", "epsilon": 0.05},
        "deterministic": True,
        "channels_last": False,
        "device": "cpu",
    }
    return prepare(Recipe.model_validate(values | changes), "test").trainer


@pytest.mark.parametrize("changes", [{}, {"probe_every": 7}, {"gradient_accumulation": 3}])
def test_a_run_that_stops_at_any_step_ends_as_one_that_does_not(tables: Path, changes: dict[str, Any]) -> None:
    straight = make_trainer(**changes)
    expected = [record.metrics["train_loss"] for record in straight.run() if isinstance(record, EpochRecord)]
    stops = 0
    for stop in (2, 5, 8) if not changes else (4,):
        trainer, losses = make_trainer(**changes), []
        asked = iter(range(1, 10**6))
        trainer.wish = lambda asked=asked, stop=stop: STOP if next(asked) == stop else GO_ON
        for record in trainer.run():
            if isinstance(record, EpochRecord):
                losses.append(record.metrics["train_loss"])
            if isinstance(record, Pause):
                stops += 1
                state = pickle.loads(pickle.dumps(trainer.state_dict()))
                break
        resumed = make_trainer(**changes)
        resumed.load_state_dict(state)
        losses += [record.metrics["train_loss"] for record in resumed.run() if isinstance(record, EpochRecord)]
        assert losses == expected
        for name, tensor in straight.model.state_dict().items():
            assert torch.equal(resumed.model.state_dict()[name], tensor), name
    assert stops == (1 if changes else 3)


def test_a_file_that_cannot_be_read_ends_the_epoch_with_its_name_and_the_run_goes_on(
    tables: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = passed(loaders_of(load_data(section(), 3)), 1)
    data = load_data(section(), 3)
    last = data.train.stream.order(3, 1)[-1]  # type: ignore[attr-defined]
    path = sorted(tables.glob("train-*"))[last]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
    for workers in (0, 2):
        loaders = loaders_of(data, workers=workers)
        loaders.start_epoch(1)
        before = []
        with pytest.raises(DataError) as caught:
            before.extend(iter(loaders.train))
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(f"hf/set train of {path.name}: cannot be read (")
        assert "mend or remove the file" in str(caught.value)
    assert capfd.readouterr() == ("", "")
    path.write_bytes(whole)
    resumed = loaders_of(load_data(section(), 3))
    resumed.go_on_at(loaders.position(16))
    assert same(passed(resumed, 1, 16), expected[2:])


def test_an_image_or_label_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    rows_of(0, 20, [0] * 17 + [-1, 0, 0]).to_parquet(tmp_path / "set" / "train.parquet")
    rows_of(20, 25).to_parquet(tmp_path / "set" / "test.parquet")
    with pytest.raises(DataError, match=r"^hf/set train, row 17 \(017.png\): cannot be used \(.*names no class\)"):
        passed(loaders_of(load_data(section(), 3), 1), 1)


@pytest.mark.parametrize("length", [TRAIN - 20, TRAIN + 30])
def test_a_length_is_believed_until_the_stream_ends(tables: Path, length: int) -> None:
    """Fewer than there are make shorter epochs, of other images each; more are one line at the end."""
    loaders = loaders_of(load_data(section({**STREAM, "train_length": length}), 3), 1)
    if length < TRAIN:
        epochs = [set(numbers(passed(loaders, epoch))) for epoch in (1, 2, 3, 4)]
        assert {len(epoch) for epoch in epochs} == {length - 5}
        assert len(set.union(*epochs)) > length - 5
        return
    with pytest.raises(DataError) as caught:
        passed(loaders, 1)
    assert str(caught.value) == (
        f"hf/set train has {TRAIN} rows, not the {length} of data.kwargs.train_length; "
        f"set data.kwargs.train_length={TRAIN}"
    )


@pytest.mark.parametrize("length", [TEST - 1, TEST + 1])
def test_all_of_the_test_part_is_tested_or_none(tables: Path, length: int) -> None:
    loaders = loaders_of(load_data(section({**STREAM, "test_length": length}), 3))
    with pytest.raises(DataError) as caught:
        list(loaders.test)
    few = f"hf/set test has more rows than the {length} of data.kwargs.test_length; correct data.kwargs.test_length"
    many = (
        f"hf/set test has {TEST} rows, not the {length} of data.kwargs.test_length; set data.kwargs.test_length={TEST}"
    )
    assert str(caught.value) == (few if length < TEST else many)


def test_parts_can_be_sent_to_another_process_without_the_stream(tables: Path) -> None:
    test = load_data(section(), 1).test
    keys = list(test.keys or ())
    again = pickle.loads(pickle.dumps(test))
    assert len(keys) == TEST
    assert all(torch.equal(again[key][0], test[key][0]) for key in keys)
    assert len(pickle.dumps(test)) < 2000


def said(data_section: DataSection) -> str:
    with pytest.raises(NeqError) as caught:
        load_data(data_section, 3)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_streamed_is_one_line(tmp_path: Path) -> None:
    rows_of(0, 20).save_to_disk(tmp_path / "saved")
    assert said(section(name="hf/saved", validation=0.2)) == (
        "data.kwargs.streaming: save_to_disk wrote hf/saved, which is read where it lies without being held in memory; "
        "remove it"
    )
    images = datasets.Image()
    made = datasets.Dataset.from_dict(
        {"image": [stored(1)] * 9, "mask": [stored(1)] * 9}, features=datasets.Features(image=images, mask=images)
    )
    (tmp_path / "masks").mkdir()
    made.to_parquet(tmp_path / "masks" / "train.parquet")
    asked = section(name="hf/masks", validation=0.2, image_key="image", label_key="mask")
    assert said(asked) == "data.kwargs.streaming: 'mask' of hf/masks holds masks, which are not streamed; remove it"
    assert said(section(name="hf/no/where")).startswith("data.name: no folder 'no/where', nor could it be had from the")


def test_classes_are_told_by_the_column_or_the_recipe(tmp_path: Path) -> None:
    for name, kind, values in (
        ("words", "string", ["a", "b"]),
        ("numbers", "int32", [0, 1]),
        ("truths", "bool", [True, False]),
    ):
        (tmp_path / name).mkdir()
        rows_of(0, 20, values * 10, datasets.Value(kind)).to_parquet(tmp_path / name / "train.parquet")

    def asked(name: str, **kwargs: Any) -> DataSection:
        return section({**STREAM, **kwargs}, name=f"hf/{name}", label_key="label", validation=0.2)

    assert said(asked("words")) == (
        "data.label_key: 'label' of hf/words holds texts, which are classes once all are read; cast it to ClassLabel, "
        "or remove data.kwargs.streaming"
    )
    assert said(asked("numbers")) == (
        "data.kwargs.num_classes: 'label' of hf/numbers holds numbers, of which the largest is not known before all "
        "are read; give it"
    )
    assert said(asked("numbers", num_classes=True)) == "data.kwargs.num_classes: True is not a number of classes"
    assert load_data(asked("numbers", num_classes=4), 3).classes == ("0", "1", "2", "3")
    data = load_data(asked("truths"), 3)
    assert data.classes == ("0", "1")
    assert {int(label) for _, labels in passed(loaders_of(data), 1) for label in labels} == {0, 1}
    as_parquet(tmp_path / "set")
    assert said(section({**STREAM, "num_classes": 3})) == (
        "data.kwargs.num_classes: 'label' of hf/set tells its classes; remove it"
    )


def test_a_number_of_rows_that_nothing_tells_is_asked_for(tmp_path: Path) -> None:
    """As of a set of the hub without a description, whose files are not here."""
    (tmp_path / "tars").mkdir()
    for part, start in (("train", 0), ("test", 30)):
        with tarfile.open(tmp_path / "tars" / f"{part}-0.tar", "w") as archive:
            for number in range(start, start + 20):
                for suffix, content in (("png", stored(number)["bytes"]), ("cls", b"1")):
                    entry = tarfile.TarInfo(f"{number:03d}.{suffix}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
    asked = {**STREAM, "num_classes": 3}
    keys = {"name": "hf/tars", "image_key": "png", "label_key": "cls"}
    assert said(section(asked, **keys)) == (
        "data.kwargs.train_length: how many rows has the split 'train' of hf/tars? Neither its files nor its "
        "description tell; give a number"
    )
    assert said(section({**asked, "train_length": 20}, **keys)).startswith("data.kwargs.test_length: how many rows has")
    told = section({**asked, "train_length": 20, "test_length": 20}, **keys)
    splits = [{"name": part, "num_examples": 20, "num_bytes": 1} for part in ("train", "test")]
    for described in (False, True):
        if described:
            (tmp_path / "tars" / "README.md").write_text(
                f"---\n{json.dumps({'dataset_info': {'splits': splits}})}\n---\n"
            )
            told = section(asked, **keys)
        loaders = loaders_of(load_data(told, 3), 1)
        assert numbers(loaders.test) == list(range(30, 50))
        assert sorted(numbers(passed(loaders, 1)) + numbers(loaders.probe)) == list(range(20))
        shared = [loaders_of(load_data(told, 3), 1, share=Share(rank, 2)) for rank in (0, 1)]
        assert [numbers(one.test) for one in shared] == [list(range(30, 40)), list(range(40, 50))]


def test_rows_that_are_sorted_by_class_are_noted(tmp_path: Path) -> None:
    as_folders(tmp_path / "set")
    sorted_by_class = "data.kwargs.streaming: the probe's 5 images are all of one class"
    assert [note for note in load_data(section(), 3).notes if note.startswith(sorted_by_class)]
    as_parquet(tmp_path / "mixed")
    assert [note for note in load_data(section(name="hf/mixed"), 3).notes if "streaming" in note] == [
        "data.kwargs.streaming: 4 files, in an order of each epoch's own, whose rows are shuffled in blocks of 12 that "
        "follow each other",
    ]


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"streaming": "yes"}, "data.kwargs.streaming: 'yes' is neither true nor false"),
        ({"streaming": 1}, "data.kwargs.streaming: 1 is neither true nor false"),
        ({"shuffle_buffer": 5}, "data.kwargs.shuffle_buffer: is for streams; remove it, or set data.kwargs.streaming"),
        ({"streaming": False, "train_length": 5}, "data.kwargs.train_length: is for streams; remove it, or set"),
        ({"streaming": True, "shuffle_buffer": 0}, "data.kwargs.shuffle_buffer: 0 is not a number of rows above 0"),
        ({"streaming": True, "train_length": 2.5}, "data.kwargs.train_length: 2.5 is not a number of rows above 0"),
        ({"streaming": True, "test_length": True}, "data.kwargs.test_length: True is not a number of rows above 0"),
    ],
)
def test_what_can_be_wrong_before_anything_is_opened(kwargs: dict[str, Any], says: str) -> None:
    (problem, *_) = check_section("data", section(kwargs))
    assert f"{problem.key}: {problem.message}".startswith(says)


def test_too_much_that_is_held_out_is_one_line(tables: Path) -> None:
    assert said(section(probe_size=TRAIN)).startswith(f"data.probe_size: {TRAIN} probe images of {TRAIN} training")
    assert said(section(validation=0.999)) == (
        f"data.validation: 0.999 of {TRAIN} training images is all of them; lower it"
    )
