"""One optimiser of a Lightning training: its Freezer, made for how the Trainer runs the module, and its run."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from neq_cli.errors import FreezingError, NeqError, one_line
from neq_cli.freezing import Freezer, Policy
from neq_cli.freezing.backward.dispatch import Dispatch
from neq_cli.freezing.backward.sliced import BackwardMode
from neq_cli.freezing.model.observing import is_compiled
from neq_cli.integrations.callback_words import in_callback_words
from neq_cli.integrations.lightning_checks import check_probe
from neq_cli.jobs.recorder import Recorder


@dataclass
class Watch:
    """What belongs to one optimiser; ``learning_rate`` is that with which the time up to the next row began."""

    freezer: Freezer
    learning_rate: float
    recorder: Recorder | None = None


def probe_of(probe: Any, trainer: Any) -> Iterable[Any]:
    """Return the probe's batches: those given, or what the function given returns for the ``trainer``."""
    if not callable(probe) or hasattr(probe, "__iter__"):
        return probe  # type: ignore[no-any-return]
    try:
        batches = probe(trainer)
    except NeqError:
        raise
    except Exception as error:
        raise FreezingError(f"NEqCallback: probe: the function fails on the Trainer ({one_line(error)})") from error
    check_probe(batches)
    return batches  # type: ignore[no-any-return]


def freezer_of(
    trainer: Any,
    module: Any,
    optimizer: torch.optim.Optimizer,
    probe: Iterable[Any],
    policy: Policy,
    backward: BackwardMode,
    **options: Any,
) -> Freezer:
    """Return a Freezer on the Trainer's ``module``; FreezingError where the module fails on the ``probe``."""
    several = trainer.world_size > 1
    if options.get("compiled") is None:
        options["compiled"] = runs_compiled(module)
    try:
        with in_callback_words("NEqCallback: "):
            return Freezer(
                trainer.strategy.model,  # within DistributedDataParallel where that trains
                optimizer,
                _Share(probe, trainer.global_rank, trainer.world_size, trainer.precision_plugin.convert_input),
                copy.deepcopy(policy),  # which has a state, of one run and optimiser
                backward=backward,
                wrapped=None,  # found out; said, so that LightningCLI, which reads this call, does not offer it
                dispatch=Dispatch(fixed=several or torch.are_deterministic_algorithms_enabled()),
                process_group=torch.distributed.group.WORLD if several else None,
                **options,
            )
    except NeqError:
        raise
    except Exception as error:  # of the module's own forward
        mend = "its items are what forward takes, else give call=lambda module, item: ..."
        raise FreezingError(f"NEqCallback: probe: the module fails on it ({one_line(error)}); {mend}") from error


def runs_compiled(module: Any) -> bool:
    """Return whether torch.compile runs the module, of which Lightning takes the wrapper off, or a part of it."""
    return getattr(module, "_compiler_ctx", None) is not None or is_compiled(module)


def seed_everywhere() -> int | None:
    """Return the seed of ``seed_everything``, which leaves it in the environment; None where it was not called."""
    seed = os.environ.get("PL_GLOBAL_SEED", "")
    return int(seed) if seed.isdecimal() else None


@dataclass(frozen=True)
class _Share:
    """One process's share of the probe, in the precision that the Trainer gives its model."""

    items: Iterable[Any]
    process: int
    processes: int
    convert: Any

    def __iter__(self) -> Iterator[Any]:
        return map(self.convert, islice(self.items, self.process, None, self.processes))
