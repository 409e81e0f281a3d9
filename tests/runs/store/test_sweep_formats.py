"""Which memory format the runs of a sweep train in: found once, whoever asks, and however many at once."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path

import pytest

from neq_cli.errors import RunDirectoryError
from neq_cli.runs.store.sweep_folder import SweepFiles, SweepRecord, open_sweep
from neq_cli.runs.store.sweep_formats import agreed_format, sweep_of

ABOUT = {"model": {"name": "resnet20"}, "device": "cpu", "precision": "fp32"}


@pytest.fixture
def files(tmp_path: Path) -> SweepFiles:
    open_sweep(tmp_path / "sweep", SweepRecord("small")).release()
    return SweepFiles(tmp_path / "sweep")


def forbidden() -> tuple[bool, str]:
    raise AssertionError("timed twice")


def test_the_first_run_chooses_and_all_others_say_the_same(files: SweepFiles) -> None:
    first = agreed_format(files, "seed=1", ABOUT, lambda: (True, "8 ms a step"))
    assert first == (True, "8 ms a step; found by the run seed=1, for all of its sweep")
    assert agreed_format(files, "seed=2", ABOUT, forbidden) == first
    assert agreed_format(files, "seed=1", ABOUT, forbidden) == first  # resumed


def test_another_network_device_or_precision_is_timed_for_itself(files: SweepFiles) -> None:
    agreed_format(files, "a", ABOUT, lambda: (True, "x"))
    for number, change in enumerate(({"model": {"name": "vgg"}}, {"device": "cuda"}, {"precision": "bf16"})):
        about = ABOUT | change
        assert agreed_format(files, "b", about, lambda number=number: (False, str(number)))[1].startswith(f"{number};")
    assert agreed_format(files, "c", ABOUT, forbidden)[0] is True


def ask(root: Path, name: str, chose: object, start: object) -> None:
    start.wait()  # type: ignore[attr-defined]

    def choose() -> tuple[bool, str]:
        with (root / "asked").open("a") as file:
            file.write(f"{name}\n")
        time.sleep(0.5)  # the others come meanwhile
        return name in "02", name

    chose.put(agreed_format(SweepFiles(root), name, ABOUT, choose))  # type: ignore[attr-defined]


def test_runs_at_once_wait_for_the_one_that_chooses(files: SweepFiles) -> None:
    context = multiprocessing.get_context("fork")
    chose, start = context.Queue(), context.Barrier(4)
    asking = [context.Process(target=ask, args=(files.root, str(name), chose, start)) for name in range(4)]
    for process in asking:
        process.start()
    found = {chose.get(timeout=30) for _ in asking}
    for process in asking:
        process.join(30)
    (only,) = (files.root / "asked").read_text().split()
    assert found == {(only in "02", f"{only}; found by the run {only}, for all of its sweep")}


def test_one_that_fails_leaves_the_choice_to_the_next(files: SweepFiles) -> None:
    with pytest.raises(AssertionError, match="timed twice"):
        agreed_format(files, "a", ABOUT, forbidden)
    assert agreed_format(files, "b", ABOUT, lambda: (False, "b"))[1].startswith("b;")


def test_which_runs_are_of_a_sweep(files: SweepFiles, tmp_path: Path) -> None:
    found = sweep_of(files.run("seed=1"))
    assert found is not None
    assert found.root == files.root
    assert sweep_of(tmp_path / "runs" / "mine" / "1") is None
    assert sweep_of(files.root / "elsewhere" / "1") is None
    files.record.unlink()
    assert sweep_of(files.run("seed=1")) is None


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"schema": 2}', '{"schema": 1, "formats": {}}', '{"schema": 1, "formats": [{"about": {}}]}'],
)
def test_a_damaged_file_is_one_line(files: SweepFiles, content: str) -> None:
    files.formats.write_text(content)
    with pytest.raises(RunDirectoryError, match=r"formats\.json") as caught:
        agreed_format(files, "a", ABOUT, forbidden)
    assert "\n" not in str(caught.value)


def test_a_hostile_note_is_made_harmless(files: SweepFiles) -> None:
    entry = {"about": ABOUT, "channels_last": True, "note": "\x1b[2J" + "x" * 9999}
    files.formats.write_text(json.dumps({"schema": 1, "formats": [entry]}))
    _, note = agreed_format(files, "a", ABOUT, forbidden)
    assert note.isprintable()
    assert len(note) <= 500
    files.formats.unlink()
    files.formats.symlink_to("/dev/null")
    with pytest.raises(RunDirectoryError, match="a link, where neq writes"):
        agreed_format(files, "a", ABOUT, forbidden)
