"""What a report says in words: the headline of every configuration, and what a reader must not make of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from neq_cli.runs.compare.comparison import Row
from neq_cli.runs.compare.configurations import disagreements
from neq_cli.runs.compare.curves import Configuration, Study
from neq_cli.runs.compare.statistics import FEWEST_RUNS, Summary
from neq_cli.runs.store.run import KNOWN_METRICS
from neq_cli.text import MISSING, format_flops, format_metric, format_p_value, format_seconds, ratio_percent

_SMALL_P = 0.05
_MOST_KEYS = 6
_SAME_WORK = 0.5  # percent


@dataclass(frozen=True)
class Fact:
    """One number of a headline: ``value`` in large, what it is made of below."""

    name: str
    value: str
    detail: str


def facts(configuration: Configuration, baseline: Configuration | None) -> tuple[Fact, ...]:
    """Return what a configuration saved and what it came to, beside the baseline where there is one."""
    row = configuration.row
    against = None if baseline is None or baseline is configuration else baseline.row
    others = (against.flops_paper, against.flops_executed) if against else (None, None)
    return (
        _flops("paper FLOPs", row.flops_paper, row.flops_paper_percent, others[0], row.unit),
        _flops("executed FLOPs", row.flops_executed, row.flops_executed_percent, others[1], row.unit),
        _accuracy(configuration, baseline),
        _seconds(row, against),
    )


def _flops(name: str, own: Summary, percent: float | None, other: Summary | None, unit: str) -> Fact:
    if other is None or percent is None or not math.isfinite(percent):
        return Fact(name, format_flops(own.mean), f"per sample and iteration, mean of all {unit}s")
    detail = f"{format_flops(own.mean)} against {format_flops(other.mean)} per sample and iteration"
    return Fact(name, _change(percent), detail)


def _change(percent: float) -> str:
    """``61.0`` percent of the baseline's are ``−39.0%``."""
    change = percent - 100
    return "±0.0%" if abs(change) < 0.05 else f"{'+' if change > 0 else '−'}{abs(change):.1f}%"


def _accuracy(configuration: Configuration, baseline: Configuration | None) -> Fact:
    row, found = configuration.row, configuration.row.final_difference
    name = f"final {row.metric}"
    own = with_spread(row.final, row.metric)
    if found is None or baseline is None:
        return Fact(name, format_metric(row.final.mean, row.metric), own if row.final.n > 1 else "")
    sign = "+" if found.mean >= 0 else "−"
    unit = " points" if row.metric in KNOWN_METRICS else ""
    detail = f"{own} against {with_spread(baseline.row.final, row.metric)}"
    return Fact(
        name, f"{sign}{format_metric(abs(found.mean), row.metric)}{unit}", f"{detail}; {_chance(configuration)}"
    )


def _chance(configuration: Configuration) -> str:
    found = configuration.row.final_difference
    if found is None or found.p_value is None:
        return f"no p-value: {found.why_no_p}" if found is not None else "no difference"
    pairs = f" over {found.pairs} seeds" if found.test == "paired" else ""
    verdict = ": may be chance" if found.p_value >= _SMALL_P else ""
    return f"p = {format_p_value(found.p_value)}{pairs}{verdict}"


def with_spread(summary: Summary, metric: str) -> str:
    """``92.96 ± 0.21``, or the mean alone where there is no deviation."""
    mean = format_metric(summary.mean, metric)
    return mean if math.isnan(summary.std) else f"{mean} ± {format_metric(summary.std, metric)}"


def _seconds(row: Row, against: Row | None) -> Fact:
    own = row.seconds
    if against is None or not against.seconds.mean > 0:
        return Fact("time to train", format_seconds(own.mean), "mean of its runs, probing and testing included")
    other = against.seconds
    detail = f"{_seconds_with_spread(own)} against {_seconds_with_spread(other)}"
    if not math.isfinite(own.mean):
        return Fact("time to train", MISSING, detail)
    change = _change(ratio_percent(own.mean, other.mean))
    if noise := _why_noise(row, against):
        return Fact("time to train", "no difference", f"{change} is noise, {noise}: {detail}")
    return Fact("time to train", change, detail)


def _why_noise(row: Row, against: Row) -> str:
    """Return why times do not tell the two apart: they did the same work, or equal runs differ as much; else "".

    As much is two standard deviations of either's runs.
    """
    if row.flops_executed_percent is not None and abs(row.flops_executed_percent - 100) < _SAME_WORK:
        return "for both computed the same"
    spreads = [one.std for one in (row.seconds, against.seconds) if math.isfinite(one.std)]
    if spreads and abs(row.seconds.mean - against.seconds.mean) <= 2 * max(spreads):
        return "as far apart as equal runs are"
    return ""


def _seconds_with_spread(summary: Summary) -> str:
    mean = format_seconds(summary.mean)
    return mean if math.isnan(summary.std) else f"{mean} ± {format_seconds(summary.std)}"


def caveats(the_study: Study) -> Iterator[str]:
    """Yield what limits these numbers, most important first, then the notes of the comparison."""
    configurations = the_study.configurations
    if keys := list(disagreements(the_study.runs)):
        more = f" and {len(keys) - _MOST_KEYS} more" if len(keys) > _MOST_KEYS else ""
        yield f"These runs differ in {', '.join(keys[:_MOST_KEYS])}{more}: they answer different questions."
    if single := _numbers([each for each in configurations if len(each.runs) == 1]):
        yield f"{single}: only one run, so no deviation is known and a difference may be that of another seed."
    if few := _numbers([each for each in configurations if 1 < len(each.runs) < FEWEST_RUNS]):
        yield f"{few}: fewer than {FEWEST_RUNS} runs, too few for a test of a difference."
    for configuration in configurations:
        if configuration.row.unfinished:
            stopped = ", ".join(configuration.row.unfinished)
            rows = f"{configuration.unit}s"
            yield f"{_numbers([configuration])}: unfinished after {stopped} {rows}; its numbers are of those {rows}."
    tested = [
        each for each in configurations if each.row.final_difference and each.row.final_difference.p_value is not None
    ]
    if len(tested) > 1:
        yield (
            f"{len(tested)} differences are tested and no p is corrected for that: "
            "one in twenty is below 0.05 by chance."
        )
    if truncated := _numbers(_of_mode(the_study, "truncated")):
        yield (
            f"{truncated}: backward=truncated is an approximation: frozen neurons pass no error on, "
            "so that other neurons train otherwise too."
        )
    if dense := _numbers([each for each in _of_mode(the_study, "dense") if each.kind != "baseline"]):
        yield (
            f"{dense}: backward=dense computes every gradient and discards those of frozen neurons; it saves nothing."
        )
    yield (
        "Paper FLOPs take off the whole cost of a frozen neuron, also the part that carries the error on, which an "
        "exact backward pass still computes; executed FLOPs count what was computed. Forward passes are in neither."
    )
    yield "Best values are chosen on the test set, so they flatter; final ones are not chosen."
    yield from the_study.comparison.notes


def _of_mode(the_study: Study, mode: str) -> list[Configuration]:
    return [each for each in the_study.configurations if each.runs[0].setting("backward") == mode]


def _numbers(configurations: list[Configuration]) -> str:
    """``Configurations 1, 3 to 5``."""
    numbers = [configuration.number for configuration in configurations]
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    written = ", ".join(str(low) if low == high else f"{low} to {high}" for low, high in spans)
    return f"Configuration{'s' if len(numbers) > 1 else ''} {written}" if numbers else ""
