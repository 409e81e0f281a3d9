"""Numbers and foreign text as people read them on a terminal, and as JSON has them."""

from __future__ import annotations

import math
import shlex
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

MISSING = "–"
_PREFIXES = ("", "K", "M", "G", "T", "P", "E")
_PERCENTAGES = ("test_top1", "test_miou")


def format_flops(value: float, like: float | None = None) -> str:
    """Write a FLOP count with two decimals and a decimal prefix: 138942464 is ``138.94M``; below 1000 it is whole.

    ``like`` is another count whose prefix is to be used, so that a mean and its spread stand in one unit.
    """
    scale = value if like is None else like
    if not math.isfinite(value) or not math.isfinite(scale):
        return MISSING
    prefix = 0
    # 999.996M would print as 1000.00M: the rounded number decides on the prefix.
    while abs(round(scale, 2)) >= 1000 and prefix < len(_PREFIXES) - 1:
        value, scale = value / 1000, scale / 1000
        prefix += 1
    return f"{value:.2f}{_PREFIXES[prefix]}" if prefix else f"{value:.0f}"


def format_flops_like(value: float, like: float | None) -> str:
    """As ``format_flops`` in the unit of ``like``, with as many decimals as it takes: ``0.0015M``, not ``0.00M``."""
    written = format_flops(value, like)
    if not value or not written.lstrip("-").startswith("0.00"):
        return written
    prefix = written[-1]
    return f"{value / 1000 ** _PREFIXES.index(prefix):.2g}{prefix}"


def format_joules(value: float, like: float | None = None) -> str:
    """``812 J``, ``1.23 kJ``, ``45.60 MJ``; ``like`` as for FLOPs."""
    written = format_flops(value, like)
    prefix = written[-1] if written[-1].isalpha() else ""
    return written if written == MISSING else f"{written.removesuffix(prefix)} {prefix.replace('K', 'k')}J"


def format_percent(value: float) -> str:
    """``61.0%``; a dash where the value is not known."""
    return f"{value:.1f}%" if math.isfinite(value) else MISSING


def format_metric(value: float, metric: str) -> str:
    """Two decimals for the percentages neq measures itself, four significant digits for a task's own metric."""
    if not math.isfinite(value):
        return MISSING
    return f"{value:.2f}" if metric in _PERCENTAGES else f"{value:.4g}"


def format_seconds(seconds: float) -> str:
    """``42.5 s``, ``12 min 05 s``, ``3 h 25 min``."""
    if not math.isfinite(seconds):
        return MISSING
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_p_value(value: float) -> str:
    """Three decimals; below that, two significant digits."""
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"


def format_passes(epochs: float) -> str:
    """Passes over the training data: ``12``, ``2.31``, below one in two significant digits."""
    if not math.isfinite(epochs):
        return MISSING
    return f"{epochs:.2g}" if abs(epochs) < 1 or abs(epochs) >= 1e9 else f"{epochs:.2f}".rstrip("0").rstrip(".")


def in_training(step: float | None, passed_epochs: float | None) -> str:
    """Where an observation stands, to be put behind its number: `` (step 6000, epoch 2.31)``; empty where unknown."""
    known = [] if step is None or not math.isfinite(step) else [f"step {step:.0f}"]
    if passed_epochs is not None and math.isfinite(passed_epochs):
        known.append(f"epoch {format_passes(passed_epochs)}")
    return f" ({', '.join(known)})" if known else ""


def printable(text: object, limit: int | None = None) -> str:
    """Text from a file, safe to print: control, formatting and surrogate characters become U+FFFD, all spaces plain.

    A terminal would obey escape codes, and bidirectional marks would reorder a line. What is longer than ``limit``
    is cut, with an ellipsis.
    """
    written = str(text)
    if limit is not None and len(written) > limit:
        written = written[: limit - 1] + "…"
    return written if written.isprintable() else "".join(map(_printable_character, written))


def _printable_character(character: str) -> str:
    if character.isprintable():
        return character
    return " " if unicodedata.category(character) == "Zs" else "\N{REPLACEMENT CHARACTER}"


def escaped(text: str) -> str:
    """Return ``text`` with line breaks, escape codes and other unprintable characters spelt out, in one line."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def shell_lines(words: Sequence[str], width: int | None = None) -> list[str]:
    """Return a command line, in lines of at most ``width`` columns that a shell takes for one; None is one line.

    Broken between words alone, and not behind an option: what is longer, such as a path, is left to the terminal.
    """
    parts: list[str] = []
    for word, before in zip(map(shlex.quote, words), ("", *words), strict=False):
        if before.startswith("-") and not word.startswith("-"):
            parts[-1] += f" {word}"
        else:
            parts.append(word)
    lines = parts[:1]
    for part in parts[1:]:
        if width is None or len(f"{lines[-1]} {part} \\") <= width:
            lines[-1] += f" {part}"
        else:
            lines[-1] += " \\"
            lines.append(f"  {part}")
    return lines


def to_go_on(said: str, command: Sequence[str], width: int | None) -> str:
    """Return what is said of a command that was ended, with the ``command`` that goes on, if there is one.

    On a terminal of ``width`` columns that has lines of its own, which can be copied whole; None is for a file.
    """
    if not command:
        return said
    return f"{said}; to go on:" + (" " if width is None else "\n") + "\n".join(shell_lines(command, width))


def folded(text: str, width: int | None) -> list[str]:
    """Return text in lines of at most ``width`` columns, broken at blanks alone: paths stay whole, to be copied."""
    if width is None or len(text) <= width:
        return [text]
    return textwrap.wrap(text, max(width, 1), break_long_words=False, break_on_hyphens=False)


def ratio_percent(part: float, whole: float) -> float:
    """``part`` in percent of ``whole``; NaN where the whole is zero."""
    return 100.0 * part / whole if whole else math.nan


def plain_json(value: Any) -> Any:
    """Return nested dictionaries, lists and tuples as JSON has them: lists, and None for what is not finite."""
    if isinstance(value, dict):
        return {key: plain_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def some_of(names: Iterable[str], limit: int = 5) -> str:
    """Return the first names for a line, and how many more there are: "a, b and 3 more"."""
    every = list(names)
    more = f" and {len(every) - limit} more" if len(every) > limit else ""
    return ", ".join(every[:limit]) + more


def counted(number: int, what: str) -> str:
    """Return a number of things: "1 epoch", "3 epochs"."""
    return f"{number} {what}" + ("s" if number != 1 else "")
