"""Memory that is full, a device's or the machine's: recognised in whatever error it ended up as, named in a line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from neq_cli.errors import TrainingError


def out_of_memory(error: BaseException | None) -> bool:
    """Whether ``error``, or one that it was made of, says that the memory of a device, or of the machine, is full."""
    while error is not None:
        if _says_so(error):
            return True
        error = error.__cause__
    return False


@contextmanager
def full_memory_named(place: str) -> Iterator[None]:
    """Inside, have full memory end in a TrainingError that begins with ``place``; also as a decorator.

    A TrainingError goes through: it says what to do already.
    """
    try:
        yield
    except TrainingError:
        raise
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise TrainingError(f"{place}: {_whose(error)} is out of memory; lower batch_size") from error


def _says_so(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _whose(error: BaseException) -> str:
    """Return the device whose memory is full; an accelerator's runs share the machine's memory too."""
    while not _says_so(error) and error.__cause__ is not None:
        error = error.__cause__
    accelerator = torch.accelerator.current_accelerator() if isinstance(error, torch.OutOfMemoryError) else None
    return "cpu" if accelerator is None else str(accelerator)
