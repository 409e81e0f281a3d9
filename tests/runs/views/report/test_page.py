from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from neq_cli.errors import NeqError
from neq_cli.runs.compare.comparison import compare_runs
from neq_cli.runs.compare.inspection import inspect_run
from neq_cli.runs.store.run import Run, read_run
from neq_cli.runs.views.report.html import text as escaped
from neq_cli.runs.views.report.page import build_report, render_page, write_page
from neq_cli.text import format_flops

pytest.importorskip("matplotlib")
FROZEN = {"conv1": [[0, 2], [2]], "bn1": [[], [1]]}
BASELINE = {"kind": "baseline"}
ATTACK = "</script><img src=x onerror=alert(1)>"
HOSTILE = (
    *(ATTACK, "</style><script>alert(1)</script>", "</svg><svg onload=alert(1)>", "--><b>", "]]><b>", "\"'><b x='"),
    *("$x^{$", "$\\frac{", "_hidden", "\\", "%s", "{0}", "var(--ink)", "#fe01f0", "url(#a)", "", " ", "\x00\x1b[2J"),
    *("\u202ereversed", "\ud800", "a\nb", "字" * 80, "x" * 5000, "&lt;b&gt;", "javascript:alert(1)"),
)
VOID = {"meta", "br", "wbr", "img", "link", "hr"}
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "h3", "p", "nav", "a", "main", "section"),
    *("div", "article", "dl", "dt", "dd", "b", "small", "ul", "li", "table", "caption", "thead", "tbody", "tr", "th"),
    *("td", "figure", "figcaption", "details", "summary", "strong", "footer", "svg", "desc", "defs", "g", "path"),
    *("span", "wbr", "code", "use", "text", "clippath", "rect", "mask", "image", "circle", "line"),
}


SQUARE = b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1"><path d="M 0 0 L 1 1"/></svg>'


def page_of(runs: Sequence[Run], *, allow_differences: bool = False) -> str:
    return render_page(build_report(runs, allow_differences=allow_differences))


