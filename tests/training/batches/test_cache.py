"""Images decoded once: the same batches as without, and nothing read twice."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from neq_cli.errors import TrainingError
from neq_cli.events import Preparing
from neq_cli.recipe import DataSection
from neq_cli.training.batches import cache as kept_module
from neq_cli.training.batches.cache import CachedBatches, CachedSeparately, Decoding
from neq_cli.training.batches.loaders import Loaders, make_loaders
from neq_cli.training.batches.sampling import ALONE, Share, ShuffledSampler
from neq_cli.training.data import parts as data_module
from neq_cli.training.data.images import ImagesInMemory
from neq_cli.training.data.opened import Source, Stored
from neq_cli.training.data.parts import Data, load_data
from neq_cli.training.data.transforms import Preparation
from neq_cli.training.startup import Startup

CPU = torch.device("cpu")


def write(root: Path, sizes: list[tuple[int, int]]) -> None:
    """Two classes of PNG files of noise in each part, of ``sizes`` (height, width) in turn."""
    generator = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("a", "b"):
            (root / part / name).mkdir(parents=True)
            for number in range(9):
                pixels = generator.integers(0, 256, (*sizes[number % len(sizes)], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{number}.png")


def open_data(kind: str, root: Path, monkeypatch: pytest.MonkeyPatch, **values: Any) -> Data:
    if kind == "digits":
        return load_data(DataSection(name="digits", probe_size=5, **values), 1)
    if kind == "in_memory":
        noise = torch.randint(0, 256, (30, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        parts = [Stored(noise[:20], torch.arange(20) % 7), Stored(noise[20:], torch.arange(10) % 7)]
        monkeypatch.setattr(data_module, "open_source", lambda *_, **__: Source("CIFAR10", *parts, tuple("abcdefg")))
        return load_data(DataSection(name="CIFAR10", probe_size=3, **values), 1)
    write(root, [(8, 8), (10, 9)] if "image_size" in values else [(8, 8)])
    return load_data(DataSection(name="image_folder", root=str(root), probe_size=3, **values), 1)


def passes(made: Loaders) -> list[tuple[Tensor, Tensor]]:
    """Every batch of two epochs, the tests and the probe between them."""
    return [batch for part in (made.train, made.test, made.probe, made.train, made.test) for batch in part]


def assert_same(first: list[tuple[Tensor, Tensor]], second: list[tuple[Tensor, Tensor]]) -> None:
    assert len(first) == len(second) > 0
    for (images, labels), (others, other_labels) in zip(first, second, strict=True):
        assert (images.dtype, labels.dtype) == (others.dtype, other_labels.dtype) == (torch.float32, torch.int64)
        assert torch.equal(images, others)
        assert torch.equal(labels, other_labels)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("augment", ["none", "crop", "cifar"])
@pytest.mark.parametrize(
    ("kind", "size"), [("folder", None), ("folder", 6), ("digits", None), ("in_memory", None), ("in_memory", 6)]
)
def test_the_same_batches_whatever_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, size: int | None, augment: str, workers: int
) -> None:
    values = {"augment": augment} if size is None else {"augment": augment, "image_size": size}
    data = open_data(kind, tmp_path, monkeypatch, **values)
    batch_size = 200 if kind == "digits" else 4
    read, kept = (make_loaders(data, batch_size, workers, 1, CPU, cache=cache) for cache in ("none", "memory"))  # type: ignore[arg-type]
    assert isinstance(kept.train, CachedBatches)
    assert [len(part) for part in (kept.train, kept.test, kept.probe)] == [
        len(part) for part in (read.train, read.test, read.probe)
    ]
    assert_same(passes(kept), passes(read))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["folder", "in_memory"])
def test_the_same_batches_where_images_are_cut_at_random(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, workers: int
) -> None:
    data = open_data(kind, tmp_path, monkeypatch, augment="imagenet", image_size=6)
    read, kept = (make_loaders(data, 4, workers, 1, CPU, cache=cache) for cache in ("none", "memory"))  # type: ignore[arg-type]
    assert isinstance(kept.train, CachedSeparately) == (kind == "folder")
    assert len(kept.train) == len(read.train)
    assert_same(passes(kept), passes(read))


@pytest.mark.parametrize("augment", ["cifar", "imagenet"])
@pytest.mark.parametrize(("workers", "sharing", "processes"), [(0, 1, 0), (2, 1, 4), (2, 2, 2), (1, 5, 1), (6, 1, 6)])
def test_what_is_kept_is_read_by_all_cores_and_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, augment: str, workers: int, sharing: int, processes: int
) -> None:
    data = open_data("folder", tmp_path, monkeypatch, augment=augment, image_size=6)
    told: list[Preparing] = []
    seconds = iter(range(10**6))
    startup = Startup(told.append, lambda: float(next(seconds)))
    expected = passes(make_loaders(data, 4, 0, 1, CPU, cache="none"))
    monkeypatch.setattr(kept_module, "usable_cores", lambda: 4)
    monkeypatch.setattr(kept_module, "_LEAST_SHARE", 1)
    started = []
    in_batches = kept_module.in_batches

    def noted(images: Any, batch_size: int, workers: int, *arguments: Any, **options: Any) -> Any:
        if options.get("collate_fn") is not None:  # for reading
            started.append((batch_size, workers))
        return in_batches(images, batch_size, workers, *arguments, **options)

    monkeypatch.setattr(kept_module, "in_batches", noted)
    made = make_loaders(data, 4, workers, 1, CPU, cache="memory", share=Share(local_processes=sharing), startup=startup)
    assert_same(passes(made), expected)
    read = [count for size, count in started if count or not workers]
    assert set(read) == {processes}
    for size, count in started:
        assert size * max(count, 1) <= 4 * max(workers, 1)  # no more in memory at once than before
    counts = [record for record in told if record.total == 15]  # 18 less 3 that are probed
    assert counts[-1] == Preparing("reading images", 15, 15)
    assert startup.seconds["reading images"] > 0


# What keeps them: read anew, kept alike, kept apart.
KINDS = [("none", "cifar"), ("memory", "cifar"), ("memory", "imagenet")]


def made_for(data: Data, cache: Any, batch_size: int, workers: int = 0, share: Share = ALONE) -> Loaders:
    return make_loaders(data, batch_size, workers, 1, CPU, cache=cache, share=share)


def joined(parts: list[list[tuple[Tensor, Tensor]]]) -> list[tuple[Tensor, Tensor]]:
    """The batches of all processes, step by step, as one."""
    steps = zip(*parts, strict=True)
    return [(torch.cat([batch[0] for batch in step]), torch.cat([batch[1] for batch in step])) for step in steps]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("cache", "augment"), KINDS)
def test_processes_have_together_what_one_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str, augment: str, workers: int
) -> None:
    data = open_data("folder", tmp_path, monkeypatch, augment=augment, image_size=6)
    alone = made_for(data, cache, 6)
    several = [made_for(data, cache, 2, workers, Share(rank, 3)) for rank in range(3)]
    assert isinstance(several[0].train, CachedSeparately) == (augment == "imagenet")
    for consumed in (0, 4, 0):  # whole, from the middle and whole again, with workers that stay
        for made in (alone, *several):
            made.start_epoch(2, consumed)
        parts = [list(made.train) for made in several]
        assert {len(part) for part in parts} == {made.steps(consumed) for made in several} == {(15 - consumed) // 6}
        assert_same(joined(parts), list(alone.train))
    assert_same(one_batch([batch for made in several for batch in made.test]), one_batch(list(alone.test)))
    assert_same(one_batch([batch for made in several for batch in made.probe]), one_batch(list(alone.probe)))
    assert [sum(len(labels) for _, labels in made.test) for made in several] == [6, 6, 6]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("cache", "augment"), KINDS)
def test_an_epoch_goes_on_where_it_was_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str, augment: str, workers: int
) -> None:
    data = open_data("folder", tmp_path, monkeypatch, augment=augment, image_size=6)
    made = made_for(data, cache, 3, workers)
    made.start_epoch(2)
    whole = list(made.train)
    for taken in (1, 3, 5):
        made.start_epoch(1)
        next(iter(made.train))  # a pass that was left
        made.start_epoch(2, 3 * taken)
        rest = list(made.train)
        assert len(rest) == made.steps(3 * taken) == 5 - taken
        if rest:
            assert_same(rest, whole[taken:])
    made.start_epoch(1, 6)
    assert [len(list(made.train)), len(list(made.train))] == [3, 5]  # the next pass is a whole one, of epoch 2
    assert len(made.train) == made.steps() == 5


@pytest.mark.parametrize(("cache", "augment"), KINDS)
def test_another_number_of_processes_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str, augment: str
) -> None:
    data = open_data("folder", tmp_path, monkeypatch, augment=augment, image_size=6)
    one_by_one = made_for(data, cache, 1)
    one_by_one.start_epoch(2)
    every = list(one_by_one.train)
    two = [made_for(data, cache, 2, share=Share(rank, 2)) for rank in range(2)]
    three = [made_for(data, cache, 1, share=Share(rank, 3)) for rank in range(3)]
    for made in two:
        made.start_epoch(2)
    first = joined([list(made.train)[:1] for made in two])
    for made in three:
        made.start_epoch(2, 4)
    then = joined([list(made.train) for made in three])
    # 4 images by two processes, 9 of the other 11 by three, and 2 that fill no step.
    assert (len(first), len(then)) == (1, 3)
    assert_same(one_batch(first + then), one_batch(every[:13]))


def one_batch(batches: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [(torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches]))]


@pytest.mark.parametrize("cache", ["none", "memory"])
def test_a_share_of_the_tests_may_be_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str) -> None:
    data = open_data("in_memory", tmp_path, monkeypatch)
    data.test.indices = data.test.indices[:2]
    made = [made_for(data, cache, 4, 2, Share(rank, 3)) for rank in range(3)]
    assert [len(part.test) for part in made] == [1, 1, 0]
    assert [sum(len(labels) for _, labels in part.test) for part in made] == [1, 1, 0]


@pytest.mark.parametrize("augment", ["cifar", "imagenet"])
def test_files_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, augment: str) -> None:
    data = open_data("folder", tmp_path, monkeypatch, augment=augment, image_size=6)
    made, again = (make_loaders(data, 4, 0, 1, CPU, cache="memory") for _ in range(2))
    first = passes(made)
    for path in tmp_path.rglob("*.png"):
        path.unlink()
    made.start_epoch(1)
    assert_same(first, passes(made))
    with pytest.raises(TrainingError, match=r"\.png: cannot be used \(FileNotFoundError"):
        passes(again)


def test_nothing_is_read_before_the_first_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_data("folder", tmp_path, monkeypatch)
    for path in tmp_path.rglob("*.png"):
        path.unlink()
    made = make_loaders(data, 4, 2, 1, CPU, cache="memory")
    assert [len(part) for part in (made.train, made.test, made.probe)] == [3, 5, 1]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("augment", ["none", "imagenet"])
def test_a_damaged_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, augment: str, workers: int) -> None:
    data = open_data("folder", tmp_path, monkeypatch, augment=augment, image_size=6)
    damaged = tmp_path / "train" / "b" / "7.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    with pytest.raises(TrainingError) as raised:
        passes(make_loaders(data, 4, workers, 1, CPU, cache="memory"))
    assert str(raised.value).startswith(f"{damaged}: cannot be used (")
    assert "\n" not in str(raised.value)


def test_no_pass_touches_the_global_generators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_loaders(open_data("folder", tmp_path, monkeypatch, augment="cifar"), 4, 0, 1, CPU, cache="memory")
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index,union-attr]
    passes(made)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()  # type: ignore[index]


def test_an_epoch_can_be_begun_at_will_and_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_data("in_memory", tmp_path, monkeypatch, augment="cifar")
    straight, resumed = (make_loaders(data, 4, 0, 1, CPU, cache="memory") for _ in range(2))
    epochs = [list(straight.train) for _ in range(3)]
    next(iter(resumed.train))
    resumed.start_epoch(3)
    assert_same(list(resumed.train), epochs[2])
    assert not torch.equal(epochs[0][0][0], epochs[1][0][0])


def test_a_model_may_overwrite_its_input() -> None:
    images = torch.rand(6, 1, 4, 4)
    data = Stored(images.clone(), torch.arange(6))
    for part in passes_of_plain_floats(data):
        for batch, _ in part:
            batch.zero_()
    assert torch.equal(data.images, images)


def passes_of_plain_floats(data: Stored) -> list[CachedBatches]:
    """The whole of ``data`` in order and shuffled; neither scaled nor normalised, so that nothing need be copied."""
    part = ImagesInMemory(data.images, data.labels, torch.arange(len(data)), Preparation(), augmented=True)
    return [CachedBatches(part, CPU, CPU, Decoding(4, 0, 1), sampler) for sampler in (None, ShuffledSampler(6, 1))]


def test_images_of_two_types_are_refused_and_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mixedmodule.py").write_text(
        "import torch\n"
        "class Mixed(list): classes = ['a']\n"
        "def make():\n"
        "    images = [torch.zeros(1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.uint8)]\n"
        "    return [Mixed((images[i // 4], 0) for i in range(8)) for _ in '12']\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    data = load_data(DataSection(entrypoint="mixedmodule:make", probe_size=1), 1)
    says = (
        r"^image 0 of mixedmodule:make: more than 8 bits \(float32\), but others have 8 bits; store all images alike$"
    )
    for cache in ("memory", "none"):
        with pytest.raises(TrainingError, match=says):
            list(make_loaders(data, 4, 0, 1, CPU, cache=cache).test)


def test_no_room_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_loaders(open_data("folder", tmp_path, monkeypatch), 4, 0, 1, CPU, cache="memory")

    empty = torch.empty

    def full(shape: tuple[int, ...], **options: Any) -> Tensor:
        if shape[:1] == (18,):
            raise torch.OutOfMemoryError("a long story")
        return empty(shape, **options)

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(TrainingError) as raised:
        list(made.test)
    assert str(raised.value) == "data.cache: no room for 18 images on cpu; use none"


def test_decoded_images_can_be_sent_to_workers_that_are_started_afresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_loaders(
        open_data("folder", tmp_path, monkeypatch, augment="imagenet", image_size=6), 4, 0, 1, CPU, cache="memory"
    )
    assert isinstance(made.train, CachedSeparately)
    list(made.train)
    sent = pickle.loads(pickle.dumps(made.train.images))
    assert torch.equal(sent[3, 2**40][0], made.train.images[3, 2**40][0])
