"""The tables of a report: the comparison, what the recipes and environments differ in, and the runs themselves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from neq_cli.events import OBSERVATION
from neq_cli.runs.compare.configurations import UNSET, differing_keys, settings_together, written
from neq_cli.runs.compare.curves import Configuration, Study
from neq_cli.runs.store.run import Run
from neq_cli.runs.views.report.html import bullets, details, element, swatch, table, text
from neq_cli.runs.views.report.pictures import line
from neq_cli.runs.views.tables.comparison import (
    GOAL_LEGEND,
    Cell,
    cells,
    goal_cells,
    goal_header,
    goal_heading,
    has_goals,
    header,
    legend,
    unfinished,
)
from neq_cli.text import MISSING, format_metric, printable

_MOST_KEYS = 200
_MOST_RUNS = 500
_MOST_NOTES = 50
_SAID_ELSEWHERE = ("notes", "unit", "rows_planned")  # of environment.json


def comparison_table(the_study: Study) -> str:
    """Return what `neq compare` prints, with the numbers and colours of the figures."""
    names = ["", *map(text, header(the_study.comparison))]
    rows = [_comparison_row(the_study, configuration) for configuration in the_study.configurations]
    below = element("p", element("small", text(f"{legend(the_study.comparison)}.", 400)))
    whole = table("Every configuration, the baseline first", names, rows, "comparison") + below
    return whole + _goal_table(the_study)


def _goal_table(the_study: Study) -> str:
    """Return what it takes to the baseline's final metric, where there is a baseline."""
    comparison = the_study.comparison
    if not has_goals(comparison):
        return ""
    names = ["", *map(text, goal_header(comparison))]
    rows = [
        [
            f"{swatch(line(the_study, configuration), dot=True)} {configuration.number}",
            *map(_cell, goal_cells(configuration.row)),
        ]
        for configuration in the_study.configurations
        if configuration.row.goal is not None
    ]
    below = element("p", element("small", text(f"{GOAL_LEGEND}.", 400)))
    return table(goal_heading(comparison), names, rows, "comparison") + below


def _comparison_row(the_study: Study, configuration: Configuration) -> list[str]:
    row = configuration.row
    name = text(configuration.name)
    stopped = "".join(map(_small, unfinished(row)))
    matched = "" if row.matched_p is None else _small(f"p matched: {row.matched_p.mean:.3g}")
    return [
        f"{swatch(line(the_study, configuration), dot=True)} {configuration.number}",
        (element("strong", name) if row.is_baseline else name) + matched + stopped,
        *map(_cell, cells(row)[1:]),
    ]


def _small(words: str) -> str:
    return " " + element("small", text(words))


def _cell(cell: Cell) -> str:
    return text(cell.with_spread) + (_small(", ".join(cell.details)) if cell.details else "")


def recipe_tables(the_study: Study) -> str:
    """Return the keys in which the recipes differ, then all keys of each."""
    flats = settings_together([configuration.runs[0] for configuration in the_study.configurations])
    numbered = [
        (str(configuration.number), flat) for configuration, flat in zip(the_study.configurations, flats, strict=True)
    ]
    parts = [_differences("Keys in which the recipes differ", "configurations", numbered, written)]
    common = {key: value for key, value in flats[0].items() if all(flat.get(key) == value for flat in flats)}
    parts.append(details(f"Keys that all share ({len(common)})", _key_table("Recipe", _described(common, written))))
    return "".join(parts)


def environment_tables(the_study: Study) -> str:
    """Return what differs between the runs' environments, then what they share."""
    flats = [_flat(run.environment) for run in the_study.runs]
    numbered = [(_run_name(run), flat) for run, flat in zip(the_study.runs, flats, strict=True)]
    parts = [_differences("What differs between the runs' environments", "runs", numbered, str)]
    common = {key: value for key, value in flats[0].items() if all(flat.get(key) == value for flat in flats)}
    parts.append(details(f"What all runs share ({len(common)})", _key_table("Environment", common.items())))
    return "".join(parts)


