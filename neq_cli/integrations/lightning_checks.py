"""What the Lightning callback and its Trainer must be for rows to be held: a line for each mistake, before training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from neq_cli.errors import FreezingError, did_you_mean

_OPTIONS = ("call", "compiled", "exclude", "probe_autocast", "probe_snapshot", "row_wise", "sample")
"""Arguments of the Freezer that are passed on as they are."""
_IN_PIECES = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "XLAStrategy", "SingleDeviceXLAStrategy")
"""Strategies by name, since both packages have them: a process holds parts of parameters, or no PyTorch device."""


def check_arguments(probe: Any, every: Any, options: Mapping[str, Any]) -> None:
    """Raise FreezingError for the first argument of the callback that cannot be."""
    if probe is None:
        raise FreezingError(
            "NEqCallback: probe: is missing; give held-out batches, such as a list or a DataLoader, or a function of "
            "the Trainer that returns them"
        )
    if hasattr(probe, "__iter__") or not callable(probe):
        check_probe(probe)
    if every != "epoch" and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
        raise FreezingError(f'NEqCallback: every: {every!r} is neither "epoch" nor a number of steps, such as 500')
    for name in options:
        if name not in _OPTIONS:
            hint = did_you_mean(name, _OPTIONS) or f"; there are {', '.join(_OPTIONS)}"
            raise FreezingError(f"NEqCallback: {name}: unknown option{hint}")


def check_probe(batches: Any) -> None:
    """Raise FreezingError unless the probe's ``batches`` can be read again and again."""
    if isinstance(batches, (str, bytes, Mapping)) or not hasattr(batches, "__iter__"):
        mend = "give batches, such as a list of them (in a configuration: a class_path that can be imported)"
    elif isinstance(batches, torch.Tensor):
        mend = "give batches, such as a list of them"
    elif isinstance(batches, Iterator):
        raise FreezingError("NEqCallback: probe: can be read only once; give a list or a DataLoader")
    else:
        return
    raise FreezingError(f"NEqCallback: probe: is a {type(batches).__name__}; {mend}")


def check_trainer(trainer: Any, callback: type) -> None:
    """Raise FreezingError where the ``callback`` is there twice, or rows cannot be held."""
    if sum(isinstance(one, callback) for one in trainer.callbacks) > 1:
        raise FreezingError("NEqCallback: the Trainer has two; one looks after every optimiser: take the other out")
    names = {kind.__name__ for kind in type(trainer.strategy).__mro__}
    for name in _IN_PIECES:
        if name in names:
            raise FreezingError(
                f"NEqCallback: {name} keeps parameters where rows cannot be held; use 'ddp' or one device"
            )
