"""The runs of a sweep train in one memory format: the first that needs to know times it, and the others take it over.

For each network, kind of device and precision: what decides it. A format is no part of what a sweep compares.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from neq_cli.recipe import Recipe
from neq_cli.runs.store.sweep_formats import agreed_format, sweep_of

if TYPE_CHECKING:
    from neq_cli.training.machine.memory_format import Agree
    from neq_cli.training.processes.joined import Processes


def format_of_sweep(recipe: Recipe, run: Path | None, processes: Processes) -> Agree | None:
    """Return how the run in the directory ``run`` agrees with others of its sweep; None where it is of none.

    Of several processes the first one's choice counts, so that it alone asks.
    """
    files = None if run is None or not processes.first else sweep_of(run)
    if run is None or files is None:
        return None
    from neq_cli.training.machine.device import resolve_device

    device = resolve_device(recipe.device, processes.local_rank if processes.count > 1 else None)
    network = recipe.model.model_dump(mode="json", include={"name", "entrypoint", "kwargs"})
    about = {"model": network, "device": device.type, "precision": recipe.precision}
    agree: Callable[..., tuple[bool, str]] = partial(agreed_format, files, run.absolute().name, about)
    return agree
