"""The tables of a report: the comparison, what the recipes and environments differ in, and the runs themselves."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from neq_cli.events import OBSERVATION
from neq_cli.runs.compare.configurations import UNSET, differing_keys, settings_together, written
from neq_cli.runs.compare.curves import Configuration, Study
from neq_cli.runs.views.report.html import bullets, command, details, element, folder, swatch, table, text, whole
from neq_cli.runs.views.report.names import command_line, key_in_words, metric_in_words, run_names
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
from neq_cli.text import MISSING, counted, format_metric

_MOST_KEYS = 200
_MOST_RUNS = 500
_MOST_NOTES = 50
_LONGEST_COMMAND = 1000
_MOST_NAMES = 12  # of runs beside a note or a value
_SAID_ELSEWHERE = ("notes", "unit", "rows_planned")  # of environment.json


def comparison_table(the_study: Study) -> str:
    """Return what `neq compare` prints, with the numbers and colours of the figures."""
    names = ["number", *map(text, header(the_study.comparison, metric_in_words))]
    rows = [_comparison_row(the_study, configuration) for configuration in the_study.configurations]
    below = element("p", element("small", text(f"{legend(the_study.comparison, metric_in_words)}.", 400)))
    return table("Every configuration, the baseline first", names, rows, "comparison") + below + _goal_table(the_study)


def _goal_table(the_study: Study) -> str:
    """Return what it takes to the baseline's final metric, where there is a baseline."""
    comparison = the_study.comparison
    if not has_goals(comparison):
        return ""
    names = ["number", *map(text, goal_header(comparison, metric_in_words))]
    rows = [
        [
            f"{swatch(line(the_study, configuration), dot=True)} {configuration.number}",
            *map(_cell, goal_cells(configuration.row)),
        ]
        for configuration in the_study.configurations
        if configuration.row.goal is not None
    ]
    below = element("p", element("small", text(f"{GOAL_LEGEND}.", 400)))
    return table(text(goal_heading(comparison, metric_in_words)), names, rows, "comparison") + below


def _comparison_row(the_study: Study, configuration: Configuration) -> list[str]:
    row = configuration.row
    name = text(configuration.name)
    stopped = "".join(map(_small, unfinished(row)))
    matched = "" if row.matched_p is None else _small(f"p matched: {row.matched_p.mean:.3g}")
    return [
        f"{swatch(line(the_study, configuration), dot=True)} {configuration.number}",
        (element("strong", name) if row.is_baseline else name) + matched + stopped,
        *map(_cell, cells(row, the_study.largest_flops)[1:]),
    ]


def _small(words: str) -> str:
    return " " + element("small", text(words))


def _cell(cell: Cell) -> str:
    return text(cell.with_spread) + (_small(", ".join(cell.details)) if cell.details else "")


def recipe_tables(the_study: Study) -> str:
    """Return the keys in which the recipes differ, then all keys of each."""
    flats = settings_together([configuration.runs[0] for configuration in the_study.configurations])
    numbers = [str(configuration.number) for configuration in the_study.configurations]
    heads = ("key", "value", "configurations")
    parts = [_differences("Keys in which the recipes differ", heads, numbers, flats, whole, _written)]
    common = {key: value for key, value in flats[0].items() if all(flat.get(key) == value for flat in flats)}
    alike = _key_table("Recipe", ("key", "value"), common, whole, _written)
    return "".join([*parts, details(f"Keys that all share ({len(common)})", alike)])


def _written(key: str, value: str) -> str:
    return text(value if value == UNSET else written(value))


def environment_tables(the_study: Study) -> str:
    """Return what differs between the runs' environments, then what they share."""
    flats = [_flat(run.environment) for run in the_study.runs]
    heads, names = ("what", "is", "in runs"), run_names(the_study.runs)
    parts = [_differences("What differs between the runs' environments", heads, names, flats, _key, _value)]
    common = {key: value for key, value in flats[0].items() if all(flat.get(key) == value for flat in flats)}
    alike = _key_table("The same in all runs", ("what", "is"), common, _key, _value)
    return "".join([*parts, details(f"What all runs share ({len(common)})", alike)])


def _key(key: str) -> str:
    return whole(key_in_words(key))


def _value(key: str, value: str) -> str:
    """Write a value; the command line as it is typed."""
    typed = command_line(value) if key == "argv" else None
    return text(value) if typed is None else command(typed, _LONGEST_COMMAND)


