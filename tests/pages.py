"""The pages of the project, cut into what tests look at: code blocks, links, headings, files that are named."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md",
    "CHANGELOG.md",
    "neq_cli/README.md",
    "neq_cli/integrations/README.md",
    "recipes/README.md",
    "recipes/studies.md",
)
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of code: ``place`` is "README.md:12"."""

    place: str
    language: str
    text: str


def read(page: str) -> str:
    """Return the text of a page."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(*languages: str) -> list[Block]:
    """Return the fenced blocks of all pages in these languages."""
    return [
        Block(f"{page}:{read(page).count(chr(10), 0, found.start()) + 1}", found[1], found[2])
        for page in PAGES
        for found in _BLOCK.finditer(read(page))
        if found[1] in languages
    ]


def prose(page: str) -> str:
    """Return a page without its fenced blocks."""
    return _BLOCK.sub("", read(page))


def spans(page: str) -> list[str]:
    """Return what stands between backticks in a page's prose, in one line each."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def anchors(page: str) -> set[str]:
    """Return what GitHub calls a page's headings in links."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def check_generated(page: str, begin: str, end: str, expected: str) -> None:
    """Fail unless ``expected`` stands between two marks of a page; with PASTE=1 in the environment, put it there."""
    text = read(page)
    before, _, rest = text.partition(begin)
    written, _, after = rest.partition(end)
    if os.environ.get("PASTE") == "1" and written.strip("\n") != expected:
        (ROOT / page).write_text(f"{before}{begin}{expected}\n{end}{after}", encoding="utf-8")
        return
    assert written.strip("\n") == expected, f"PASTE=1 pytest ... does it, or paste into {page}:\n{expected}"


def shell_lines(text: str) -> Iterator[list[str]]:
    """Yield the words of every command in a piece of shell, with the variables that it sets put in.

    What follows another command's ``&&``, ``||``, ``&`` or ``;`` is a command of its own; no prompt, no comments.
    """
    variables: dict[str, str] = {}
    for line in _whole_lines(text.replace("\\\n", " ")):
        for name, value in variables.items():
            line = re.sub(rf"\${name}\b", value, line)
        words = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="&|;")
        words.whitespace_split, words.commenters = True, "#"
        command: list[str] = []
        for word in [*words, ";"]:
            if word not in ("&&", "||", ";", "|", "&"):
                command.append(word)
                continue
            while command and re.fullmatch(r"(export )?\w+=.*", command[0], flags=re.DOTALL):
                name, _, value = command.pop(0).partition("=")
                variables[name] = " ".join(value.split())
            if command:
                yield command
            command = []


def _whole_lines(text: str) -> Iterator[str]:
    """Yield lines, those together that a quotation goes on over."""
    waiting = ""
    for line in text.splitlines():
        waiting += line + "\n"
        try:
            shlex.split(waiting, comments=True)
        except ValueError:
            continue
        yield waiting.strip()
        waiting = ""
    assert not waiting.strip(), f"a quotation is not closed: {waiting}"


def neq_arguments(command: list[str]) -> list[str] | None:
    """Return what a command gives to `neq`, None where it is none of ours."""
    if command[0] == "neq":
        return command[1:]
    if "neq_cli" in command and command[command.index("neq_cli") - 1] == "-m":
        return command[command.index("neq_cli") + 1 :]
    return None
