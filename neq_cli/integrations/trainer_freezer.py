"""A Freezer on the model that a Trainer trains, made for how it runs it; what cannot be is one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import distributed, nn

from neq_cli.freezing import Freezer, Policy
from neq_cli.freezing.backward.dispatch import Dispatch
from neq_cli.freezing.backward.sliced import BackwardMode
from neq_cli.freezing.model.observing import is_compiled
from neq_cli.freezing.processes.counting import process_count, process_number
from neq_cli.integrations.callback_words import in_callback_words


def freezer_of(
    args: Any,
    model: nn.Module,
    optimizer: Any,
    batches: Sequence[Any],
    policy: Policy,
    backward: BackwardMode,
    options: Mapping[str, Any],
) -> Freezer:
    """Return a Freezer with this process's share of the probe's ``batches``; FreezingError, one line, where it fails.

    ``args`` are the Trainer's; it compiles and wraps the model later than it tells callbacks that training begins.
    """
    given, together = {"compiled": args.torch_compile or is_compiled(model), **options}, process_count() > 1
    if together:  # each by its own timings would not be found again when rank 0's are loaded
        given.setdefault("dispatch", Dispatch(fixed=True))
    with in_callback_words():
        return Freezer(
            model,
            optimizer,
            batches[process_number() :: process_count()],
            policy,
            backward=backward,
            wrapped=together,
            process_group=distributed.group.WORLD if together else None,
            **given,
        )
