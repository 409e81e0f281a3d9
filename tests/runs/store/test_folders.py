"""Which runs lie in a folder: nested, linked, damaged; and what is none."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from neq_cli.errors import RunDirectoryError
from neq_cli.runs.store import folders
from neq_cli.runs.store.folders import find_runs, is_run, listed, runs_of_folder
from neq_cli.runs.store.run import Run


@pytest.fixture
def root(tmp_path: Path, make_run: Callable[..., Run]) -> Path:
    """Return a folder of three runs at different depths, beside things that look like runs and are none."""
    for name in ("all/a", "all/digits/b", "all/sweeps/x/grid/runs/c"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        make_run(name)
    for file in ("recipe-only/recipe.yaml", "other/status.json", "sweeps/x/grid/sweep.json", ".hidden/recipe.yaml"):
        (tmp_path / "all" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "all" / file).touch()
    (tmp_path / "all" / ".hidden" / "metrics.csv").touch()
    return tmp_path / "all"


def test_runs_are_found_at_any_depth_and_nothing_else(root: Path) -> None:
    expected = tuple(root / name for name in ("a", "digits/b", "sweeps/x/grid/runs/c"))
    assert find_runs(root) == folders.Found(expected)
    assert runs_of_folder(root) == expected
    assert find_runs(root / "a").runs == (root / "a",)
    assert runs_of_folder(root / "a") == runs_of_folder(root / "other") == runs_of_folder(root / "nowhere") == ()
    assert is_run(root / "a")
    assert not is_run(root / "recipe-only")
    assert not is_run(root / "recipe-only" / "recipe.yaml")


def test_what_lies_in_a_run_is_its_own(root: Path, make_run: Callable[..., Run]) -> None:
    make_run("all/a/tracking/copy")
    assert root / "a/tracking/copy" not in find_runs(root).runs


def test_a_run_is_told_once_by_its_own_place(root: Path) -> None:
    (root / "0-latest").symlink_to(root / "digits" / "b")
    (root / "digits" / "up").symlink_to(root)
    assert [path.name for path in find_runs(root).runs] == ["a", "b", "c"]


def test_links_from_elsewhere_are_followed(root: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "moved").symlink_to(root / "digits")
    assert find_runs(tmp_path / "mine").runs == (tmp_path / "mine" / "moved" / "b",)


def test_a_run_that_lost_a_file_is_still_one(root: Path) -> None:
    (root / "a" / "recipe.yaml").unlink()
    (root / "digits" / "b" / "status.json").unlink()
    assert len(find_runs(root).runs) == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look everywhere")
def test_folders_that_may_not_be_looked_into_are_told(root: Path) -> None:
    (root / "digits").chmod(0)
    try:
        found = find_runs(root)
    finally:
        (root / "digits").chmod(0o755)
    assert len(found.runs) == 2
    assert found.unread == (f"{root / 'digits'}: cannot be looked into: Permission denied",)


def test_no_folder_and_too_many(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunDirectoryError, match="nowhere: cannot be looked into: no such folder"):
        find_runs(root / "nowhere")
    monkeypatch.setattr(folders, "MOST_FOLDERS", 5)
    with pytest.raises(RunDirectoryError, match="all: more than 5 folders in it; give one that is nearer to the runs"):
        find_runs(root)


def test_paths_in_a_line() -> None:
    paths = [Path(name) for name in "abc"]
    assert listed(paths) == "a, b, c"
    assert listed(paths, 2) == "a, b, and 1 more"
