"""Tensors in shards: put together again, and every fault of files that others may have written is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from neq_cli.errors import RunDirectoryError
from neq_cli.training.loop.checkpoint import load_state, read_weights_whole, save_state, shards_of
from neq_cli.training.loop.shards import STARTS, InShards, Shards, in_shards, replaced
from neq_cli.training.loop.tensor_file import write_tensors

WHOLE = {"model/weight": torch.arange(15.0).view(5, 3), "averaged/module.weight": torch.arange(15, 20).double()}


def parts(*spans: tuple[int, int]) -> list[dict[str, tuple[int, Tensor]]]:
    return [{name: (start, one[start:end]) for name, one in WHOLE.items()} for start, end in spans]


def written(folder: Path, files: list[dict[str, tuple[int, Tensor]]], starts: Any = None) -> Shards:
    """Write the parts of each process, as ``write_shards`` does."""
    folder.mkdir()
    checksums = {}
    for number, file in enumerate(files, 1):
        name = f"{number}-of-{len(files)}.safetensors"
        told = json.dumps({key: start for key, (start, _) in file.items()}) if starts is None else starts
        found = {key: part for key, (_, part) in file.items()}
        checksums[name] = write_tensors(found, {STARTS: told}, folder / name)
    return Shards(folder, checksums)


def state_of(shards: Shards) -> dict[str, Any]:
    named = {name: InShards(name, one.dtype, one.shape, shards) for name, one in WHOLE.items()}
    return {
        "epoch": 3,
        "so_far": None,
        "model": {"weight": named["model/weight"], "buffer": torch.ones(2)},
        "averaged": {"module.weight": named["averaged/module.weight"], "n_averaged": torch.tensor(4)},
    }


def saved(folder: Path, spans: list[tuple[int, int]], **changes: Any) -> Path:
    shards = written(folder / "shards_000007", parts(*spans), **changes)
    save_state(state_of(shards), folder / "last.safetensors", shards)
    return folder / "last.safetensors"


@pytest.mark.parametrize("spans", [[(0, 5)], [(0, 3), (3, 5)], [(0, 2), (2, 4), (4, 5), (5, 5), (5, 5)]])
def test_put_together_in_one_process(tmp_path: Path, spans: list[tuple[int, int]]) -> None:
    path = saved(tmp_path, spans)
    state = load_state(path)
    assert torch.equal(state["model"]["weight"], WHOLE["model/weight"])
    assert torch.equal(state["averaged"]["module.weight"], WHOLE["averaged/module.weight"])
    assert state["averaged"]["module.weight"].dtype == torch.float64
    assert torch.equal(state["model"]["buffer"], torch.ones(2))
    assert shards_of(path) == tmp_path / "shards_000007"
    weights = read_weights_whole(path)
    assert weights.epoch == 3
    assert list(weights.tensors) == ["weight"]  # the averaged ones
    assert torch.equal(weights.tensors["weight"], WHOLE["averaged/module.weight"])


def test_left_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, [(0, 3), (3, 5)])
    monkeypatch.chdir(tmp_path)
    shards, found = in_shards(load_state(Path("last.safetensors"), whole=False))
    assert shards is not None
    assert shards.folder == tmp_path / "shards_000007"  # wherever another process is
    assert {name: one.shape for name, one in found.items()} == {name: one.shape for name, one in WHOLE.items()}


def test_a_checkpoint_without_has_none(tmp_path: Path) -> None:
    save_state({"epoch": 1}, tmp_path / "last.safetensors")
    assert shards_of(tmp_path / "last.safetensors") is None


def test_nested_state_is_replaced_where_it_changes() -> None:
    state = {"a": [1, (2, 3)], "b": {"c": 4}}
    assert replaced(state, lambda value, place: value) is state
    found = replaced(state, lambda value, place: place if value == 3 else value)
    assert found == {"a": [1, (2, "a/1/1")], "b": {"c": 4}}
    assert found["b"] is state["b"]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("missing", "2-of-2.safetensors: missing"),
        ("bit", "its checksum does not fit"),
        ("other", "of another checkpoint"),
        ("cut", "damaged ("),
        ("link", "of another checkpoint"),
    ],
)
def test_files_that_are_not_those_written(tmp_path: Path, fault: str, said: str, whole: bool) -> None:
    path = saved(tmp_path, [(0, 3), (3, 5)])
    file = tmp_path / "shards_000007" / "2-of-2.safetensors"
    content = bytearray(file.read_bytes())
    if fault in ("missing", "link"):
        file.unlink()
    if fault == "link":
        file.symlink_to(path)
    elif fault == "bit":
        content[-3] ^= 8
        file.write_bytes(content)
    elif fault == "other":
        write_tensors({"model/weight": torch.zeros(2, 3)}, {STARTS: '{"model/weight": 3}'}, file)
    elif fault == "cut":
        file.write_bytes(content[:-8])
    with pytest.raises(RunDirectoryError) as caught:
        load_state(path, whole=whole)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spans", [[(0, 3)], [(0, 3), (4, 5)], [(0, 3), (2, 5)], [(0, 5), (0, 5)], [(1, 5)]])
def test_parts_that_are_not_all_of_it(tmp_path: Path, spans: list[tuple[int, int]]) -> None:
    with pytest.raises(RunDirectoryError, match="a part of it is missing"):
        load_state(saved(tmp_path, spans))


@pytest.mark.parametrize(
    "starts", ["", "[]", "{}", '{"model/weight": 0}', "[" * 3000, '{"model/weight": "0", "averaged/module.weight": 0}']
)
def test_shards_that_do_not_tell_where_their_parts_belong(tmp_path: Path, starts: str) -> None:
    with pytest.raises(RunDirectoryError, match="it does not tell where its parts belong"):
        load_state(saved(tmp_path, [(0, 5)], starts=starts))


def test_parts_of_other_shapes_and_types(tmp_path: Path) -> None:
    for number, other in enumerate((torch.zeros(5, 2), torch.zeros(5, 3).double())):
        folder = tmp_path / str(number)
        folder.mkdir()
        file = {**parts((0, 5))[0], "model/weight": (0, other)}
        shards = written(folder / "shards_000001", [file])
        save_state(state_of(shards), folder / "last.safetensors", shards)
        with pytest.raises(RunDirectoryError, match="a part that is none of it"):
            load_state(folder / "last.safetensors")


def test_a_shape_larger_than_the_files_takes_no_memory(tmp_path: Path) -> None:
    shards = written(tmp_path / "shards_000001", parts((0, 5)))
    state = state_of(shards)
    state["model"]["weight"] = InShards("model/weight", torch.float32, torch.Size([2**50, 3]), shards)
    save_state(state, tmp_path / "last.safetensors", shards)
    with pytest.raises(RunDirectoryError, match="a part of it is missing"):
        load_state(tmp_path / "last.safetensors")


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", '{"folder": "shards_1"}', '{"folder": "shards_1", "files": {}}',
        '{"folder": "../shards_1", "files": {"1-of-1.safetensors": "0"}}',
        '{"folder": "/etc", "files": {"1-of-1.safetensors": "0"}}',
        '{"folder": "shards_1", "files": {"../last.safetensors": "0"}}',
        '{"folder": "shards_1", "files": {"1-of-1.safetensors": 0}}',
        '{"folder": 3, "files": {"1-of-1.safetensors": "0"}}', "[" * 3000,
    ],
)  # fmt: skip
def test_what_a_checkpoint_says_of_its_shards_is_looked_at(tmp_path: Path, text: str) -> None:
    with pytest.raises(RunDirectoryError, match="what it says of its shards is not what was written"):
        Shards.of(text, tmp_path / "last.safetensors")
