"""Runs side by side, folded over seeds; compares means of whole runs, never single epochs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from neq_cli.errors import NeqError
from neq_cli.events import EPOCH
from neq_cli.runs.compare.configurations import (
    UNSET,
    beside_matched,
    disagreements,
    labels,
    matched_to_seeds,
    matched_values,
    roots_of_unknown_content,
    settings_together,
    written,
)
from neq_cli.runs.compare.energy import common_way, energy_notes, is_measured, total_joules
from neq_cli.runs.compare.goal import Goal, goal, training_flops
from neq_cli.runs.compare.saving import nothing_saved
from neq_cli.runs.compare.statistics import CUSTOMARY_LEVEL, Difference, Summary, difference, mean_known, summarise
from neq_cli.runs.store.run import Run, unit_of_runs
from neq_cli.text import counted, plain_json, printable, ratio_percent

_MATCHED_P_SPREAD = (
    0.05  # wider than seeds mostly make it: runs folded into one `match` row were matched to different ones
)


@dataclass(frozen=True)
class Row:
    """One configuration: runs whose recipes differ in the seed and in surroundings only."""

    approach: str
    runs: tuple[str, ...]
    seeds: tuple[int | None, ...]
    is_baseline: bool
    unfinished: tuple[str, ...]  # "12/250" for every run that stopped early, in its ``unit``
    flops_paper: Summary  # per iteration: mean over the rows of a run, then over runs
    flops_paper_percent: float | None  # of the baseline's, as are all below that have None
    flops_executed: Summary
    flops_executed_percent: float | None
    metric: str
    final: Summary  # the last value measured
    final_difference: Difference | None
    best: Summary
    best_difference: Difference | None
    seconds: Summary
    flops_training: Summary  # forward passes and executed back-propagation of all epochs; NaN where runs do not tell
    flops_training_percent: float | None
    goal: Goal | None  # None without a baseline of the same metric
    matched_p: Summary | None  # of `p: match:RUN_DIR`
    lower_is_better: bool = False  # of the metric
    unit: str = EPOCH  # or OBSERVATION: what the runs have a row of
    joules: Summary | None = None  # of whole runs; None unless all runs compared measured it
    joules_percent: float | None = None  # None too where it was not measured in one way
    flops_paper_difference: Difference | None = None  # per iteration; None without a baseline, as the next two
    flops_executed_difference: Difference | None = None
    seconds_difference: Difference | None = None


@dataclass(frozen=True)
class Comparison:
    """All rows, the baseline's first, and what a reader must know about them."""

    baseline: str | None
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    energy: str | None = None  # how it was measured; None where it was not, or in different ways

    @property
    def units(self) -> str:
        """What means of whole runs are over: "epochs", "observations", or "epochs or observations"."""
        return " or ".join(dict.fromkeys(f"{row.unit}s" for row in self.rows))


@dataclass(frozen=True)
class _Group:
    label: str
    runs: tuple[Run, ...]


