"""What part of a run's time goes into other things than training, told once where that is much."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

_LEAST_SECONDS = 5.0  # in runs of seconds, shares are noise
_LEAST_ROWS = 3  # the first may have waited for a compiler

MUCH_PROBING = 0.05
MUCH_WAITING = 0.1


class TimeShare:
    """Adds up a ``column`` of seconds in rows of metrics.csv beside the rows' own; ``much`` is a share of those.

    ``past`` are the rows of earlier calls, which have told what there was to tell.
    """

    def __init__(
        self, column: str, much: float, said: str, mend: str, past: Iterable[Mapping[str, float | int]] = ()
    ) -> None:
        self.column = column
        self.much = much
        self.said = said  # "probing"
        self.mend = mend
        self.rows = 0
        self.seconds = self.spent = 0.0
        self.told = False
        for row in past:
            self.note(row)

    def note(self, row: Mapping[str, float | int]) -> str | None:
        """Take in a row; returns what to tell where it is the first by which much was spent."""
        self.rows += 1
        self.seconds += row["epoch_seconds"]
        self.spent += row.get(self.column, 0.0)
        much = self.spent > max(_LEAST_SECONDS, self.much * self.seconds) and self.rows >= _LEAST_ROWS
        if self.told or not much:
            return None
        self.told = True
        return f"{self.said} took {100 * self.spent / self.seconds:.0f} % of the time so far; {self.mend}"
