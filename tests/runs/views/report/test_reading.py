"""How a report's page reads: what stands large and what grey, words, units, names, and what is said once."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any

import pytest
from html_tree import Node, parsed, section

from neq_cli.runs.store.run import Run, read_run
from neq_cli.runs.views.report.names import run_names
from neq_cli.runs.views.report.page import build_report, render_page

pytest.importorskip("matplotlib")
BASELINE = {"kind": "baseline"}
SQUARE = b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1"><path d="M 0 0 L 1 1"/></svg>'


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every figure be the same little one, where only what stands around them matters."""
    monkeypatch.setattr("neq_cli.runs.views.report.page.drawn", lambda *arguments: SQUARE)


def page_of(runs: Sequence[Run]) -> Node:
    return parsed(render_page(build_report(runs)))


@pytest.fixture
def seeded(make_run: Callable[..., Run], recipe: Any) -> Callable[..., Run]:
    """``seeded(name, seed, top1, seconds, policy=..., environment=...)``, of three epochs, FLOPs 70 % of 1000 M."""

    def make(name: str, seed: int, top1: float, seconds: float, **changes: Any) -> Run:
        environment = changes.pop("environment", None)
        flops = 1e9 if changes.get("policy") == BASELINE else 7e8 + 1e6 * seed
        row = {"test_top1": top1, "epoch_seconds": seconds, "flops_paper": flops, "flops_executed": flops}
        plain = recipe(seed=seed, **changes)
        return make_run(f"{name}{seed}", plain, metrics=[row] * 3, environment=environment)

    return make


@pytest.mark.usefixtures("undrawn")
def test_large_figures_carry_their_spread_and_are_grey_where_they_mean_nothing(seeded: Callable[..., Run]) -> None:
    runs = [seeded("b", seed, 90.0 + seed, 2.2, policy=BASELINE) for seed in (1, 2, 3)]
    runs += [seeded("n", seed, (92.5, 90.5, 94.5)[seed - 1], 1.0 + seed / 10) for seed in (1, 2, 3)]
    short = section(page_of(runs), "short")
    card = short.one("article")
    facts = {each.one("dt").text: each.one("b") for each in card.one("dl").all("div")}
    assert {name: value.kinds for name, value in facts.items()} == {
        "paper FLOPs": ["known"], "executed FLOPs": ["known"], "final test top-1 accuracy": ["noise"],
        "time to train": ["known"],
    }  # fmt: skip
    for value in facts.values():  # the spread stands within what is large, and grey with it
        assert value.text.endswith(value.one("span", kind="spread").text)
    # 1.5, -1.5 and 1.5 points; t(2) times their error of 1 is 4.303.
    assert facts["final test top-1 accuracy"].text == "+0.50 points (−3.80 to +4.80)"
    told = " ".join(each.text for each in short.all("p"))
    assert "95 % interval" in told
    assert "Grey: the runs do not tell it from no difference." in told


COLUMNS = ("test_top1", "test_miou", "test_loss", "train_loss", "flops_paper", "flops_executed", "epoch_seconds")


def headings(page: Node) -> list[str]:
    """What stands over something: headings, titles of figures, captions and heads of tables, names of facts."""
    heads = [*page.all("h1", "h2", "h3", "caption", "dt", "summary"), *page.all("p", kind="title")]
    heads += [each for each in page.all("th") if each.attributes["scope"] == "col"]
    return [each.text for each in heads]


def drawn_texts(page: Node) -> list[str]:
    return [each.text for each in page.all("text")]


@pytest.fixture
def three(seeded: Callable[..., Run]) -> list[Run]:
    """A baseline of two seeds, and two configurations with its FLOPs and accuracy but for one seed."""
    made = [seeded("b", seed, 90.0, 10, policy=BASELINE) for seed in (1, 2)]
    made += [seeded("n", seed, 91.0, 10) for seed in (1, 2)]
    return made + [seeded("e", seed, 91.0 + seed / 500, 10, policy={"kind": "neq", "epsilon": 0.1}) for seed in (1, 2)]


def test_headings_and_axes_are_words_not_column_names(three: list[Run]) -> None:
    page = page_of(three)
    said = [*headings(page), *drawn_texts(page)]
    assert "Final test top-1 accuracy against paper FLOPs" in said
    assert "Test top-1 accuracy by epoch" in said
    assert "final test top-1 accuracy (%)" in said
    assert [words for words in said if any(column in words for column in (*COLUMNS, "delta_phi", "_"))] == []