class Outline(HTMLParser):
    """Tags in order, texts by the tag they stand in, rows of cells; AssertionError where tags do not match."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.rows: list[list[str]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: Any) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.append((self.open[-1], data))
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def check_safe(page: str) -> Outline:
    """Parse a page and see that nothing in it runs, is fetched, or is not of neq's making."""
    outline = Outline(page)
    assert {tag for tag, _ in outline.tags} <= TAGS
    for tag, attributes in outline.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert not {"src", "srcdoc", "action"} & set(attributes)
        for name in ("href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,")), tag
    styles = "".join(data for tag, data in outline.texts if tag == "style")
    assert "@import" not in styles
    assert "url(" not in styles
    assert page.isascii() or page.encode()
    identities = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(set(identities)) == len(identities)
    return outline


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every figure be the same little one, where only what stands around them matters."""
    monkeypatch.setattr("neq_cli.runs.views.report.page.drawn", lambda *arguments: SQUARE)


@pytest.fixture
def runs(make_run: Callable[..., Run], recipe: Any) -> list[Run]:
    made = []
    for seed in (1, 2, 3):
        for name, policy in (("n", {"kind": "neq"}), ("b", BASELINE)):
            share = 0.6 + seed / 100 if name == "n" else 1.0
            metrics = [
                {"test_top1": 90 + seed + epoch / 3, "flops_paper": share * 138942464, "lr": 0.1 if epoch < 2 else 0.01}
                for epoch in range(3)
            ]
            frozen = FROZEN if name == "n" else {}
            made.append(make_run(f"{name}{seed}", recipe(seed=seed, policy=policy), metrics=metrics, frozen=frozen))
    return made


@pytest.mark.usefixtures("undrawn")
def test_numbers_are_those_of_the_comparison(runs: list[Run]) -> None:
    outline = check_safe(page_of(runs))
    compared = compare_runs(runs)
    header = next(place for place, row in enumerate(outline.rows) if "approach" in row)
    for row, cells in zip(compared.rows, outline.rows[header + 1 :], strict=False):
        number, approach, n, paper, executed, final, best, seconds = (" ".join(cell.split()) for cell in cells)
        assert (approach, n) == (row.approach, "3")
        assert number == str(compared.rows.index(row) + 1)
        spread = f" ± {format_flops(row.flops_paper.std, row.flops_paper.mean)}" if row.flops_paper.std else ""
        assert paper == f"{format_flops(row.flops_paper.mean)}{spread} {row.flops_paper_percent:.1f}%"
        assert row.flops_executed.mean == 1500
        assert executed == f"0.0015M {row.flops_executed_percent:.1f}%"  # in the unit of the paper's 138.94M
        assert final.startswith(f"{row.final.mean:.2f} ± {row.final.std:.2f}")
        assert best.startswith(f"{row.best.mean:.2f} ± {row.best.std:.2f}")
        assert seconds == f"{row.seconds.mean:.1f} ± {row.seconds.std:.1f}"
    assert compared.rows[1].final_difference is not None
    assert "+0.00, p=1.000" in outline.rows[header + 2][5]


@pytest.mark.usefixtures("undrawn")
def test_what_is_said_of_layers_agrees_with_inspect(make_run: Callable[..., Run], recipe: Any) -> None:
    # Neurons chosen after an epoch rest in the next: in the last epoch those chosen after the one before.
    run = make_run("run", frozen=FROZEN)
    seen = inspect_run(run, epoch=2)
    conv1 = next(layer for layer in seen.layers if layer.name == "conv1")
    page = page_of([run])
    share = (inspect_run(run, epoch=1).layers[0].frozen + conv1.frozen) / (3 * conv1.neurons)
    assert f"most in conv1, {100 * share:.1f}% in the mean epoch" in page


@pytest.mark.usefixtures("undrawn")
def test_the_page_is_accessible(runs: list[Run]) -> None:
    outline = check_safe(page_of(runs))
    assert outline.of("html")[0]["lang"] == "en"
    levels = [int(tag[1]) for tag, _ in outline.tags if tag in ("h1", "h2", "h3")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))
    assert all(attributes.get("scope") in ("row", "col") for attributes in outline.of("th"))
    pictures = [each for each in outline.of("svg") if each.get("role") == "img"]
    assert len(pictures) == len(outline.of("figure")) == 10
    identities = {attributes.get("id") for _, attributes in outline.tags}
    for picture in pictures:
        assert set((picture["aria-labelledby"] or "").split()) <= identities
    assert all(each.get("aria-hidden") == "true" for each in outline.of("svg") if each.get("role") != "img")
    anchors = {(each["href"] or "")[1:] for each in outline.of("a")}
    assert anchors <= identities


def test_nothing_can_run_or_be_fetched(runs: list[Run]) -> None:
    page = page_of(runs)
    outline = check_safe(page)
    policy = next(each["content"] for each in outline.of("meta") if each.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "http://" not in page
    assert "https://" not in page


def test_the_same_runs_give_the_same_page(runs: list[Run]) -> None:
    assert page_of(runs) == page_of([read_run(run.path) for run in runs])


def hostile_run(make_run: Callable[..., Run], recipe: Any, name: str, words: str) -> Run:
    """A run whose every text says ``words``: names, layers, kinds, metric, notes, device, keys and values."""
    plain = recipe(policy={"kind": "entrypoint", "entrypoint": "a:b"}, description=words)
    plain["policy"]["entrypoint"] = words
    plain["model"]["name"] = words
    plain["model"]["kwargs"] = {words: words}
    plain["data"]["name"] = words
    run = make_run(name, plain, frozen={"conv1": [[1]]})
    environment = {"recipe_name": words, "device": words, "notes": [words, {words: words}], words: {words: [words]}}
    environment["metric"] = "test_top1"
    encoded = json.dumps(environment).encode("utf-8", "replace")
    run.files.environment.write_bytes(encoded)
    status = {"state": "failed", "reason": words}
    run.files.status.write_text(json.dumps(status), encoding="utf-8")
    return read_run(run.path)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("words", HOSTILE)
def test_hostile_texts_stay_texts(make_run: Callable[..., Run], recipe: Any, words: str) -> None:
    run = hostile_run(make_run, recipe, "run", words)
    page = page_of([run])
    check_safe(page)
    assert page.encode()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e]", page)
    assert len(page) < 1_000_000
    if words == ATTACK:
        assert escaped(ATTACK) in page
        assert ATTACK not in page


def test_hostile_layers_metric_and_folder(make_run: Callable[..., Run], recipe: Any) -> None:
    layers = {**dict.fromkeys((word for word in HOSTILE if word.isprintable() and len(word) < 999), 2), ATTACK: 3}
    run = make_run("<b>&amp;", sizes=layers, frozen={ATTACK: [[1]]})
    run.files.metrics.write_text(run.files.metrics.read_text().replace("test_top1", ATTACK), encoding="utf-8")
    run.files.environment.write_text(json.dumps({"metric": ATTACK}), encoding="utf-8")
    outline = check_safe(page_of([read_run(run.path)]))
    assert any(ATTACK in data for _, data in outline.texts)
    assert any("(the model itself)" in data for _, data in outline.texts)


ODD = (math.nan, math.inf, pytest.param(0.0, marks=pytest.mark.slow), 1e99, -1e-99)


@pytest.mark.parametrize("value", ODD)
@pytest.mark.filterwarnings("error", "ignore::ResourceWarning")  # of garbage of other tests
def test_odd_numbers(make_run: Callable[..., Run], recipe: Any, value: float) -> None:
    columns = (
        "test_top1",
        "flops_paper",
        "flops_executed",
        "flops_paper_dense",
        "epoch_seconds",
        "lr",
        "probe_seconds",
    )
    rows = [dict.fromkeys(columns, value)] * 3
    check_safe(page_of([make_run("n", metrics=rows), make_run("b", recipe(policy=BASELINE))]))


def test_one_epoch_and_nothing_frozen(make_run: Callable[..., Run], recipe: Any) -> None:
    page = page_of([make_run("run", recipe(epochs=1))])
    check_safe(page)
    assert "No run ever froze a neuron." in page
    assert "There is no baseline to compare with" in page
    assert "only one run" in page


@pytest.mark.usefixtures("undrawn")
def test_metrics_that_were_never_measured(make_run: Callable[..., Run]) -> None:
    page = page_of([make_run("run", metrics=[{"test_top1": math.nan}] * 3, frozen=FROZEN)])
    check_safe(page)
    assert "never measured" in page


@pytest.mark.usefixtures("undrawn")
def test_custom_metric_and_different_metrics(make_run: Callable[..., Run], recipe: Any) -> None:
    run = make_run("own", metrics=[{"dice": 0.5 + epoch / 10} for epoch in range(3)])
    run.files.environment.write_text(json.dumps({"metric": "dice"}))
    own = read_run(run.path)
    assert "Dice by epoch" in page_of([own])
    page = page_of([own, make_run("b", recipe(policy=BASELINE))], allow_differences=True)
    check_safe(page)
    assert "Dice by epoch" not in page


@pytest.mark.usefixtures("undrawn")
def test_long_runs_say_what_is_drawn(make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neq_cli.runs.views.report.fields.MOST_EPOCHS", 2)
    monkeypatch.setattr("neq_cli.runs.views.report.fields.MOST_COLUMNS", 2)
    page = page_of([make_run("run", frozen=FROZEN)])
    assert "2 of 3 epochs are drawn, evenly spread." in page
    assert "A cell takes together 1 layer and 2 epochs" in page


@pytest.mark.usefixtures("undrawn")
def test_runs_that_cannot_be_compared(make_run: Callable[..., Run], recipe: Any) -> None:
    made = [make_run("a"), make_run("b", recipe(epochs=2))]
    with pytest.raises(NeqError, match="--allow-differences"):
        page_of(made)
    check_safe(page_of(made, allow_differences=True))


@pytest.mark.usefixtures("undrawn")
def test_what_differs_is_told_first(runs: list[Run]) -> None:
    outline = check_safe(page_of(runs))
    rows = [[" ".join(cell.split()) for cell in row] for row in outline.rows]
    assert ["policy.kind", "baseline", "1"] in rows
    assert ["", "neq", "2"] in rows
    assert rows.index(["policy.kind", "baseline", "1"]) < rows.index(["model.name", "resnet32"])
    # The goal is the second seed's last value: two of each reach it.
    assert [row[0] for row in rows if row[2:3] == ["2 of 3"]] == ["1", "2"]
    assert [str(number) for number in (1, 1, 1, 2, 2, 2)] == [row[0] for row in rows if "finished" in row]


@pytest.mark.usefixtures("undrawn")
def test_writing(tmp_path: Path, runs: list[Run]) -> None:
    page = page_of(runs[:1])
    path = tmp_path / "new" / "report.html"
    write_page(path, "old" + page[:500])
    write_page(path, page)
    assert path.read_text(encoding="utf-8") == page
    path.write_text("<html>mine</html>")
    with pytest.raises(NeqError, match=r"report\.html: already exists and was not written by neq report"):
        write_page(path, page)
    with pytest.raises(NeqError, match="already exists"):
        write_page(tmp_path / "new", page)
    with pytest.raises(NeqError, match=r"cannot be written: .*; choose another with -o"):
        write_page(path / "x.html", page)


@pytest.mark.usefixtures("undrawn")
def test_observations_beside_epochs(
    make_run: Callable[..., Run], make_observed: Callable[..., Run], recipe: Any
) -> None:
    rates = {"b": [0.1, 0.01, 0.01], "n": [0.1] * 4 + [0.01] * 8}
    runs = [
        make_run("b", recipe(policy=BASELINE), metrics=[{"lr": rate} for rate in rates["b"]]),
        make_observed("n", metrics=[{"lr": rate} for rate in rates["n"]], frozen={"conv1": [[0]] * 12}),
    ]
    outline = check_safe(page_of(runs))
    told = " ".join(data for tag, data in outline.texts if tag != "style")
    for words in (
        "2 runs of 2 configurations, 3 epochs and 12 observations",
        "mean of all epochs or observations",
        "By epoch",
        "Test top-1 accuracy by epoch",
        "Velocity v by observation",
        "a neuron is frozen until the next observation",
        "Learning rate: 0.1; after epoch 1 0.01.",  # the same of both, one seen by epoch and one by fourths of it
        "neurons not updated up to the observation",
    ):
        assert words in told, words
    assert "rows_planned" not in told
    table = next(row for row in outline.rows if "folder" in row)
    assert table[4] == "epochs or observations"
    assert [row[4] for row in outline.rows if len(row) == 7 and row[3] == "finished"] == [
        "3 of 3",
        "12 of 12 observations",
    ]


@pytest.mark.usefixtures("undrawn")
def test_unfinished_observations_are_called_so(make_observed: Callable[..., Run]) -> None:
    told = page_of([make_observed("n", finish=False)])
    assert "unfinished after 8/12 observations; its numbers are of those observations." in told
    assert "1 run of 1 configuration, 8 observations" in told
    assert "per sample and iteration, mean of all observations" in told
    assert ">8 of 12</td>" in told


def test_observations_are_drawn_whatever_they_say(
    make_observed: Callable[..., Run], make_run: Callable[..., Run]
) -> None:
    tiny = [{"passed_epochs": 1e-300 * row} for row in range(1, 4)]
    large = [{"passed_epochs": value} for value in (1e-9, 1.0, 1e9)]
    untold = [{"passed_epochs": math.nan}] * 3
    for name, rows in (("tiny", tiny), ("large", large), ("untold", untold), ("one", [{}])):
        page = page_of([make_observed(name, metrics=rows)])
        check_safe(page)
        assert f"Test top-1 accuracy by {'observation' if name == 'untold' else 'epoch'}" in page
