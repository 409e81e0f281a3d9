"""``neq validate``: five lines, or the resolved recipe, which trains the same run."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from neq_cli.cli import main


@pytest.fixture(autouse=True)
def away_from_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["validate", *arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_five_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("digits", "epochs=2") == 0
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["ok", "model", "data", "neurons", "run"]
    assert "359 test images of 1x8x8, 10 classes" in out
    assert "2 epochs of 21 batches of 64, 42 in all" in out
    assert err == ""


def test_resolved_is_yaml_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("digits", "epochs=2", "--resolved") == 0
    resolved = capsys.readouterr().out
    assert yaml.safe_load(resolved)["epochs"] == 2
    Path("again.yaml").write_text(resolved)
    assert call("again.yaml", "--resolved") == 0
    assert capsys.readouterr().out == resolved


def test_what_only_the_data_shows_has_its_place_in_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text(
        "model: {name: resnet8, kwargs: {in_channels: 1}}\ndata: {name: digits}\nepochs: 1\nbatch_size: 5000\n"
        "optimizer: {name: sgd, lr: 0.1}\n"
    )
    assert call("mine.yaml") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("mine.yaml:4: batch_size: 5000 images per step, but digits has 1388 to train on")
    assert call("mine.yaml", "--resolved") == 0, "no data is opened for that"


def test_two_kinds_at_once_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("digits", "--resolved", "--coverage") == 2
    assert "exclude each other" in capsys.readouterr().err
