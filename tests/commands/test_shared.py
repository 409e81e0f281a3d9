"""What commands print: the same lines on a terminal and off it, but for colours, and no blanks at their ends."""

from __future__ import annotations

import re

import pytest
from rich.table import Table
from rich.text import Text

from neq_cli.commands.shared import show


def table() -> Table:
    made = Table(title=Text("a title", style="bold"), box=None, padding=(0, 2, 0, 0))
    for name in ("first", "second"):
        made.add_column(name)
    made.add_row("a", "b", style="red")
    made.add_row(Text("long words", style="dim"), "")
    return made


@pytest.mark.parametrize("colours", [False, True])
def test_lines_end_without_blanks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, colours: bool
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    if colours:  # which makes rich call a pipe a terminal
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm-256color")
    show(table())
    out = capsys.readouterr().out
    assert ("\x1b[31m" in out) is colours
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out)
    assert [line.split() for line in plain.splitlines()] == [["a", "title"], ["first", "second"], ["a", "b"],
                                                            ["long", "words"]]  # fmt: skip
    assert plain.endswith("words\n")
    assert not [line for line in plain.splitlines() if line != line.rstrip()]
