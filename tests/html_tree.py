"""A page as a tree of elements, for tests of what it says and where."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

_VOID = {"meta", "br", "img", "link", "hr", "wbr"}


@dataclass
class Node:
    """An element: its tag, attributes, and what stands in it, texts and elements."""

    tag: str
    attributes: dict[str, str | None] = field(default_factory=dict)
    content: list[Node | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All text in it, in one line."""
        return " ".join("".join(self._texts()).split())

    def _texts(self) -> Iterator[str]:
        for each in self.content:
            yield from [each] if isinstance(each, str) else each._texts()

    def all(self, *tags: str, kind: str = "") -> list[Node]:
        """Return the elements in it of these tags, in order, those of the class ``kind`` alone where one is given."""
        return [each for each in self._nodes() if each.tag in tags and (not kind or kind in each.kinds)]

    def one(self, *tags: str, kind: str = "") -> Node:
        """Return the only such element."""
        (found,) = self.all(*tags, kind=kind)
        return found

    @property
    def kinds(self) -> list[str]:
        return (self.attributes.get("class") or "").split()

    def _nodes(self) -> Iterator[Node]:
        for each in self.content:
            if isinstance(each, Node):
                yield each
                yield from each._nodes()


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open = [Node("")]

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.handle_startendtag(tag, attributes)
        if tag not in _VOID:
            node = self.open[-1].content[-1]
            assert isinstance(node, Node)
            self.open.append(node)

    def handle_startendtag(self, tag: str, attributes: Any) -> None:
        self.open[-1].content.append(Node(tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].content.append(data)


def parsed(page: str) -> Node:
    """Return the root of a page; AssertionError where its tags do not match."""
    parser = _Parser()
    parser.feed(page)
    parser.close()
    (root,) = parser.open
    return root


def section(root: Node, identity: str) -> Node:
    """Return a section of a report's page."""
    (found,) = [each for each in root.all("section") if each.attributes.get("id") == identity]
    return found