def notes(the_study: Study) -> str:
    """Return what the runs noted of themselves, each note once, with how many runs have it."""
    found: dict[str, int] = {}
    for run in the_study.runs:
        own = run.environment.get("notes")
        for note in dict.fromkeys(map(str, own)) if isinstance(own, list) else ():
            found[note] = found.get(note, 0) + 1
    items = [f"{text(note)} {_small(_of_runs(count, len(the_study.runs)))}" for note, count in found.items()]
    more = [f"and {len(items) - _MOST_NOTES} more"] if len(items) > _MOST_NOTES else []
    return bullets([*items[:_MOST_NOTES], *more])


def _of_runs(count: int, all_runs: int) -> str:
    return "" if count == all_runs else f"({count} of {all_runs} runs)"


def runs_table(the_study: Study) -> str:
    """Return every run with its folder, seed, state and outcome."""
    rows, units = [], the_study.comparison.units
    for configuration in the_study.configurations:
        for run in configuration.runs:
            known = run.column(run.metric)
            known = known[~np.isnan(known)]
            final = format_metric(float(known[-1]), run.metric) if len(known) else MISSING
            seed = run.setting("seed")
            told = [str(configuration.number), run.path, "?" if seed is None else seed, run.status.state]
            # Where the heading has both, the rarer word stands with its number.
            of = f" {run.unit}s" if run.unit == OBSERVATION and units != f"{run.unit}s" else ""
            told += [f"{run.epochs} of {run.epochs_planned}{of}", final, run.environment.get("device") or MISSING]
            rows.append([text(one) for one in told])
    caption = "Every run" if len(rows) <= _MOST_RUNS else f"The first {_MOST_RUNS} of {len(rows)} runs"
    names = ["configuration", "folder", "seed", "state", units, "final", "device"]
    return table(caption, names, rows[:_MOST_RUNS])


def _run_name(run: Run) -> str:
    return printable(run.path.name or str(run.path), 80)


def _differences(
    caption: str, whose: str, numbered: Sequence[tuple[str, Mapping[str, str]]], form: Callable[[str], str]
) -> str:
    keys = differing_keys([flat for _, flat in numbered])
    rows = []
    for key in keys[:_MOST_KEYS]:
        values: dict[str, list[str]] = {}
        for name, flat in numbered:
            values.setdefault(flat.get(key, UNSET), []).append(name)
        for place, (value, names) in enumerate(values.items()):
            shown = value if value == UNSET else form(value)
            rows.append([text(key) if place == 0 else "", text(shown), text(", ".join(names), 200)])
    if not rows:
        return element("p", f"{caption}: none.")
    more = f"; {len(keys) - _MOST_KEYS} more are left out" if len(keys) > _MOST_KEYS else ""
    return table(caption + more, ["key", "value", whose], rows)


def _described(flat: Mapping[str, str], form: Callable[[str], str]) -> Iterable[tuple[str, str]]:
    return ((key, form(value)) for key, value in flat.items())


def _key_table(caption: str, items: Iterable[tuple[str, str]]) -> str:
    rows = [[text(key), text(value)] for key, value in items]
    more = f"; {len(rows) - _MOST_KEYS} keys more are left out" if len(rows) > _MOST_KEYS else ""
    return table(caption + more, ["key", "value"], rows[:_MOST_KEYS])


def _flat(environment: Mapping[str, Any]) -> dict[str, str]:
    """Return dotted keys; lists stay whole."""
    flat: dict[str, str] = {}

    def visit(value: Any, key: str) -> None:
        if isinstance(value, dict):
            for name, item in value.items():
                visit(item, f"{key}.{name}" if key else str(name))
        elif value is not None and key not in _SAID_ELSEWHERE:
            flat[key] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    visit(environment, "")
    return flat
