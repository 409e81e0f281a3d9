"""Pieces of HTML, whose text is escaped, and a figure's SVG made part of a page.

By hand, not jinja2: a page of a dozen pieces, in which nothing can be left unescaped.
"""

from __future__ import annotations

import html
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from xml.etree.ElementTree import Element

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


def whole(value: object, limit: int = LONGEST_TEXT) -> str:
    """Return foreign text that no line breaks in its middle, unless it is longer than the line: a name."""
    return element("span", text(value, limit), class_="name")


def folder(path: object, limit: int = LONGEST_TEXT) -> str:
    """Return a path whose folders stay whole: lines end after a slash."""
    *folders, last = printable(path, limit).split("/")
    pieces = [whole(f"{part}/", limit + 1) if part else "/" for part in folders]
    return "<wbr>".join([*pieces, *([whole(last, limit)] if last else [])])


def command(line: str, limit: int = LONGEST_TEXT) -> str:
    """Return a command line, whose lines end between words and after slashes."""
    return element("code", " ".join(map(folder, printable(line, limit).split(" "))))


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Return a table of HTML cells, the first of each row its heading.

    Where it is too wide it scrolls, and its edges show that. On a narrow screen each row is a card, whose lines begin
    with the names of the columns; the roles keep what it is for those who hear it, which cards would take.
    """
    head = "".join(element("th", name, scope="col", role="columnheader") for name in header)
    body = "".join(
        element(
            "tr",
            element("th", cells[0], scope="row", role="rowheader")
            + "".join(_cell(name, cell) for name, cell in zip(header[1:], cells[1:], strict=True)),
            role="row",
        )
        for cells in rows
    )
    content = element("caption", caption)
    content += element("thead", element("tr", head, role="row"), role="rowgroup")
    content += element("tbody", body, role="rowgroup")
    # Focusable, so that a keyboard can scroll it.
    return element("div", element("table", content, class_=kind, role="table"), class_="scroll", tabindex="0")


def _cell(column: str, content: str) -> str:
    # ``column`` is escaped already.
    return f'<td role="cell" data-column="{column}">{content}</td>'


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


_COLOUR = re.compile("|".join(_VARIABLES))
_FONT = re.compile(r"font:\s*([0-9.]+)px [^;]*")
_BOLD = re.compile(r"font:\s*(?:bold|700) ([0-9.]+)px [^;]*")
_FAMILY = re.compile(r"font-family:[^;]*;\s*")
_LONG_NUMBER = re.compile(r"(-?\d+\.\d{2})\d+")
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_NUMBERS = ("d", "x", "y", "transform", "width", "height", "points")
_DROPPED = ("metadata", "style", "title")


def inline(svg: bytes, title: str, description: str, name: str) -> str:
    """Return an <svg> element for a page. ``name``, letters, digits and dashes, is unique within the page.

    Both texts are read out in place of the picture. What matplotlib drew in a placeholder colour takes the page's
    variable of that name, and an image is the mask of a plane in ``--density``.
    """
    root = ElementTree.fromstring(svg)
    _strip(root)
    _own_ids(root, name)
    for place, (parent, image) in enumerate(_images(root)):
        _mask(parent, image, root, f"{name}-mask-{place}")
    for side in ("width", "height"):
        root.attrib.pop(side, None)
    root.attrib.update({"role": "img", "aria-labelledby": f"{name}-title {name}-text"})
    for position, (tag, identity, text) in enumerate((("title", "title", title), ("desc", "text", description))):
        element = Element(tag, {"id": f"{name}-{identity}"})
        element.text = text
        root.insert(position, element)
    return ElementTree.tostring(root, encoding="unicode")


def _strip(root: Element) -> None:
    """Drop namespaces, which HTML does without, what only other programs read, and needless digits; set colours."""
    for element in root.iter():
        element.tag = _local(element.tag)
        attributes = {_local(key): value for key, value in element.attrib.items()}
        style = attributes.get("style")
        if style is not None:
            style = _COLOUR.sub(lambda match: _VARIABLES[match[0]], style)
            style = _BOLD.sub(r"font-weight: bold; font-size: \1px", style)
            attributes["style"] = _FAMILY.sub("", _FONT.sub(r"font-size: \1px", style))
        for key in _NUMBERS:
            if key in attributes and element.tag != "image":
                attributes[key] = _LONG_NUMBER.sub(r"\1", attributes[key])
        element.attrib.clear()
        element.attrib.update(attributes)
        element.text, element.tail = _trimmed(element.text), _trimmed(element.tail)
        for child in list(element):
            if not isinstance(child.tag, str) or _local(child.tag) in _DROPPED:
                element.remove(child)


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _trimmed(text: str | None) -> str | None:
    """Line ends and indentation between elements are of no use."""
    return None if text is None or not text.strip() else text


def _own_ids(root: Element, name: str) -> None:
    used = set()
    for element in root.iter():
        for value in element.attrib.values():
            used.update(_REFERENCE.findall(value))
        if element.get("href", "").startswith("#"):
            used.add(element.attrib["href"][1:])
    for element in root.iter():
        identity = element.get("id")
        if identity is not None and identity not in used:
            del element.attrib["id"]
        elif identity is not None:
            element.attrib["id"] = f"{name}-{identity}"
        for key, value in element.attrib.items():
            if key == "href" and value.startswith("#"):
                element.attrib[key] = f"#{name}-{value[1:]}"
            else:
                element.attrib[key] = _REFERENCE.sub(rf"url(#{name}-\1)", value)


def _images(root: Element) -> list[tuple[Element, Element]]:
    return [(parent, child) for parent in root.iter() for child in parent if child.tag == "image"]


def _mask(parent: Element, image: Element, root: Element, identity: str) -> None:
    """Replace an image, white and more or less transparent, by a plane that shows through it."""
    _, _, width, height = root.attrib["viewBox"].split()
    whole = {"x": "0", "y": "0", "width": width, "height": height}
    group, mask = Element("g"), Element("mask", {"id": identity, "maskUnits": "userSpaceOnUse", **whole})
    place = list(parent).index(image)
    parent.remove(image)
    mask.append(image)
    group.append(mask)
    group.append(Element("rect", {**whole, "style": "fill: var(--density)", "mask": f"url(#{identity})"}))
    parent.insert(place, group)
