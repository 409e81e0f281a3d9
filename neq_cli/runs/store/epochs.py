"""Writes the epochs of a run: neuron file, rows of layers.csv, last the row of metrics.csv, which makes the epoch."""

from __future__ import annotations

import math

from neq_cli.errors import RunDirectoryError
from neq_cli.events import ENERGY_COLUMNS, EpochRecord
from neq_cli.runs.store.csv_files import Beginning, append_rows, beginning, cut
from neq_cli.runs.store.disk import atomic_write, writing
from neq_cli.runs.store.neurons import neurons_file
from neq_cli.runs.store.paths import RunFiles
from neq_cli.runs.store.tables import LAYER_COLUMNS, cell, layer_row
from neq_cli.runs.store.untrusted import damaged
from neq_cli.text import counted, printable


class EpochFiles:
    """What grows in a run directory by an epoch at a time, and is cut back to one when a run is gone on with."""

    def __init__(self, files: RunFiles) -> None:
        self.files = files
        self.columns: tuple[str, ...] = ()  # of metrics.csv; none before its first row
        self.epoch = 0
        self.resumed = False

    def beginnings(self, epoch: int) -> tuple[Beginning, Beginning]:
        """Return how far metrics.csv and layers.csv hold epochs 1 to ``epoch``; RunDirectoryError where they do not."""
        if not epoch:  # whatever they hold
            return Beginning(), Beginning()
        path = self.files.metrics
        try:
            metrics, layers = beginning(path, epoch), beginning(self.files.layers, epoch)
        except OSError as error:
            raise RunDirectoryError(
                f"{printable(path)}: cannot be read: {printable(error.strerror or error)}"
            ) from error
        if metrics.rows != [1] * epoch:
            whole = next((number for number, rows in enumerate(metrics.rows) if rows != 1), len(metrics.rows))
            raise damaged(path, f"whole rows of {counted(whole, 'epoch')}, but the checkpoint is of epoch {epoch}")
        path = self.files.layers
        if layers.columns != LAYER_COLUMNS:
            raise damaged(path, f"its columns are not {', '.join(LAYER_COLUMNS)}")
        # A model without layers that are observed has no rows.
        if layers.rows and layers.rows != layers.rows[:1] * epoch:
            raise damaged(path, f"its rows of epochs 1 to {epoch} are not all there")
        return metrics, layers

    def cut_back(self, epoch: int, beginnings: tuple[Beginning, Beginning]) -> None:
        """Remove what is of epochs after ``epoch``, where the tables' ``beginnings`` end. OSError."""
        metrics, layers = beginnings
        # The row of metrics.csv makes the epoch: it goes first.
        cut(self.files.metrics, metrics.size)
        cut(self.files.layers, layers.size)
        for path in list(self.files.neurons_after(epoch)):
            path.unlink()
        self.columns, self.epoch, self.resumed = metrics.columns, epoch, True

    def add(self, record: EpochRecord, policy: str) -> None:
        """Add a finished epoch. ValueError unless epochs come in order from 1 and keep the first one's columns.

        RunDirectoryError where another neq, with other columns, began the run.
        """
        metrics = {"epoch": record.epoch, **record.metrics}
        columns = self.columns or tuple(metrics)
        if self.resumed:  # by a call that no longer measures energy
            metrics = {**{column: math.nan for column in ENERGY_COLUMNS if column in columns}, **metrics}
        if record.epoch != self.epoch + 1 or metrics["epoch"] != record.epoch:
            raise ValueError(f"epoch {record.epoch} ({metrics['epoch']} in its metrics) after epoch {self.epoch}")
        if self.resumed and set(metrics) > set(columns):  # an earlier neq began it: the table keeps its width
            metrics = {column: metrics[column] for column in columns}
        if set(metrics) != set(columns) and self.resumed:
            differing = printable(", ".join(sorted(set(metrics) ^ set(columns))), 200)
            what = f"columns that this neq has not in common with it: {differing}"
            raise RunDirectoryError(f"{printable(self.files.metrics)}: {what}; go on with the neq that began it")
        if set(metrics) != set(columns):
            raise ValueError(f"epoch {record.epoch}: columns {sorted(set(metrics) ^ set(columns))} come or go")
        with writing(self.files.neurons(record.epoch)):
            atomic_write(self.files.neurons(record.epoch), neurons_file(record, policy))
        with writing(self.files.layers):
            rows = [layer_row(record.epoch, layer) for layer in record.layers]
            append_rows(self.files.layers, rows if self.columns else [LAYER_COLUMNS, *rows])
        with writing(self.files.metrics):
            row = [cell(metrics[column]) for column in columns]
            append_rows(self.files.metrics, [row] if self.columns else [columns, row])
        self.columns, self.epoch = columns, record.epoch
