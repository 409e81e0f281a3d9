"""How a report's page reads: what stands large and what grey, words, units, names, and what is said once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from html_tree import Node, parsed, section

from neq_cli.runs.store.run import Run
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
