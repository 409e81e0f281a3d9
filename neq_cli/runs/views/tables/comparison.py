"""A comparison as a terminal table, CSV, Markdown and LaTeX; every text is escaped for where it goes."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from neq_cli.events import OBSERVATION
from neq_cli.runs.compare.comparison import Comparison, Row
from neq_cli.runs.compare.goal import Goal
from neq_cli.runs.compare.statistics import Difference, Summary
from neq_cli.runs.store.run import KNOWN_METRICS
from neq_cli.text import (
    MISSING,
    format_flops,
    format_flops_like,
    format_joules,
    format_metric,
    format_p_value,
    format_percent,
    printable,
)

GOAL_LEGEND = (
    "seconds until a run first measured it, of the runs that reached it; FLOPs of forward passes and executed "
    "back-propagation up to there, and of the whole training, % of the baseline's whole training"
)
_NARROWEST_NAME = 12
_WIDEST_SCORE = 12  # "92.85 ± 0.23": two such columns, and the widest of the others, fit into 80
_CSV_COLUMNS = (
    *("approach", "is_baseline", "n", "seeds", "unfinished", "metric"),
    *("flops_paper_mean", "flops_paper_std", "flops_paper_percent"),
    *("flops_executed_mean", "flops_executed_std", "flops_executed_percent"),
    *("final_mean", "final_std", "final_difference", "final_p_value", "final_test", "final_why_no_p"),
    *("best_mean", "best_std", "best_difference", "best_p_value", "best_test", "best_why_no_p"),
    *("seconds_mean", "seconds_std", "matched_p_mean", "matched_p_std"),
    *("flops_training_mean", "flops_training_std", "flops_training_percent"),
    *("goal_target", "goal_reached", "goal_seconds_mean", "goal_seconds_std", "goal_flops_percent"),
    *("equal_seconds", "at_equal_time_mean", "at_equal_time_std", "lower_is_better"),
    *("joules_mean", "joules_std", "joules_percent"),
    *("final_low", "final_high", "best_low", "best_high", "seconds_difference", "seconds_low", "seconds_high"),
)


@dataclass(frozen=True)
class Cell:
    """What a cell says: its value, the spread over runs, and how it relates to the baseline."""

    value: str
    spread: str = ""
    details: tuple[str, ...] = ()

    @property
    def with_spread(self) -> str:
        return f"{self.value} ± {self.spread}" if self.spread else self.value

    @property
    def stacked(self) -> str:
        return "\n".join([self.value, *([f"± {self.spread}"] if self.spread else []), *self.details])

    @property
    def on_one_line(self) -> str:
        return f"{self.with_spread} ({', '.join(self.details)})" if self.details else self.with_spread


def column_name(metric: str) -> str:
    """What a metric is called where its column is to be found again."""
    return printable(metric, 40)


def legend(comparison: Comparison, called: Callable[[str], str] = column_name) -> str:
    """Return what the numbers of the table are; ``called`` says what a metric is called."""
    percentages = all(row.metric in KNOWN_METRICS for row in comparison.rows)
    lower = dict.fromkeys(called(row.metric) for row in comparison.rows if row.lower_is_better)
    unit = "points" if percentages else "the metric's unit"
    return (
        "mean ± sample standard deviation over n runs; FLOPs per iteration and sample, "
        f"mean of all {comparison.units}, % of the baseline; "
        f"differences to the baseline in {unit}, p exact and two-sided"
        + "".join(f"; lower {metric} is better" for metric in lower)
        + ("; energy of all epochs" if has_energy(comparison) else "")
        + (f", {comparison.energy}" if comparison.energy else "")
    )


def has_energy(comparison: Comparison) -> bool:
    """Whether all runs measured what they took."""
    return any(row.joules is not None for row in comparison.rows)


def render(comparison: Comparison) -> RenderableType:
    """Return the terminal table with its legend and notes; it fits 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0), leading=1)
    name, *numbers = header(comparison)
    if has_energy(comparison):  # below seconds, for there is no room beside them
        numbers[-2:] = [" ".join(numbers[-2:])]
    table.add_column(name, overflow="fold", min_width=_NARROWEST_NAME)
    for number in numbers:
        table.add_column(Text("\n".join(_folded_name(number))), justify="right", no_wrap=True)
    rows = [cells(row) for row in comparison.rows]
    # FLOPs and seconds never leave room for both on one line, a percentage's digits do.
    abreast = all(len(cell.with_spread) <= _WIDEST_SCORE for row in rows for cell in row[4:6])
    for row, told in zip(comparison.rows, rows, strict=True):
        stacked = [one.stacked for one in told]
        if abreast:
            stacked[4:6] = ["\n".join([one.with_spread, *one.details]) for one in told[4:6]]
        if row.joules is not None:
            stacked[-2:] = ["\n".join(stacked[-2:])]
        table.add_row(*map(Text, stacked), style="bold" if row.is_baseline else "")
    notes = [Text(f"note: {printable(note)}", style="yellow") for note in comparison.notes]
    return Group(table, Text(legend(comparison), style="dim"), *_goals(comparison), *notes)


