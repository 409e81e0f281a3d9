"""What `--slurm KEY=VALUE` asks of SLURM: sbatch's long options, of which those that are neq's own are refused."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from neq_cli.errors import RecipeError
from neq_cli.text import escaped

DEFAULT_MINUTES = 60
"""A job whose time is up saves and is queued again, so that any limit will do; submitit's own five minutes are few."""
DEFAULT_WARNING = 90
"""Seconds before its end in which a job is warned, and saves."""
_KEY = re.compile(r"[a-z][a-z0-9_-]*")
_OWN = {
    "array": "a sweep is one array; --jobs says how many of its jobs run at once",
    "signal": "neq is told when to save; signal_delay_s=SECONDS says how long before the end",
    "open_mode": "logs are appended to",
    "output": "logs lie in the sweep's folder",
    "error": "logs lie in the sweep's folder",
    "chdir": "jobs run where neq sweep is called",
    "wrap": "jobs run neq train",
}
_ONE = ("nodes", "ntasks", "ntasks_per_node")
# SLURM's: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, days-hours:minutes:seconds
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")


@dataclass(frozen=True)
class SlurmOptions:
    """How jobs are submitted; ``others`` are sbatch's long options with underscores, True where one takes no value."""

    minutes: int = DEFAULT_MINUTES
    warning: int = DEFAULT_WARNING  # seconds
    others: Mapping[str, str | bool] = field(default_factory=dict)


def parse_slurm(arguments: Sequence[str]) -> SlurmOptions:
    """Return what ``KEY=VALUE`` texts ask for. RecipeError with all that is wrong with them."""
    problems: list[str] = []
    found: dict[str, str] = {}
    for argument in arguments:
        written, equals, value = argument.partition("=")
        key = written.strip().removeprefix("--").replace("-", "_")
        problem = _problem(key, value.strip()) if equals else _FORM
        if problem is None and key in found:
            problem = "given twice; remove one"
        if problem is not None:
            problems.append(escaped(f"--slurm {argument}: {problem}"))
        found[key] = value.strip()
    if problems:
        raise RecipeError(problems)
    minutes = slurm_minutes(found.pop("time", str(DEFAULT_MINUTES)))
    assert minutes is not None  # of a text that is no time there is a problem
    warning = int(found.pop("signal_delay_s", DEFAULT_WARNING))
    return SlurmOptions(minutes, warning, {key: value == "true" or value for key, value in found.items()})


def slurm_minutes(text: str) -> int | None:
    """Return a time as SLURM writes it in whole minutes, rounded up as SLURM does, None where it is none or zero."""
    match = _TIME.fullmatch(text)
    if match is None:
        return None
    days = match["days"]
    first, second, third = (int(match[name] or 0) for name in ("first", "second", "third"))
    if days is not None:
        seconds = int(days) * 86400 + first * 3600 + second * 60 + third
    elif match["third"] is not None:
        seconds = first * 3600 + second * 60 + third
    else:
        seconds = first * 60 + second
    return -(-seconds // 60) or None


_FORM = "not KEY=VALUE, such as partition=gpu, time=04:00:00 or gres=gpu:1"


def _problem(key: str, value: str) -> str | None:
    if not _KEY.fullmatch(key) or not value or "\n" in value:
        return _FORM
    if key in _OWN:
        return f"is neq's own: {_OWN[key]}"
    if key in _ONE and value != "1":
        return "a run of a sweep is one process; several for one run are torchrun's, in a script of your own"
    if key == "time" and slurm_minutes(value) is None:
        return "not a time as SLURM has it, such as 30 (minutes), 04:00:00 or 1-12"
    if key == "signal_delay_s" and not (value.isdecimal() and 0 < int(value) < 65536):
        return "not a number of seconds from 1 to 65535"  # what sbatch --signal takes
    return None
