"""The energy of a training over all its processes: each reads its card, one of each machine the processor."""

from __future__ import annotations

import math
import socket
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from neq_cli.errors import RecipeValueError, one_line
from neq_cli.events import ENERGY_COLUMNS, UNUSED
from neq_cli.recipe import Recipe
from neq_cli.training.machine.energy.estimate import estimating_meter
from neq_cli.training.machine.energy.meter import JOULES_PER_KWH, EnergyError, Meter, Unmeasured
from neq_cli.training.machine.energy.nvml import card_of, nvml_meter
from neq_cli.training.machine.energy.rapl import DOMAINS, rapl_meter
from neq_cli.training.processes.joined import Processes


class Energy:
    """What training takes, where it is ``asked`` for; else nothing is read, and nothing told.

    ``how`` each source is read and ``notes`` are, in the first of several processes, those of all.
    """

    def __init__(
        self,
        meters: Sequence[Meter] = (),
        *,
        asked: bool = False,
        grams_per_kwh: float | None = None,
        processes: Processes | None = None,
        device: torch.device | None = None,
        how: Mapping[str, str] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.meters = tuple(meters)
        self.asked = asked
        self.grams_per_kwh = grams_per_kwh
        self._how = how or {}
        self.notes = tuple(notes)
        self._processes = Processes() if processes is None else processes
        # Of groups that only NCCL serves, nothing but a CUDA device's tensors can be added up.
        self._place = device if device is not None and device.type == "cuda" else torch.device("cpu")
        self._before = 0.0
        self._failure: str | None = None
        self._told = False

    @property
    def environment(self) -> dict[str, Any]:
        """What environment.json says of how it is taken; nothing where nobody asked."""
        grams = {} if self.grams_per_kwh is None else {"grams_per_kwh": self.grams_per_kwh}
        return {"energy": {**self._how, **grams}} if self.asked else {}

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of what ``row`` returns."""
        return tuple(self.row(0.0))

    def row(self, joules: float) -> dict[str, float]:
        """Return the columns of metrics.csv that ``joules`` come to; none where nobody asked."""
        if not self.asked:
            return {}
        values = (joules,) if self.grams_per_kwh is None else (joules, joules * self.grams_per_kwh / JOULES_PER_KWH)
        return dict(zip(ENERGY_COLUMNS, values, strict=False))

    def begin(self) -> None:
        """Count from here on."""
        for meter in self.meters:
            meter.start()
        self._before = self._read()

    def lap(self) -> float:
        """Return the joules of all processes since ``begin`` or the last lap; NaN once a meter has failed.

        Where it is asked for, all processes call it together.
        """
        if not self.asked:
            return math.nan
        now = self._read()
        spent = torch.tensor(now - self._before, dtype=torch.float64, device=self._place)
        self._before = now
        total = float(self._processes.sum(spent))
        if math.isnan(total) and self._failure is None:
            self._failure = "the meter of another process failed"
        return total

    def failure_note(self, place: str) -> str | None:
        """Return what to tell of a meter that has failed, at ``place`` ("epoch 3"); None a second time."""
        if self._failure is None or self._told:
            return None
        self._told = True
        return f"energy: {self._failure} in {place}; its joules, and all after it, are not known"

    def close(self) -> None:
        """Let go of all meters, those that failed too."""
        for meter in self.meters:
            with suppress(Exception):
                meter.close()

    def _read(self) -> float:
        joules = 0.0
        for meter in self.meters:
            try:
                joules += meter.joules()
            except Exception as error:  # whatever it is, training goes on
                self._failure = self._failure or f"{meter.how} failed ({one_line(error)})"
                joules = math.nan
        return joules


def energy_of(recipe: Recipe, device: torch.device, processes: Processes) -> Energy:
    """Return what ``recipe`` asks for. RecipeValueError where nothing here measures it."""
    if not recipe.energy:
        return Energy()
    try:
        return measured(device, processes, recipe.grams_per_kwh)
    except EnergyError as error:
        raise RecipeValueError("energy", str(error)) from error


def measured(device: torch.device, processes: Processes, grams_per_kwh: float | None) -> Energy:
    """Return the energy of training on ``device``, with a meter for all that can be measured; all processes call it.

    Where a machine's first process has none, energy is estimated. EnergyError where a library for that is missing.
    """
    here = (_machine(), card_of(device))
    places = processes.shared(processes.gathered(here))
    # Of several processes on a machine, or on a card, the first one reads what is theirs together.
    first_here = [machine for machine, _ in places].index(here[0]) == processes.rank
    first_on_card = here[1] is not None and places.index(here) == processes.rank
    meters, missing = _opened(here[1] if first_on_card else None, cpu=first_here)
    if here[1] is None and device.type != "cpu":
        missing["gpu"] = f"{device} has no meter"
    if first_here and not meters:
        meters = [estimating_meter("; ".join(missing.values()))]
        notes = [f"energy: estimated, as nothing measures it here: {missing.pop('cpu')}"]
    else:
        notes = []
    notes += [f"energy: {source} is not measured: {reason}" for source, reason in missing.items()]
    pairs = [(meter.source, meter.how) for meter in meters] + [(source, "not measured") for source in missing]
    told = processes.gathered((pairs, notes))
    how = _together([pair for pairs, _ in told for pair in pairs])
    used = "; ".join(f"{source}: {text}" for source, text in how.items() if text != UNUSED)
    first = f"energy: {used}; of whole processors and cards, with what other programs do on them"
    return Energy(
        meters,
        asked=True,
        grams_per_kwh=grams_per_kwh,
        processes=processes,
        device=device,
        how=how,
        notes=tuple(dict.fromkeys([first, *(note for _, notes in told for note in notes)])),
    )


def _opened(card: str | None, *, cpu: bool) -> tuple[list[Meter], dict[str, str]]:
    """Return the meters of a card and of the processor, where wanted, and of either why there is none."""
    openers: dict[str, Callable[[], Meter]] = {} if card is None else {"gpu": lambda: nvml_meter(card)}
    if cpu:
        openers["cpu"] = lambda: rapl_meter(DOMAINS)
    meters, missing = [], {}
    for source, opened in openers.items():
        try:
            meters.append(opened())
        except Unmeasured as error:
            missing[source] = str(error)
    return meters, missing


def _together(pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return how each source is read, over all processes: "2 x NVML total energy, NVIDIA H200"."""
    found: dict[str, list[str]] = {"gpu": [], "cpu": []}
    for (source, how), times in Counter(pairs).items():
        found[source].append(f"{times} x {how}" if times > 1 else how)
    return {source: "; ".join(hows) or UNUSED for source, hows in found.items()}


def _machine() -> str:
    """Return what is the same for all processes of a machine, in whatever containers, and for none of another one."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return socket.gethostname()