def test_an_own_metric_is_called_by_its_own_words(make_run: Callable[..., Run]) -> None:
    rows = [{"dice_of_cells": 0.5 + epoch / 10} for epoch in range(3)]
    page = page_of([make_run("own", metrics=rows, metric="dice_of_cells")])
    said = [*headings(page), *drawn_texts(page)]
    assert "Dice of cells by epoch" in said
    assert "final dice of cells" in said
    assert not any("dice_of_cells" in words for words in said)


def test_flops_have_one_unit_in_text_and_beside_axes(seeded: Callable[..., Run], make_run: Any, recipe: Any) -> None:
    """A thousandth of the baseline's FLOPs would be in M by itself, the baseline's are in G."""
    row = {"test_top1": 90.0, "flops_paper": 1.5e6, "flops_executed": 2.25e6}
    runs = [seeded("b", 1, 90.0, 10, policy=BASELINE), make_run("n", metrics=[row] * 3)]
    page = page_of(runs)
    labels = [label for label in drawn_texts(page) if "FLOPs per iteration" in label]
    assert sorted(set(labels)) == [f"{what} FLOPs per iteration (G)" for what in ("executed", "paper")]
    assert len(labels) == 4
    numbers = set(re.findall(r"\b\d[\d.]*([KMGT])\b", page.one("main").text))
    assert numbers == {"G"}
    assert "0.0015G against 1.00G" in section(page, "short").text
    assert page.one("footer").text.endswith("one multiply-add each. G: 1,000,000,000 of them.")


@pytest.mark.usefixtures("undrawn")
def test_a_note_of_several_runs_stands_once_with_their_names(three: list[Run]) -> None:
    shared = "channels_last: auto, false (8.23 ms a step, contiguous 8.305 ms)"
    for run in three:
        told = json.loads(run.files.environment.read_text())
        told["notes"] = [shared, *(["of some"] if run.path.name[0] in "ne" else []), *["of one"] * (run is three[0])]
        run.files.environment.write_text(json.dumps(told))
    notes = section(page_of([read_run(run.path) for run in three]), "environment").all("li")
    assert [note.text for note in notes] == [
        f"{shared} (all 6 runs)", "of one (b1)", "of some (n1, n2, e1, e2)",
    ]  # fmt: skip
    assert [each.text for each in notes[2].all("span", kind="name")] == ["n1,", "n2,", "e1,", "e2"]


@pytest.mark.usefixtures("undrawn")
def test_a_note_of_very_many_runs_names_some(make_run: Callable[..., Run], recipe: Any) -> None:
    runs = [make_run(f"r{seed:02}", recipe(seed=seed)) for seed in range(15)]
    told = json.loads(runs[0].files.environment.read_text())
    runs[0].files.environment.write_text(json.dumps({**told, "notes": []}))
    (note,) = section(page_of([read_run(run.path) for run in runs]), "environment").all("li")
    assert note.text == f"a note ({', '.join(f'r{seed:02}' for seed in range(1, 13))} and 2 more runs)"


@pytest.mark.usefixtures("undrawn")
def test_the_environment_is_what_differs_and_then_what_is_the_same(make_run: Callable[..., Run], recipe: Any) -> None:
    def environment(seed: int) -> dict[str, Any]:
        argv = ["/opt/site-packages/neq_cli/__main__.py", "train", "mine.yaml", "policy={kind: neq}", f"seed={seed}"]
        packages = {"torch": "2.14.1", "numpy": f"2.{seed}"}
        return {"argv": argv, "packages": packages, "git": {"commit": "abc", "dirty": seed == 2}, "python": "3.11"}

    runs = [make_run(f"s{seed}", recipe(seed=seed), environment=environment(seed)) for seed in (1, 2)]
    differs, same = section(page_of(runs), "environment").all("table")
    assert differs.one("caption").text == "What differs between the runs' environments"
    rows = [[cell.text for cell in row.all("th", "td")] for row in differs.one("tbody").all("tr")]
    typed = "neq train mine.yaml 'policy={kind: neq}' seed="
    assert rows == [
        ["command line", f"{typed}1", "s1"], ["", f"{typed}2", "s2"],
        ["numpy", "2.1", "s1"], ["", "2.2", "s2"],
        ["changes not committed", "false", "s1"], ["", "true", "s2"],
    ]  # fmt: skip
    codes = differs.all("code")
    assert [code.text for code in codes] == [f"{typed}1", f"{typed}2"]
    # No word of it is broken, but for a path after a slash.
    assert [each.text for each in codes[0].all("span", kind="name")] == f"{typed}1".split()
    assert same.one("caption").text == "The same in all runs"
    rows = [[cell.text for cell in row.all("th", "td")] for row in same.one("tbody").all("tr")]
    assert [row for row in rows if row[0] in ("git commit", "torch", "Python")] == [
        ["torch", "2.14.1"], ["git commit", "abc"], ["Python", "3.11"],
    ]  # fmt: skip