def notes(the_study: Study) -> str:
    """Return what the runs noted of themselves, each note once, with the names of the runs that have it."""
    found: dict[str, list[str]] = {}
    for run, name in zip(the_study.runs, run_names(the_study.runs), strict=True):
        own = run.environment.get("notes")
        for note in dict.fromkeys(map(str, own)) if isinstance(own, list) else ():
            found.setdefault(note, []).append(name)
    count = len(the_study.runs)
    items = [f"{text(note)} {element('small', _of_runs(names, count))}" for note, names in found.items()]
    more = [f"and {len(items) - _MOST_NOTES} more"] if len(items) > _MOST_NOTES else []
    return bullets([*items[:_MOST_NOTES], *more])


def _of_runs(names: Sequence[str], all_runs: int) -> str:
    """Return which runs a note is of; nothing where there is but one run."""
    if len(names) == all_runs:
        return f"(all {all_runs} runs)" if all_runs > 1 else ""
    return f"({_listed(names, 'run')})"


def _listed(names: Sequence[str], what: str) -> str:
    """Return the names, those of the first where there are many; no line begins with a comma."""
    *first, last = names[:_MOST_NAMES]
    more = f" and {counted(len(names) - _MOST_NAMES, f'more {what}')}" if len(names) > _MOST_NAMES else ""
    return " ".join([*(whole(f"{name},") for name in first), whole(last)]) + more


def runs_table(the_study: Study) -> str:
    """Return every run with its folder, seed, state and outcome."""
    rows, units = [], the_study.comparison.units
    metrics = {metric_in_words(run.metric) for run in the_study.runs}
    final = f"final {metrics.pop()}" if len(metrics) == 1 else "final metric"
    for configuration in the_study.configurations:
        for run in configuration.runs:
            known = run.column(run.metric)
            known = known[~np.isnan(known)]
            last = format_metric(float(known[-1]), run.metric) if len(known) else MISSING
            seed = run.setting("seed")
            # Where the heading has both, the rarer word stands with its number.
            of = f" {run.unit}s" if run.unit == OBSERVATION and units != f"{run.unit}s" else ""
            told = ["?" if seed is None else seed, run.status.state]
            told += [f"{run.epochs} of {run.epochs_planned}{of}", last, run.environment.get("device") or MISSING]
            rows.append([text(configuration.number), folder(run.path), *map(text, told)])
    caption = "Every run" if len(rows) <= _MOST_RUNS else f"The first {_MOST_RUNS} of {len(rows)} runs"
    names = ["configuration", "folder", "seed", "state", units, text(final), "device"]
    return table(caption, names, rows[:_MOST_RUNS])


KeyWritten = Callable[[str], str]
"""Writes a key as HTML."""
ValueWritten = Callable[[str, str], str]
"""Writes the value of a key as HTML."""


def _differences(
    caption: str,
    heads: Sequence[str],
    names: Sequence[str],
    flats: Sequence[Mapping[str, str]],
    key_written: KeyWritten,
    value_written: ValueWritten,
) -> str:
    """Return a table with a row for each value of a key in which ``flats`` differ, which are those of ``names``."""
    keys, what = differing_keys(flats), heads[-1].split()[-1].removesuffix("s")
    rows = []
    for key in keys[:_MOST_KEYS]:
        values: dict[str, list[str]] = {}
        for name, flat in zip(names, flats, strict=True):
            values.setdefault(flat.get(key, UNSET), []).append(name)
        for place, (value, whose) in enumerate(values.items()):
            shown = UNSET if value == UNSET else value_written(key, value)
            rows.append([key_written(key) if place == 0 else "", shown, _listed(whose, what)])
    if not rows:
        return element("p", f"{caption}: none.")
    more = f"; {len(keys) - _MOST_KEYS} more are left out" if len(keys) > _MOST_KEYS else ""
    return table(caption + more, heads, rows, "values")


def _key_table(
    caption: str, heads: Sequence[str], values: Mapping[str, str], key_written: KeyWritten, value_written: ValueWritten
) -> str:
    rows = [[key_written(key), value_written(key, value)] for key, value in values.items()]
    more = f"; {len(rows) - _MOST_KEYS} keys more are left out" if len(rows) > _MOST_KEYS else ""
    return table(caption + more, heads, rows[:_MOST_KEYS], "values")


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
