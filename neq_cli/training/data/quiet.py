"""Hugging Face's library kept quiet while it works: what matters of its log becomes an error."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

from neq_cli.training.models.libraries import imported

_one_at_a_time = RLock()  # else one would put back what another had set
_TALKING = ("datasets", "huggingface_hub", "filelock", "fsspec")


@contextmanager
def quietly() -> Iterator[None]:
    """Keep the library's log and progress bars off the screen; both are put back after. One thread at a time does."""
    library = imported("datasets", "hf/NAME", key="data.name", library="datasets")
    loggers = [logging.getLogger(name) for name in _TALKING]
    with _one_at_a_time:
        levels, hidden = [logger.level for logger in loggers], library.utils.are_progress_bars_disabled()
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        library.disable_progress_bars()
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if not hidden:
                library.enable_progress_bars()
