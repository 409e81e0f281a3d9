"""What a report says in words: the headline of every configuration, and what a reader must not make of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from neq_cli.runs.compare.comparison import Row
from neq_cli.runs.compare.configurations import disagreements
from neq_cli.runs.compare.curves import Configuration, Study
from neq_cli.runs.compare.statistics import CONFIDENCE, CUSTOMARY_LEVEL, FEWEST_RUNS, Difference, Summary
from neq_cli.runs.store.run import KNOWN_METRICS
from neq_cli.runs.views.report.names import metric_in_words
from neq_cli.text import (
    MISSING,
    counted,
    format_flops,
    format_flops_like,
    format_metric,
    format_p_value,
    format_seconds,
    ratio_percent,
    some_of,
)

_MOST_KEYS = 6
_SAME_WORK = 0.5  # percent


@dataclass(frozen=True)
class Fact:
    """One number of a headline: ``value`` in large with its ``spread``, what it is made of below.

    Without ``certain`` it is grey, for the runs do not tell it from nothing; ``detail`` says why.
    """

    name: str
    value: str
    detail: str
    spread: str = ""
    certain: bool = True


def facts(configuration: Configuration, baseline: Configuration | None, like: float | None = None) -> tuple[Fact, ...]:
    """Return what a configuration saved and what it came to, beside the baseline where there is one.

    FLOPs are in the unit of ``like``, where that is given.
    """
    row = configuration.row
    against = None if baseline is None or baseline is configuration else baseline.row
    others = (against.flops_paper, against.flops_executed) if against else (None, None)
    return (
        _flops("paper FLOPs", row.flops_paper, others[0], row.flops_paper_difference, row.unit, like),
        _flops("executed FLOPs", row.flops_executed, others[1], row.flops_executed_difference, row.unit, like),
        _accuracy(row, against),
        _seconds(row, against),
    )


def _flops(
    name: str, own: Summary, other: Summary | None, found: Difference | None, unit: str, like: float | None
) -> Fact:
    percent = math.nan if other is None else ratio_percent(own.mean, other.mean)
    if other is None or not math.isfinite(percent):
        deviation = _deviation(own, lambda std: format_flops(std, like or own.mean))
        return Fact(
            name, format_flops_like(own.mean, like), f"per sample and iteration, mean of all {unit}s", deviation
        )
    like = other.mean if like is None else like
    detail = (
        f"{format_flops_like(own.mean, like)} against {format_flops_like(other.mean, like)} per sample and iteration"
    )
    value, spread = _change(percent), _interval_in_percent(found, other.mean)
    # A single run's FLOPs are counted, not measured: what they come to is known, if not for other seeds.
    certain = found is None or found.interval is None or not found.is_noise
    why = "" if certain or value == _NOTHING else "within noise: "
    return Fact(name, value, why + detail, spread, certain and value != _NOTHING)


_NOTHING = "±0.0%"


def _change(percent: float) -> str:
    """``61.0`` percent of the baseline's are ``−39.0%``."""
    change = percent - 100
    return _NOTHING if abs(change) < 0.05 else f"{_signed(change, '{:.1f}'.format)}%"


def _signed(value: float, written: Callable[[float], str]) -> str:
    return ("+" if value >= 0 else "−") + written(abs(value))


def _interval_in_percent(found: Difference | None, of: float) -> str:
    """``−41.2 to −36.8``: in percent of the baseline's mean; empty where no spread is known, or there is none."""
    if found is None or found.interval is None or found.interval[0] == found.interval[1] or not of:
        return ""
    return " to ".join(_signed(100 * end / of, "{:.1f}".format) for end in found.interval)


def _deviation(summary: Summary, written: Callable[[float], str]) -> str:
    # Runs that freeze nothing do not scatter in FLOPs.
    return "" if math.isnan(summary.std) or not summary.std else f"± {written(summary.std)}"


def _accuracy(row: Row, against: Row | None) -> Fact:
    def written(value: float) -> str:
        return format_metric(value, row.metric)

    found, name = row.final_difference, f"final {metric_in_words(row.metric)}"
    if found is None or against is None:
        runs = f"mean of {counted(row.final.n, 'run')}" if row.final.n > 1 else ""
        return Fact(name, written(row.final.mean), runs, _deviation(row.final, written))
    unit = " points" if row.metric in KNOWN_METRICS else ""
    spread = "" if found.interval is None else " to ".join(_signed(end, written) for end in found.interval)
    detail = f"{with_spread(row.final, row.metric)} against {with_spread(against.final, row.metric)}; {_chance(found)}"
    return Fact(name, f"{_signed(found.mean, written)}{unit}", _why_noise(found) + detail, spread, not found.is_noise)


def _chance(found: Difference) -> str:
    if found.p_value is None:
        return f"no p-value: {found.why_no_p}"
    pairs = f" over {found.pairs} seeds" if found.test == "paired" else ""
    least = ", the smallest that so few runs can give" if found.is_least_p and found.p_value >= CUSTOMARY_LEVEL else ""
    return f"p = {format_p_value(found.p_value)}{pairs}{least}"


def _why_noise(found: Difference | None) -> str:
    """Return what is to be said before a difference that the runs do not tell from none; else ""."""
    if found is None or not found.is_noise:
        return ""
    if found.interval is None and found.why_no_p != "unfinished":
        return "one run tells no spread: "
    return "within noise: "


def with_spread(summary: Summary, metric: str) -> str:
    """``92.96 ± 0.21``, or the mean alone where there is no deviation."""
    mean = format_metric(summary.mean, metric)
    return mean if math.isnan(summary.std) else f"{mean} ± {format_metric(summary.std, metric)}"


def _seconds(row: Row, against: Row | None) -> Fact:
    own, name = row.seconds, "time to train"
    if against is None or not against.seconds.mean > 0:
        deviation = _deviation(own, format_seconds)
        return Fact(name, format_seconds(own.mean), "mean of its runs, probing and testing included", deviation)
    other, found = against.seconds, row.seconds_difference
    detail = f"{_seconds_with_spread(own)} against {_seconds_with_spread(other)}"
    if not math.isfinite(own.mean):
        return Fact(name, MISSING, detail)
    same = row.flops_executed_percent is not None and abs(row.flops_executed_percent - 100) < _SAME_WORK
    why = "noise, for both computed the same: " if same else _why_noise(found)
    value, spread = _change(ratio_percent(own.mean, other.mean)), _interval_in_percent(found, other.mean)
    return Fact(name, value, why + detail, spread, not why and value != _NOTHING)


def _seconds_with_spread(summary: Summary) -> str:
    mean = format_seconds(summary.mean)
    return mean if math.isnan(summary.std) else f"{mean} ± {format_seconds(summary.std)}"


def reading(the_study: Study) -> str:
    """Return how the large numbers of a comparison are read; empty where there is nothing to compare with."""
    if the_study.baseline is None or len(the_study.configurations) == 1:
        return ""
    return (
        f"Large: the difference to the baseline, and behind it its {100 * CONFIDENCE:.0f} % interval (Student's t over "
        "the seeds that both have, Welch's where they share too few; FLOPs and time in % of the baseline's mean). "
        "Grey: the runs do not tell it from no difference."
    )


def caveats(the_study: Study) -> Iterator[str]:
    """Yield what limits these numbers, most important first, then the notes of the comparison."""
    configurations = the_study.configurations
    if keys := list(disagreements(the_study.runs)):
        yield f"These runs differ in {some_of(keys, _MOST_KEYS)}: they answer different questions."
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
