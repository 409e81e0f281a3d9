"""The epochs in a run directory as the records they were written from, for a display that goes on with them."""

from __future__ import annotations

from neq_cli.errors import RunDirectoryError
from neq_cli.events import EpochRecord, LayerState
from neq_cli.runs.store.run import Run


def past_epochs(run: Run) -> tuple[EpochRecord, ...]:
    """Return the records of all finished epochs; the last has its layers, unless their files cannot be read."""
    *earlier, last = run.metrics
    epochs = [EpochRecord(int(row["epoch"]), row, ()) for row in earlier]
    return (*epochs, EpochRecord(int(last["epoch"]), last, _layers(run)))


def _layers(run: Run) -> tuple[LayerState, ...]:
    try:
        neurons = run.neurons(run.epochs)
        return tuple(
            LayerState(
                name=row.layer,
                kind=row.kind,
                flops_paper=row.flops_paper,
                flops_executed=row.flops_executed,
                **neurons[row.layer],
            )
            for row in run.layers(run.epochs)
        )
    except (RunDirectoryError, KeyError):  # which `neq inspect` says; the training does not need them
        return ()
