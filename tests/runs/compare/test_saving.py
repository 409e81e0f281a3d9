"""Why all was computed though neurons were frozen: one sentence from dispatch.json, and none where it is not so."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from neq_cli.runs.compare.comparison import compare_runs
from neq_cli.runs.compare.inspection import inspect_run
from neq_cli.runs.compare.saving import nothing_saved
from neq_cli.runs.store.run import Run
from neq_cli.runs.views.tables.inspection import render

TIMED = {"dense": 0.2, "sliced": 0.3}
SMALL = "all layers ran dense: too small for slicing here; `neq bench` shows it by layer"


@pytest.fixture
def saving(make_run: Callable[..., Run], recipe: Any) -> Callable[..., Run]:
    """``saving(kernels, executed=2000.0, paper=1000.0)``: of 2000 dense, with these kernels in dispatch.json."""
    made = 0

    def make(
        kernels: list[tuple[str, dict[str, float]]] | None,
        executed: float = 2000.0,
        paper: float = 1000.0,
        backward: str = "exact",
        device: str = "cpu (1 thread)",
        policy: dict[str, Any] | None = None,
    ) -> Run:
        nonlocal made
        made += 1
        run = make_run(
            f"run{made}",
            recipe(epochs=2, policy=policy or {"kind": "neq"}),
            frozen={"conv1": [[0], [0]]},
            metrics=[{"flops_paper": 2000.0}, {"flops_paper": paper, "flops_executed": executed}],
        )
        if kernels is not None:
            choices = {f"kind {n}": {"kernel": k, "milliseconds": ms} for n, (k, ms) in enumerate(kernels)}
            written = {"backward": backward, "dense": {"bn1": "normalisation"}, "choices": choices}
            run.files.dispatch.write_text(json.dumps(written))
        # In the first epoch nothing is frozen, and all executed.
        rows = ({**run.rows[0], "flops_executed": 2000.0}, run.rows[1])
        return Run(run.path, run.recipe, {**run.environment, "device": device}, run.status, rows)

    return make


@pytest.mark.parametrize(
    ("kernels", "others", "says"),
    [
        ([("dense", TIMED)] * 2, {}, SMALL),
        ([("dense", TIMED)], {"device": "cuda (NVIDIA H200)"}, "all layers ran dense: slicing them is no faster here"),
        ([("dense", TIMED), ("sliced", TIMED)], {"executed": 1999.0}, "almost all layers ran dense: too small"),
        ([("dense", {})], {}, "all layers ran dense: too few of a layer's neurons were frozen for the rule"),
        ([("dense", TIMED)], {"backward": "dense"}, "backward: dense computes every gradient"),
        ([], {}, "what was frozen lies in layers that are computed whole; dispatch.json has their reasons"),
    ],
)
def test_the_reason(saving: Callable[..., Run], kernels: Any, others: dict[str, Any], says: str) -> None:
    found = nothing_saved(saving(kernels, **others))
    assert found is not None
    assert found.startswith(says)
    assert "\n" not in found


@pytest.mark.parametrize(
    "others",
    [
        {"executed": 1990.0},  # 99.75 % in the mean: it reads 99.8 %
        {"paper": 2000.0},  # nothing was frozen
        {"kernels": None},  # a run of before, or a loop of one's own without a record of kernels
    ],
)
def test_none_where_something_is_saved_or_nothing_is_known(saving: Callable[..., Run], others: dict[str, Any]) -> None:
    assert nothing_saved(saving(**{"kernels": [("dense", TIMED)], **others})) is None


@pytest.mark.parametrize("text", ["{", "[]", '{"choices": 3}', '{"choices": {"kind": "dense"}}'])
def test_a_damaged_file_costs_the_sentence_alone(saving: Callable[..., Run], text: str) -> None:
    run = saving([("dense", TIMED)])
    run.files.dispatch.write_text(text)
    assert nothing_saved(run) is None


def test_a_comparison_says_it_once_for_all_it_holds_for(saving: Callable[..., Run]) -> None:
    dense = [("dense", TIMED)]
    runs = [
        saving(dense),
        saving(dense, policy={"kind": "stochastic", "p": 0.5}),
        saving([("sliced", TIMED)], 1000.0, policy={"kind": "neq", "epsilon": 0.5}),
        saving(None, paper=2000.0, policy={"kind": "baseline"}),
    ]
    notes = [note for note in compare_runs(runs).notes if "nothing saved" in note]
    assert notes == [f"NEq eps=0.001 mu=0.5; Stochastic p=0.5: nothing saved: {SMALL}"]


def test_a_configuration_of_which_one_run_saved_something_is_not_among_them(saving: Callable[..., Run]) -> None:
    dense = [("dense", TIMED)]
    assert not [note for note in compare_runs([saving(dense), saving(dense, 1000.0)]).notes if "saved" in note]


def test_an_inspection_says_it_of_the_epochs_it_is_of(saving: Callable[..., Run]) -> None:
    run = saving([("dense", TIMED)])
    assert inspect_run(run).nothing_saved == SMALL
    assert inspect_run(run, epoch=1).nothing_saved is None  # nothing was frozen by then
    from io import StringIO

    from rich.console import Console

    console = Console(file=StringIO(), width=80)
    console.print(render(inspect_run(run)))
    text = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert f"nothing saved {SMALL}" in text
