"""What tests of sweeps have in common: code that acts within a run, and how sweep and runs have ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# In a run, once its third step is done; `parent` is the sweep, or the process that a cluster's job is.
_AT_STEP_3 = """
import os, signal, sys, time
from neq_cli.training.loop.step import TrainingStep

train, done, parent = TrainingStep.train, 0, os.getppid()


def and_then(self, *arguments, **options):
    global done
    loss = train(self, *arguments, **options)
    done += 1
    if done == 3 and {condition}:
        {action}
    return loss


TrainingStep.train = and_then
"""
_ONCE = "not os.path.exists('was-here') and not open('was-here', 'w').close()"


def at_step_3(action: str, condition: str = "True", *, once: bool = False) -> str:
    """Return the code that does ``action`` after a run's third step; ``once``: the first time that one comes there."""
    return _AT_STEP_3.format(action=action, condition=f"{condition} and {_ONCE}" if once else condition)


def status(run: Path) -> tuple[str, str | None]:
    """Return a run's state and the reason."""
    content = json.loads((run / "status.json").read_text())
    return content["state"], content["reason"]


def done(process: Any, code: int = 0, seconds: float = 120) -> list[str]:
    """Return the lines of a sweep that has ended as it should, and left no process behind."""
    assert process.wait(seconds) == code, process.text
    process.until_alone()
    assert "Traceback" not in process.text
    lines: list[str] = process.lines
    return lines