def _goals(comparison: Comparison) -> list[RenderableType]:
    """Return the terminal table of what it takes to the baseline's final metric, where there is a baseline."""
    if not has_goals(comparison):
        return []
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    name, *numbers = goal_header(comparison)
    table.add_column(name, overflow="fold", min_width=_NARROWEST_NAME)
    for number in numbers:
        table.add_column(Text("\n".join(_folded_name(number))), justify="right", no_wrap=True)
    for row in comparison.rows:
        if row.goal is not None:
            texts = [Text(cell.with_spread) for cell in goal_cells(row)]
            table.add_row(*texts, style="bold" if row.is_baseline else "")
    heading = Text(f"\n{goal_heading(comparison)}", style="bold")
    return [heading, table, Text(GOAL_LEGEND, style="dim")]


def _folded_name(name: str) -> list[str]:
    """Return a column's name in lines that are no wider than its numbers, broken where its words end if they do."""
    lines: list[str] = []
    for word in name.split(" "):
        line = ""
        for part in re.findall(rf"[^_]{{1,{_WIDEST_SCORE - 1}}}_?|_", word):
            if len(line) + len(part) > _WIDEST_SCORE:
                lines.append(line)
                line = ""
            line += part
        lines.append(line)
    return lines


def to_csv(comparison: Comparison) -> str:
    """Return one line per configuration under a header; numbers in full, what is not known empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV_COLUMNS)
    writer.writerows(_csv_row(row) for row in comparison.rows)
    return text.getvalue()


def to_markdown(comparison: Comparison) -> str:
    """Return a GitHub table, with legend and notes below."""
    table = _markdown_table(header(comparison), [cells(row) for row in comparison.rows])
    goals = ""
    if has_goals(comparison):
        rows = [goal_cells(row) for row in comparison.rows if row.goal is not None]
        heading = f"\n{_markdown(goal_heading(comparison))}:\n\n"
        goals = f"{heading}{_markdown_table(goal_header(comparison), rows)}\n\n{GOAL_LEGEND}.\n"
    told = "".join(f"\n- {_markdown(note)}" for note in comparison.notes)
    return f"{table}\n\n{_markdown(legend(comparison))}.\n{goals}{told}\n"


def _markdown_table(names: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    lines = [[_markdown(name) for name in names], ["---", *["---:"] * (len(names) - 1)]]
    lines += [[_markdown(cell.on_one_line) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def to_latex(comparison: Comparison) -> str:
    """Return a ``tabular`` that needs no package, with legend and notes as comments."""
    notes = [f"% {printable(line)}" for line in (legend(comparison), *comparison.notes)]
    lines = [*notes, *_tabular(header(comparison), [cells(row) for row in comparison.rows])]
    if has_goals(comparison):
        lines += ["", *(f"% {printable(line)}" for line in (goal_heading(comparison), GOAL_LEGEND))]
        lines += _tabular(goal_header(comparison), [goal_cells(row) for row in comparison.rows if row.goal is not None])
    return "\n".join(lines) + "\n"


def _tabular(names: Sequence[str], told: Sequence[Sequence[Cell]]) -> list[str]:
    rows = [[_latex(cell.on_one_line) for cell in row] for row in told]
    return [
        rf"\begin{{tabular}}{{l{'r' * (len(names) - 1)}}}",
        r"\hline",
        " & ".join(map(_latex, names)) + r" \\",
        r"\hline",
        # After the line before, LaTeX takes a star or a bracket for an argument of its \\.
        *(("{}" if row[0].startswith(("[", "*")) else "") + " & ".join(row) + r" \\" for row in rows),
        r"\hline",
        r"\end{tabular}",
    ]


def header(comparison: Comparison, called: Callable[[str], str] = column_name) -> list[str]:
    """Return the names of the columns that ``cells`` has."""
    metrics = {row.metric for row in comparison.rows}
    metric = called(metrics.pop()) if len(metrics) == 1 else "metric"
    energy = ["energy"] if has_energy(comparison) else []
    return ["approach", "n", "paper FLOPs", "executed FLOPs", f"final {metric}", f"best {metric}", "seconds", *energy]


def cells(row: Row, like: float | None = None) -> list[Cell]:
    """Return what a configuration's row says, in words; FLOPs in the unit of ``like``, where that is given."""
    return [
        Cell(printable(row.approach), details=unfinished(row)),
        Cell(str(len(row.runs))),
        _flops(row.flops_paper, row.flops_paper_percent, like),
        _flops(row.flops_executed, row.flops_executed_percent, like),
        _metric(row.final, row.final_difference, row.metric),
        _metric(row.best, row.best_difference, row.metric),
        Cell(_seconds(row.seconds.mean), _spread(row.seconds, _seconds)),
        *([] if row.joules is None else [_joules(row.joules, row.joules_percent)]),
    ]


