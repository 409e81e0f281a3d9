"""Starts the process that trains one run of a sweep: command, share of the machine, and a log of bounded length.

Processes at once share the CPU's threads by number and CUDA devices by turns; nothing is pinned.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import PIPE, Popen

from neq_cli.errors import TrainingError
from neq_cli.runs.store.disk import check_own
from neq_cli.runs.views.live.sweep_state import SweptRun, failure_reason
from neq_cli.text import printable

LARGEST_LOG = 2**20  # bytes; of a longer one its end is kept
_KEPT = 2**18
_LAST_WORDS = 2**14  # bytes that are searched for the reason why a process ended
_APPEND = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


def train_command(reference: str, overrides: Sequence[str], run: Path) -> list[str]:
    """Return the command that trains a run, or goes on with it."""
    neq = [sys.executable, "-m", "neq_cli.jobs.sweep.child"]
    return [*neq, "train", reference, *overrides, "-o", str(run), "--resume", "--progress", "plain"]


def cores() -> int:
    """Return the CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cuda_devices(environment: Mapping[str, str]) -> list[str]:
    """Return the names by which CUDA_VISIBLE_DEVICES calls the devices there are; none is initialised."""
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(index) for index in range(count)]


def shared_environment(
    slot: int, jobs: int, device: str, environment: Mapping[str, str], cpus: int, gpus: Sequence[str]
) -> dict[str, str]:
    """Return what to change in ``environment`` for the process in ``slot`` of ``jobs`` at once.

    ``device`` is the recipe's. What the user has set stays, and so does a device with a number.
    """
    changes: dict[str, str] = {}
    if jobs > 1 and not environment.get("OMP_NUM_THREADS"):
        changes["OMP_NUM_THREADS"] = str(max(1, cpus // jobs))
    if jobs > 1 and len(gpus) > 1 and device in ("auto", "cuda"):
        changes["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    return changes


class Job:
    """A process that trains ``run``; ``slot`` counts those at once from 0."""

    def __init__(self, run: SweptRun, slot: int, command: Sequence[str], log: Path, changes: Mapping[str, str]) -> None:
        """Start it, with ``changes`` to the environment. Raises TrainingError where that cannot be done."""
        self.run = run
        self.slot = slot
        self.log = log
        try:
            check_own(log)
            self._log = os.open(log, _APPEND, 0o666)
        except OSError as error:
            raise _not_started(run, error) from error
        self._began_at = os.fstat(self._log).st_size
        try:
            # A session of its own: what is typed on the terminal, such as Ctrl-C, reaches it through the sweep only.
            self._process = Popen(
                command,
                stdin=PIPE,  # which it watches, to end when this process is gone
                stdout=self._log,
                stderr=self._log,
                env={**os.environ, **changes},
                start_new_session=True,
            )
        except OSError as error:
            os.close(self._log)
            raise _not_started(run, error) from error

    def poll(self) -> int | None:
        """Return its exit code, None while it runs; keeps the log short."""
        if os.fstat(self._log).st_size > LARGEST_LOG:
            self._shorten_log()
        return self._process.poll()

    def send(self, name: str) -> None:
        """Send it a signal by name."""
        self._process.send_signal(getattr(signal, name))

    def close(self) -> None:
        """Let go of the process; one that still runs is told to save and end."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            self._process.stdin.close()
            os.close(self._log)

    def failure(self) -> str:
        """Return why it ended, in one line; call once it has, with another code than 0."""
        code = self._process.returncode
        if code < 0:
            return f"killed by {_signal_name(-code)}; the next call goes on with it"
        return self.said_failed() or self._last_words() or f"exit code {code}"

    def said_failed(self) -> str:
        """Return the reason that the run gives for having failed, an empty text where it gives none."""
        return failure_reason(self.run.path, self._process.pid)

    def _last_words(self) -> str:
        size = os.fstat(self._log).st_size
        start = max(self._began_at if self._began_at <= size else 0, size - _LAST_WORDS)
        text = os.pread(self._log, size - start, start).decode(errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        return printable(lines[-1].strip(), 500) if lines else ""

    def _shorten_log(self) -> None:
        """Keep the log's end. The process appends, so that it needs not be told; what it writes meanwhile is lost."""
        size = os.fstat(self._log).st_size
        kept = os.pread(self._log, _KEPT, size - _KEPT).partition(b"\n")[2]
        os.ftruncate(self._log, 0)
        os.write(self._log, b"(earlier lines are removed)\n" + kept)
        self._began_at = 0


def _not_started(run: SweptRun, error: OSError) -> TrainingError:
    reason = printable(error.strerror or error)
    return TrainingError(f"{run.name}: its process cannot be started: {reason}; call again to go on")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
