"""Where images are kept: by their size and what is free, with the reason in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from neq_cli.errors import RecipeError
from neq_cli.recipe import DataSection
from neq_cli.training.batches import cache_place as module
from neq_cli.training.batches.cache_place import Choice, choose_cache, readable
from neq_cli.training.data import parts as data_module
from neq_cli.training.data.opened import Source, Stored
from neq_cli.training.data.parts import Data, load_data

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GIGA = 10**9


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int | None]:
    """Bytes free by device type, to be changed."""
    bytes_free: dict[str, int | None] = {"cpu": GIGA, "cuda": GIGA}
    monkeypatch.setattr(module, "free_memory", lambda device: bytes_free[device.type])
    return bytes_free


def folder(root: Path, **values: Any) -> Data:
    for place in ("train/a", "test/a"):
        (root / place).mkdir(parents=True)
        for number in range(5):
            Image.fromarray(np.zeros((6, 4, 3), dtype=np.uint8)).save(root / place / f"{number}.png")
    return load_data(DataSection(name="image_folder", root=str(root), probe_size=1, **values), 1)


def stored(monkeypatch: pytest.MonkeyPatch, **values: Any) -> Data:
    """Data like CIFAR-10's: 10 training and 4 test images of 3x4x4 bytes in memory."""
    parts = [Stored(torch.zeros(n, 3, 4, 4, dtype=torch.uint8), torch.zeros(n, dtype=torch.int64)) for n in (10, 4)]
    monkeypatch.setattr(data_module, "open_source", lambda section, **_: Source("mine", *parts, ("a",)))
    return load_data(DataSection(name="CIFAR10", probe_size=2, **values), 1)


def test_auto_takes_memory_where_a_quarter_is_enough(tmp_path: Path, free: dict[str, int | None]) -> None:
    data = folder(tmp_path)
    size = 10 * 3 * 6 * 4
    free["cpu"] = 4 * size
    assert choose_cache(data, "auto", CPU) == Choice("memory", "data.cache: memory, 0.00072 MB")
    free["cpu"] = 4 * size - 1
    assert choose_cache(data, "auto", CPU) == Choice(
        "none", "data.cache: none, as 0.00072 MB are more than a quarter of the 0.00288 MB of memory that are free"
    )


def test_auto_prefers_the_device(tmp_path: Path, free: dict[str, int | None]) -> None:
    data = folder(tmp_path, image_size=8)
    size = 10 * 3 * 8 * 8
    free["cuda"] = 4 * size
    assert choose_cache(data, "auto", CUDA) == Choice("device", "data.cache: device, 0.00192 MB")
    free["cuda"] = 4 * size - 1
    assert choose_cache(data, "auto", CUDA).place == "memory"
    free["cuda"] = None
    assert choose_cache(data, "auto", CUDA).place == "memory"
    free["cpu"] = 0
    assert choose_cache(data, "auto", CUDA).place == "none"


def test_images_in_memory_take_no_more_of_it_unless_scaled(
    monkeypatch: pytest.MonkeyPatch, free: dict[str, int | None]
) -> None:
    free["cpu"] = 0
    assert choose_cache(stored(monkeypatch), "auto", CPU) == Choice("memory", "data.cache: memory, 0.000672 MB")
    assert choose_cache(stored(monkeypatch, image_size=4), "memory", CPU).place == "memory"
    assert choose_cache(stored(monkeypatch, image_size=8), "auto", CPU).place == "none"
    # Cut at random, the 8 training images stay as they are; 2 and 4 others are scaled.
    cut = stored(monkeypatch, image_size=8, augment="imagenet")
    free["cpu"] = 4 * 6 * 3 * 8 * 8
    assert choose_cache(cut, "auto", CUDA) == Choice("memory", f"data.cache: memory, {readable(8 * 48 + 6 * 192)}")
    free["cpu"] -= 1
    assert choose_cache(cut, "auto", CUDA).place == "none"


