"""The rows of a data set as the batches of a probe, put together as a trainer does; all are held in memory."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from neq_cli.errors import FreezingError, one_line
from neq_cli.freezing.model.observing import undisturbed

Collate = Callable[[list[Any]], Any]


def check_probe(probe: Any, batch_size: int | None) -> None:
    """Raise FreezingError where ``probe`` is no data set, or ``batch_size`` neither None nor a positive number."""
    if probe is None:
        raise FreezingError("probe: none is given; give held-out rows, such as eval_dataset.select(range(64))")
    if isinstance(probe, Iterator):
        raise FreezingError("probe: can be read only once; give a data set or a list")
    if isinstance(probe, (str, bytes, Mapping)) or not hasattr(probe, "__len__"):
        raise FreezingError(f"probe: is a {type(probe).__name__}; give a data set with a length, or a list")
    if not len(probe):
        raise FreezingError("probe: is empty; give at least one row")
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        raise FreezingError(f"batch_size: {batch_size!r} is not a positive whole number; None takes ready batches")


def ready_batches(
    model: nn.Module, probe: Any, batch_size: int | None, collate: Collate, columns: Collection[str] | None, seed: int
) -> list[Any]:
    """Return the probe's batches: ``batch_size`` rows each, put together by ``collate``; None: they are ready.

    Of rows that are mappings, ``columns`` (None: all) are kept. A collator that draws, as one that masks words, draws
    from ``seed``, the same in every process and after every resume; nobody else's random numbers move. FreezingError
    where the rows cannot be put together.
    """
    with undisturbed(model):
        _sow(seed)
        try:
            if batch_size is None or isinstance(probe, DataLoader):
                return list(probe)
            rows = [_kept(probe[number], columns) for number in range(len(probe))]
            return [collate(rows[first : first + batch_size]) for first in range(0, len(rows), batch_size)]
        except Exception as error:
            raise FreezingError(
                f"probe: its rows cannot be put together ({one_line(error)}); give rows like those of train_dataset, "
                "data_collator=, or ready batches and batch_size=None"
            ) from error


def check_batches(batches: Collection[Any]) -> None:
    """Raise FreezingError unless all are mappings, by whose keys a model of transformers is called."""
    odd = [batch for batch in batches if not isinstance(batch, Mapping)]
    if odd:
        raise FreezingError(
            f"probe: a batch is a {type(odd[0]).__name__}; the model is called with mappings, as a data collator makes "
            "them; anything else needs call=lambda model, batch: ..."
        )


def columns_taken(model: nn.Module, others: Collection[str]) -> set[str]:
    """Return what the Trainer keeps of a row: what the model's forward takes, labels and ``others``."""
    inner: Any = getattr(model, "get_base_model", lambda: model)()  # of a PEFT model
    return {*inspect.signature(inner.forward).parameters, "label", "label_ids", *others}


def _kept(row: Any, columns: Collection[str] | None) -> Any:
    if columns is None or not isinstance(row, Mapping):
        return row
    return {key: value for key, value in row.items() if key in columns}


def _sow(seed: int) -> None:
    import random

    import numpy

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
