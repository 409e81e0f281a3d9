"""What part of a run's time its observations take, told once where that is much; little time is never much."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

_MUCH = 0.05  # of the time
_LEAST_SECONDS = 5.0  # of probes: in runs of seconds, shares are noise
_LEAST_ROWS = 3  # the first may have waited for a compiler


class ProbeCost:
    """Adds up rows of metrics.csv; ``past`` are those of earlier calls, which have told what there was to tell."""

    def __init__(self, unit: str, mend: str, past: Iterable[Mapping[str, float | int]] = ()) -> None:
        self.unit = unit
        self.mend = mend
        self.rows = 0
        self.seconds = self.probe_seconds = 0.0
        self.told = False
        for row in past:
            self.note(row)

    def note(self, row: Mapping[str, float | int]) -> str | None:
        """Take in a row; returns what to tell where it is the first by which probes have taken much."""
        self.rows += 1
        self.seconds += row["epoch_seconds"]
        self.probe_seconds += row["probe_seconds"]
        much = self.probe_seconds > max(_LEAST_SECONDS, _MUCH * self.seconds) and self.rows >= _LEAST_ROWS
        if self.told or not much:
            return None
        self.told = True
        share = 100 * self.probe_seconds / self.seconds
        return f"probing took {share:.0f} % of the time up to {self.unit} {self.rows}; {self.mend}"
