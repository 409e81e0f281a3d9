from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import numpy as np
import pytest

from neq_cli.runs.views.report.drawing import PAGE, PLACEHOLDERS, drawn
from neq_cli.runs.views.report.html import inline

pytest.importorskip("matplotlib")
HOSTILE = '</svg><script>alert(1)</script> "\'&--> $x^{$ url(#p) #fe01f0 id="a"'


def draw(figure: Any, style: Any) -> None:
    axes = figure.add_subplot()
    axes.plot([1, 2, 3], [1, 3, 2], color=style.colour(1), marker="o")
    axes.imshow(np.full((2, 2, 4), 128, dtype=np.uint8), extent=(1, 3, 1, 3), interpolation="none")
    axes.set_title(HOSTILE).set_parse_math(False)


@pytest.fixture(scope="module")
def svg() -> str:
    return inline(drawn(draw, PAGE, 3.0, "a", "svg"), HOSTILE, f"all of {HOSTILE}", "figure-a")


def test_texts_stay_texts(svg: str) -> None:
    root = ElementTree.fromstring(svg)
    assert [element.tag for element in root][:2] == ["title", "desc"]
    texts = ["".join(element.itertext()) for element in root.iter() if element.tag in ("title", "desc", "text")]
    assert texts[:2] == [HOSTILE, f"all of {HOSTILE}"]
    assert HOSTILE in texts[2:]
    assert "<script" not in svg
    drawn_with = {"defs", "g", "path", "use", "text", "clipPath", "rect", "mask", "image"}
    assert {element.tag for element in root.iter()} <= {"svg", "title", "desc", *drawn_with}


def test_colours_are_the_pages(svg: str) -> None:
    root = ElementTree.fromstring(svg)
    styles = " ".join(element.get("style", "") for element in root.iter())
    assert not any(colour in styles for colour in PLACEHOLDERS.values())
    assert "stroke: var(--series-0)" in styles
    assert "fill: var(--ink)" in styles
    assert "font-family" not in styles


def test_ids_are_its_own_and_lead_somewhere(svg: str) -> None:
    root = ElementTree.fromstring(svg)
    identities = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
    assert len(set(identities)) == len(identities)
    assert all(identity.startswith("figure-a-") for identity in identities)
    attributes = [value for element in root.iter() for value in element.attrib.values()]
    targets = [name for value in attributes for name in re.findall(r"url\(#(.*?)\)", value)]
    targets += [element.attrib["href"][1:] for element in root.iter() if element.get("href", "").startswith("#")]
    assert targets
    assert set(targets) <= set(identities)
    assert root.attrib["aria-labelledby"] == "figure-a-title figure-a-text"


def test_nothing_is_fetched(svg: str) -> None:
    root = ElementTree.fromstring(svg)
    addresses = [element.attrib["href"] for element in root.iter() if "href" in element.attrib]
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in addresses)
    assert "http" not in svg


def test_images_are_masks(svg: str) -> None:
    root = ElementTree.fromstring(svg)
    masks = list(root.iter("mask"))
    assert [element.tag for mask in masks for element in mask] == ["image"]
    planes = [element for element in root.iter("rect") if "mask" in element.attrib]
    assert [plane.attrib["style"] for plane in planes] == ["fill: var(--density)"]
    assert planes[0].attrib["mask"] == f"url(#{masks[0].attrib['id']})"
