"""What W&B keeps offline, read from its file: the newest folder holds all of the run, each epoch once."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from tracked import TrackedLoop, wandb_files, wandb_history, wandb_records

from neq_cli import read_run
from neq_cli.jobs.tracking.libraries import missing
from neq_cli.jobs.tracking.numbers import EDGES, numbers_again

if (problem := missing("wandb")) is not None:
    pytest.skip(problem, allow_module_level=True)


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_PROJECT", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def closed(file: Path) -> Path:
    """Return a file whose run has ended once it is whole: W&B's process finishes it on its own."""
    end = time.monotonic() + 30
    while not any(each.WhichOneof("record_type") == "exit" for each in wandb_records(file)):
        assert time.monotonic() < end, f"{file} is never finished"
        time.sleep(0.1)
    return file


def assert_all_is_there(path: Path) -> None:
    run, rows = read_run(path), wandb_history(closed(wandb_files(path)[-1]))
    assert [row["_step"] for row in rows] == list(range(1, run.epochs + 1))
    for row in rows:
        told = numbers_again(run, row["_step"])
        assert {name: row[name] for name in told.scalars} == told.scalars
        assert told.histograms
        for name, counts in told.histograms.items():
            found = row[name]
            assert found["_type"] == "histogram"
            assert found["values"] == counts.tolist()
            assert found["bins"] == pytest.approx(EDGES.tolist())


def test_a_run_is_read_back(tmp_path: Path) -> None:
    run = tmp_path / "run"
    TrackedLoop().record(run, 3, ["wandb"])
    assert_all_is_there(run)
    (file,) = wandb_files(run)
    begun = [each.run for each in wandb_records(file) if each.WhichOneof("record_type") == "run"]
    assert (begun[0].project, begun[0].display_name) == ("mine", "run")
    assert begun[0].run_id == json.loads((run / "tracking/ids.json").read_text())["wandb"]["id"]
    assert "coverage: " in begun[0].notes
    config = {item.key: json.loads(item.value_json) for item in begun[0].config.update}
    assert config["policy"]["epsilon"] == 0.05
    assert config["settings"] == {"depth": {"of": 2}}
    assert list(begun[-1].tags) == ["finished"]
    assert (file.parent / "files/recipe.yaml").read_text() == (run / "recipe.yaml").read_text()
    saved = {item.path for each in wandb_records(file) for item in each.files.files}
    assert "recipe.yaml" in saved
    ended = [each.exit for each in wandb_records(file) if each.WhichOneof("record_type") == "exit"]
    assert [each.exit_code for each in ended] == [0]


def test_where_a_run_goes_on_the_newest_folder_has_all_of_it(tmp_path: Path) -> None:
    loop, run = TrackedLoop(), tmp_path / "run"
    with pytest.raises(RuntimeError):
        loop.record(run, 4, ["wandb"], fails=True)
    loop.rewind(2)
    loop.optimizer.param_groups[0]["lr"] = 0.01  # what is trained again comes to other numbers
    loop.record(run, 5, ["wandb"], resume=True)
    assert_all_is_there(run)
    names = [each.run.run_id for file in wandb_files(run) for each in wandb_records(file) if each.run.run_id]
    assert len(set(names)) == 1


def test_the_pictures_of_the_report(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    TrackedLoop().record(tmp_path / "run", 2, ["wandb"])
    (file,) = wandb_files(tmp_path / "run")
    closed(file)
    saved = {item.path for each in wandb_records(file) for item in each.files.files}
    assert "report/accuracy-by-epoch.png" in saved
    assert (file.parent / "files/report/accuracy-by-epoch.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_of_the_users_own_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    own = wandb.init(mode="offline", dir=str(tmp_path), settings=wandb.Settings(console="off", silent=True))
    TrackedLoop().record(tmp_path / "run", 1, ["wandb"])
    own.log({"mine": 1.0})
    own.finish()
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert [row["mine"] for row in wandb_history(closed(file))] == [1.0]
    assert_all_is_there(tmp_path / "run")


def test_a_key_that_is_configured_makes_it_online(monkeypatch: pytest.MonkeyPatch) -> None:
    from neq_cli.jobs.tracking.of_wandb import mode_of

    asked: list[dict[str, bool]] = []
    found = [False, True]  # what W&B finds in its settings and in ~/.netrc
    wandb = SimpleNamespace(login=lambda **options: asked.append(options) or found.pop(0))
    assert mode_of(wandb) == "offline"
    assert mode_of(wandb) == "online"
    assert asked == [{"prompt": False, "verify": False}] * 2
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert mode_of(wandb) == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert mode_of(wandb) == "offline"


def test_the_users_mode_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    TrackedLoop().record(tmp_path / "run", 2, ["wandb"])
    assert wandb_files(tmp_path / "run") == []
    assert read_run(tmp_path / "run").epochs == 2
