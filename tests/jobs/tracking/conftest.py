"""Pictures of reports take seconds: they are drawn in the tests that are named after them alone."""

from __future__ import annotations

import pytest

from neq_cli.jobs.tracking import teller


@pytest.fixture(autouse=True)
def _few_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "pictures" not in request.node.name:
        monkeypatch.setattr(teller, "can_draw", lambda: True)
        monkeypatch.setattr(teller, "report_pictures", lambda run: {})
