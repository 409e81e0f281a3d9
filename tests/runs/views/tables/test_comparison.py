from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from neq_cli.runs.compare.comparison import Comparison, Row, compare_runs
from neq_cli.runs.compare.goal import Goal
from neq_cli.runs.compare.statistics import Difference, Summary
from neq_cli.runs.store.run import Run
from neq_cli.runs.views.tables.comparison import render, to_csv, to_latex, to_markdown

HOSTILE = "=a|b_c&d%e$f#g{h}i~j^k\\l<m>n*o[p]`q\x1b"
ROW = Row(
    approach="Baseline",
    runs=("runs/b1", "runs/b2", "runs/b3"),
    seeds=(1, 2, 3),
    is_baseline=True,
    unfinished=(),
    flops_paper=Summary(138.94e6, 0.0, 3),
    flops_paper_percent=100.0,
    flops_executed=Summary(141.0e6, 0.0, 3),
    flops_executed_percent=100.0,
    metric="test_top1",
    final=Summary(92.851, 0.234, 3),
    final_difference=None,
    best=Summary(93.0, 0.1, 3),
    best_difference=None,
    seconds=Summary(1234.56, 12.3, 3),
    flops_training=Summary(211.0e6, 0.0, 3),
    flops_training_percent=100.0,
    goal=Goal(92.851, 3, Summary(1200.0, 10.0, 3), Summary(5e9, 0.0, 3), 98.7, 1111.0, Summary(91.5, 0.31, 3)),
    matched_p=None,
)
NEQ = replace(
    ROW,
    approach="NEq eps=0.001 mu=0.5",
    is_baseline=False,
    flops_paper=Summary(84.81e6, 0.554e6, 3),
    flops_paper_percent=61.04,
    final=Summary(92.961, 0.21, 3),
    final_difference=Difference(0.11, 0.25, "paired", 3, "", (-0.4, 0.62)),
    best=Summary(92.9, 0.1, 3),
    best_difference=Difference(-0.1, 0.5, "paired", 3, ""),
    flops_training_percent=81.2,
    goal=Goal(92.851, 2, Summary(900.0, 20.0, 2), Summary(4e9, 0.0, 2), 75.4, 1111.0, Summary(92.6, 0.2, 3)),
)
SINGLE = replace(
    NEQ,
    approach="Stochastic* p=0.378",
    seeds=(1,),
    runs=("runs/s1",),
    unfinished=("12/250",),
    flops_paper=Summary(99e6, math.nan, 1),
    final=Summary(90.0, math.nan, 1),
    final_difference=Difference(-2.9, None, "unpaired", 0, "n too small"),
    seconds=Summary(math.nan, math.nan, 0),
)
TABLE = Comparison("Baseline", (ROW, NEQ, SINGLE), ("3 pairs cannot give a p below 0.25",))