def unfinished(row: Row) -> tuple[str, ...]:
    """Return how far each run of a configuration came that stopped early."""
    of = " observations" if row.unit == OBSERVATION else ""
    return tuple(f"unfinished {progress}{of}" for progress in row.unfinished)


def goal_heading(comparison: Comparison, called: Callable[[str], str] = column_name) -> str:
    """Return what the second table is about: "To the baseline's final test_top1, 74.03"."""
    row = next(row for row in comparison.rows if row.goal is not None)
    return f"To the baseline's final {called(row.metric)}, {format_metric(_goal(row).target, row.metric)}"


def has_goals(comparison: Comparison) -> bool:
    """Whether there is a baseline whose final metric others may reach."""
    return len(comparison.rows) > 1 and any(row.goal is not None for row in comparison.rows)


def goal_header(comparison: Comparison, called: Callable[[str], str] = column_name) -> list[str]:
    """Return the names of the columns that ``goal_cells`` has."""
    row = next(row for row in comparison.rows if row.goal is not None)
    after = f"{called(row.metric)} after {_seconds(_goal(row).equal_seconds)} s"
    return ["approach", "reached", "seconds", "FLOPs to it", after, "FLOPs of all"]


def goal_cells(row: Row) -> list[Cell]:
    """Return what a configuration takes to the baseline's final metric, in words."""
    found = _goal(row)

    def written(value: float) -> str:
        return format_metric(value, row.metric)

    return [
        Cell(printable(row.approach)),
        Cell(f"{found.reached} of {len(row.runs)}"),
        Cell(_seconds(found.seconds.mean), _spread(found.seconds, _seconds)),
        Cell(format_percent(found.flops_percent)),
        Cell(written(found.at_equal_time.mean), _spread(found.at_equal_time, written)),
        Cell(format_percent(math.nan if row.flops_training_percent is None else row.flops_training_percent)),
    ]


def _goal(row: Row) -> Goal:
    assert row.goal is not None
    return row.goal


