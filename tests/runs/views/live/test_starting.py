"""The line while PyTorch is loaded: there at once on a terminal, gone afterwards, nothing elsewhere."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
from rich.console import Console

from neq_cli.runs.views.live.progress import Mode
from neq_cli.runs.views.live.starting import starting


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def console(file: io.StringIO, *, terminal: bool = True) -> Console:
    environment = {"TERM": "xterm-256color"}
    return Console(file=file, force_terminal=terminal, width=60, height=20, _environ=environment)


@pytest.fixture(autouse=True)
def _nobody_builds_this(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)


def test_it_is_drawn_before_anything_else_and_leaves_nothing() -> None:
    file = Tty()
    with starting("rich", console(file)):
        assert "starting: loading PyTorch, 0:00" in file.getvalue()
        file.truncate(file.seek(0))
    # The cursor goes to the line's beginning and clears it.
    assert "\r\x1b[2K" in file.getvalue()
    assert file.getvalue().rpartition("\x1b[2K")[2].strip("\r").replace("\x1b[?2026l", "") == ""


@pytest.mark.parametrize("mode", ["plain", "off", "auto"])
def test_elsewhere_nothing_is_written(mode: Mode) -> None:
    file = io.StringIO()
    with starting(mode, console(file, terminal=False)):
        pass
    assert file.getvalue() == ""


def test_it_is_gone_before_a_mistake_is_told() -> None:
    file = Tty()
    with pytest.raises(ValueError, match="a mistake"), starting("rich", console(file)):
        raise ValueError("a mistake")
    assert "\r\x1b[2K" in file.getvalue()


def test_it_needs_no_torch() -> None:
    said = "import sys, neq_cli.runs.views.live.starting; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
