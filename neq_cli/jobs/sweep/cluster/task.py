"""What one job of a cluster does: trains one run in a process of its own, which saves before the job ends.

submitit starts it, passes it the warning of the cluster, and has it queued again. Nothing here has run under SLURM.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

from neq_cli.errors import TrainingError
from neq_cli.jobs.sweep.process import Job
from neq_cli.runs.store.disk import atomic_write
from neq_cli.runs.views.live.sweep_state import SweptRun

_POLL_SECONDS = 0.1
_KILLED_WITHIN = 600.0  # seconds after SIGTERM; SLURM's KillWait is 30 seconds, grace times of preemption are minutes
_ENDED_BY_SIGTERM = (143, -signal.SIGTERM)


@dataclass
class RunTask:
    """Trains a run by ``command``, what it says goes to ``log``, how it ended to ``outcome``; submitit pickles it."""

    name: str
    path: Path
    command: tuple[str, ...]
    log: Path
    outcome: Path
    killed_within: float = _KILLED_WITHIN
    _job: Job | None = field(default=None, init=False)
    _told: bool = field(default=False, init=False)

    def __call__(self) -> None:
        """Return once the run is finished. Raises TrainingError with the reason where it is not."""
        # A job that is preempted, cancelled or out of time gets SIGTERM, and is killed after a while.
        signal.signal(signal.SIGTERM, self._note)
        try:
            with _held_back():
                # The run keeps it held back: SLURM may send the warning to every process of a job, which would kill it.
                self._job = Job(SweptRun(self.name, (), self.path, 1), 0, self.command, self.log, {})
            self._follow(self._job)
            self._write_outcome("")
        except TrainingError as error:
            self._write_outcome(str(error))
            raise

    def checkpoint(self) -> Any:
        """Have the run save and end, and return what is to be done when the job is started again: the same.

        submitit calls it in the handler of the cluster's warning.
        """
        from submitit.helpers import DelayedSubmission

        if self._job is not None:
            if self._job.poll() is None:
                self._job.send("SIGTERM")
            while self._job.poll() is None:
                time.sleep(_POLL_SECONDS)
            self._job.close()
        return DelayedSubmission(replace(self))

    def _follow(self, job: Job) -> None:
        passed_on = False
        while True:
            # Not amid a look at the process, where ``checkpoint`` could not look at it too.
            with _held_back():
                code = job.poll()
            if code is not None:
                break
            if self._told and not passed_on:
                passed_on = True
                job.send("SIGTERM")
            time.sleep(_POLL_SECONDS)
        if code == 0:
            return
        if (self._told or code in _ENDED_BY_SIGTERM) and not job.said_failed():
            # It has saved. A job that ended by itself now would not be queued again, one that SLURM ends is.
            time.sleep(self.killed_within)
            raise TrainingError("ended by SIGTERM; the next call goes on with it")
        raise TrainingError(job.failure())

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._told = True

    def _write_outcome(self, reason: str) -> None:
        from submitit import JobEnvironment

        content = {"job": JobEnvironment().job_id, "failed": bool(reason), "reason": reason}
        atomic_write(self.outcome, (json.dumps(content) + "\n").encode())


@contextmanager
def _held_back() -> Iterator[None]:
    """Hold back the signal by which submitit is warned; it comes when the context ends."""
    from submitit import JobEnvironment

    warning = {getattr(signal, f"SIG{JobEnvironment.USR_SIG}")}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, warning)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
