"""An estimate where nothing is measured: codecarbon's, of processor and memory, from their load and what they are."""

from __future__ import annotations

import inspect
import logging
from importlib import import_module
from importlib.metadata import version
from typing import Any

from neq_cli.errors import one_line
from neq_cli.training.machine.device import processor_name
from neq_cli.training.machine.energy.meter import JOULES_PER_KWH, EnergyError, Meter

_TO = ("save_to_file", "save_to_api", "save_to_logger", "save_to_prometheus")
_QUIET: dict[str, Any] = {
    "emissions_endpoint": None,
    "allow_multiple_runs": True,  # else it takes a lock file
    "log_level": "critical",
    "country_iso_code": "USA",  # it wants one; grams are not asked of it
}
"""Arguments, since files and variables of the user's own might say otherwise."""


def estimating_meter(unmeasured: str) -> Meter:
    """Return codecarbon's estimate; ``unmeasured`` is why nothing is measured.

    Raises EnergyError where it is not installed, or does not work here.
    """
    try:
        codecarbon: Any = import_module("codecarbon")
    except ImportError as error:
        raise EnergyError(
            f"nothing here measures it: {unmeasured}; pip install 'neq[codecarbon]' to have it estimated, or set it to "
            "false"
        ) from error
    logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
    try:
        tracker = codecarbon.OfflineEmissionsTracker(**_nowhere(codecarbon), **_QUIET)
        tracker.start_task()
        tracker.stop_task()  # which ends its thread: until training begins there is nothing to estimate
    except Exception as error:
        raise EnergyError(f"codecarbon does not work here ({one_line(error)}); set it to false") from error

    begun = False

    def spent() -> float:
        nonlocal begun
        data = tracker.stop_task() if begun else None
        tracker.start_task()
        begun = True
        return 0.0 if data is None else float(data.cpu_energy + data.ram_energy) * JOULES_PER_KWH

    how = f"an estimate by codecarbon {version('codecarbon')}, {processor_name()}"
    return Meter("cpu", how, spent, close=tracker.stop_task)


def _nowhere(codecarbon: Any) -> dict[str, Any]:
    """Return the arguments by which nothing is written or sent: newer versions have one for all places."""
    if "output_methods" in inspect.signature(codecarbon.EmissionsTracker).parameters:
        return {"output_methods": []}
    return dict.fromkeys(_TO, False)