@pytest.mark.usefixtures("undrawn")
def test_names_of_runs_are_whole_and_tell_runs_apart(make_run: Callable[..., Run], recipe: Any) -> None:
    runs = [make_run("mine/20261129-035100-s1", recipe(seed=1)), make_run("other/20261129-035100-s1", recipe(seed=2))]
    assert run_names(runs) == ["mine/20261129-035100-s1", "other/20261129-035100-s1"]
    assert run_names(runs[:1]) == ["20261129-035100-s1"]
    cells = [row.all("td")[0] for row in section(page_of(runs), "runs").one("tbody").all("tr")]
    for run, cell in zip(runs, cells, strict=True):
        assert cell.text == str(run.path)
        # A line may end after a slash; what lies between two of them is one piece.
        assert [each.text for each in cell.all("span", kind="name")] == [
            *(f"{part}/" for part in run.path.parts[1:-1]),
            run.path.name,
        ]
        assert len(cell.all("wbr")) == len(run.path.parts) - 1


def test_the_style_breaks_no_word_that_fits_its_line() -> None:
    style = (files("neq_cli.runs.views.report") / "page.css").read_text(encoding="utf-8")
    assert "anywhere" not in style
    assert "break-all" not in style
    rule = next(line for line in style.splitlines() if line.startswith(".name {"))
    assert "display: inline-block" in rule  # no hyphen within a name ends a line


@pytest.mark.usefixtures("undrawn")
def test_every_cell_of_a_card_says_its_column(three: list[Run]) -> None:
    page = page_of(three)
    for each in page.all("table"):
        heads = [head.text for head in each.one("thead").all("th")]
        assert all(heads)
        for row in each.one("tbody").all("tr"):
            assert [cell.attributes["data-column"] for cell in row.all("td")] == heads[1:]
            roles = [cell.attributes["role"] for cell in row.all("th", "td")]
            assert (row.attributes["role"], *roles) == ("row", "rowheader", *["cell"] * (len(heads) - 1))
        assert each.attributes["role"] == "table"
    style = (files("neq_cli.runs.views.report") / "page.css").read_text(encoding="utf-8")
    narrow = style.partition("@media screen and (max-width: 40rem)")[2]
    assert "attr(data-column)" in narrow.partition("@media print")[0]


def test_points_on_one_spot_and_lines_on_one_line_are_told(three: list[Run]) -> None:
    page = page_of(three)
    points, curves = section(page, "flops"), section(page, "epochs")
    assert "Configurations 2 and 3 lie on one spot, or nearly so." in points.text
    for picture in [figure.one("svg") for figure in points.all("figure")]:
        numbers = [
            text for text in (each.text for each in picture.all("text")) if re.fullmatch(r"[123](, [123])*", text)
        ]
        assert numbers == ["1", "2, 3"]
    told = {each.one("p", kind="title").text: each.text for each in curves.all("figure")}
    assert "Configurations 2 and 3 lie on one line." in told["Paper FLOPs by epoch"]
    assert "Configurations 1, 2 and 3 lie on one line." in told["Updated neurons by epoch"]
    assert all("lie on one spot" not in words for words in told.values())


def test_points_apart_say_nothing(seeded: Callable[..., Run]) -> None:
    page = page_of([seeded("b", 1, 90.0, 10, policy=BASELINE), seeded("n", 1, 91.0, 10)])
    assert "lie on one" not in section(page, "flops").text


def letters(page: Node, width: float) -> list[float]:
    """Return the sizes in pixels of the texts of all figures, were each drawn ``width`` pixels wide."""
    sizes = []
    for picture in [each for each in page.all("svg") if each.attributes.get("role") == "img"]:
        scale = width / float((picture.attributes["viewbox"] or "").split()[2])
        for each in picture.all("text"):
            (size,) = re.findall(r"font-size: ([0-9.]+)px", each.attributes["style"] or "")
            sizes.append(float(size) * scale)
    return sizes


@pytest.mark.parametrize("width", [360, 368])
def test_distributions_are_readable_on_a_phone_and_three_abreast(make_run: Callable[..., Run], width: float) -> None:
    """On a screen of 400 pixels a figure is 360 wide; of 1280 three stand abreast, with gaps of 24, within 1176."""
    neurons = section(page_of([make_run("n", frozen={"conv1": [[0], [0]]})]), "neurons")
    found = letters(neurons, width)
    assert len(found) > 20
    assert min(found) >= 10
