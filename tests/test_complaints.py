"""Lines on stderr: said by one of several processes, and asked of nobody where a process is alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from neq_cli import complaints


class Together:
    """Two processes as this one sees them: the other has ``said`` some lines."""

    def __init__(self, *said: str) -> None:
        self.said = said
        self.lingered = 0

    def say_once(self, message: str) -> bool:
        return message not in self.said

    def linger(self) -> None:
        self.lingered += 1


@pytest.fixture(autouse=True)
def alone_again() -> Iterator[None]:
    before = list(complaints._company)
    complaints._company.clear()
    yield
    complaints._company[:] = before


def test_a_process_alone_says_everything(capsys: pytest.CaptureFixture[str]) -> None:
    complaints.complain("one")
    complaints.linger()
    assert capsys.readouterr() == ("", "one\n")


def test_what_another_process_said_is_not_said_again(capsys: pytest.CaptureFixture[str]) -> None:
    company = Together("one")
    complaints.keep_company(company)
    complaints.complain("one")
    complaints.complain("two")
    complaints.linger()
    assert capsys.readouterr().err == "two\n"
    assert company.lingered == 1


def test_a_warning_is_one_line() -> None:
    assert complaints.warning_line("a\n  b", UserWarning, "mine.py", 3) == "warning: a b (mine.py:3)\n"
