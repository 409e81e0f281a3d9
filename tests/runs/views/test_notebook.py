from __future__ import annotations

from collections.abc import Callable

from neq_cli.runs.store.run import Run
from neq_cli.runs.views.notebook import run_as_html


def test_where_a_run_stands(make_run: Callable[..., Run], make_observed: Callable[..., Run]) -> None:
    assert "<td>finished, epoch 3 of 3</td>" in run_as_html(make_run())
    assert "<td>finished, observation 8 of 12 (step 800, epoch 2)</td>" in run_as_html(make_observed())
