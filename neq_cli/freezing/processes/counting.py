"""Which of how many processes this one is, by torch.distributed; the only one where that was not started."""

from __future__ import annotations

from torch import distributed


def process_number() -> int:
    """Return this process's rank, 0 for the first."""
    return distributed.get_rank() if _started() else 0


def process_count() -> int:
    """Return how many processes there are."""
    return distributed.get_world_size() if _started() else 1


def _started() -> bool:
    return distributed.is_available() and distributed.is_initialized()
