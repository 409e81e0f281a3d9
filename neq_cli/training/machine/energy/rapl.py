"""Processors and their memory, by the counters that Linux reads from them (RAPL): whole packages, whoever uses them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from neq_cli.training.machine.device import processor_name
from neq_cli.training.machine.energy.meter import Meter, Unmeasured, counted

DOMAINS = Path("/sys/class/powercap")
_EVERY = 20.0
"""Seconds. Counters begin anew after some 65 or 262 kJ: less than that is used in 20 seconds by anything up to 3 kW."""


def rapl_meter(folder: Path) -> Meter:
    """Return the meter of all packages, and of memory where it has counters of its own; ``folder``: ``DOMAINS``.

    Raises Unmeasured where there are none, or where any of them cannot be read.
    """
    domains = _domains(folder)
    if not domains:
        raise Unmeasured(f"no RAPL package in {folder}, as in most virtual machines and containers")
    try:
        counters = [_counter(path) for _, path in domains]
    except PermissionError as error:
        raise Unmeasured(f"RAPL is for root alone here ({error.filename}: permission denied)") from error
    except (OSError, ValueError) as error:
        raise Unmeasured(f"RAPL cannot be read ({error})") from error
    how = f"RAPL {', '.join(name for name, _ in domains)}, {processor_name()}"
    return Meter("cpu", how, lambda: sum(spent() for spent in counters), every=_EVERY)


def _domains(folder: Path) -> list[tuple[str, Path]]:
    """Return the domains to add up, with their names: packages, their cores within, and memory, which is not.

    Not `psys`, which has the packages within.
    """
    found = []
    # One more colon for what lies within; `intel-rapl-mmio:0` is a second door to the first package.
    for path in sorted(folder.glob("intel-rapl:*")):
        name = _text(path / "name")
        if name.startswith("package"):
            found.append((name, path))
        elif name == "dram":
            package = _text(folder / path.name.rpartition(":")[0] / "name")
            found.append((f"{package} dram", path))
    return found


def _counter(domain: Path) -> Callable[[], float]:
    return counted(lambda: _joules(domain / "energy_uj"), _largest(domain))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _joules(path: Path) -> float:
    return int(path.read_text(encoding="utf-8")) / 1e6  # microjoules


def _largest(path: Path) -> float | None:
    try:
        return _joules(path / "max_energy_range_uj")
    except (OSError, ValueError):
        return None
