"""Pieces of HTML; every text passes through ``text``, the only way into a page for what a run directory says."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from neq_cli.runs.views.report.charts import Line
from neq_cli.runs.views.report.drawing import PAGE, PLACEHOLDERS
from neq_cli.text import printable

LONGEST_TEXT = 300
_VARIABLES = {colour: f"var(--{name})" for name, colour in PLACEHOLDERS.items()}


def text(value: object, limit: int = LONGEST_TEXT) -> str:
    """Return foreign text, harmless in HTML and in quoted attributes: control characters replaced, long text cut."""
    return html.escape(printable(value, limit), quote=True)


def element(tag: str, content: str, **attributes: str) -> str:
    """Return an element around HTML. An underscore at an attribute's end is dropped, others become dashes."""
    written = "".join(f' {name.rstrip("_").replace("_", "-")}="{text(value)}"' for name, value in attributes.items())
    return f"<{tag}{written}>{content}</{tag}>"


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Return a table of HTML cells, the first of each row its heading; where it is too wide it scrolls."""
    head = "".join(element("th", name, scope="col") for name in header)
    body = "".join(
        element("tr", element("th", cells[0], scope="row") + "".join(element("td", cell) for cell in cells[1:]))
        for cells in rows
    )
    content = element("caption", caption) + element("thead", element("tr", head)) + element("tbody", body)
    # Focusable, so that a keyboard can scroll it.
    return element("div", element("table", content, class_=kind), class_="scroll", tabindex="0")


def details(summary: str, content: str) -> str:
    """Return HTML that is folded until it is asked for."""
    return element("details", element("summary", summary) + content)


def swatch(line: Line, dot: bool = False) -> str:
    """Return the little sample of a configuration's line or point that stands in legends."""
    colour = _VARIABLES[PAGE.colour(line.place)]
    dashes = PAGE.dashes(line.place)
    pattern = "" if dashes == "-" else f' stroke-dasharray="{" ".join(str(2 * length) for length in dashes[1])}"'
    drawing = (
        f'<circle cx="14" cy="5" r="4" style="fill: {colour}"/>'
        if dot
        else f'<line x1="1" y1="5" x2="27" y2="5" style="stroke: {colour}; stroke-width: 2.5"{pattern}/>'
    )
    return f'<svg class="swatch" viewBox="0 0 28 10" aria-hidden="true">{drawing}</svg>'


def legend(lines: Sequence[Line], dot: bool = False) -> str:
    """Return the list that tells lines or points apart."""
    items = "".join(element("li", f"{swatch(line, dot)} {line.number}&ensp;{text(line.name)}") for line in lines)
    return element("ul", items, class_="legend")


def bullets(items: Iterable[str]) -> str:
    """Return a list of HTML items, or nothing."""
    written = "".join(element("li", item) for item in items)
    return element("ul", written) if written else ""
