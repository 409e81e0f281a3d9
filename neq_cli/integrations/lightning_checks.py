"""What the Lightning callback and its Trainer must be for rows to be held: a line for each mistake, before training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from neq_cli.errors import FreezingError, did_you_mean

_OPTIONS = ("call", "exclude", "probe_autocast", "probe_snapshot", "row_wise", "sample")
"""Arguments of the Freezer that are passed on as they are."""
_IN_PIECES = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "XLAStrategy", "SingleDeviceXLAStrategy")
"""Strategies by name, since both packages have them: a process holds parts of parameters, or no PyTorch device."""


def check_arguments(probe: Any, every: Any, options: Mapping[str, Any]) -> None:
    """Raise FreezingError for the first argument of the callback that cannot be."""
    if probe is None:
        raise FreezingError("NEqCallback: probe: is missing; give held-out batches, such as a list or a DataLoader")
    if not hasattr(probe, "__iter__") or isinstance(probe, torch.Tensor):
        raise FreezingError(f"NEqCallback: probe: is a {type(probe).__name__}; give batches, such as a list of them")
    if isinstance(probe, Iterator):
        raise FreezingError("NEqCallback: probe: can be read only once; give a list or a DataLoader")
    if every != "epoch" and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
        raise FreezingError(f'NEqCallback: every: {every!r} is neither "epoch" nor a number of steps, such as 500')
    for name in options:
        if name not in _OPTIONS:
            hint = did_you_mean(name, _OPTIONS) or f"; there are {', '.join(_OPTIONS)}"
            raise FreezingError(f"NEqCallback: {name}: unknown option{hint}")


def check_trainer(trainer: Any, module: Any, callback: type) -> None:
    """Raise FreezingError where the ``callback`` is there twice, or rows cannot be held."""
    if sum(isinstance(one, callback) for one in trainer.callbacks) > 1:
        raise FreezingError("NEqCallback: the Trainer has two; one looks after every optimiser: take the other out")
    names = {kind.__name__ for kind in type(trainer.strategy).__mro__}
    for name in _IN_PIECES:
        if name in names:
            raise FreezingError(
                f"NEqCallback: {name} keeps parameters where rows cannot be held; use 'ddp' or one device"
            )
    if getattr(module, "_compiler_ctx", None) is not None:
        raise FreezingError("NEqCallback: fit was given a module that torch.compile wraps; give it the module itself")
