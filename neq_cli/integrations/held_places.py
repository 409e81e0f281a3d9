"""Who of this process freezes by which optimiser and writes which run directory; both end with the training."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any, Protocol

import torch

from neq_cli.errors import FreezingError, TrainingError
from neq_cli.jobs.recorder import Recorder

BROKEN_OFF = "the training was broken off"


class Ends(Protocol):
    """A callback whose training can be ended from outside."""

    def end(self, error: BaseException | None = None) -> None:
        """Close the run, as failed by an ``error``, and let go of model and optimiser."""


_at_work: weakref.WeakKeyDictionary[torch.optim.Optimizer, weakref.ref[Ends]] = weakref.WeakKeyDictionary()
"""Which callback freezes by which optimiser: two would undo each other's sets."""
_recording: weakref.WeakValueDictionary[Path, Ends] = weakref.WeakValueDictionary()
"""Which callback writes where. No hook tells that a training was broken off, as by Ctrl-C in a notebook."""


def check_alone(optimizer: torch.optim.Optimizer) -> None:
    """Raise FreezingError, and end the other's training, where another callback freezes by this optimiser."""
    other = _at_work[optimizer]() if optimizer in _at_work else None
    if other is not None:
        error = FreezingError("NEqCallback: there are two on this trainer; remove one")
        other.end(error)
        raise error


def take(optimizer: torch.optim.Optimizer, callback: Ends) -> None:
    """Have ``callback`` freeze by this optimiser alone."""
    _at_work[optimizer] = weakref.ref(callback)


def record_at(path: Path, callback: Ends, recorder: Recorder) -> weakref.finalize[..., Any]:
    """Have ``callback`` write ``path``; where it is gone, or the program ends, before its training does, so is told."""
    _recording[path] = callback
    return weakref.finalize(callback, _break_off, recorder)


def let_go_of(path: Path) -> None:
    """Have a training of this very process that was broken off give up the lock of its run directory."""
    if path in _recording:
        _recording[path].end(TrainingError(BROKEN_OFF))
    gc.collect()  # what is referred to in circles only


def give_back(optimizer: torch.optim.Optimizer, callback: Ends) -> None:
    """Let others have what ``callback`` had."""
    if optimizer in _at_work and _at_work[optimizer]() is callback:
        del _at_work[optimizer]
    for path in [path for path, other in _recording.items() if other is callback]:
        del _recording[path]


def _break_off(recorder: Recorder) -> None:
    recorder.__exit__(TrainingError, TrainingError(BROKEN_OFF), None)
