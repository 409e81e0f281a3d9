"""Commands that are given a folder of runs: which of them they take, and what they say of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from neq_cli.cli import main
from neq_cli.runs.store.run import read_run

CHECKOUT = Path(__file__).parents[2]
RECORDED = CHECKOUT / "tests" / "data" / "0.1.0"


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


def place(source: str, path: str, *, minute: int, **recipe: str) -> Path:
    """Copy a recorded run to ``path``, begun at that minute, with lines of its recipe changed."""
    shutil.copytree(RECORDED / source, path)
    status = json.loads((Path(path) / "status.json").read_text())
    (Path(path) / "status.json").write_text(json.dumps({**status, "started": f"2026-01-31T12:{minute:02}:00+00:00"}))
    text = (Path(path) / "recipe.yaml").read_text()
    for key, value in recipe.items():
        before = next(line for line in text.splitlines() if line.startswith(f"{key}:"))
        text = text.replace(before, f"{key}: {value}", 1)
    (Path(path) / "recipe.yaml").write_text(text)
    return Path(path)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work beside a folder of two runs of one recipe."""
    monkeypatch.chdir(tmp_path)
    place("finished", "runs/digits/new", minute=2)
    place("interrupted", "runs/digits/old", minute=1, seed="2")
    return tmp_path


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("list", "--json") == 0
    found = json.loads(capsys.readouterr().out)["runs"]
    assert [one["path"] for one in found] == ["runs/digits/old", "runs/digits/new"]
    assert [one["state"] for one in found] == ["interrupted", "finished"]
    for one in found:
        run = read_run(one["path"])
        assert (one["epochs"], one["epochs_planned"]) == (run.epochs, run.epochs_planned)
    assert call("list", "runs/digits") == call("list", "runs/digits", "runs") == 0
    first, second = capsys.readouterr().out.split("begun")[1:]
    assert first == second, "a run that lies in two folders is told once"
    (Path("runs/digits/old/metrics.csv")).write_bytes(b"\xff\n")
    assert call("list") == 0
    out, err = capsys.readouterr()
    assert "damaged" in out.splitlines()[1]
    assert err == ""


def test_list_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree("runs")
    assert call("list", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"schema": 1, "runs": []}
    assert call("list") == 0
    assert capsys.readouterr() == ("", "note: no runs in runs, sweeps; `neq train RECIPE` makes one\n")
    assert call("list", "nowhere") == 2
    assert capsys.readouterr() == ("", "nowhere: cannot be looked into: no such folder\n")


@pytest.mark.parametrize("arguments", [["inspect", "runs"], ["inspect", "runs/digits", "--json"]])
def test_the_newest_is_inspected_and_named_on_stderr(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert call(*arguments) == 0
    out, err = capsys.readouterr()
    assert err == f"note: {arguments[1]}: runs/digits/new is the newest of 2 runs in it\n"
    assert call("inspect", "runs/digits/new", *arguments[2:]) == 0
    assert capsys.readouterr() == (out, "")


def test_export_evaluate_and_predict_take_the_newest(capsys: pytest.CaptureFixture[str]) -> None:
    note = "note: runs: runs/digits/new is the newest of 2 runs in it\n"
    for arguments in (["export", "runs", "-o", "a.txt"], ["evaluate", "runs", "--recipe", "digits"]):
        assert call(*arguments) == 2
        assert capsys.readouterr().err.startswith(note)
    assert call("predict", "runs", "missing.png") == 2
    err = capsys.readouterr().err
    assert err.startswith(note)
    assert "missing.png" in err


def test_a_folder_without_runs_is_as_before(capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    assert call("inspect", "empty") == 2
    assert capsys.readouterr().err.startswith("empty: not a run directory: no recipe.yaml with metrics.csv in it")


def test_compare_takes_all_runs_in_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("compare", "runs", "--json") == 0
    out = capsys.readouterr().out
    assert call("compare", "runs/digits/new", "runs/digits/old", "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(out)
    compared = [run for row in json.loads(out)["rows"] for run in row["runs"]]
    assert sorted(compared) == ["runs/digits/new", "runs/digits/old"]


def test_compare_leaves_out_what_cannot_be_read_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(7):
        run = place("finished", f"runs/damaged/{number}", minute=3)
        (run / "metrics.csv").write_bytes(b"\xff\n")
    assert call("compare", "runs", "--json") == 0
    out, err = capsys.readouterr()
    assert len([run for row in json.loads(out)["rows"] for run in row["runs"]]) == 2
    lines = err.splitlines()
    assert lines[0].startswith("note: left out: runs/damaged/0/metrics.csv:1: not UTF-8 text")
    assert lines[5:] == ["note: left out: 2 more; `neq list` shows them"]
    assert call("compare", "runs/damaged") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("runs/damaged/0/metrics.csv:1: ")
    assert line.endswith("(and 6 more that cannot be read)")


def test_compare_sets_apart_what_cannot_be_compared(capsys: pytest.CaptureFixture[str]) -> None:
    place("finished", "runs/short/one", minute=3, epochs="9")
    assert call("compare", "runs") == 0
    out = capsys.readouterr().out
    titles = [line for line in out.splitlines() if " on digits, " in line]
    assert [title.rpartition(", ")[2] for title in titles] == ["4 epochs", "9 epochs"]
    assert call("compare", "runs/digits/new", "runs/short/one") == 2, "runs that are named are meant to be compared"
    assert "answer different questions" in capsys.readouterr().err
    assert call("compare", "runs", "--json") == 2
    assert "answer different questions" in capsys.readouterr().err


def test_resuming_a_folder_of_runs_tells_what_is_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path("runs").rglob("*"))
    assert call("train", "digits", "--resume", "-o", "runs/digits", "device=cpu") == 2
    assert capsys.readouterr().err == (
        "runs/digits: holds 2 runs, and is none itself: runs/digits/new (finished), runs/digits/old (interrupted); "
        "give the one to go on with by -o, or leave -o out for the newest unfinished one\n"
    )
    assert sorted(Path("runs").rglob("*")) == before


@pytest.mark.parametrize("arguments", [["list"], ["inspect", "runs"], ["compare", "runs"]])
def test_looking_at_runs_imports_no_torch(arguments: list[str]) -> None:
    code = (
        f"import sys\nfrom neq_cli.cli import main\ntry: main({arguments!r})\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(CHECKOUT)}, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "0 False"
