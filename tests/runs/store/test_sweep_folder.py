"""sweep.json as it is written and read back, also where somebody has damaged it or the folder is another thing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from neq_cli.errors import RunDirectoryError
from neq_cli.runs.store.sweep_folder import SweepFiles, SweepRecord, default_sweep_directory, open_sweep, read_sweep

RECORD = SweepRecord("digits", {"seed": ["1", "2"]}, {"seed=1": ["seed=1"], "seed=2": ["seed=2"]})


def test_a_sweep_is_found_again_by_recipe_and_keys() -> None:
    assert default_sweep_directory("digits", "policy.epsilon,seed") == Path("sweeps/digits/policy.epsilon,seed")
    assert default_sweep_directory("../my recipe", "seed") == Path("sweeps/my-recipe/seed")


def test_what_is_written_is_read_back_and_runs_are_kept(tmp_path: Path) -> None:
    root = tmp_path / "a" / "sweep"
    assert read_sweep(root) is None
    open_sweep(root, RECORD).release()
    assert read_sweep(root) == RECORD
    assert sorted(path.name for path in root.iterdir()) == [".lock", "logs", "runs", "sweep.json"]
    more = SweepRecord("digits", {"seed": ["3"]}, {"seed=3": ["seed=3"]})
    open_sweep(root, more).release()
    assert read_sweep(root) == SweepRecord("digits", more.axes, {**RECORD.runs, **more.runs})


def test_one_sweep_at_a_time(tmp_path: Path) -> None:
    lock = open_sweep(tmp_path / "sweep", RECORD)
    with pytest.raises(RunDirectoryError, match="being trained by this very process"):
        open_sweep(tmp_path / "sweep", RECORD)
    lock.release()
    open_sweep(tmp_path / "sweep", RECORD).release()


def test_a_sweep_killed_as_it_began_can_begin_again(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".sweep.json.partial").touch()
    (tmp_path / ".DS_Store").touch()  # a file manager looked
    assert read_sweep(tmp_path) is None
    open_sweep(tmp_path, RECORD).release()
    assert read_sweep(tmp_path) == RECORD


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        "{}",
        "\0",
        '{"schema": 2}',
        '{"schema": 1, "recipe": 5, "axes": {}, "runs": {}}',
        '{"schema": 1, "recipe": "digits", "axes": [], "runs": {}}',
        '{"schema": 1, "recipe": "digits", "axes": {}}',
        '{"schema": 1, "recipe": "digits", "axes": {}, "runs": {"a": "b"}}',
        '{"schema": 1, "recipe": "digits", "axes": {}, "runs": {"a": [1]}}',
        "[" * 10_000,
        json.dumps({"schema": 1, "recipe": "x" * 2**21}),
        '{"schema": 1' + "0" * 5000 + "}",
    ],
)
def test_a_damaged_record_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "sweep.json").write_text(content)
    for attempt in (lambda: read_sweep(tmp_path), lambda: open_sweep(tmp_path, RECORD)):
        with pytest.raises(RunDirectoryError, match=r"sweep\.json") as caught:
            attempt()
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500
    assert (tmp_path / "sweep.json").read_text() == content


def test_names_in_a_record_are_never_followed(tmp_path: Path) -> None:
    hostile: dict[str, Any] = {"../../escape": ["data.root=/etc"], "\x1b[2J": ["x"]}
    (tmp_path / "sweep.json").write_text(json.dumps({"schema": 1, "recipe": "digits", "axes": {}, "runs": hostile}))
    open_sweep(tmp_path, RECORD).release()
    assert {path.name for path in tmp_path.rglob("*")} == {".lock", "logs", "runs", "sweep.json"}
    assert not (tmp_path.parent / "escape").exists()


def test_another_recipes_folder_is_refused_and_its_name_cannot_escape(tmp_path: Path) -> None:
    open_sweep(tmp_path / "s", SweepRecord("a\x1b[31mb" + "c" * 500)).release()
    with pytest.raises(RunDirectoryError, match="not of digits; choose another with -o") as caught:
        open_sweep(tmp_path / "s", RECORD)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_links_and_files_in_the_way_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for name, said in (("file", "a file, not a folder"), ("nowhere", "a link that leads nowhere")):
        with pytest.raises(RunDirectoryError, match=said):
            open_sweep(tmp_path / name, RECORD)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("precious")
    for name in ("sweep.json", ".lock", "runs", "logs"):
        root = tmp_path / f"with-{name}"
        open_sweep(root, RECORD).release()
        path = getattr(SweepFiles(root), {"sweep.json": "record", ".lock": "lock"}.get(name, name))
        path.rmdir() if path.is_dir() else path.unlink()
        path.symlink_to(precious if name in ("runs", "logs") else precious / "file")
        with pytest.raises(RunDirectoryError, match=f"{name}: a link, where neq writes"):
            open_sweep(root, RECORD)
    assert [path.read_text() for path in precious.iterdir()] == ["precious"]


def test_a_record_does_not_outgrow_what_is_read(tmp_path: Path) -> None:
    def runs(first: int, count: int) -> SweepRecord:
        return SweepRecord("d", {}, {f"{'n' * 150}{number}": ["o" * 300] for number in range(first, first + count)})

    open_sweep(tmp_path / "s", runs(0, 1000)).release()
    open_sweep(tmp_path / "s", runs(500, 1500)).release()
    with pytest.raises(RunDirectoryError, match="more than 2000 runs; choose another folder with -o"):
        open_sweep(tmp_path / "s", runs(1500, 1000))
    assert len((read_sweep(tmp_path / "s") or RECORD).runs) == 2000