def compare_runs(runs: Sequence[Run], baseline: Run | None = None, allow_differences: bool = False) -> Comparison:
    """Fold runs into configurations and set each against the baseline's.

    The baseline is the configuration that ``baseline`` belongs to, else the only one of policy ``baseline``, else none:
    then differences and percentages are None and a note says so. Differences of final and best metric are in its unit;
    their p-values are exact (``statistics.difference`` says which test and its smallest p) and need three
    finished runs on both sides. A run given twice counts once; two runs of one seed both count, but are not paired.

    Raises NeqError where data, model, task or epochs differ, with every key, its values and runs, unless
    ``allow_differences``. Data differ by name or content, not by root, workers, download, cache or probe size.
    """
    runs = _once([*runs, *([baseline] if baseline else [])])
    if not runs:
        raise NeqError("nothing to compare: give at least one run directory")
    if not allow_differences:
        _refuse_differences(runs)
    groups = _groups(runs)
    reference, notes = _baseline_group(groups, baseline)
    ordered = ([reference] if reference else []) + [group for group in groups if group is not reference]
    shortest = min(_seconds(group.runs).mean for group in ordered)
    rows = tuple(_row(group, reference, shortest) for group in ordered)
    notes += dict.fromkeys(_notes(ordered, rows))  # what holds for several rows is said once
    way = None
    if all(map(is_measured, runs)):
        way = common_way(runs)
        rows = tuple(_with_energy(*pair, reference if way else None) for pair in zip(rows, ordered, strict=True))
    notes += energy_notes(runs)
    return Comparison(reference.label if reference else None, rows, tuple(notes), way)


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Return plain lists and dicts; what is not known is None.

    ``schema`` (1), ``baseline`` (an approach or None), ``notes``, ``energy`` (how it was measured, or None), and
    ``rows``, each with the fields of ``Row``: ``approach``, ``runs``, ``seeds``, ``is_baseline``, ``unfinished``,
    ``metric``, ``lower_is_better``, ``unit``; ``flops_paper``, ``flops_executed``, ``flops_training``, ``final``,
    ``best``, ``seconds``, ``matched_p`` and ``joules`` as ``{mean, std, n}``; ``flops_paper_percent``,
    ``flops_executed_percent``, ``flops_training_percent``, ``joules_percent``; ``final_difference``,
    ``best_difference``, ``flops_paper_difference``, ``flops_executed_difference`` and ``seconds_difference`` as
    ``{mean, p_value, test, pairs, why_no_p, interval, least_p}``; ``goal`` with the fields of ``Goal``.
    """
    return {"schema": 1, **plain_json(asdict(comparison))}


def _once(runs: Sequence[Run]) -> list[Run]:
    return list({run.path.resolve(): run for run in runs}.values())


def _refuse_differences(runs: Sequence[Run]) -> None:
    found = disagreements(runs)
    metrics = {_metric_in_words(run): run for run in runs}
    if not found and len(metrics) == 1:
        return
    lines = ["these runs answer different questions; drop some, or compare them all the same with --allow-differences"]
    for key, values in found.items():
        lines.append(f"{printable(key)}: " + ", ".join(f"{written(v)} {_where(w)}" for v, w in values.items()))
    if len(metrics) > 1:
        lines.append("metric: " + ", ".join(f"{m} {_where([run])}" for m, run in metrics.items()))
    raise NeqError("\n".join(lines))


def _metric_in_words(run: Run) -> str:
    return printable(run.metric) + (" (lower is better)" if run.lower_is_better else "")


def _where(runs: Sequence[Run]) -> str:
    more = f" and {len(runs) - 1} more" if len(runs) > 1 else ""
    return f"in {printable(runs[0].path)}{more}"


def _groups(runs: Sequence[Run]) -> list[_Group]:
    found: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run, flat in zip(runs, settings_together(runs), strict=True):
        found.setdefault(tuple(sorted(flat.items())), []).append(run)
    members = [sorted(group, key=lambda run: (_seed(run) is None, _seed(run) or 0)) for group in found.values()]
    return [_Group(label, tuple(group)) for label, group in zip(labels(members), members, strict=True)]


def _seed(run: Run) -> int | None:
    seed = run.setting("seed")
    return seed if isinstance(seed, int) else None


def _baseline_group(groups: Sequence[_Group], baseline: Run | None) -> tuple[_Group | None, list[str]]:
    if baseline is not None:
        path = baseline.path.resolve()
        return next(group for group in groups if path in {run.path.resolve() for run in group.runs}), []
    found = [group for group in groups if group.runs[0].setting("policy.kind") == "baseline"]
    if len(found) == 1:
        return found[0], []
    if found:
        return None, [f"{len(found)} configurations freeze nothing, so none is the baseline; choose with --baseline"]
    return None, ["no run freezes nothing, so there are no differences; choose one to compare with by --baseline"]


def _row(group: _Group, reference: _Group | None, shortest: float) -> Row:
    runs = group.runs
    training = _training(runs)
    same_metric = reference is not None and _metric_in_words(reference.runs[0]) == _metric_in_words(runs[0])
    paper, executed = _summary(runs, "flops_paper"), _summary(runs, "flops_executed")
    others = reference.runs if reference is not None and reference is not group else ()
    against = others if same_metric else ()
    target = math.nan if reference is None else summarise([final_metric(run) for run in reference.runs]).mean
    matched = matched_values(runs)
    return Row(
        approach=group.label,
        runs=tuple(str(run.path) for run in runs),
        seeds=tuple(_seed(run) for run in runs),
        is_baseline=group is reference,
        unfinished=tuple(f"{run.epochs}/{run.epochs_planned}" for run in runs if _is_unfinished(run)),
        flops_paper=paper,
        flops_paper_percent=_percent(paper, reference, "flops_paper"),
        flops_executed=executed,
        flops_executed_percent=_percent(executed, reference, "flops_executed"),
        metric=runs[0].metric,
        final=summarise([final_metric(run) for run in runs]),
        final_difference=_difference(runs, against, final_metric),
        best=summarise([_best(run) for run in runs]),
        best_difference=_difference(runs, against, _best),
        seconds=_seconds(runs),
        flops_training=training,
        flops_training_percent=None
        if reference is None
        else ratio_percent(training.mean, _training(reference.runs).mean),
        goal=goal(runs, reference.runs, target, shortest) if reference is not None and same_metric else None,
        matched_p=summarise(matched) if matched else None,
        lower_is_better=runs[0].lower_is_better,
        unit=unit_of_runs(runs),
        flops_paper_difference=_difference(runs, others, _mean_of("flops_paper")),
        flops_executed_difference=_difference(runs, others, _mean_of("flops_executed")),
        seconds_difference=_difference(runs, others, _seconds_of),
    )


def _with_energy(row: Row, group: _Group, reference: _Group | None) -> Row:
    joules = total_joules(group.runs)
    percent = None if reference is None else ratio_percent(joules.mean, total_joules(reference.runs).mean)
    return replace(row, joules=joules, joules_percent=percent)


def _summary(runs: Sequence[Run], column: str) -> Summary:
    return summarise(list(map(_mean_of(column), runs)))


def _mean_of(column: str) -> Callable[[Run], float]:
    return lambda run: mean_known(run.column(column))


def _seconds(runs: Sequence[Run]) -> Summary:
    return summarise(list(map(_seconds_of, runs)))


def _seconds_of(run: Run) -> float:
    return float(np.nansum(run.column("epoch_seconds")))


def _training(runs: Sequence[Run]) -> Summary:
    return summarise([float(training_flops(run).sum()) for run in runs])


def _percent(summary: Summary, reference: _Group | None, column: str) -> float | None:
    return None if reference is None else ratio_percent(summary.mean, _summary(reference.runs, column).mean)


def final_metric(run: Run) -> float:
    """Return the last value of the run's metric that was measured, NaN where none was."""
    values = run.column(run.metric)
    known = values[~np.isnan(values)]
    return float(known[-1]) if known.size else math.nan


