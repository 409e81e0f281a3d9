"""Names in a run directory, and which folders may become one."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from neq_cli.runs.store.paths import RunFiles, default_run_directory, recipe_folder

NOW = datetime(2026, 3, 4, 5, 6, 7)


def test_default_directory_counts_on_where_it_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    taken = []
    for _ in range(3):
        path = default_run_directory("digits", 7, NOW)
        path.mkdir(parents=True)
        taken.append(path.as_posix())
    stem = "runs/digits/20260304-050607-s7"
    assert taken == [stem, f"{stem}-2", f"{stem}-3"]


@pytest.mark.parametrize(
    ("name", "folder"), [("../../etc/x y", "etc-x-y"), ("...", "recipe"), ("réseau-32", "réseau-32")]
)
def test_default_directory_stays_below_runs(name: str, folder: str) -> None:
    path = default_run_directory(name, 1, NOW)
    assert (path.parent.as_posix(), ".." in path.parts) == (f"runs/{folder}", False)


def test_recipe_folder_is_where_default_directories_are(tmp_path: Path) -> None:
    assert recipe_folder("a/b", tmp_path) == tmp_path / "a-b"
    assert default_run_directory("a/b", 1, NOW).parent == recipe_folder("a/b")


def test_later_neuron_files(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    files.neurons_folder.mkdir()
    for epoch in (1, 2, 3, 9999, 10_000):
        files.neurons(epoch).touch()
    for name in ("epoch_3.safetensors", "epoch_0003.safetensors.bak", "xepoch_0003.safetensors"):
        (files.neurons_folder / name).touch()
    assert set(files.neurons_after(2)) == {files.neurons(epoch) for epoch in (3, 9999, 10_000)}


def test_shards_are_numbered_on_and_found_in_their_order(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    assert files.shards == []
    assert files.next_shards() == tmp_path / "checkpoints" / "shards_000001"
    for name in ("shards_000010", "shards_000009", "shards_1000000", "shards_x", "other"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [path.name for path in files.shards] == ["shards_000009", "shards_000010", "shards_1000000"]
    assert files.next_shards().name == "shards_1000001"
    part = tmp_path / "checkpoints" / "shards_000009" / "1-of-2.safetensors"
    part.touch()
    assert part in files.files  # and so looked at before anything is written