def test_images_cut_at_random_are_kept_only_when_asked(tmp_path: Path, free: dict[str, int | None]) -> None:
    data = folder(tmp_path, image_size=8, augment="imagenet")
    choice = choose_cache(data, "auto", CUDA)
    assert choice.place == "none"
    assert choice.note.startswith("data.cache: none, as images that are cut at random may differ in size;")
    asked = choose_cache(data, "memory", CUDA)
    assert asked.place == "memory"
    assert asked.note == f"data.cache: memory, {readable(6 * 192)}, and training images in sizes of their own"
    with pytest.raises(
        RecipeError, match=r"^data.cache: imagenet augmentation cuts .* on the CPU; use memory, not the device$"
    ):
        choose_cache(data, "device", CUDA)


def test_data_of_the_users_own_is_kept_only_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: dict[str, int | None]
) -> None:
    (tmp_path / "cachemodule.py").write_text(
        "import torch\n"
        "from torch.utils.data import TensorDataset\n"
        "def make(): return [TensorDataset(torch.rand(5, 1, 2, 2), torch.arange(5)) for _ in '12']\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    data = load_data(DataSection(entrypoint="cachemodule:make", probe_size=1), 1)
    choice = choose_cache(data, "auto", CUDA)
    assert choice.place == "none"
    assert choice.note.startswith("data.cache: none, as cachemodule:make may change or hold chance;")
    assert choose_cache(data, "memory", CUDA) == Choice("memory", f"data.cache: memory, {readable(10 * 16)}")
    assert choose_cache(data, "device", CUDA) == Choice("device", f"data.cache: device, {readable(10 * 16)}")


def test_none_is_none(tmp_path: Path, free: dict[str, int | None]) -> None:
    assert choose_cache(folder(tmp_path), "none", CUDA) == Choice("none", "data.cache: none")


def test_the_device_may_be_the_cpu(tmp_path: Path, free: dict[str, int | None]) -> None:
    assert choose_cache(folder(tmp_path), "device", CPU) == Choice(
        "memory", "data.cache: memory, 0.00072 MB, as the training device is the CPU"
    )


def test_what_cannot_fit_is_refused_before_it_is_decoded(tmp_path: Path, free: dict[str, int | None]) -> None:
    data = folder(tmp_path)
    free |= {"cpu": 719, "cuda": 719}
    with pytest.raises(RecipeError) as raised:
        choose_cache(data, "memory", CUDA)
    assert str(raised.value) == ("data.cache: images of 0.00072 MB, but 0.000719 MB of memory are free; use auto")
    with pytest.raises(RecipeError, match=r"^data.cache: images .* of cuda's memory are free; use auto$"):
        choose_cache(data, "device", CUDA)
    free |= {"cpu": 720, "cuda": None}
    assert choose_cache(data, "memory", CUDA).place == "memory"
    assert choose_cache(data, "device", CUDA).place == "device"


def test_processes_of_a_machine_share_its_memory(tmp_path: Path, free: dict[str, int | None]) -> None:
    data = folder(tmp_path)
    free |= {"cpu": 3 * 4 * 720, "cuda": 4 * 720}
    assert choose_cache(data, "auto", CPU, 3) == Choice("memory", "data.cache: memory, 0.00072 MB in each process")
    assert choose_cache(data, "auto", CUDA, 3).place == "device"  # one process, one device
    free["cpu"] = 3 * 4 * 720 - 1
    assert choose_cache(data, "auto", CPU, 3).note == (
        "data.cache: none, as 0.00072 MB are more than a quarter of the 0.00288 MB of memory that are free "
        "for each of 3 processes"
    )
    free["cpu"] = 3 * 720
    assert choose_cache(data, "memory", CPU, 3).place == "memory"
    with pytest.raises(RecipeError, match=r"0.00054 MB of memory are free for each of 4 processes; use auto$"):
        choose_cache(data, "memory", CPU, 4)


def test_sizes_in_words() -> None:
    words = [readable(count) for count in (460_032, 184_319_999, 999_999_999, 1_230_000_000, 4_000_000_000_000)]
    assert words == ["0.46 MB", "184 MB", "1,000 MB", "1.23 GB", "4,000 GB"]
