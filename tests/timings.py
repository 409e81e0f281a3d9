"""What of a run differs from one time to the next: columns of metrics.csv, and fields of a checkpoint's half epoch."""

from __future__ import annotations

TIMINGS = ("images_per_second", "epoch_seconds", "probe_seconds", "data_wait_seconds")
SECONDS = ("train_seconds", "seconds", "bookkeeping_seconds", "data_seconds", "joules")
