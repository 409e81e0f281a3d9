"""Why a run that froze neurons computed all the same, in a sentence from its dispatch.json; FLOPs alone, no seconds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neq_cli.errors import RunDirectoryError
from neq_cli.runs.compare.statistics import mean_known
from neq_cli.runs.store.run import Run
from neq_cli.runs.store.untrusted import read_json
from neq_cli.text import MISSING, format_percent, ratio_percent

_WHOLE = format_percent(100.0)


def nothing_saved(run: Run, epoch: int | None = None) -> str | None:
    """Return why the back-propagation of a run that froze neurons was computed whole; None where it was not.

    Whole is what reads so: 100.0% of the dense one's FLOPs, in the mean of all epochs up to ``epoch`` (None: of all).
    None too where hardly any neuron was frozen, and where dispatch.json does not tell.
    """
    if _share(run, "executed", epoch) != _WHOLE or _share(run, "paper", epoch) in (_WHOLE, MISSING):
        return None
    try:
        told = read_json(run.files.dispatch) if run.files.dispatch.exists() else {}
    except (RunDirectoryError, OSError):
        return None
    if told.get("backward") == "dense":
        return "backward: dense computes every gradient, and discards those of frozen neurons"
    choices = told.get("choices")
    if not isinstance(choices, Mapping) or not all(isinstance(choice, Mapping) for choice in choices.values()):
        return None
    if not choices:
        return "what was frozen lies in layers that are computed whole; dispatch.json has their reasons"
    return _of_kernels([dict(choice) for choice in choices.values()], str(run.environment.get("device") or ""))


def _of_kernels(choices: list[dict[str, Any]], device: str) -> str:
    layers = "all layers" if all(choice.get("kernel") == "dense" for choice in choices) else "almost all layers"
    if not any(choice.get("milliseconds") for choice in choices):
        return f"{layers} ran dense: too few of a layer's neurons were frozen for the rule of deterministic: true"
    # A GPU's layers may be large: there it is copying some channels that costs more than it saves.
    why = "too small for slicing here" if device.startswith("cpu") else "slicing them is no faster here"
    return f"{layers} ran dense: {why}; `neq bench` shows it by layer"


def _share(run: Run, accounting: str, epoch: int | None) -> str:
    part, whole = (mean_known(run.column(f"flops_{accounting}{of}")[:epoch]) for of in ("", "_dense"))
    return format_percent(ratio_percent(part, whole))
