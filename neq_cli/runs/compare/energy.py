"""What runs took in energy, and how that was measured: what was measured in different ways is shown, never compared."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from neq_cli.events import ENERGY_COLUMNS, UNUSED
from neq_cli.runs.compare.statistics import Summary, summarise
from neq_cli.runs.store.run import Run
from neq_cli.text import counted, printable

_LONGEST = 200


def is_measured(run: Run) -> bool:
    """Whether the run has a column of its energy."""
    return ENERGY_COLUMNS[0] in run.rows[0]


def total(run: Run, column: str = ENERGY_COLUMNS[0], epoch: int | None = None) -> float:
    """Return the joules, or grams, of all epochs up to ``epoch``; NaN where those of any epoch are not known."""
    return float(np.sum(run.column(column)[:epoch])) if column in run.rows[0] else math.nan


def total_joules(runs: Sequence[Run]) -> Summary:
    """Return the joules of whole runs, folded into one number."""
    return summarise([total(run) for run in runs])


def ways(run: Run) -> tuple[str, ...]:
    """Return how the run's energy was measured, "gpu: NVML total energy, NVIDIA H200; cpu: RAPL package-0, Xeon".

    More than one where it went on elsewhere, none where the run does not tell.
    """
    first = run.environment.get("energy")
    found = [first] if isinstance(first, Mapping) else []
    resumed = run.environment.get("resumed")
    for entry in resumed if isinstance(resumed, list) else ():
        changed = entry.get("changed") if isinstance(entry, Mapping) else None
        other = changed.get("energy") if isinstance(changed, Mapping) else None
        if isinstance(other, Mapping):
            found.append({**(found[0] if found else {}), **other})
    return tuple(dict.fromkeys(filter(None, map(_in_words, found))))


def _in_words(how: Mapping[str, object]) -> str:
    told = {source: how.get(source) for source in ("gpu", "cpu")}
    said = [f"{source}: {text}" for source, text in told.items() if isinstance(text, str) and text != UNUSED]
    return printable("; ".join(said), _LONGEST)


def common_way(runs: Sequence[Run]) -> str | None:
    """Return how the energy of all ``runs`` was measured; None where it was in different ways, or that is not known."""
    told = [ways(run) for run in runs]
    return told[0][0] if len(told[0]) == 1 and len(set(told)) == 1 else None


def energy_notes(runs: Sequence[Run]) -> Iterator[str]:
    """Yield what a reader must know before comparing the energy of ``runs``."""
    measured = [run for run in runs if is_measured(run)]
    if measured and len(measured) < len(runs):
        yield f"energy is not shown: {len(measured)} of {counted(len(runs), 'run')} measured it"
    if not measured or len(measured) < len(runs):
        return
    if common_way(runs) is None:
        where: dict[str, list[Run]] = {}
        for run in runs:
            where.setdefault(" and then ".join(ways(run)) or "a way not told", []).append(run)
        told = (f"{way} (in {printable(found[0].path)}{_more(found)})" for way, found in where.items())
        yield f"energy is not compared, for it was not measured in one way: {', '.join(told)}"
    partly = sum(math.isnan(total(run)) for run in runs)
    if partly:
        yield f"energy of {partly} of {counted(len(runs), 'run')} is not known of every epoch, and left out"


def _more(runs: Sequence[Run]) -> str:
    return f" and {len(runs) - 1} more" if len(runs) > 1 else ""