def _flops(summary: Summary, percent: float | None, like: float | None) -> Cell:
    details = () if percent is None else (format_percent(percent),)
    # Runs that freeze nothing do not scatter; a row of zeros would only be in the way.
    spread = _spread(summary, lambda std: format_flops(std, like or summary.mean)) if summary.std else ""
    return Cell(format_flops_like(summary.mean, like), spread, details)


def _joules(summary: Summary, percent: float | None) -> Cell:
    details = () if percent is None else (format_percent(percent),)
    spread = _spread(summary, lambda std: format_joules(std, summary.mean).partition(" ")[0])
    return Cell(format_joules(summary.mean), spread, details)


def _metric(summary: Summary, found: Difference | None, metric: str) -> Cell:
    def written(value: float) -> str:
        return format_metric(value, metric)

    if found is None:
        return Cell(written(summary.mean), _spread(summary, written))
    sign = "+" if found.mean >= 0 else "−"
    p_value = found.why_no_p if found.p_value is None else f"p={format_p_value(found.p_value)}"
    return Cell(written(summary.mean), _spread(summary, written), (sign + written(abs(found.mean)), p_value))


def _seconds(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else MISSING


def _spread(summary: Summary, written: Callable[[float], str]) -> str:
    return "" if math.isnan(summary.std) else written(summary.std)


def _csv_row(row: Row) -> list[str]:
    def compared(summary: Summary, found: Difference | None) -> list[str]:
        if found is None:
            return [*_numbers(summary.mean, summary.std), "", "", "", ""]
        return [*_numbers(summary.mean, summary.std, found.mean, found.p_value), found.test, found.why_no_p]

    seeds = " ".join("?" if seed is None else str(seed) for seed in row.seeds)
    matched = row.matched_p or Summary(math.nan, math.nan, 0)
    joules = row.joules or Summary(math.nan, math.nan, 0)
    return [
        *(_csv_text(row.approach), str(row.is_baseline).lower(), str(len(row.runs)), seeds),
        *(" ".join(row.unfinished), _csv_text(row.metric)),
        *_numbers(row.flops_paper.mean, row.flops_paper.std, row.flops_paper_percent),
        *_numbers(row.flops_executed.mean, row.flops_executed.std, row.flops_executed_percent),
        *compared(row.final, row.final_difference),
        *compared(row.best, row.best_difference),
        *_numbers(row.seconds.mean, row.seconds.std, matched.mean, matched.std),
        *_numbers(row.flops_training.mean, row.flops_training.std, row.flops_training_percent),
        *_goal_numbers(row.goal),
        str(row.lower_is_better).lower(),
        *_numbers(joules.mean, joules.std, row.joules_percent),
        *_numbers(*_ends(row.final_difference), *_ends(row.best_difference)),
        *_numbers(None if row.seconds_difference is None else row.seconds_difference.mean),
        *_numbers(*_ends(row.seconds_difference)),
    ]


def _ends(found: Difference | None) -> tuple[float | None, float | None]:
    return (None, None) if found is None or found.interval is None else found.interval


def _goal_numbers(found: Goal | None) -> list[str]:
    if found is None:
        return [""] * 8
    return [
        *_numbers(found.target),
        str(found.reached),
        *_numbers(found.seconds.mean, found.seconds.std, found.flops_percent, found.equal_seconds),
        *_numbers(found.at_equal_time.mean, found.at_equal_time.std),
    ]


def _numbers(*values: float | None) -> list[str]:
    return ["" if value is None or not math.isfinite(value) else repr(float(value)) for value in values]


def _csv_text(text: str) -> str:
    """Keep a spreadsheet from taking a name for a formula."""
    clean = printable(text)
    return f"'{clean}" if clean.startswith(("=", "+", "-", "@")) else clean


def _markdown(text: str) -> str:
    clean = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{character}" if character in "\\`*_[]|~#$" else character for character in clean)


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "−": "$-$",
    "+": "$+$",
    MISSING: "--",
    "…": r"\ldots{}",
    "\N{REPLACEMENT CHARACTER}": "?",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in printable(text))
