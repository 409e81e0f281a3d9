"""Trackers whose library is missing, broken or too old are one line, before anything is trained."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
from tracked import TrackedLoop

from neq_cli.errors import FreezingError, RecipeError
from neq_cli.jobs.prepare import load
from neq_cli.jobs.tracking.libraries import missing, trackers_problem
from neq_cli.jobs.tracking.teller import TRACKERS

RECIPE = str(Path(__file__).parents[3] / "recipes" / "digits.yaml")


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_missing_library_is_a_line_with_its_extra(tracker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] == tracker or name.startswith("torch.utils.tensorboard"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, tracker, None)
    line = f"'{tracker}' needs {tracker}; pip install 'neq[{tracker}]'"
    with pytest.raises(RecipeError) as error:
        load(RECIPE, [f"track=[{tracker}, {tracker}]"])
    assert str(error.value) == f"command line: track=[{tracker}, {tracker}]: {line}"
    with pytest.raises(FreezingError) as refused:
        TrackedLoop().record(Path("not-made"), 1, [tracker])
    assert str(refused.value) == f"Recorder: track: {line}"
    assert not Path("not-made").exists()


def test_a_library_that_is_broken_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    old = types.ModuleType("wandb")
    old.__version__ = "0.30.9"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", old)
    assert missing("wandb") == (
        "'wandb' needs wandb, which cannot be used (ImportError: it is version 0.30.9, and 0.31 or newer is needed); "
        "pip install --upgrade 'neq[wandb]'"
    )
    old.__version__ = "0.31.0"  # type: ignore[attr-defined]
    assert missing("wandb") is None
    old.__version__ = "1.0"  # type: ignore[attr-defined]
    assert missing("wandb") is None


def test_names_that_nobody_has_checked() -> None:
    assert trackers_problem("tensorboard") == "'tensorboard' is not a list; write ['tensorboard']"
    assert trackers_problem(["tensorbord"]) == "'tensorbord' is no tracker; did you mean 'tensorboard'?"
    assert trackers_problem(["x"]) == "'x' is no tracker; known: tensorboard, wandb, mlflow, trackio"
    assert trackers_problem([]) is None
    with pytest.raises(RecipeError, match=r"track.0: 'tensorbord' is not one of .*; did you mean 'tensorboard'\?"):
        load(RECIPE, ["track=[tensorbord]"])
    with pytest.raises(RecipeError, match=r"track=wandb: 'wandb' is not a list of any of .*; write \['wandb'\]"):
        load(RECIPE, ["track=wandb"])