def printed(comparison: Comparison, width: int = 80) -> str:
    console = Console(file=StringIO(), width=width)
    console.print(render(comparison))
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize("width", [80, 120])
def test_terminal_table_says_everything_uncut(width: int) -> None:
    text = printed(TABLE, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for fact in (
        *("138.94M", "141.00M", "92.85 ± 0.23", "93.00 ± 0.10", "1234.6", "± 12.3"),
        *("84.81M", "± 0.55M", "61.0%", "92.96 ± 0.21", "+0.11", "p=0.250", "−0.10", "p=0.500"),
        *("99.00M", "−2.90", "n too small", "unfinished 12/250", "note: 3 pairs"),
        *("To the baseline's final test_top1, 92.85", "3 of 3", "2 of 3", "900.0 ± 20.0", "75.4%", "92.60 ± 0.20"),
        *("81.2%", "seconds until a run first"),
    ):
        assert fact in text, fact
    assert [line.split()[0] for line in text.splitlines() if re.match(r"^ (Base|NEq|Stoch)", line)] == [
        *("Baseline", "NEq", "Stochastic*"),
        *("Baseline", "NEq", "Stochastic*"),  # to the baseline's final metric
    ]


WIDE = replace(
    NEQ,
    approach="NEq eps=0.001 mu=0.5 reference, optimizer.weight_decay=0.00005",
    flops_paper=Summary(305.06e9, 123.45e9, 10),
    flops_executed=Summary(999.99e9, 100e9, 10),
    runs=("run",) * 10,
    final=Summary(100.0, 10.25, 10),
    best=Summary(100.0, 12.33, 10),
    final_difference=Difference(-12.34, 0.0000123, "paired", 10, ""),
    best_difference=Difference(-12.34, 0.0000123, "paired", 10, ""),
    seconds=Summary(1234567.8, 123456.7, 10),
)
OWN = replace(
    WIDE,
    metric="validation_mean_average_precision",
    final=Summary(-1.234e-7, 1.2e-9, 3),
    best=Summary(-5.678e-7, 3.4e-9, 3),
)


@pytest.mark.parametrize("row", [WIDE, OWN], ids=["wide numbers", "a metric of the user's own"])
@pytest.mark.parametrize("width", [80, 100, 160])
def test_no_column_is_cut_however_wide_its_numbers_and_names(row: Row, width: int) -> None:
    text = printed(Comparison("Baseline", (replace(ROW, metric=row.metric), row), ()), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    final, best = ("-1.234e-07", "-5.678e-07") if row is OWN else ("100.00", "100.00")
    numbers = (
        *("305.06G", "± 123.45G", "999.99G", "± 100.00G", final, best, "−12.34", "p=1.2e-05", "1234567.8"),
        *("± 123456.7", "approach", " n ", "seconds", "executed", " 10 "),
        *(row.metric.split("_") if row is OWN else [row.metric]),
    )
    for number in numbers:
        assert number in text, number
    assert re.sub(r"\s", "", row.approach[:9]) in re.sub(r"\s", "", text)


@pytest.mark.parametrize("row", [NEQ, WIDE, OWN], ids=["usual", "wide numbers", "a metric of the user's own"])
def test_energy_is_a_column_that_fits_too(row: Row) -> None:
    joules = Summary(123_456_789.0, 987_654.3, 3)
    rows = tuple(replace(one, metric=row.metric, joules=joules, joules_percent=61.04) for one in (ROW, row))
    comparison = Comparison("Baseline", rows, (), "gpu: NVML total energy, NVIDIA H200")
    text = printed(comparison)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for fact in ("energy", "123.46 MJ", "± 0.99", "61.0%", "energy of all epochs, gpu: NVML total energy,"):
        assert fact in re.sub(r"\s+", " ", text), fact
    assert "123.46 MJ ± 0.99 (61.0%) |" in to_markdown(comparison)
    written = list(csv.DictReader(io.StringIO(to_csv(comparison))))[1]
    assert [written[f"joules_{name}"] for name in ("mean", "std", "percent")] == ["123456789.0", "987654.3", "61.04"]


def test_without_energy_there_is_no_column_of_it() -> None:
    assert "energy" not in printed(TABLE)
    assert "energy" not in to_markdown(TABLE)
    assert next(csv.DictReader(io.StringIO(to_csv(TABLE))))["joules_mean"] == ""


def test_terminal_table_takes_no_markup_from_files() -> None:
    text = printed(replace(TABLE, rows=(replace(ROW, approach="[red]x[/nope]\x1b[31m"),)), 120)
    assert "[red]x[/nope]" in text
    assert "\x1b" not in text


def test_csv_has_numbers_in_full_and_nothing_for_the_unknown() -> None:
    baseline, neq, single = csv.DictReader(io.StringIO(to_csv(TABLE)))
    assert float(neq["flops_paper_mean"]) == 84.81e6
    assert (neq["approach"], neq["n"], neq["seeds"], neq["metric"]) == (
        "NEq eps=0.001 mu=0.5",
        "3",
        "1 2 3",
        "test_top1",
    )
    assert (neq["final_difference"], neq["final_p_value"], neq["final_test"]) == ("0.11", "0.25", "paired")
    assert (baseline["is_baseline"], baseline["final_difference"], baseline["best_test"]) == ("true", "", "")
    assert (single["final_std"], single["final_why_no_p"], single["seconds_mean"]) == ("", "n too small", "")
    assert single["unfinished"] == "12/250"
    assert (neq["final_low"], neq["final_high"], neq["best_low"], single["final_low"]) == ("-0.4", "0.62", "", "")


def test_csv_text_is_quoted_and_no_formula() -> None:
    (row,) = csv.DictReader(io.StringIO(to_csv(replace(TABLE, rows=(replace(ROW, approach='=cmd,"x"\n1'),)))))
    assert row["approach"] == '\'=cmd,"x"�1'


def test_markdown_by_hand() -> None:
    lines = to_markdown(TABLE).splitlines()
    assert (
        lines[0] == "| approach | n | paper FLOPs | executed FLOPs | final test\\_top1 | best test\\_top1 | seconds |"
    )
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    assert lines[3] == (
        "| NEq eps=0.001 mu=0.5 | 3 | 84.81M ± 0.55M (61.0%) | 141.00M (100.0%) | 92.96 ± 0.21 (+0.11, p=0.250) "
        "| 92.90 ± 0.10 (−0.10, p=0.500) | 1234.6 ± 12.3 |"
    )
    assert lines[4].startswith("| Stochastic\\* p=0.378 (unfinished 12/250) | 1 | 99.00M (61.0%) |")
    assert lines[-1] == "- 3 pairs cannot give a p below 0.25"


def test_markdown_is_escaped() -> None:
    line = to_markdown(replace(TABLE, rows=(replace(ROW, approach=HOSTILE),), notes=(HOSTILE,))).splitlines()[2]
    assert len(re.findall(r"(?<!\\)\|", line)) == 8  # seven cells
    assert r"=a\|b\_c&amp;d%e\$f\#g{h}i\~j^k\\l&lt;m&gt;n\*o\[p\]\`q�" in line


def test_latex_by_hand() -> None:
    lines = to_latex(TABLE).splitlines()
    assert lines[2:6] == [
        r"\begin{tabular}{lrrrrrr}",
        r"\hline",
        r"approach & n & paper FLOPs & executed FLOPs & final test\_top1 & best test\_top1 & seconds \\",
        r"\hline",
    ]
    assert lines[7] == (
        r"NEq eps=0.001 mu=0.5 & 3 & 84.81M $\pm$ 0.55M (61.0\%) & 141.00M (100.0\%) & "
        r"92.96 $\pm$ 0.21 ($+$0.11, p=0.250) & 92.90 $\pm$ 0.10 ($-$0.10, p=0.500) & 1234.6 $\pm$ 12.3 \\"
    )
    assert lines[-2:] == [r"\hline", r"\end{tabular}"]


def test_latex_is_escaped() -> None:
    text = to_latex(replace(TABLE, rows=(replace(ROW, approach=HOSTILE),), notes=(f"{HOSTILE}\n\\evil",)))
    assert (
        r"=a\textbar{}b\_c\&d\%e\$f\#g\{h\}i\textasciitilde{}j\textasciicircum{}k\textbackslash{}l\textless{}m" in text
    )
    assert all(line.startswith("%") for line in text.splitlines() if "evil" in line)
    assert text.isascii() or text.splitlines()[0].startswith("%")


@pytest.mark.parametrize("start", ["[", "*"])
def test_a_row_of_latex_is_no_argument_of_the_line_break_before(start: str) -> None:
    text = to_latex(replace(TABLE, rows=(ROW, replace(ROW, approach=f"{start}9cm]evil"))))
    assert f"\n{{}}{start}9cm]evil & " in text


def test_real_runs_make_every_table(make_run: Callable[..., Run], recipe: Any) -> None:
    runs = [make_run(kind, recipe(policy={"kind": kind})) for kind in ("neq", "baseline")]
    comparison = compare_runs(runs)
    assert len(to_csv(comparison).splitlines()) == 3
    for text in (printed(comparison), to_markdown(comparison), to_latex(comparison)):
        assert "NEq eps=0.001" in text
        assert "1.00K" in text


def test_means_and_unfinished_runs_are_of_what_the_rows_are() -> None:
    observed = replace(NEQ, unit="observation", unfinished=("12/40",))
    epochs = replace(ROW, unfinished=("12/250",))
    for rows, mean in (
        ((epochs,), "mean of all epochs, %"),
        ((observed,), "mean of all observations, %"),
        ((epochs, observed), "mean of all epochs or observations, %"),
    ):
        assert mean in to_markdown(Comparison(None, rows, ()))
    told = to_markdown(Comparison("Baseline", (epochs, observed), ()))
    assert "unfinished 12/250)" in told
    assert "unfinished 12/40 observations)" in told
    assert [row["unfinished"] for row in csv.DictReader(io.StringIO(to_csv(Comparison(None, (observed,), ()))))] == [
        "12/40"
    ]