def _best(run: Run) -> float:
    values = run.column(run.metric)
    known = values[~np.isnan(values)]
    return float(known.min() if run.lower_is_better else known.max()) if known.size else math.nan


def _difference(runs: Sequence[Run], against: Sequence[Run], value: Callable[[Run], float]) -> Difference | None:
    sides = [[(_seed(run), value(run)) for run in side if math.isfinite(value(run))] for side in (runs, against)]
    if not all(sides):
        return None
    found = difference(*sides)
    if any(map(_is_unfinished, (*runs, *against))):
        return replace(found, p_value=None, why_no_p="unfinished", interval=None)
    return found


def _is_unfinished(run: Run) -> bool:
    # One that its recipe's `stop_when_frozen` ended is finished.
    return run.epochs < run.epochs_planned and run.status.state != "finished"


def _notes(groups: Sequence[_Group], rows: Sequence[Row]) -> Iterator[str]:
    yield from _why_nothing_saved(groups)
    for group, row in zip(groups, rows, strict=True):
        twice = [seed for seed, count in Counter(row.seeds).items() if count > 1 and seed is not None]
        if twice:
            yield f"{row.approach}: seed {', '.join(map(str, twice))} more than once; both count, none is paired"
        if row.final.n < len(row.runs):
            never = f"{len(row.runs) - row.final.n} of {counted(len(row.runs), 'run')}"
            yield f"{row.approach}: {never} never measured {row.metric}"
        matched = matched_values(group.runs)
        if matched and max(matched) - min(matched) > _MATCHED_P_SPREAD and not matched_to_seeds(group.runs):
            span = f"{min(matched):.3g} to {max(matched):.3g}"
            yield f"{row.approach}: matched p goes from {span}: matched to different runs? compare those apart"
        if beside := beside_matched(group.runs):
            span = f"{min(beside):+.2f}%" + (f" to {max(beside):+.2f}%" if len(beside) > 1 else "")
            yield f"{row.approach}: paper FLOPs {span} beside those that p was matched to"
        if row.final_difference is not None:
            yield from _test_notes(row, row.final_difference)
    runs = [run for group in groups for run in group.runs]
    devices = dict.fromkeys(str(run.environment.get("device") or UNSET) for run in runs)
    if len(devices) > 1:
        yield f"seconds are of different devices: {', '.join(printable(device, 60) for device in devices)}"
    if unknown := roots_of_unknown_content(runs):
        yield f"not every run records what its data hold: make sure that {' and '.join(unknown)} hold the same"


def _why_nothing_saved(groups: Sequence[_Group]) -> Iterator[str]:
    """Yield each reason once, with the configurations whose runs all have it."""
    found: dict[str, list[str]] = {}
    for group in groups:
        reasons = dict.fromkeys(map(nothing_saved, group.runs))
        if None not in reasons:
            for reason in reasons:
                found.setdefault(str(reason), []).append(group.label)
    for reason, names in found.items():
        yield f"{'; '.join(names)}: nothing saved: {reason}"


def _test_notes(row: Row, found: Difference) -> Iterator[str]:
    if found.test == "paired" and found.pairs < row.final.n:
        yield f"{row.approach}: differences are over the {counted(found.pairs, 'seed')} that the baseline has too"
    if found.p_value is not None and found.test == "unpaired":
        yield f"{row.approach}: too few seeds shared with the baseline, p is of the unpaired test"
    if found.p_value is not None and found.test == "paired" and 2 / 2**found.pairs > CUSTOMARY_LEVEL:
        yield f"{found.pairs} pairs cannot give a p below {2 / 2**found.pairs:g}"
