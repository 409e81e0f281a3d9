"""The figures of a run's report as PNG files in memory, one printed column wide; none without matplotlib."""

from __future__ import annotations

from importlib.util import find_spec

from neq_cli.runs.store.run import Run

WITHOUT = "no pictures of the report for the trackers: they need matplotlib; pip install 'neq[report]'"


def can_draw() -> bool:
    """Whether matplotlib is there."""
    return find_spec("matplotlib") is not None


def report_pictures(run: Run) -> dict[str, bytes]:
    """Return the figures of a report of this run alone by their names. NeqError where it cannot be drawn."""
    from neq_cli.runs.views.report.drawing import PRINT, drawn
    from neq_cli.runs.views.report.files import printed_height
    from neq_cli.runs.views.report.page import build_report

    return {
        picture.name: drawn(picture.draw, PRINT, printed_height(picture), picture.name, "png")
        for picture in build_report([run]).pictures
    }
